//! A packed batch: concatenated sequences without padding. Layer 5.
//!
//! Invariant: all counts are computed on the host; no kernel's output shape depends on device data.
//! Token ids have been checked against the vocabulary.

use std::sync::Arc;

use crate::autograd::Cx;
use crate::error::{Error, Result};
use crate::ops::attention::{AttnPlan, Segment};
use crate::ops::embedding::TokenIndex;
use crate::tensor::Tensor;

/// One sequence of a batch: its tokens, and for each whether it is a target (a token whose log-prob
/// counts).
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    pub ids: &'a [u32],
    /// Same length as `ids`. The first token can be a target only after a learned prompt, since
    /// otherwise nothing predicts it. None: all but the first are targets.
    pub target: Option<&'a [bool]>,
}

/// The ids that a model accepts: its tokens and, after them, virtual tokens for the rows of a
/// learned prompt, which precedes every sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocab {
    pub tokens: usize,
    /// Number of virtual tokens: 0 without prompt tuning.
    pub virtuals: usize,
}

impl Vocab {
    pub fn total(self) -> usize {
        self.tokens + self.virtuals
    }

    /// Returns `ids` with the prompt before them.
    pub fn prompted(self, ids: &[u32]) -> Vec<u32> {
        (self.tokens as u32..self.total() as u32).chain(ids.iter().copied()).collect()
    }

    fn check(self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|id| **id as usize >= self.tokens) {
            None => Ok(()),
            Some(id) => {
                let message = format!(
                    "token {id} is outside the vocabulary of {}; use the model's own tokenizer",
                    self.tokens
                );
                Err(Error::op("batch", message))
            }
        }
    }
}

/// A model without a prompt.
impl From<usize> for Vocab {
    fn from(tokens: usize) -> Vocab {
        Vocab { tokens, virtuals: 0 }
    }
}

pub struct Batch {
    pub tokens: TokenIndex,
    /// I32 `[n]`: position of each row in its own sequence.
    pub positions: Tensor,
    pub plan: Arc<AttnPlan>,
    /// I32 `[targets]`: the rows that predict a target, in order, and the targets.
    pub target_rows: Tensor,
    pub targets: Tensor,
    /// Number of rows, and length of the longest sequence.
    pub rows: usize,
    pub longest: usize,
    /// Number of targets of each sequence.
    pub targets_of: Vec<usize>,
    pub target_ids: Vec<u32>,
    pub vocab: Vocab,
}

/// A prompt and alternative completions that share its rows, computed once.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// Not empty.
    pub prompt: &'a [u32],
    /// The completions; `target` refers to their own tokens, the first of which can be a target.
    pub completions: Vec<Sequence<'a>>,
}

impl Batch {
    /// Packs the sequences, each after the learned prompt if there is one. `vocab` is the model's.
    /// Errors: an empty sequence, or a token id beyond the vocabulary.
    pub fn new(cx: &Cx, sequences: &[Sequence], vocab: impl Into<Vocab>) -> Result<Batch> {
        let vocab = vocab.into();
        let mut build = Builder::default();
        for sequence in sequences {
            vocab.check(sequence.ids)?;
            if vocab.virtuals > 0 && !sequence.ids.is_empty() {
                build.segment(&vocab.prompted(sequence.ids), None, 0)?;
                match sequence.target {
                    // The prompt's last row predicts the first token, which counts if the mask says
                    // so.
                    Some(mask) => build.targets(sequence.ids, Some(mask), sequence.ids.len() + 1),
                    None => build.targets(&sequence.ids[1..], None, sequence.ids.len()),
                }
                continue;
            }
            build.segment(sequence.ids, None, 0)?;
            build.targets(&sequence.ids[1..], sequence.target.map(|t| &t[1..]), sequence.ids.len());
        }
        build.finish(cx, vocab)
    }

    /// Packs groups: each prompt without its last token once, then every completion preceded by
    /// that token, which attends to the prompt and to itself. Gives the same log-probs as each
    /// prompt with each completion, in fewer rows. `targets_of` has one entry per completion.
    /// Errors: as for [`Batch::new`], or an empty prompt.
    pub fn grouped(cx: &Cx, groups: &[Group], vocab: impl Into<Vocab>) -> Result<Batch> {
        let vocab = vocab.into();
        let mut build = Builder::default();
        let mut own = Vec::new();
        for group in groups {
            vocab.check(group.prompt)?;
            let Some((last, before)) = group.prompt.split_last() else {
                return Err(Error::op("batch", "a prompt is empty; give at least a BOS token"));
            };
            let before = vocab.prompted(before);
            let prefix = match &before[..] {
                [] => None,
                before => Some(build.segment(before, None, 0)?),
            };
            for completion in &group.completions {
                vocab.check(completion.ids)?;
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
    /// Adds rows, the first of which is at `position` in its sequence; returns the segment's index.
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

    /// Adds the targets of the last segment, which has `len` rows: `tokens` are its rows from the
    /// second on.
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

    fn finish(self, cx: &Cx, vocab: Vocab) -> Result<Batch> {
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
            vocab,
        })
    }
}
