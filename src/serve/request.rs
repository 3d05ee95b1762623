//! Requests for completions and chats, from JSON fields to token ids. Layer 9.
//!
//! Invariant: a prompt has the same ids as in `temper generate`; a refused request has computed
//! nothing.

use std::path::Path;
use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::names::Served;
use super::tools::{self, arguments_to_objects};
use crate::config::ServeConfig;
use crate::data::rows::Row;
use crate::error::Error;
use crate::rollout::RequestOptions;
use crate::rollout::sample::Sampling;
use crate::rollout::stop::{StopStrings, special_ids};

/// The largest values that a request may have: choices per prompt, stop texts, their bytes, and
/// most probable tokens.
const MOST_CHOICES: i64 = 128;
const MOST_STOPS: usize = 16;
const MOST_STOP_BYTES: usize = 1024;
const MOST_TOP: i64 = 20;
/// OpenAI's default for completions.
const DEFAULT_TOKENS: usize = 16;
/// Fields that have no effect on the answer.
const WITHOUT_EFFECT: [&str; 6] =
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"];

/// A prompt to complete.
pub(super) struct AskedPrompt {
    pub ids: Vec<u32>,
    /// The text as it was given. None: the prompt was given as ids.
    pub text: Option<String>,
}

/// A parsed request.
pub(super) struct Asked {
    pub chat: bool,
    pub model: usize,
    pub prompts: Vec<AskedPrompt>,
    pub n: usize,
    pub options: RequestOptions,
    pub seeded: bool,
    pub stop: Vec<String>,
    /// Whether tool calls in the text are reported as calls.
    pub calls: bool,
    pub echo: bool,
    /// Some: report log-probs, and those of this many of the most probable tokens.
    pub logprobs: Option<usize>,
    pub stream: bool,
    /// Whether the stream ends with token counts.
    pub stream_usage: bool,
}

impl Asked {
    /// The number of completions to generate.
    pub fn choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// Whether tokens must be sent one by one.
    pub fn each_token(&self) -> bool {
        self.stream || self.logprobs.is_some()
    }

    /// Some if prompts are scored: the number of most probable tokens to report.
    pub fn score(&self) -> Option<usize> {
        self.logprobs.filter(|_| self.echo)
    }

    /// Parses the body of a request.
    pub fn parse(
        models: &[Served],
        config: &ServeConfig,
        chat: bool,
        body: &[u8],
    ) -> Result<Asked, ApiError> {
        let mut f = Fields::parse(body)?;
        let model = pick(models, f.text("model")?)?;
        let served = &models[model];
        let n = f.count("n", 1, MOST_CHOICES)?.unwrap_or(1);
        let stream = f.flag("stream")?;
        let mut stream_options = f.object("stream_options")?;
        let usage = stream_options.shift_remove("include_usage");
        if let Some(name) = stream_options.keys().find(|name| *name != "include_obfuscation") {
            let message = format!("`stream_options.{name}` is not supported here; leave it out");
            return Err(ApiError::field("stream_options", message));
        }
        let stop = f.texts("stop")?;
        if stop.len() > MOST_STOPS || stop.iter().any(|s| s.len() > MOST_STOP_BYTES) {
            let message =
                format!("`stop` takes at most {MOST_STOPS} texts of {MOST_STOP_BYTES} bytes");
            return Err(ApiError::field("stop", message));
        }
        let seed = f.seed("seed")?;
        let sampling = sampling(&mut f, seed)?;
        f.only("logit_bias", "{}", |v| v.as_object().is_some_and(Map::is_empty))?;
        f.ignore(&WITHOUT_EFFECT);
        let read = if chat { chat_fields } else { completion_fields };
        let own = read(&mut f, served, n)?;
        f.finish()?;
        let longest = own.prompts.iter().map(|p| p.ids.len()).max().unwrap_or(0);
        let rest = served.longest.saturating_sub(longest);
        let most = config.max_new_tokens.unwrap_or(served.longest);
        let wanted = own.max_tokens.unwrap_or(own.default_tokens).min(usize::MAX / 2);
        let max_new_tokens = match own.max_tokens {
            None => wanted.min(most).min(rest),
            Some(_) => wanted,
        };
        if longest + max_new_tokens > served.longest || (max_new_tokens == 0 && !own.echo) {
            let message = format!(
                "this server allows at most {} tokens, but the prompt has {longest} and {wanted} \
                 more are requested; shorten the prompt, lower max_tokens, or start the server \
                 with a higher max_model_len",
                served.longest,
                wanted = own.max_tokens.map_or("some".to_string(), |n| n.to_string()),
            );
            let field = if chat { "messages" } else { "prompt" };
            return Err(ApiError::field(field, message).code("context_length_exceeded"));
        }
        if max_new_tokens > most {
            let message = format!(
                "`max_tokens` is {max_new_tokens}; this server allows at most {most} (its option \
                 max_new_tokens)"
            );
            return Err(ApiError::field("max_tokens", message));
        }
        let tokenizer = &served.text.tokenizer;
        let mut ends = served.stop.clone();
        ends.extend(special_ids(tokenizer, &stop).map_err(ApiError::internal)?);
        let options = RequestOptions {
            max_new_tokens,
            sampling,
            stop: ends,
            stop_strings: StopStrings::new(&stop, tokenizer),
            top_logprobs: own.logprobs.unwrap_or(0),
            turns: false,
        };
        Ok(Asked {
            chat,
            model,
            prompts: own.prompts,
            n,
            options,
            seeded: seed.is_some(),
            stop,
            calls: own.tools && tools::reads_calls(served),
            echo: own.echo,
            logprobs: own.logprobs,
            stream,
            stream_usage: usage == Some(Value::Bool(true)),
        })
    }
}

