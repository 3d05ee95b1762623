//! `temper serve`: serves a model over HTTP. Layer 9.
//!
//! Invariant: once it answers requests, it prints its address and an example.

use std::path::Path;

use crate::cli::args::Where;
use crate::error::{Error, Result};

/// Serve a model, with adapters, over HTTP with OpenAI's API: completions, chat, streams, log-probs
#[derive(clap::Args)]
pub struct ServeArgs {
    /// model folder, or a hub name in the local cache; the same as the first word
    #[arg(long)]
    model: Option<String>,
    /// NAME=DIR: an adapter, which requests select by NAME; may be given several times
    #[arg(long)]
    adapter: Vec<String>,
    /// hold the linear layers in 4 bits (nf4), as load_in_4bit trains on them
    #[arg(long, conflicts_with = "load_in_8bit")]
    load_in_4bit: bool,
    /// hold the linear layers in 8 bits, as load_in_8bit trains on them
    #[arg(long)]
    load_in_8bit: bool,
    #[command(flatten)]
    on: Where,
    /// the model folder, and options as KEY=VALUE or --KEY VALUE: host, port, api_key, served_name,
    /// max_model_len, max_new_tokens, max_sequences, cache_tokens, step_tokens, max_queue,
    /// max_request_bytes, request_timeout, drain_timeout, tools, chat_template_kwargs
    #[arg(value_name = "MODEL|KEY=VALUE")]
    words: Vec<String>,
}

impl ServeArgs {
    /// The model, and the remaining words.
    fn part(&self) -> Result<(String, Vec<String>)> {
        let is_key = |word: &&String| word.contains('=') && !Path::new(word.as_str()).exists();
        let (keys, models): (Vec<&String>, Vec<&String>) = self.words.iter().partition(is_key);
        let models: Vec<&String> = self.model.iter().chain(models).collect();
        match models.as_slice() {
            [model] => Ok((model.to_string(), keys.into_iter().cloned().collect())),
            [] => Err(Error::Config("give a model folder: temper serve DIR".into())),
            several => Err(Error::Config(format!(
                "{} are {} models, and a server takes one; add adapters on it with --adapter \
                 NAME=DIR",
                several.iter().map(|m| m.as_str()).collect::<Vec<_>>().join(" and "),
                several.len()
            ))),
        }
    }
}

#[cfg(not(feature = "serve"))]
pub fn run(args: ServeArgs) -> Result<()> {
    args.part()?;
    Err(Error::Config(
        "this build has no server; build temper with `cargo build --release --features serve`"
            .into(),
    ))
}

#[cfg(feature = "serve")]
pub fn run(args: ServeArgs) -> Result<()> {
    use crate::cli::args::read_keys;
    use crate::config::{PeftConfig, ServeConfig};
    use crate::model::hub::resolve_model;
    use crate::observer::output::{note_line, print_line};
    use crate::serve::{AdapterSpec, ServedModels, bind, serve};
    use crate::signals::Stop;
    use crate::train::tuning::scheme;

    let (model, keys) = args.part()?;
    let mut config = ServeConfig::default();
    read_keys(&mut [&mut config], &keys)?;
    if config.api_key.is_none() {
        config.api_key = std::env::var("TEMPER_API_KEY").ok().filter(|key| !key.is_empty());
    }
    let dir = resolve_model(&model)?;
    let listener = bind(&config.host, config.port)?;
    let cx = args.on.open()?;
    let bits = PeftConfig {
        load_in_4bit: args.load_in_4bit,
        load_in_8bit: args.load_in_8bit,
        ..PeftConfig::default()
    };
    let adapters: Vec<AdapterSpec> = args.adapter.iter().map(|a| AdapterSpec::parse(a)).collect();
    let models = ServedModels::open(&cx, (&model, &dir), &adapters, scheme(&bits), &config)?;
    let names: Vec<String> = models.names().map(String::from).collect();
    let cache = models.cache_bytes(&config, cx.dtype.size()) as f64 / f64::from(1 << 20);
    note_line(format_args!("models: {}; key-value cache: {cache:.0} MiB each", names.join(", ")));
    if config.api_key.is_none() && !is_local(&config.host) {
        note_line(format_args!(
            "note: every machine that reaches {} can use this server; set TEMPER_API_KEY to \
             require a key",
            config.host
        ));
    }
    let key =
        config.api_key.as_ref().map_or("", |_| " -H \"Authorization: Bearer $TEMPER_API_KEY\"");
    let stop = Stop::on_signals()?;
    let name = names.first().cloned().unwrap_or_default();
    serve(cx, models, listener, config, stop, |address| {
        let body = serde_json::json!({ "model": name, "prompt": "Hello", "max_tokens": 16 });
        print_line(format_args!("listening on http://{address}/v1"))?;
        print_line(format_args!(
            "try: curl http://{address}/v1/completions{key} -H \"Content-Type: application/json\" -d '{body}'"
        ))
    })
}

#[cfg(feature = "serve")]
fn is_local(host: &str) -> bool {
    host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}
