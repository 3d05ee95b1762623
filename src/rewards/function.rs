//! Rewards that are functions of the program. Layer 6.
//!
//! Invariant: a function reads one completion at a time, with its prompt and the columns of its
//! row.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::batch::RewardBatch;

/// One completion, as a [`RewardFunction`] reads it.
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

    /// The text of the completion; for a conversation, the last assistant message.
    pub fn text(&self) -> String {
        self.batch.completion_text(self.row)
    }

    /// The tokens of the completion.
    pub fn ids(&self) -> &[u32] {
        &self.batch.completion_ids[self.row]
    }

    /// The value of the row in another column of the data; `Null` if there is none.
    pub fn column(&self, name: &str) -> &Value {
        self.batch.cell(name, self.row)
    }
}

type ScoreRow = dyn Fn(&RewardRow) -> Option<f64> + Send + Sync;

/// A reward that is a function of the program; clones share the function.
#[derive(Clone)]
pub struct RewardFunction {
    name: String,
    function: Arc<ScoreRow>,
}

#[deny(missing_docs)]
impl RewardFunction {
    /// `function` returns the score of a completion, or `None` if the reward does not apply.
    /// Metrics use the name `name`.
    pub fn new(
        name: impl Into<String>,
        function: impl Fn(&RewardRow) -> Option<f64> + Send + Sync + 'static,
    ) -> RewardFunction {
        RewardFunction { name: name.into(), function: Arc::new(function) }
    }

    pub(super) fn score(&self, batch: &RewardBatch, row: usize) -> Option<f64> {
        (self.function)(&RewardRow { batch, row })
    }

    /// The name in metrics.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for RewardFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RewardFunction({})", self.name)
    }
}
