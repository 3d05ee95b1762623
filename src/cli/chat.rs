//! `temper chat`: a conversation with a model over standard input. Layer 9.
//!
//! Invariant: the model reads the whole conversation in its own chat template, as in training.

use std::io::{BufRead, IsTerminal};
use std::path::Path;

use serde_json::{Value, json};

use crate::autograd::Cx;
use crate::cli::args::{ModelArgs, read_keys};
use crate::config::GenerateConfig;
use crate::data::chat::ChatTemplate;
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::observer::output::{self, clean};
use crate::rollout::{Engine, EngineOptions, Request, SampledToken};

/// Talk to a model
///
/// A line in, a reply out. /reset starts a new conversation, /quit ends the command.
#[derive(clap::Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// the system message
    #[arg(long)]
    system: Option<String>,
    /// key=value: max_new_tokens, temperature (0: greedy), top_k, top_p, min_p, repetition_penalty,
    /// stop (texts), seed, tools, chat_template_kwargs
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

pub fn run(args: ChatArgs) -> Result<()> {
    let mut keys = GenerateConfig::default();
    read_keys(&mut [&mut keys], &args.keys)?;
    if keys.n != 1 {
        return Err(Error::Config(format!("n = {}: a chat has one reply; leave n out", keys.n)));
    }
    let text = args.model.text(&keys.template)?;
    let tokenizer = &text.tokenizer;
    ChatTemplate::of(tokenizer)?; // without a template, the error says what to do
    let (mut cx, mut model) = args.model.open()?;
    let renderer = text.renderer(model.config.vocab_size);
    let options = EngineOptions::of(&keys, &model.config, tokenizer, 1)?;
    let start: Vec<Value> =
        args.system.iter().map(|s| json!({ "role": "system", "content": s })).collect();
    let mut messages = start.clone();
    let mut turn = 0;
    let (shows, mut input) = (std::io::stdin().is_terminal(), std::io::stdin().lock());
    loop {
        if shows {
            say("> ")?;
        }
        let mut line = String::new();
        if input.read_line(&mut line).map_err(|e| Error::io("stdin", e))? == 0 {
            return Ok(());
        }
        match line.trim() {
            "" => continue,
            "/quit" => return Ok(()),
            "/reset" => {
                messages.clone_from(&start);
                continue;
            }
            text if is_command(text) => {
                say(&format!(
                    "{text} is not a command: /reset forgets the conversation, /quit ends it\n"
                ))?;
                continue;
            }
            text => messages.push(json!({ "role": "user", "content": text })),
        }
        let value = [("prompt".to_string(), json!(messages))].into_iter().collect();
        let row = Row { value, file: Path::new("stdin").into(), line: turn as usize + 1 };
        let request = Request { prompt: renderer.prompt(&row)?.ids, n: 1, number: turn };
        let reply = reply(&mut cx, &mut model, &options, tokenizer, &request)?;
        messages.push(json!({ "role": "assistant", "content": reply }));
        turn += 1;
    }
}

/// Streams a reply to standard output and returns it.
fn reply(
    cx: &mut Cx,
    model: &mut Decoder,
    options: &EngineOptions,
    tokenizer: &Tokenizer,
    request: &Request,
) -> Result<String> {
    let longest = request.prompt.len() + options.max_new_tokens;
    // Every reply computes the whole conversation again.
    model.begin_run(cx, longest + model.vocab().virtuals)?;
    let mut engine = Engine::new(cx, model, options.clone(), longest)?;
    engine.submit(request)?;
    let mut stream = tokenizer.stream(true);
    let mut all = String::new();
    while engine.has_work() {
        for SampledToken { token, .. } in engine.step(cx, model)?.tokens {
            let text = stream.push(token)?;
            say(&text)?;
            all += &text;
        }
    }
    let rest = stream.finish()?;
    say(&rest)?;
    say("\n")?;
    Ok(all + &rest)
}

/// Whether the text is only `/word`: a path or a sentence goes to the model.
fn is_command(text: &str) -> bool {
    text.strip_prefix('/')
        .is_some_and(|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphabetic()))
}

/// Removes escape sequences from the model's text for a terminal.
fn say(text: &str) -> Result<()> {
    if output::shows_to_a_person() { output::print(clean(text)) } else { output::print(text) }
}