/// The fields that completions and chats do not share.
struct OwnFields {
    prompts: Vec<AskedPrompt>,
    max_tokens: Option<usize>,
    default_tokens: usize,
    echo: bool,
    logprobs: Option<usize>,
    /// Whether the prompt lists tools.
    tools: bool,
}

/// The index of the model with this name; the first model without a name.
fn pick(models: &[Served], name: Option<String>) -> Result<usize, ApiError> {
    let Some(name) = name else { return Ok(0) };
    models.iter().position(|served| served.is(&name)).ok_or_else(|| {
        let known: Vec<&str> = models.iter().map(|served| served.name.as_str()).collect();
        let message = format!("no model {name:?} on this server; it has {}", known.join(", "));
        ApiError {
            param: Some("model".into()),
            ..ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found")
        }
    })
}

fn sampling(f: &mut Fields, seed: Option<u64>) -> Result<Sampling, ApiError> {
    let temperature =
        f.number("temperature", "from 0 to 100; 0 is greedy", |t| (0.0..=100.0).contains(&t))?;
    let top_p = f.number("top_p", "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
    let top_k = f.count("top_k", -1, i64::from(i32::MAX))?;
    let min_p = f.number("min_p", "from 0 to 1", |p| (0.0..=1.0).contains(&p))?;
    let penalty =
        f.number("repetition_penalty", "above 0 and at most 100", |p| p > 0.0 && p <= 100.0)?;
    for name in ["frequency_penalty", "presence_penalty"] {
        f.only(name, "0", |v| v.as_f64() == Some(0.0))?;
    }
    let repetition_penalty = penalty.unwrap_or(1.0);
    let temperature = temperature.unwrap_or(1.0);
    // Lower temperatures would overflow when logits are divided by them; sampling is greedy
    // instead.
    if temperature < 1e-4 {
        return Ok(Sampling { repetition_penalty, ..Sampling::greedy() });
    }
    Ok(Sampling {
        temperature,
        top_k: top_k.unwrap_or(0),
        top_p: top_p.unwrap_or(1.0),
        min_p: min_p.unwrap_or(0.0),
        repetition_penalty,
        seed: seed.unwrap_or(0),
    })
}

fn completion_fields(f: &mut Fields, served: &Served, n: usize) -> Result<OwnFields, ApiError> {
    let echo = f.flag("echo")?;
    let max_tokens = f.count("max_tokens", i64::from(!echo), i64::from(i32::MAX))?;
    let logprobs = f.count("logprobs", 0, MOST_TOP)?;
    f.only("best_of", "the value of n", |v| v.as_u64() == Some(n as u64))?;
    f.only("suffix", "\"\"", |v| v.as_str() == Some(""))?;
    let what = "a string, a list of strings, a list of token ids, or a list of such lists";
    let prompts = match f.need("prompt", what)? {
        text @ Value::String(_) => vec![text],
        Value::Array(items) if items.first().is_some_and(Value::is_number) => {
            vec![Value::Array(items)]
        }
        Value::Array(items) if !items.is_empty() => items,
        Value::Array(_) => {
            return Err(ApiError::field(
                "prompt",
                format!("`prompt` is an empty list; give {what}"),
            ));
        }
        other => return Err(wrong("prompt", what, &other)),
    };
    let prompts = prompts.into_iter().enumerate().map(|(i, prompt)| {
        let field = if prompt.is_array() { "input_ids" } else { "prompt" };
        if !prompt.is_string() && !prompt.is_array() {
            return Err(wrong("prompt", what, &prompt));
        }
        let text = prompt.as_str().map(String::from);
        let ids = ids(served, i, [(field.to_string(), prompt)].into_iter().collect(), "prompt")?;
        Ok(AskedPrompt { ids, text })
    });
    let prompts = prompts.collect::<Result<_, _>>()?;
    let default_tokens = DEFAULT_TOKENS;
    Ok(OwnFields { prompts, max_tokens, default_tokens, echo, logprobs, tools: false })
}

fn chat_fields(f: &mut Fields, served: &Served, _n: usize) -> Result<OwnFields, ApiError> {
    let most = i64::from(i32::MAX);
    let new = f.count("max_completion_tokens", 1, most)?;
    let old = f.count("max_tokens", 1, most)?;
    let top = f.count("top_logprobs", 0, MOST_TOP)?;
    let logprobs = match (f.flag("logprobs")?, top) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None) => None,
        (false, Some(_)) => {
            let message = "`top_logprobs` needs `logprobs`: true";
            return Err(ApiError::field("top_logprobs", message));
        }
    };
    f.ignore(&["parallel_tool_calls"]); // calls are reported as the model writes them
    let is = |wanted: Value| move |v: &Value| *v == wanted;
    f.only("response_format", "{\"type\": \"text\"}", is(json!({ "type": "text" })))?;
    f.only("modalities", "[\"text\"]", is(json!(["text"])))?;
    let tools = f.take("tools");
    let choice = f.take("tool_choice");
    let none = choice == Some(json!("none"));
    if let Some(choice) = choice.filter(|c| *c != "auto" && *c != "none") {
        let message = format!(
            "`tool_choice` {choice} is not supported here, because no answer can be forced; send \
             \"auto\" or \"none\""
        );
        return Err(ApiError::field("tool_choice", message).code("unsupported_parameter"));
    }
    let kwargs = f.take("chat_template_kwargs");
    let mut messages = f.need("messages", "a list of messages, each with a role and content")?;
    let Value::Array(list) = &mut messages else {
        return Err(wrong("messages", "a list of messages", &messages));
    };
    list.iter_mut().enumerate().try_for_each(|(i, message)| one_text(i, message))?;
    list.iter_mut().for_each(arguments_to_objects);
    let mut row: Map<String, Value> = [("prompt".to_string(), messages)].into_iter().collect();
    let tools = tools.filter(|_| !none);
    let own = served.text.template.as_ref().and_then(|t| t.setup().tools.as_ref());
    let named = tools.as_ref().or(own).and_then(Value::as_array).is_some_and(|t| !t.is_empty());
    row.extend(tools.map(|tools| ("tools".to_string(), tools)));
    row.extend(kwargs.map(|kwargs| ("chat_template_kwargs".to_string(), kwargs)));
    let ids = ids(served, 0, row, "messages")?;
    Ok(OwnFields {
        prompts: vec![AskedPrompt { ids, text: None }],
        max_tokens: new.or(old),
        default_tokens: usize::MAX,
        echo: false,
        logprobs,
        tools: named && !none,
    })
}

