//! The prompts of a run, and which of them a generation takes. Layer 7.
//!
//! Invariant: the prompts of a generation are a function of (data, seed, generation).

use serde_json::{Map, Value, json};

use crate::config::{SamplingStrategy, TrainingConfig};
use crate::data::bad::BadRows;
use crate::data::format::{Content, unused_template};
use crate::data::order::epoch_order;
use crate::data::render::{RenderedPrompt, Renderer};
use crate::data::rows::Row;
use crate::digest::Digest;
use crate::error::Result;
use crate::methods::offline::rows::Split;
use crate::methods::{MethodInputs, RowPart, RowView};

/// A prompt of the data.
pub struct Prompt {
    pub ids: Vec<u32>,
    /// The prompt in the row's form: a string, or messages.
    pub value: Value,
    /// All other columns.
    pub columns: Map<String, Value>,
    /// `file:line`
    pub source: String,
}

pub struct Prompts {
    pub train: Vec<Prompt>,
    pub eval: Vec<Prompt>,
    order: SamplingStrategy,
    seed: u64,
    /// Rows that were dropped.
    pub bad: BadRows,
    /// See [`unused_template`].
    pub unused_template: Option<&'static str>,
}

impl Prompts {
    /// Reads prompts (`prompt`: a string or messages; other columns go to the rewards).
    pub fn new(training: &TrainingConfig, inputs: &MethodInputs) -> Result<Prompts> {
        let MethodInputs { tokenizer, template, model, .. } = *inputs;
        let renderer = Renderer::new(tokenizer, template, model.vocab_size);
        let mut bad = BadRows::new(inputs.on_bad_row);
        let mut read = |rows: &[Row]| -> Result<Vec<Prompt>> {
            let good = bad.filter(rows, |row| prompt(row, &renderer))?;
            Ok(good.into_iter().map(|(_, prompt)| prompt).collect())
        };
        let (train, eval) = (read(inputs.train)?, read(inputs.eval)?);
        let first = inputs.train.first();
        Ok(Prompts {
            train,
            eval,
            bad,
            unused_template: first.and_then(|row| unused_template(row, template.is_some())),
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

    /// Adds the prompts of a split, with the columns that rewards see.
    pub fn digest(&self, split: Split, digest: &mut Digest) {
        for prompt in self.of(split) {
            digest.ids(&prompt.ids);
            digest.text(&prompt.value.to_string());
            digest.text(&Value::Object(prompt.columns.clone()).to_string());
        }
    }

    /// A training prompt, and the columns that rewards see.
    pub fn view(&self, row: usize) -> RowView {
        let prompt = &self.train[row];
        let columns: Vec<&str> = prompt.columns.keys().map(String::as_str).collect();
        let note = match columns.is_empty() {
            true => String::new(),
            false => format!("columns for the rewards: {}", columns.join(", ")),
        };
        let (ids, mask) = (prompt.ids.clone(), vec![false; prompt.ids.len()]);
        let part = RowPart { name: "prompt", ids, mask };
        RowView { places: vec![prompt.source.clone()], parts: vec![part], note }
    }

    /// Every prompt of the evaluation set.
    pub fn all_eval(&self) -> Vec<usize> {
        (0..self.eval.len()).collect()
    }

    /// Tokens of the longest prompt.
    pub fn longest(&self) -> usize {
        self.train.iter().chain(&self.eval).map(|p| p.ids.len()).max().unwrap_or(1)
    }

    /// The `count` longest prompts of a split: for the memory plan.
    pub fn longest_of(&self, split: Split, count: usize) -> Vec<usize> {
        let all = self.of(split);
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by_key(|p| std::cmp::Reverse(all[*p].ids.len()));
        order.into_iter().cycle().take(count).collect()
    }

    /// The `count` prompts of a generation, in the order of its epoch.
    pub fn of_generation(&self, generation: u64, count: usize) -> Vec<usize> {
        let each = (self.train.len() / count.max(1)).max(1) as u64;
        let (epoch, at) = (generation / each, (generation % each) as usize * count);
        let order = epoch_order(self.order, self.train.len(), self.seed, epoch as u32);
        order.into_iter().cycle().skip(at).take(count).collect()
    }
}

fn prompt(row: &Row, renderer: &Renderer) -> Result<Prompt> {
    let RenderedPrompt { ids, content } = renderer.prompt(row)?;
    let value = match content {
        Content::Text(text) => json!(text),
        Content::Chat(messages) => Value::Array(messages),
    };
    let mut columns = row.value.clone();
    columns.shift_remove("prompt");
    Ok(Prompt { ids, value, columns, source: row.place() })
}
