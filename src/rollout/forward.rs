//! The device side of a step: its rows go up, the decoder runs over the cache, tokens are sampled.
//! Layer 6.
//!
//! Invariant: what changes from step to step is data on the device; a row of padding changes nothing.

use super::Engine;
use crate::autograd::Cx;
use crate::device::DType;
use crate::error::Result;
use crate::model::decoder::Decoder;
use crate::model::kv::KvStep;
use crate::ops::embedding::{TokenIndex, gather_rows};
use crate::ops::sample::{Draws, PendingDraws, sample};
use crate::ops::tokens::{keep_tokens, take_tokens};
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
    given: Vec<i32>,
    positions: Vec<i32>,
    /// Row of the page table; -1: padding.
    sequences: Vec<i32>,
    /// Row of the cache; -1: nowhere.
    slots: Vec<i32>,
    /// Rows that predict.
    ends: Vec<i32>,
    /// Number, position in the completion and slot of each row that predicts.
    info: Vec<i32>,
    sampled: Vec<(usize, u64)>,
    longest: usize,
}

/// The rows of a step on the device.
#[derive(Clone)]
pub(super) struct StepArrays {
    given: Tensor,
    positions: Tensor,
    sequences: Tensor,
    slots: Tensor,
    /// None: no row predicts.
    info: Option<Tensor>,
    /// None: every row predicts.
    ends: Option<Tensor>,
    longest: usize,
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

    fn all_predict(&self) -> bool {
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

impl Engine {
    /// Queues a step; false if it sampled nothing.
    pub(super) fn launch(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        scheduled: &[usize],
    ) -> Result<bool> {
        let mut rows = self.rows(scheduled)?;
        if rows.count() == 0 {
            return Ok(false);
        }
        self.counts.steps += 1;
        self.counts.tokens_in += rows.count();
        self.table.upload()?;
        let draws = match self.recorder.take() {
            None => {
                let arrays = rows.upload(cx, None)?;
                let draws = self.forward(cx, model, &arrays)?;
                draws.map(|d| d.begin_download()).transpose()?
            }
            Some(mut recorder) => {
                let draws = if rows.all_predict() {
                    recorder.decode(self, cx, model, &mut rows).map(Some)
                } else {
                    recorder.in_its_memory(cx, |cx| {
                        let arrays = rows.upload(cx, None)?;
                        let draws = self.forward(cx, model, &arrays)?;
                        draws.map(|d| d.begin_download()).transpose()
                    })
                };
                self.counts.replayed = recorder.replayed;
                self.recorder = Some(recorder);
                draws?
            }
        };
        let sampled = draws.map(|draws| Sampled { draws, rows: rows.sampled });
        let any = sampled.is_some();
        self.in_flight.extend(sampled);
        Ok(any)
    }

    /// The rows of the tokens that go in: of each running sequence as many as `scheduled` says. They
    /// count as cached from here on.
    fn rows(&mut self, scheduled: &[usize]) -> Result<StepRows> {
        let mut rows = StepRows::default();
        for (s, take) in self.running.iter_mut().zip(scheduled).filter(|(_, take)| **take > 0) {
            self.table.set(s.slot, &s.cached.pages);
            for position in s.cached.len..s.cached.len + take {
                let unread = -1 - s.slot as i32;
                rows.given.push(s.tokens.get(position).map_or(unread, |token| *token as i32));
                rows.positions.push(position as i32);
                rows.sequences.push(s.slot as i32);
                rows.slots.push(s.cached.row(position)?);
            }
            s.cached.len += take;
            rows.longest = rows.longest.max(s.cached.len);
            if s.left() == 0 {
                let position = s.completion.ids.len() + s.pending;
                rows.ends.push(rows.count() as i32 - 1);
                rows.info.extend([s.number as i32, position as i32, s.slot as i32]);
                rows.sampled.push((s.slot, s.serial));
                s.pending += 1;
            }
        }
        Ok(rows)
    }

    /// The work of a step, launches only: the same list whatever the arrays hold.
    pub(super) fn forward(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        arrays: &StepArrays,
    ) -> Result<Option<Draws>> {
        let ids = match &self.latest {
            Some(latest) => take_tokens(cx, &arrays.given, latest)?,
            None => arrays.given.clone(),
        };
        let step = KvStep {
            tokens: TokenIndex::for_generation(ids)?,
            positions: arrays.positions.clone(),
            row_sequence: arrays.sequences.clone(),
            slots: arrays.slots.clone(),
            page_table: self.table.pages.clone(),
            longest: arrays.longest,
            vocab: self.vocab.total(),
        };
        let mut hidden = model.cached(cx, &self.cache, &step)?;
        let Some(info) = &arrays.info else { return Ok(None) };
        if let Some(ends) = &arrays.ends {
            hidden = gather_rows(cx, &hidden, ends)?;
        }
        let logits = model.logits(cx, &hidden)?;
        let seen = self.seen.as_ref();
        let draws = sample(cx, &self.options.sampling, &logits, info, &self.seed, seen)?;
        if let Some(latest) = &self.latest {
            keep_tokens(cx, &draws.tokens()?, info, latest)?;
        }
        Ok(Some(draws))
    }

    /// The longest that a sequence gets, virtual tokens included.
    pub(super) fn longest_position(&self) -> usize {
        self.longest + self.vocab.virtuals
    }
}
