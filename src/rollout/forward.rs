//! The device side of a step: uploads its rows, runs the decoder over the cache, samples tokens.
//! Layer 6.
//!
//! Invariant: everything that changes from step to step is data on the device.

use super::Engine;
use super::record::DecodeStep;
use super::rows::{GroupDraws, SampleGroup, Sampled, StepArrays, StepRows};
use crate::autograd::Cx;
use crate::device::DType;
use crate::error::Result;
use crate::model::decoder::Decoder;
use crate::model::kv::KvStep;
use crate::ops::embedding::{TokenIndex, gather_rows};
use crate::ops::sample::sample_rows;
use crate::ops::tokens::{keep_tokens, take_tokens};

impl Engine {
    /// Queues a step. False: it sampled nothing.
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
                draws.iter().map(GroupDraws::begin_download).collect::<Result<Vec<_>>>()?
            }
            Some(mut recorder) => {
                let sampling = rows.one_sampling().filter(|_| rows.all_predict()).cloned();
                let draws = if let Some(sampling) = &sampling {
                    let step = DecodeStep {
                        forward: &|cx: &mut Cx, arrays: &StepArrays| {
                            self.forward(cx, model, arrays)
                        },
                        model,
                        sampling,
                        most_rows: self.options.max_sequences,
                        longest: self.longest + self.vocab.virtuals,
                    };
                    recorder.decode(cx, &step, &mut rows).map(|draws| vec![draws])
                } else {
                    recorder.in_its_memory(cx, |cx| {
                        let arrays = rows.upload(cx, None)?;
                        let draws = self.forward(cx, model, &arrays)?;
                        draws.iter().map(GroupDraws::begin_download).collect()
                    })
                };
                self.counts.replayed = recorder.replayed;
                self.recorder = Some(recorder);
                draws?
            }
        };
        let any = !draws.is_empty();
        if any {
            self.in_flight.push_back(Sampled { draws, rows: rows.sampled });
        }
        Ok(any)
    }

    /// The rows of a step: `scheduled[i]` tokens of running sequence `i`. From here on they count
    /// as cached.
    fn rows(&mut self, scheduled: &[usize]) -> Result<StepRows> {
        let mut rows = StepRows::default();
        for i in self.sampled_alike() {
            let (s, take) = (&mut self.running[i], &scheduled[i]);
            if *take == 0 {
                continue;
            }
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
                let group = SampleGroup {
                    rows: 1,
                    sampling: s.options.sampling.clone(),
                    logits: s.options.top_logprobs > 0,
                };
                match rows.groups.last_mut().filter(|last| last.has(&group)) {
                    Some(last) => last.rows += 1,
                    None => rows.groups.push(group),
                }
                s.pending += 1;
            }
        }
        Ok(rows)
    }

    /// Indices of the running sequences, with those that share sampling options side by side.
    fn sampled_alike(&self) -> Vec<usize> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (i, s) in self.running.iter().enumerate() {
            let like =
                |group: &&mut Vec<usize>| self.running[group[0]].options.samples_like(&s.options);
            match groups.iter_mut().find(like) {
                Some(group) => group.push(i),
                None => groups.push(vec![i]),
            }
        }
        groups.concat()
    }

    /// The work of a step. It only launches, and its launches do not depend on the contents of the
    /// arrays.
    fn forward(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        arrays: &StepArrays,
    ) -> Result<Vec<GroupDraws>> {
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
            // A row that predicts is the last of its sequence.
            decodes: arrays.info.is_some() && arrays.ends.is_none(),
        };
        let mut hidden = model.cached(cx, &self.cache, &step)?;
        let Some(info) = &arrays.info else { return Ok(Vec::new()) };
        if let Some(ends) = &arrays.ends {
            hidden = gather_rows(cx, &hidden, ends)?;
        }
        let plain = arrays.groups.iter().any(|(group, _)| group.sampling.is_plain());
        let rows = model.rows_to_sample(cx, &hidden, plain)?;
        let seen = self.seen.as_ref();
        let ints = info.numel() / hidden.row_count();
        let (mut all, mut first) = (Vec::new(), 0);
        for (group, seed) in &arrays.groups {
            let last = first + group.rows;
            let own = rows.rows(first, last)?;
            let info = info.view(4 * first * ints, DType::I32, &[group.rows * ints])?;
            let draws = sample_rows(cx, &group.sampling, &own, &info, seed, seen)?;
            if let Some(latest) = &self.latest {
                keep_tokens(cx, &draws.tokens()?, &info, latest)?;
            }
            all.push(GroupDraws { draws, logits: group.logits.then_some(own.logits) });
            first = last;
        }
        Ok(all)
    }
}
