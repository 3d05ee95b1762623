//! The prompts of a run, and which of them a generation takes. Layer 7.
//!
//! Invariant: the prompts of a generation are a function of (data, seed, generation).

use serde_json::{Map, Value, json};

use crate::config::{Sampling, TrainingConfig};
use crate::data::chat::RenderOptions;
use crate::data::order::epoch_order;
use crate::data::rows::Row;
use crate::error::Result;
use crate::methods::MethodInputs;
use crate::methods::offline::rows::Split;

/// A row of the data.
pub struct Prompt {
    pub ids: Vec<u32>,
    /// As the row has it: a string, or messages.
    pub value: Value,
    /// All other columns.
    pub columns: Map<String, Value>,
    /// `file:line`
    pub source: String,
}

pub struct Prompts {
    pub train: Vec<Prompt>,
    pub eval: Vec<Prompt>,
    order: Sampling,
    seed: u64,
}

impl Prompts {
    /// Reads prompts (`prompt`: string or messages; other columns go to the rewards).
    pub fn new(training: &TrainingConfig, inputs: &MethodInputs) -> Result<Prompts> {
        let read = |rows: &[Row]| -> Result<Vec<Prompt>> {
            rows.iter().map(|row| prompt(row, inputs)).collect()
        };
        Ok(Prompts {
            train: read(inputs.train)?,
            eval: read(inputs.eval)?,
            order: training.train_sampling_strategy,
            seed: training.seed,
        })
    }

    pub fn of(&self, split: Split) -> &[Prompt] {
        match split {
            Split::Train => &self.train,
            Split::Eval => &self.eval,
        }
    }

    /// Every prompt of the evaluation set.
    pub fn all_eval(&self) -> Vec<usize> {
        (0..self.eval.len()).collect()
    }

    /// Tokens of the longest prompt.
    pub fn longest(&self) -> usize {
        self.train.iter().chain(&self.eval).map(|p| p.ids.len()).max().unwrap_or(1)
    }

    /// The `count` prompts of a generation, in the order of the epoch that it is in.
    pub fn of_generation(&self, generation: u64, count: usize) -> Vec<usize> {
        let each = (self.train.len() / count.max(1)).max(1) as u64;
        let (epoch, at) = (generation / each, (generation % each) as usize * count);
        let order = epoch_order(self.order, self.train.len(), self.seed, epoch as u32);
        order.into_iter().cycle().skip(at).take(count).collect()
    }
}

fn prompt(row: &Row, inputs: &MethodInputs) -> Result<Prompt> {
    let (ids, value) = match row.need("prompt")? {
        Value::String(text) => (inputs.tokenizer.encode(text, true)?, json!(text)),
        Value::Array(items) => {
            let messages = Value::Array(row.checked_messages("prompt", items)?);
            let Some(template) = inputs.template else {
                return Err(row.error(
                    "is a conversation, and the model has no chat template; set chat_template_path",
                ));
            };
            let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
            let text =
                template.render(&messages, options).map_err(|e| row.error(e.to_string()))?.text;
            (inputs.tokenizer.encode(&text, false)?, messages)
        }
        other => return Err(row.wrong("prompt", "a string or a list of messages", other)),
    };
    let vocab = inputs.model.vocab_size;
    if ids.is_empty() || ids.iter().any(|id| *id as usize >= vocab) {
        return Err(row.error(format!(
            "the prompt has no tokens, or one beyond the model's vocabulary of {vocab}"
        )));
    }
    let columns = row
        .value
        .iter()
        .filter(|(k, _)| *k != "prompt")
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    Ok(Prompt { ids, value, columns, source: format!("{}:{}", row.file.display(), row.line) })
}
