//! The rows of a step, on the host and on the device, and what they sampled. Layer 6.
//!
//! Invariant: a row of padding changes nothing.

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::Result;
use crate::ops::sample::PendingDraws;
use crate::tensor::Tensor;

/// What a step sampled, on its way to the host.
pub(super) struct Sampled {
    pub draws: PendingDraws,
    /// Slot and serial number of the sequence of each row.
    pub rows: Vec<(usize, u64)>,
}

/// The rows of a step on the host: a column for each array.
#[derive(Default)]
pub(super) struct StepRows {
    /// The token, or -1 - slot: the one that was sampled last in that slot.
    pub(super) given: Vec<i32>,
    pub(super) positions: Vec<i32>,
    /// Row of the page table; -1: padding.
    pub(super) sequences: Vec<i32>,
    /// Row of the cache; -1: nowhere.
    pub(super) slots: Vec<i32>,
    /// Rows that predict.
    pub(super) ends: Vec<i32>,
    /// Number, position in the completion and slot of each row that predicts.
    pub(super) info: Vec<i32>,
    pub(super) sampled: Vec<(usize, u64)>,
    pub(super) longest: usize,
}

/// The rows of a step on the device.
#[derive(Clone)]
pub(super) struct StepArrays {
    pub(super) given: Tensor,
    pub(super) positions: Tensor,
    pub(super) sequences: Tensor,
    pub(super) slots: Tensor,
    /// None: no row predicts.
    pub(super) info: Option<Tensor>,
    /// None: every row predicts.
    pub(super) ends: Option<Tensor>,
    pub(super) longest: usize,
}

impl StepArrays {
    /// The same arrays, for sequences of up to `longest` tokens.
    pub fn reaching(&self, longest: usize) -> StepArrays {
        StepArrays { longest, ..self.clone() }
    }
}

/// Ints of a row that predicts.
pub(super) const ROW_INTS: usize = 7;

impl StepRows {
    pub fn count(&self) -> usize {
        self.given.len()
    }

    pub fn all_predict(&self) -> bool {
        self.ends.len() == self.count()
    }

    /// Rows that change nothing, until there are `n`; all rows predict.
    pub fn pad(&mut self, n: usize) {
        for _ in self.count()..n {
            self.given.push(0);
            self.positions.push(0);
            self.sequences.push(-1);
            self.slots.push(-1);
            self.ends.push(self.ends.len() as i32);
            self.info.extend([-1, 0, 0]);
        }
    }

    /// One upload: to the front of `into`, or to new memory.
    pub fn upload(&self, cx: &Cx, into: Option<&Tensor>) -> Result<StepArrays> {
        let mut all = [&self.given, &self.positions, &self.sequences, &self.slots, &self.info]
            .map(Vec::as_slice)
            .concat();
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
        let ends = if self.all_predict() { None } else { Some(part(self.ends.len())?) };
        let longest = self.longest;
        Ok(StepArrays { given, positions, sequences, slots, info, ends, longest })
    }
}
