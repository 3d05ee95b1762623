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

/// A prompt and what may follow it: completions that share its rows, computed once.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// Not empty.
    pub prompt: &'a [u32],
    /// What follows; `target` is of these tokens, and the first of them can be one.
    pub completions: Vec<Sequence<'a>>,
}

impl Batch {
    /// Packs the sequences. Errors: an empty sequence, or a token id that `vocab` does not hold.
    pub fn new(cx: &Cx, sequences: &[Sequence], vocab: usize) -> Result<Batch> {
        let mut build = Builder::default();
        for sequence in sequences {
            build.segment(sequence.ids, None, 0)?;
            build.targets(&sequence.ids[1..], sequence.target.map(|t| &t[1..]), sequence.ids.len());
        }
        build.finish(cx, vocab)
    }

    /// Packs groups: each prompt but its last token once, then every completion with that token before it, which sees the
    /// prompt and itself. The same log-probs as prompt + completion each on its own, in fewer rows. `targets_of` has one
    /// entry a completion. Errors: as [`Batch::new`], or an empty prompt.
    pub fn grouped(cx: &Cx, groups: &[Group], vocab: usize) -> Result<Batch> {
        let mut build = Builder::default();
        let mut own = Vec::new();
        for group in groups {
            let Some((last, before)) = group.prompt.split_last() else {
                return Err(Error::op("batch", "a prompt is empty; give at least a BOS token"));
            };
            let prefix = match before {
                [] => None,
                _ => Some(build.segment(before, None, 0)?),
            };
            for completion in &group.completions {
                own.clear();
                own.push(*last);
                own.extend_from_slice(completion.ids);
                build.segment(&own, prefix, before.len())?;
                build.targets(completion.ids, completion.target, own.len());
            }
        }
        build.finish(cx, vocab)
    }
}

#[derive(Default)]
struct Builder {
    ids: Vec<u32>,
    positions: Vec<i32>,
    segments: Vec<Segment>,
    rows: Vec<i32>,
    targets: Vec<u32>,
    targets_of: Vec<usize>,
    longest: usize,
}

impl Builder {
    /// Adds rows whose first stands at `position` of its sequence; returns the segment's number.
    fn segment(&mut self, ids: &[u32], prefix: Option<usize>, position: usize) -> Result<usize> {
        if ids.is_empty() {
            return Err(Error::op("batch", format!("sequence {} is empty", self.targets_of.len())));
        }
        self.segments.push(Segment { start: self.ids.len(), len: ids.len(), prefix });
        self.ids.extend_from_slice(ids);
        let end = position + ids.len();
        self.positions.extend(position as i32..end as i32);
        self.longest = self.longest.max(end);
        Ok(self.segments.len() - 1)
    }

    /// The targets of the segment added last, of `len` rows: `tokens` are its rows from the second on.
    fn targets(&mut self, tokens: &[u32], mask: Option<&[bool]>, len: usize) {
        let (start, before) = (self.ids.len() - len, self.targets.len());
        for (i, token) in tokens.iter().enumerate() {
            if mask.is_none_or(|m| m[i]) {
                self.rows.push((start + i) as i32);
                self.targets.push(*token);
            }
        }
        self.targets_of.push(self.targets.len() - before);
    }

    fn finish(self, cx: &Cx, vocab: usize) -> Result<Batch> {
        if let Some(id) = self.ids.iter().find(|id| **id as usize >= vocab) {
            let message = format!("token {id}, the vocabulary has {vocab}; is it the model's tokenizer?");
            return Err(Error::op("batch", message));
        }
        let target_ints: Vec<i32> = self.targets.iter().map(|t| *t as i32).collect();
        Ok(Batch {
            tokens: TokenIndex::new(cx, &self.ids)?,
            positions: cx.ints("positions", &self.positions)?,
            plan: AttnPlan::new(cx, &self.segments)?,
            target_rows: cx.ints("target rows", &self.rows)?,
            targets: cx.ints("targets", &target_ints)?,
            rows: self.ids.len(),
            longest: self.longest,
            targets_of: self.targets_of,
            target_ids: self.targets,
        })
    }
}
