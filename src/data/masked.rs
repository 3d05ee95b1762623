//! A sequence with its loss targets, and the truncation that all trainers share. Layer 6.
//!
//! Invariant: ids and mask have the same length, before and after truncation.

use std::fmt;

use super::rows::RowPlace;
use crate::config::TruncationMode;
use crate::error::{Error, Result};

/// Token ids, and which of them are loss targets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MaskedSequence {
    pub input_ids: Vec<u32>,
    /// True at completion tokens. As in TRL, the first token may be marked (if truncation left no
    /// prompt); it has no log-prob, since nothing precedes it, but counts towards the completion's
    /// length.
    pub target_mask: Vec<bool>,
}

impl MaskedSequence {
    /// Joins a prompt and its completion, whose tokens are the targets.
    pub fn new(prompt: &[u32], completion: &[u32]) -> MaskedSequence {
        let target_mask = (0..prompt.len() + completion.len()).map(|i| i >= prompt.len()).collect();
        MaskedSequence { input_ids: [prompt, completion].concat(), target_mask }
    }

    /// Keeps at most `limit` tokens, from the start or the end.
    pub fn cut(&mut self, limit: usize, mode: TruncationMode) {
        let over = self.input_ids.len().saturating_sub(limit);
        if mode == TruncationMode::KeepEnd {
            self.input_ids.drain(..over);
            self.target_mask.drain(..over);
        }
        self.input_ids.truncate(limit);
        self.target_mask.truncate(limit);
    }

    /// Counts the completion tokens that have a log-prob.
    pub fn targets(&self) -> usize {
        self.target_mask.iter().skip(1).filter(|t| **t).count()
    }

    /// Counts the completion tokens, as TRL does for averages.
    pub fn completion_tokens(&self) -> usize {
        self.target_mask.iter().filter(|t| **t).count()
    }
}

/// Length of the common prefix of two lists.
pub(super) fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The error for a run without rows.
pub(super) fn no_rows() -> Error {
    Error::Run("there are no rows to train on".into())
}

/// Checks that `max_length` leaves any tokens.
pub(super) fn check_length(max_length: Option<usize>) -> Result<()> {
    match max_length {
        Some(0) => Err(Error::Config(
            "max_length=0 leaves no tokens; give a length, or none for no limit".into(),
        )),
        _ => Ok(()),
    }
}

/// The error for a row of `n` tokens if `on_truncation` is `error`.
pub(super) fn too_long(row: &RowPlace, n: usize, limit: usize) -> Error {
    row.error(format!(
        "has {n} tokens, more than max_length={limit}; raise max_length, or set on_truncation=truncate or drop"
    ))
}

/// Writes the number of rows in which the prompt alone is tokenised differently from the prompt
/// with its completion. `end`: the part of the first such prompt after the common tokens.
pub(super) fn write_mismatches(
    f: &mut fmt::Formatter,
    rows: usize,
    end: &Option<String>,
) -> fmt::Result {
    let Some(end) = end else { return Ok(()) };
    write!(
        f,
        " In {rows} rows the tokens of the prompt alone are not a prefix of the tokens of prompt \
         and completion, so the model trains on a context that differs from the one it will see. \
         The first such prompt ends in {end:?}. End prompts where a token ends, or use a \
         template that renders a prompt the same way with and without an answer."
    )
}
