//! `temper generate`: sample from a model folder. Layer 9.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::cli::score::input_ids;
use crate::cli::{Where, part_keys, sink};
use crate::config::{self, GenerateConfig};
use crate::data::chat::{ChatTemplate, RenderOptions};
use crate::data::rows::{Row, read_rows};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::folder;
use crate::model::hub::resolve_model;
use crate::model::open::open_model;
use crate::rollout::stop::StopStrings;
use crate::rollout::{Engine, EngineOptions, Finish, Request};

/// Completions for a prompt, or for every row of a file (prompt: string or messages; or input_ids)
#[derive(clap::Args)]
pub struct Args {
    /// model folder, or a hub name in the local cache
    #[arg(long)]
    model: String,
    /// adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// a prompt; the completion is printed
    #[arg(long, conflicts_with = "data")]
    prompt: Option<String>,
    /// wrap --prompt in the model's chat template
    #[arg(long)]
    chat: bool,
    #[arg(long, num_args = 1..)]
    data: Vec<PathBuf>,
    /// JSON lines: the row with completion, completion_ids, logps, finish_reason
    #[arg(long)]
    output: Option<PathBuf>,
    /// sequences decoded at once
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// tokens that go in at once: longer prompts are prefilled in pieces
    #[arg(long, default_value_t = 2048)]
    step_tokens: usize,
    #[command(flatten)]
    on: Where,
    /// key=value: max_new_tokens, temperature (0: greedy), top_k, top_p, min_p, repetition_penalty,
    /// stop (texts), n, seed
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

pub fn run(mut args: Args) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    let mut keys = GenerateConfig::default();
    for note in config::load(&mut [&mut keys], None, &args.keys)? {
        eprintln!("note: {note}");
    }
    let dir = resolve_model(&args.model)?;
    let tokenizer = Arc::new(Tokenizer::load(&dir)?);
    let mut cx = args.on.open()?;
    let mut model = open_model(&cx, &dir, args.adapter.as_deref())?;
    let vocab = model.config.vocab_size;
    let rows = read_rows_or_prompt(&args)?;
    let mut requests = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let prompt = if row.has("input_ids") {
            input_ids(row, vocab)?
        } else {
            prompt_ids(row, &tokenizer)?
        };
        requests.push(Request { prompt, n: keys.n, number: (i * keys.n) as u32 });
    }
    let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0) + keys.max_new_tokens;
    let batch = args.batch.clamp(1, (rows.len() * keys.n).max(1));
    let mut options = engine_options(&keys, &model, &tokenizer, &dir, batch)?;
    options.max_step_tokens = args.step_tokens.max(1);
    let mut engine = Engine::new(&cx, &mut model, options, longest)?;
    let completions = engine.generate(&mut cx, &model, &requests)?;
    let mut out = sink(&args.output)?;
    for completion in completions {
        let text = tokenizer.decode(&completion.ids, true)?;
        let line = if args.prompt.is_some() && args.output.is_none() {
            text
        } else {
            let mut value = rows[completion.request].value.clone();
            value.insert("completion".into(), json!(text));
            value.insert("completion_ids".into(), json!(completion.ids));
            value.insert("logps".into(), json!(completion.logps));
            let reason = if completion.finish == Finish::Stop { "stop" } else { "length" };
            value.insert("finish_reason".into(), json!(reason));
            Value::Object(value).to_string()
        };
        writeln!(out, "{line}")
            .map_err(|e| Error::io(args.output.clone().unwrap_or("stdout".into()), e))?;
    }
    Ok(())
}

/// The keys as an engine takes them, with all that ends a text of this model.
pub(super) fn engine_options(
    keys: &GenerateConfig,
    model: &Decoder,
    tokenizer: &Arc<Tokenizer>,
    dir: &Path,
    batch: usize,
) -> Result<EngineOptions> {
    let sampling = keys.sampling.seeded(keys.seed);
    let mut stop = model.config.eos.clone();
    stop.extend(tokenizer.eos_id());
    if let Some(map) = folder::generation_config(dir)? {
        stop.extend(eos_ids(map.get("eos_token_id")));
    }
    let mut options = EngineOptions::new(keys.max_new_tokens, sampling, stop, batch);
    options.stop_strings = StopStrings::new(&keys.stop, tokenizer);
    Ok(options)
}

fn read_rows_or_prompt(args: &Args) -> Result<Vec<Row>> {
    let Some(prompt) = &args.prompt else {
        if args.data.is_empty() {
            return Err(Error::Config("give --prompt TEXT or --data FILE".into()));
        }
        return read_rows(&args.data);
    };
    let prompt =
        if args.chat { json!([{ "role": "user", "content": prompt }]) } else { json!(prompt) };
    let value = [("prompt".to_string(), prompt)].into_iter().collect();
    Ok(vec![Row { value, file: std::path::Path::new("--prompt").into(), line: 1 }])
}

/// A string as it is, with the tokenizer's own special tokens; messages through the chat template.
pub(super) fn prompt_ids(row: &Row, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    match row.need("prompt")? {
        Value::String(text) => tokenizer.encode(text, true),
        Value::Array(items) => {
            let messages = Value::Array(row.checked_messages("prompt", items)?);
            let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
            let text = ChatTemplate::of(tokenizer)?
                .render(&messages, options)
                .map_err(|e| row.error(e.to_string()))?
                .text;
            tokenizer.encode(&text, false)
        }
        other => Err(row.wrong("prompt", "a string or a list of messages", other)),
    }
}

fn eos_ids(value: Option<&Value>) -> Vec<u32> {
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).map(|i| i as u32).collect(),
        Some(v) => v.as_u64().map(|i| i as u32).into_iter().collect(),
        None => Vec::new(),
    }
}
