//! Completions of the user's sample prompts at every evaluation. Layer 8.
//!
//! Invariant: they are greedy and depend only on the weights, so a resumed run writes the same
//! ones; they affect nothing in the run. The memory plan includes their generation.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::autograd::Cx;
use crate::config::{SamplingOptions, TrainingConfig};
use crate::data::chat::ChatTemplate;
use crate::data::read::{FolderSplit, WantedFields, read};
use crate::data::render::Renderer;
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::layout::{ModelConfig, Task};
use crate::observer::Observer;
use crate::observer::output::excerpt;
use crate::rollout::stop::stop_ids;
use crate::rollout::{Completion, Engine, EngineOptions, Request};

/// Most prompts: a person reads the completions.
const MOST: usize = 64;
/// Sequences that are decoded at once.
const AT_ONCE: usize = 8;

/// The prompts of `sample_prompts`.
pub struct Samples {
    /// As given: a text or messages.
    prompts: Vec<Value>,
    requests: Vec<Request>,
    max_new_tokens: usize,
    stop: Vec<u32>,
    tokenizer: Arc<Tokenizer>,
}

impl Samples {
    /// Reads and tokenises the prompts. None: there are none. `conversations`: the training rows
    /// are conversations, so a text is a user's message. Errors name the file and line.
    pub fn of(
        training: &TrainingConfig,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        model: &ModelConfig,
        conversations: bool,
    ) -> Result<Option<Samples>> {
        let options = &training.samples;
        if options.sample_prompts.0.is_empty() {
            return Ok(None);
        }
        if model.task != Task::CausalLm {
            return Err(Error::Config(
                "sample_prompts: this method trains a classifier, which generates no text; leave \
                 it out"
                    .into(),
            ));
        }
        let chat = template.is_some() && conversations;
        let mut rows = Vec::new();
        for (i, given) in options.sample_prompts.0.iter().enumerate() {
            let path = PathBuf::from(given);
            if path.is_file() {
                rows.extend(
                    read(&[path], FolderSplit::Eval, &training.reading, &WantedFields::All)?.rows,
                );
                continue;
            }
            let prompt = match chat {
                true => json!([{ "role": "user", "content": given }]),
                false => json!(given),
            };
            let value = [("prompt".to_string(), prompt)].into_iter().collect();
            rows.push(Row { value, file: Path::new("sample_prompts").into(), line: i + 1 });
        }
        if rows.len() > MOST {
            return Err(Error::Config(format!(
                "sample_prompts has {} prompts; give at most {MOST}: each is completed at every evaluation",
                rows.len()
            )));
        }
        let renderer = Renderer::new(tokenizer, template, model.vocab_size);
        let ids =
            rows.iter().map(|row| Ok(renderer.prompt(row)?.ids)).collect::<Result<Vec<_>>>()?;
        let prompt = |row: &Row| row.get("prompt").cloned().unwrap_or_default();
        Ok(Some(Samples {
            prompts: rows.iter().map(prompt).collect(),
            requests: Request::numbered(ids, 1),
            max_new_tokens: options.sample_max_new_tokens,
            stop: stop_ids(tokenizer, model, &[])?,
            tokenizer: Arc::new(tokenizer.clone()),
        }))
    }

    /// Completes every prompt.
    pub fn complete(&self, cx: &mut Cx, model: &mut Decoder) -> Result<Vec<Completion>> {
        let sampling = SamplingOptions { temperature: 0.0, ..Default::default() }.seeded(0);
        let at_once = self.requests.len().min(AT_ONCE);
        let mut options =
            EngineOptions::new(self.max_new_tokens, sampling, self.stop.clone(), at_once);
        // Each evaluation makes an engine: recording its steps would cost more than it saves.
        options.replay = Some(false);
        let longest = Request::longest(&self.requests) + self.max_new_tokens;
        Engine::new(cx, model, options, longest)?.generate(cx, model, &self.requests)
    }

    /// Completes every prompt, reports the texts to the observer, and returns lines for
    /// completions.jsonl.
    pub fn take(
        &self,
        cx: &mut Cx,
        model: &mut Decoder,
        observer: &dyn Observer,
    ) -> Result<Vec<Value>> {
        let mut lines = Vec::new();
        for (prompt, c) in self.prompts.iter().zip(self.complete(cx, model)?) {
            let text = self.tokenizer.decode(&c.ids, true)?;
            let asked = match prompt {
                Value::String(text) => text.clone(),
                messages => said_last(messages),
            };
            observer.info(&format!("  sample  {} -> {}", excerpt(&asked), excerpt(&text)));
            lines.push(json!({ "prompt": prompt, "completion": text, "by": "sample" }));
        }
        Ok(lines)
    }
}

/// The text of the last message of a conversation.
fn said_last(messages: &Value) -> String {
    let last = messages.as_array().and_then(|all| all.last());
    last.and_then(|m| m["content"].as_str()).unwrap_or_default().to_string()
}
