//! The completions of a generation, and which optimizer step trains on which of them. Layer 7.
//!
//! Invariant: which completions a micro-batch has is a function of its number and the step's; a
//! checkpoint holds the buffer, so a resumed run trains on the same completions.

use std::path::Path;

use super::rollout::{StateReader, StateWriter, StoredRollout};
use crate::config::TrainingConfig;
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::{Metric, StateFiles};

const STATE: &str = "rollouts.bin";

/// How generations are divided among micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct RolloutSchedule {
    /// Completions per micro-batch.
    pub batch: usize,
    /// Micro-batches per optimizer step.
    pub accumulation: usize,
    /// Micro-batches per pass over a generation, and passes.
    pub micro_batches: usize,
    pub passes: usize,
    /// Completions per prompt.
    pub group: usize,
    /// Prompts in the data.
    pub prompts: usize,
}

/// The position of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RolloutSlot {
    pub generation: u64,
    pub pass: usize,
    /// Within the pass.
    pub micro: usize,
    /// Whether it is the first that uses the generation.
    pub first: bool,
}

impl RolloutSchedule {
    /// Errors if groups do not divide a generation, or if the data has too few prompts for one.
    pub fn new(
        training: &TrainingConfig,
        micro_batches: usize,
        passes: usize,
        group: usize,
        prompts: usize,
    ) -> Result<RolloutSchedule> {
        let batch = training.per_device_train_batch_size;
        let accumulation = training.gradient_accumulation_steps;
        let schedule =
            RolloutSchedule { batch, accumulation, micro_batches, passes, group, prompts };
        let size = schedule.size();
        if !size.is_multiple_of(group) {
            return Err(Error::Config(format!(
                "a generation has {size} completions (per_device_train_batch_size = {batch} x \
                 {micro_batches} micro-batches), which num_generations = {group} does not divide; \
                 change one of them"
            )));
        }
        if prompts < schedule.prompts_per_generation() {
            let needed = schedule.prompts_per_generation();
            return Err(Error::Config(format!(
                "a generation needs {needed} prompts, but the data has {prompts}; give more \
                 rows, or a smaller per_device_train_batch_size"
            )));
        }
        Ok(schedule)
    }

    /// Completions per generation.
    pub fn size(&self) -> usize {
        self.batch * self.micro_batches
    }

    pub fn prompts_per_generation(&self) -> usize {
        self.size() / self.group
    }

    /// Micro-batches that use one generation.
    fn served(&self) -> usize {
        self.micro_batches * self.passes
    }

    /// Whole generations per epoch, at least one.
    fn generations(&self) -> usize {
        (self.prompts / self.prompts_per_generation()).max(1)
    }

    /// Micro-batches per epoch.
    pub fn epoch(&self) -> usize {
        self.generations() * self.served()
    }

    /// The position of micro-batch `k` of the epoch that contains optimizer step `step`.
    pub fn slot(&self, step: u64, k: usize) -> RolloutSlot {
        let epoch = step / self.epoch().div_ceil(self.accumulation) as u64;
        let within = k % self.served();
        RolloutSlot {
            generation: epoch * self.generations() as u64 + (k / self.served()) as u64,
            pass: within / self.micro_batches,
            micro: within % self.micro_batches,
            first: within == 0,
        }
    }

    /// The positions of the micro-batches of optimizer step `step`, in order, grouped by pass and
    /// generation.
    pub fn spans(&self, step: u64, micro: &[&[usize]]) -> Vec<Vec<RolloutSlot>> {
        let numbers = micro.iter().copied().flatten();
        let slots: Vec<RolloutSlot> = numbers.map(|k| self.slot(step, *k)).collect();
        let pass = |s: &RolloutSlot| (s.generation, s.pass);
        slots.chunk_by(|a, b| pass(a) == pass(b)).map(<[RolloutSlot]>::to_vec).collect()
    }

    /// Whether each step uses all groups of a generation.
    pub fn whole_groups(&self) -> bool {
        self.accumulation.is_multiple_of(self.micro_batches)
    }
}

/// The samples of the current generation.
pub struct RolloutBuffer<S> {
    generation: Option<u64>,
    pub samples: Vec<S>,
    /// Metrics of the generation, for the step that generated it.
    pub pending: Vec<Metric>,
}

impl<S> Default for RolloutBuffer<S> {
    fn default() -> Self {
        RolloutBuffer { generation: None, samples: Vec::new(), pending: Vec::new() }
    }
}

impl<S> RolloutBuffer<S> {
    /// Whether the generation of `slot` must be generated now. Error if it should already exist.
    pub fn is_due(&self, slot: &RolloutSlot) -> Result<bool> {
        if self.generation == Some(slot.generation) {
            return Ok(false);
        }
        if !slot.first {
            let g = slot.generation;
            return Err(Error::Run(format!(
                "the completions of generation {g} are missing; resume from an earlier checkpoint"
            )));
        }
        Ok(true)
    }

    pub fn replace(&mut self, generation: u64, samples: Vec<S>) {
        (self.generation, self.samples) = (Some(generation), samples);
    }
}

impl<S: StoredRollout> RolloutBuffer<S> {
    /// The buffer as a file of a checkpoint; `more` adds a method's other state.
    pub fn state(&self, more: impl FnOnce(&mut StateWriter) -> Result<()>) -> Result<StateFiles> {
        let mut out = StateWriter::default();
        out.word(self.generation.unwrap_or(u64::MAX));
        out.word(self.samples.len() as u64);
        self.samples.iter().for_each(|s| s.write(&mut out));
        more(&mut out)?;
        Ok(vec![(STATE.into(), out.0)])
    }

    /// Reads [`RolloutBuffer::state`] back; `more` returns None if the file ends too early. Errors
    /// if samples refer to prompts beyond `prompts`, or their number is not a generation's `size`.
    pub fn restore(
        &mut self,
        dir: &Path,
        (prompts, size): (usize, usize),
        more: impl FnOnce(&mut StateReader) -> Result<Option<()>>,
    ) -> Result<()> {
        let path = dir.join(STATE);
        let data = fsio::read(&path)?;
        let mut from = StateReader(&data);
        let read = |from: &mut StateReader| {
            let (generation, n) = (from.word()?, from.word()?);
            let samples = (0..n).map(|_| S::read(from)).collect::<Option<Vec<S>>>()?;
            Some(((generation != u64::MAX).then_some(generation), samples))
        };
        let cut = || Error::checkpoint(&path, "is truncated");
        let (generation, samples) = read(&mut from).ok_or_else(cut)?;
        let whole = samples.len() == if generation.is_some() { size } else { 0 };
        if !whole || !samples.iter().all(|s| s.fits(prompts)) {
            let message = "does not fit this run: it has a completion of a prompt that is not in the data, or a different number of completions";
            return Err(Error::checkpoint(&path, message));
        }
        (self.generation, self.samples) = (generation, samples);
        more(&mut from)?.ok_or_else(cut)
    }
}
