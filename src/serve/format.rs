//! Answers in OpenAI's JSON format. Layer 9.
//!
//! Invariant: this module only formats; it makes no decisions.

use serde_json::{Map, Value, json};

use super::answer::{Answer, Delta, FinishReason, TokenInfo};
use super::ticket::now;
use super::tools::ToolCall;

/// The common part of all pieces of an answer.
pub(super) struct Head {
    id: String,
    created: u64,
    model: String,
    chat: bool,
    logprobs: bool,
}

/// A choice of a complete answer.
#[derive(Default)]
pub(super) struct WholeChoice {
    text: String,
    calls: Vec<ToolCall>,
    tokens: Vec<TokenInfo>,
    finish: Option<FinishReason>,
}

impl WholeChoice {
    pub fn add(&mut self, delta: Delta) {
        self.text += &delta.text;
        self.calls.extend(delta.calls);
        self.tokens.extend(delta.tokens);
        self.finish = delta.finish.or(self.finish);
    }
}

impl Head {
    pub fn of(answer: &Answer) -> Head {
        let (app, asked) = (&answer.ticket.app, &answer.asked);
        let prefix = if asked.chat { "chatcmpl" } else { "cmpl" };
        Head {
            id: format!("{prefix}-{:x}-{}", app.started, answer.ticket.id),
            created: now(),
            model: app.models[asked.model].name.clone(),
            chat: asked.chat,
            logprobs: asked.logprobs.is_some(),
        }
    }

    fn object(&self, name: &str, choices: Vec<Value>) -> Map<String, Value> {
        let Head { id, created, model, .. } = self;
        let object = json!({
            "id": id, "object": name, "created": created, "model": model, "choices": choices,
        });
        if let Value::Object(map) = object { map } else { Map::new() }
    }

    pub fn whole(&self, answer: &Answer, choices: Vec<WholeChoice>) -> Value {
        let choice = |(i, c): (usize, WholeChoice)| {
            let (logprobs, reason) = (self.logprobs(&c.tokens), reason(c.finish));
            if self.chat {
                let mut message =
                    json!({ "role": "assistant", "content": c.text, "refusal": null });
                if !c.calls.is_empty() {
                    if c.text.is_empty() {
                        message["content"] = Value::Null;
                    }
                    let calls = c.calls.iter().map(|call| call.json(&self.call_id(i, call)));
                    message["tool_calls"] = calls.collect();
                }
                return json!({
                    "index": i, "message": message, "logprobs": logprobs, "finish_reason": reason,
                });
            }
            json!({ "index": i, "text": c.text, "logprobs": logprobs, "finish_reason": reason })
        };
        let choices = choices.into_iter().enumerate().map(choice).collect();
        let name = if self.chat { "chat.completion" } else { "text_completion" };
        let mut whole = self.object(name, choices);
        whole.insert("usage".into(), usage(answer));
        Value::Object(whole)
    }

    /// A unique id for a call.
    fn call_id(&self, choice: usize, call: &ToolCall) -> String {
        format!("call-{}-{choice}-{}", self.id, call.index)
    }

    fn chunk_name(&self) -> &'static str {
        if self.chat { "chat.completion.chunk" } else { "text_completion" }
    }

    /// The first piece of a choice, which names the role. Only for chats.
    pub fn role(&self, choice: usize) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        let choice = json!({
            "index": choice, "delta": delta, "logprobs": null, "finish_reason": null,
        });
        self.chat.then(|| Value::Object(self.object(self.chunk_name(), vec![choice])))
    }

    /// A piece of a stream. None: the piece would be empty.
    pub fn chunk(&self, delta: &Delta) -> Option<Value> {
        let says = !delta.text.is_empty() || !delta.calls.is_empty() || !delta.tokens.is_empty();
        if !says && delta.finish.is_none() {
            return None;
        }
        let logprobs = match delta.tokens.is_empty() {
            true => Value::Null,
            false => self.logprobs(&delta.tokens),
        };
        let reason = delta.finish.map_or(Value::Null, |finish| reason(Some(finish)));
        let (index, text) = (delta.choice, &delta.text);
        let choice = match (self.chat, text.is_empty()) {
            (false, _) => json!({
                "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason,
            }),
            (true, empty) => {
                let mut piece = if empty { json!({}) } else { json!({ "content": text }) };
                if !delta.calls.is_empty() {
                    let calls = delta.calls.iter().map(|call| {
                        let mut json = call.json(&self.call_id(index, call));
                        json["index"] = json!(call.index);
                        json
                    });
                    piece["tool_calls"] = calls.collect();
                }
                json!({
                    "index": index, "delta": piece, "logprobs": logprobs, "finish_reason": reason,
                })
            }
        };
        Some(Value::Object(self.object(self.chunk_name(), vec![choice])))
    }

    /// The last piece of a stream for which usage was requested.
    pub fn usage_chunk(&self, answer: &Answer) -> Value {
        let mut chunk = self.object(self.chunk_name(), Vec::new());
        chunk.insert("usage".into(), usage(answer));
        Value::Object(chunk)
    }

    fn logprobs(&self, tokens: &[TokenInfo]) -> Value {
        match (self.logprobs, self.chat) {
            (false, _) => Value::Null,
            (true, true) => json!({ "content": tokens.iter().map(chat_token).collect::<Vec<_>>() }),
            (true, false) => completion_tokens(tokens),
        }
    }
}

fn chat_token(token: &TokenInfo) -> Value {
    let named = |text: &str, logp: Option<f32>| {
        // A token may be a part of a character, which has no text.
        let bytes = (!text.contains('\u{FFFD}')).then_some(text.as_bytes());
        json!({ "token": text, "logprob": logp, "bytes": bytes })
    };
    let mut value = named(&token.text, token.logp);
    value["top_logprobs"] = token.top.iter().map(|(text, logp)| named(text, Some(*logp))).collect();
    value
}

fn completion_tokens(tokens: &[TokenInfo]) -> Value {
    let top = |token: &TokenInfo| {
        let mut map = Map::new();
        for (text, logp) in &token.top {
            // Several parts of characters may have the same text: the most probable one is kept.
            map.entry(text.clone()).or_insert_with(|| json!(logp));
        }
        if let Some(logp) = token.logp.filter(|_| !map.is_empty()) {
            map.entry(token.text.clone()).or_insert_with(|| json!(logp));
        }
        if map.is_empty() { Value::Null } else { Value::Object(map) }
    };
    json!({
        "tokens": tokens.iter().map(|t| &t.text).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logp).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": tokens.iter().map(|t| t.offset).collect::<Vec<_>>(),
    })
}

fn reason(finish: Option<FinishReason>) -> Value {
    json!(match finish {
        Some(FinishReason::Stop) => "stop",
        Some(FinishReason::ToolCalls) => "tool_calls",
        Some(FinishReason::Length) | None => "length",
    })
}

fn usage(answer: &Answer) -> Value {
    let prompt: usize = answer.asked.prompts.iter().map(|p| p.ids.len()).sum();
    let completion = answer.completion_tokens;
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    })
}
