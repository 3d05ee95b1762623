//! The completions for rewards to score. Layer 6.
//!
//! Invariant: every list has one entry per completion.

use serde_json::{Map, Value, json};

use super::text;
use crate::error::{Error, Result};

/// The data from which completions are scored; each list has one entry per completion.
#[derive(Clone, Debug, Default)]
pub struct RewardBatch {
    /// A string, or a list of messages.
    pub prompts: Vec<Value>,
    /// A string, or a list of messages.
    pub completions: Vec<Value>,
    pub completion_ids: Vec<Vec<u32>>,
    /// The other columns of the dataset, repeated for each completion of a prompt.
    pub columns: Map<String, Value>,
}

/// A completion in the form of its prompt: a text, or a list with an assistant message.
pub fn said(prompt: &Value, text: &str) -> Value {
    match prompt {
        Value::Array(_) => json!([{ "role": "assistant", "content": text }]),
        _ => json!(text),
    }
}

impl RewardBatch {
    /// An empty batch with these columns. A column that a row does not have is null in that row.
    pub fn with_columns(names: &[String]) -> RewardBatch {
        let columns = names.iter().map(|name| (name.clone(), Value::Array(Vec::new()))).collect();
        RewardBatch { columns, ..RewardBatch::default() }
    }

    pub fn len(&self) -> usize {
        self.completions.len()
    }

    /// Adds a completion in the form of its prompt. `columns` are the other fields of the row; a
    /// field that only some rows have is null in the others.
    pub fn push<'a>(
        &mut self,
        prompt: &Value,
        columns: impl Iterator<Item = (&'a String, &'a Value)>,
        text: &str,
        ids: Vec<u32>,
    ) {
        let completion = said(prompt, text);
        self.push_whole(prompt, columns, completion, ids);
    }

    /// [`RewardBatch::push`] with the completion in its final form: a text, or messages.
    pub fn push_whole<'a>(
        &mut self,
        prompt: &Value,
        columns: impl Iterator<Item = (&'a String, &'a Value)>,
        completion: Value,
        ids: Vec<u32>,
    ) {
        let n = self.len();
        for (name, cell) in columns {
            let column = self.columns.entry(name.clone()).or_insert_with(|| Value::Array(vec![]));
            if let Value::Array(cells) = column {
                cells.resize(n, Value::Null);
                cells.push(cell.clone());
            }
        }
        for column in self.columns.values_mut() {
            if let Value::Array(cells) = column {
                cells.resize(n + 1, Value::Null);
            }
        }
        self.completions.push(completion);
        self.prompts.push(prompt.clone());
        self.completion_ids.push(ids);
    }

    /// Replaces a completion.
    pub fn replace(&mut self, row: usize, completion: Value, ids: Vec<u32>) {
        (self.completions[row], self.completion_ids[row]) = (completion, ids);
    }

    pub fn is_empty(&self) -> bool {
        self.completions.is_empty()
    }

    /// Error: a list does not have one entry per completion; the message names the list.
    pub fn check(&self) -> Result<()> {
        let n = self.len();
        let mut lengths = vec![("prompts".to_string(), self.prompts.len())];
        lengths.push(("completion_ids".into(), self.completion_ids.len()));
        for (name, column) in &self.columns {
            lengths.push((name.clone(), column.as_array().map_or(0, Vec::len)));
        }
        match lengths.iter().find(|(_, l)| *l != n) {
            Some((name, l)) => {
                Err(Error::Run(format!("rewards: {n} completions, but {name} has {l} entries")))
            }
            None => Ok(()),
        }
    }

    /// A cell of a column; `Null` if there is none.
    pub fn cell(&self, column: &str, row: usize) -> &Value {
        self.columns.get(column).and_then(|c| c.get(row)).unwrap_or(&Value::Null)
    }

    /// The text for a verifier: the string, or the content of the last assistant message.
    pub fn completion_text(&self, row: usize) -> String {
        text::of(&self.completions[row])
    }
}