/// Joins the parts of a message's content into one text. Error: a part is not text.
fn one_text(i: usize, message: &mut Value) -> Result<(), ApiError> {
    let Some(content) = message.get_mut("content") else { return Ok(()) };
    let Value::Array(parts) = content else { return Ok(()) };
    let mut all = String::new();
    for part in parts {
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text"), Some(text)) => all += text,
            (kind, _) => {
                let kind = kind.unwrap_or("without a type");
                let message = format!(
                    "`messages[{i}].content` has a part {kind}; this server takes parts of type text"
                );
                return Err(ApiError::field("messages", message));
            }
        }
    }
    *content = Value::String(all);
    Ok(())
}

/// The token ids of a row, computed as in every command.
fn ids(
    served: &Served,
    i: usize,
    value: Map<String, Value>,
    field: &str,
) -> Result<Vec<u32>, ApiError> {
    let row = Row { value, file: Arc::from(Path::new(field)), line: i };
    let ids = match row.has("input_ids") {
        true => row.input_ids(served.vocab),
        false => served.text.renderer(served.vocab).prompt(&row).map(|prompt| prompt.ids),
    };
    ids.map_err(|e| match e {
        Error::Data { message, .. } => {
            let message = message.replace("field \"prompt", &format!("field \"{field}"));
            ApiError::field(field, format!("`{field}`: {message}"))
        }
        other => ApiError::field(field, other),
    })
}
