//! `temper generate`: samples from a model. Layer 9.
//!
//! Invariant: completions come in the order of the prompts, in whatever order they end.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cli::args::{ModelArgs, OutputLines, part_keys, read_data, read_keys};
use crate::cli::parsers::count;
use crate::config::{DataOptions, GenerateConfig};
use crate::data::bad::BadRows;
use crate::data::read::FolderSplit;
use crate::data::rows::Row;
use crate::error::{Error, Result};
use crate::observer::output::{clean, note_line, shows_to_a_person};
use crate::rollout::{Engine, EngineOptions, Finish, Request};

/// Generate completions for a prompt or for every row of a file
///
/// A row of the file has `prompt` (a text or messages) or `input_ids`.
#[derive(clap::Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// a prompt; the completion is printed
    #[arg(long, conflicts_with = "data")]
    prompt: Option<String>,
    /// wrap --prompt in the model's chat template
    #[arg(long)]
    chat: bool,
    /// files of rows, folders of them or patterns (docs/data.md); a row's tools and chat_template_kwargs reach the template
    #[arg(long, num_args = 1..)]
    data: Vec<PathBuf>,
    /// JSON lines: the row with completion, completion_ids, logps, finish_reason
    #[arg(long)]
    output: Option<PathBuf>,
    /// sequences decoded at once
    #[arg(long, default_value_t = 32, value_parser = count)]
    batch: usize,
    /// most tokens in one step; longer prompts are prefilled in pieces
    #[arg(long, default_value_t = 2048, value_parser = count)]
    step_tokens: usize,
    /// key=value: max_new_tokens, temperature (0: greedy), top_k, top_p, min_p, repetition_penalty,
    /// stop (texts), n, seed, tools, chat_template_kwargs
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

pub fn run(mut args: GenerateArgs) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    let mut keys = GenerateConfig::default();
    let mut data = DataOptions::default();
    read_keys(&mut [&mut keys, &mut data], &args.keys)?;
    let text = args.model.text(&keys.template)?;
    let tokenizer = &text.tokenizer;
    let (mut cx, mut model) = args.model.open()?;
    let vocab = model.config.vocab_size;
    let renderer = text.renderer(vocab);
    let all = read_rows_or_prompt(&args, &data)?;
    let ids = |row: &Row| match row.has("input_ids") {
        true => row.input_ids(vocab),
        false => Ok(renderer.prompt(row)?.ids),
    };
    let mut bad = BadRows::new(data.on_bad_row);
    let (rows, prompts): (Vec<&Row>, Vec<_>) = bad.filter(&all, ids)?.into_iter().unzip();
    if bad.count > 0 {
        note_line(format_args!("note: {bad}"));
    }
    let requests = Request::numbered(prompts, keys.n);
    let longest = Request::longest(&requests) + keys.max_new_tokens;
    let batch = args.batch.clamp(1, (rows.len() * keys.n).max(1));
    let mut options = EngineOptions::of(&keys, &model.config, tokenizer, batch)?;
    options.max_step_tokens = args.step_tokens.max(1);
    let mut engine = Engine::new(&cx, &mut model, options, longest)?;
    let completions = engine.generate(&mut cx, &model, &requests)?;
    let mut out = OutputLines::open(&args.output)?;
    for completion in completions {
        let text = tokenizer.decode(&completion.ids, true)?;
        if args.prompt.is_some() && args.output.is_none() {
            let shown = if shows_to_a_person() { clean(&text) } else { text };
            out.write(&shown)?;
            continue;
        }
        let mut value = rows[completion.request].value.clone();
        value.insert("completion".into(), json!(text));
        value.insert("completion_ids".into(), json!(completion.ids));
        value.insert("logps".into(), json!(completion.logps));
        let reason = if completion.finish == Finish::Stop { "stop" } else { "length" };
        value.insert("finish_reason".into(), json!(reason));
        out.write(&Value::Object(value).to_string())?;
    }
    Ok(())
}

fn read_rows_or_prompt(args: &GenerateArgs, data: &DataOptions) -> Result<Vec<Row>> {
    let Some(prompt) = &args.prompt else {
        if args.data.is_empty() {
            return Err(Error::Config("give --prompt TEXT or --data FILE".into()));
        }
        return read_data(&args.data, FolderSplit::Eval, data);
    };
    let prompt =
        if args.chat { json!([{ "role": "user", "content": prompt }]) } else { json!(prompt) };
    let value = [("prompt".to_string(), prompt)].into_iter().collect();
    Ok(vec![Row { value, file: Path::new("--prompt").into(), line: 1 }])
}
