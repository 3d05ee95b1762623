//! A packed batch: sequences one after the other, no padding. Floor 3.
//!
//! Invariant: all counts are made here, on the host; no kernel's output shape depends on device data. Token ids were
//! checked against the vocabulary.

use std::sync::Arc;

use crate::cx::Cx;
use crate::error::{Error, Result};
use crate::ops::attention::{AttnPlan, Segment};
use crate::ops::embedding::TokenIndex;
use crate::tensor::Tensor;

/// One sequence of a batch: its tokens, and for each whether it is a target (a token whose log-prob counts).
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    pub ids: &'a [u32],
    /// As long as `ids`; the first token is never a target, nothing predicts it. None: all the others are.
    pub target: Option<&'a [bool]>,
}

pub struct Batch {
    pub tokens: TokenIndex,
    /// I32 [n]: position of each row in its own sequence.
    pub positions: Tensor,
    pub plan: Arc<AttnPlan>,
    /// I32 [targets]: the rows that predict a target, in order; and the targets.
    pub target_rows: Tensor,
    pub targets: Tensor,
    /// Rows, and longest sequence.
    pub rows: usize,
    pub longest: usize,
    /// For each sequence, how many targets it has.
    pub targets_of: Vec<usize>,
    pub target_ids: Vec<u32>,
}

impl Batch {
    /// Packs the sequences. Errors: an empty sequence, or a token id that `vocab` does not hold.
    pub fn new(cx: &Cx, sequences: &[Sequence], vocab: usize) -> Result<Batch> {
        let mut ids = Vec::new();
        let mut positions = Vec::new();
        let mut segments = Vec::new();
        let (mut rows, mut targets, mut targets_of) = (Vec::new(), Vec::new(), Vec::new());
        for (s, sequence) in sequences.iter().enumerate() {
            if sequence.ids.is_empty() {
                return Err(Error::op("batch", format!("sequence {s} is empty")));
            }
            if let Some(id) = sequence.ids.iter().find(|id| **id as usize >= vocab) {
                let message =
                    format!("sequence {s} holds token {id}, the vocabulary has {vocab}; is it the model's tokenizer?");
                return Err(Error::op("batch", message));
            }
            let start = ids.len();
            let before = targets.len();
            for i in 1..sequence.ids.len() {
                if sequence.target.is_none_or(|t| t[i]) {
                    rows.push((start + i - 1) as i32);
                    targets.push(sequence.ids[i]);
                }
            }
            targets_of.push(targets.len() - before);
            ids.extend_from_slice(sequence.ids);
            positions.extend(0..sequence.ids.len() as i32);
            segments.push(Segment { start, len: sequence.ids.len(), prefix: None });
        }
        let target_ints: Vec<i32> = targets.iter().map(|t| *t as i32).collect();
        Ok(Batch {
            tokens: TokenIndex::new(cx, &ids)?,
            positions: cx.ints("positions", &positions)?,
            plan: AttnPlan::new(cx, &segments)?,
            target_rows: cx.ints("target rows", &rows)?,
            targets: cx.ints("targets", &target_ints)?,
            rows: ids.len(),
            longest: sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0),
            targets_of,
            target_ids: targets,
        })
    }
}
