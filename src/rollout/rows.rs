//! The rows of a step, on the host and on the device, and their sampled tokens. Layer 6.
//!
//! Invariant: a padding row changes nothing.

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::Result;
use crate::ops::sample::{Draws, PendingDraws};
use crate::tensor::{PendingDownload, Tensor};

use super::sample::Sampling;

/// The sampled tokens of a step, on their way to the host.
pub(super) struct Sampled {
    pub draws: Vec<PendingGroup>,
    /// Slot and serial number of each row's sequence, group by group.
    pub rows: Vec<(usize, u64)>,
}

/// Adjacent rows of a step with the same sampling options: one launch samples all of them.
#[derive(Clone)]
pub(super) struct SampleGroup {
    pub rows: usize,
    pub sampling: Sampling,
    /// Whether their logits go to the host, too.
    pub logits: bool,
}

impl SampleGroup {
    /// Whether rows of `other` can join this group.
    pub fn has(&self, other: &SampleGroup) -> bool {
        self.sampling == other.sampling && self.logits == other.logits
    }
}

/// The sampled tokens of a group, on the device.
pub(super) struct GroupDraws {
    pub draws: Draws,
    pub logits: Option<Tensor>,
}

/// The sampled tokens of a group, on their way to the host.
pub(super) struct PendingGroup {
    pub draws: PendingDraws,
    pub logits: Option<PendingDownload>,
}

impl GroupDraws {
    pub fn begin_download(&self) -> Result<PendingGroup> {
        let logits = self.logits.as_ref().map(Tensor::begin_download).transpose()?;
        Ok(PendingGroup { draws: self.draws.begin_download()?, logits })
    }
}

/// The rows of a step on the host, one list per array.
#[derive(Default)]
pub(super) struct StepRows {
    /// The token, or -1 - slot for the last token sampled in that slot.
    pub(super) given: Vec<i32>,
    pub(super) positions: Vec<i32>,
    /// Row of the page table; -1 for padding.
    pub(super) sequences: Vec<i32>,
    /// Row of the cache; -1 to store nothing.
    pub(super) slots: Vec<i32>,
    /// Indices of the rows that predict.
    pub(super) ends: Vec<i32>,
    /// Sequence number, position in the completion and slot of each row that predicts.
    pub(super) info: Vec<i32>,
    pub(super) sampled: Vec<(usize, u64)>,
    /// Groups of the rows that predict, in order.
    pub(super) groups: Vec<SampleGroup>,
    pub(super) longest: usize,
}

/// The rows of a step on the device.
#[derive(Clone)]
pub(super) struct StepArrays {
    pub(super) given: Tensor,
    pub(super) positions: Tensor,
    pub(super) sequences: Tensor,
    pub(super) slots: Tensor,
    /// None if no row predicts.
    pub(super) info: Option<Tensor>,
    /// None if every row predicts.
    pub(super) ends: Option<Tensor>,
    /// Each with its seed, I32 `[2]`.
    pub(super) groups: Vec<(SampleGroup, Tensor)>,
    pub(super) longest: usize,
}

impl StepArrays {
    /// The same arrays with `longest` as the bound on sequence lengths.
    pub fn reaching(&self, longest: usize) -> StepArrays {
        StepArrays { longest, ..self.clone() }
    }
}

/// Ints per row that predicts.
pub(super) const ROW_INTS: usize = 7;
/// Ints per seed.
pub(super) const SEED_INTS: usize = 2;

impl StepRows {
    pub fn count(&self) -> usize {
        self.given.len()
    }

    pub fn all_predict(&self) -> bool {
        self.ends.len() == self.count()
    }

    /// The sampling options, if all rows share them and no logits go to the host.
    pub fn one_sampling(&self) -> Option<&Sampling> {
        match self.groups.as_slice() {
            [group] if !group.logits => Some(&group.sampling),
            _ => None,
        }
    }

    /// Adds padding rows up to `n` rows. All rows predict and are one group.
    pub fn pad(&mut self, n: usize) {
        self.groups.iter_mut().for_each(|group| group.rows += n - self.given.len());
        for _ in self.count()..n {
            self.given.push(0);
            self.positions.push(0);
            self.sequences.push(-1);
            self.slots.push(-1);
            self.ends.push(self.ends.len() as i32);
            self.info.extend([-1, 0, 0]);
        }
    }

    /// Uploads all arrays in one copy: to the start of `into`, or to new memory.
    pub fn upload(&self, cx: &Cx, into: Option<&Tensor>) -> Result<StepArrays> {
        let mut all = [&self.given, &self.positions, &self.sequences, &self.slots, &self.info]
            .map(Vec::as_slice)
            .concat();
        for group in &self.groups {
            let seed = group.sampling.seed;
            all.extend([seed as i32, (seed >> 32) as i32]);
        }
        if !self.all_predict() {
            all.extend(&self.ends);
        }
        let uploaded = match into {
            Some(fixed) => {
                let part = fixed.rows(0, all.len())?;
                part.upload(&all)?;
                part
            }
            None => cx.ints("step", &all)?,
        };
        let mut byte = 0;
        let mut part = |n: usize| {
            let view = uploaded.view(byte, DType::I32, &[n]);
            byte += 4 * n;
            view
        };
        let n = self.count();
        let (given, positions, sequences, slots) = (part(n)?, part(n)?, part(n)?, part(n)?);
        let info = if self.info.is_empty() { None } else { Some(part(self.info.len())?) };
        let seeded = |group: &SampleGroup| Ok((group.clone(), part(SEED_INTS)?));
        let groups = self.groups.iter().map(seeded).collect::<Result<_>>()?;
        let ends = if self.all_predict() { None } else { Some(part(self.ends.len())?) };
        let longest = self.longest;
        Ok(StepArrays { given, positions, sequences, slots, info, ends, groups, longest })
    }
}
