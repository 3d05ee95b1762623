//! Rewards that the program computes itself. Layer 6.
//!
//! Invariant: a function sees one completion at a time, with its prompt and the columns of its row.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::batch::RewardBatch;

/// One completion, as a [`RewardFunction`] sees it.
#[deny(missing_docs)]
#[derive(Clone, Copy)]
pub struct RewardRow<'a> {
    batch: &'a RewardBatch,
    row: usize,
}

#[deny(missing_docs)]
impl RewardRow<'_> {
    /// A string, or a list of messages.
    pub fn prompt(&self) -> &Value {
        &self.batch.prompts[self.row]
    }

    /// The completion's text: of a conversation, the last assistant message.
    pub fn text(&self) -> String {
        self.batch.completion_text(self.row)
    }

    /// The completion's tokens.
    pub fn ids(&self) -> &[u32] {
        &self.batch.completion_ids[self.row]
    }

    /// The row's value in another column of the data; `Null` where there is none.
    pub fn column(&self, name: &str) -> &Value {
        self.batch.cell(name, self.row)
    }
}

type ScoreRow = dyn Fn(&RewardRow) -> Option<f64> + Send + Sync;

/// A reward that the program computes itself; clones share the function.
#[derive(Clone)]
pub struct RewardFunction {
    name: String,
    function: Arc<ScoreRow>,
}

#[deny(missing_docs)]
impl RewardFunction {
    /// `function` scores a completion, or gives `None` where it does not apply; metrics call it
    /// `name`.
    pub fn new(
        name: impl Into<String>,
        function: impl Fn(&RewardRow) -> Option<f64> + Send + Sync + 'static,
    ) -> RewardFunction {
        RewardFunction { name: name.into(), function: Arc::new(function) }
    }

    pub(super) fn score(&self, batch: &RewardBatch, row: usize) -> Option<f64> {
        (self.function)(&RewardRow { batch, row })
    }

    /// Its name in metrics.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for RewardFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RewardFunction({})", self.name)
    }
}
