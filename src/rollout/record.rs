//! Decode steps as graphs: one graph is recorded for each of a few row counts and then replayed.
//! Layer 6.
//!
//! Invariant: a graph is replayed only with the model, the sampling options and the kernels of its
//! recording, and nothing else uses its memory while it exists. So a replayed step has the bits of
//! a launched one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::options::EngineOptions;
use super::rows::{GroupDraws, PendingGroup, ROW_INTS, SEED_INTS, StepArrays, StepRows};
use super::sample::Sampling;
use crate::autograd::Cx;
use crate::config::{AttentionChoice, MatmulChoice};
use crate::device::{DType, Device, Graph, Pool};
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::layout::ModelConfig;
use crate::ops::fastest::padded_rows;
use crate::ops::head::LogitRows;
use crate::tensor::Tensor;

/// The forward of an engine's step on these arrays; returns the draws of each group.
type Forward<'a> = &'a dyn Fn(&mut Cx, &StepArrays) -> Result<Vec<GroupDraws>>;

/// The parts of an engine's decode step.
pub(super) struct DecodeStep<'a> {
    pub forward: Forward<'a>,
    pub model: &'a Decoder,
    pub sampling: &'a Sampling,
    pub most_rows: usize,
    /// Positions of the longest possible sequence.
    pub longest: usize,
}

pub(super) struct Recorder {
    /// The memory of the recorded steps. Steps that are not recorded use it, too, since it is
    /// allocated anyway.
    memory: Arc<Pool>,
    /// I32: the arrays of a decode step, at a fixed address.
    rows: Tensor,
    of: Option<RecordedFor>,
    /// Row counts that have run once, so that everything loaded or chosen at first use is present.
    warm: BTreeSet<usize>,
    steps: BTreeMap<usize, RecordedStep>,
    /// Whether the device failed to record a step; this was reported once.
    refused: bool,
    pub replayed: usize,
}

/// What a graph contains as addresses and scalars. Keeps the memory of the model alive.
struct RecordedFor {
    model: Decoder,
    /// With seed 0: the seed is data on the device.
    sampling: Sampling,
    kernels: (MatmulChoice, AttentionChoice),
}

struct RecordedStep {
    device: Arc<dyn Device>,
    graph: Graph,
    draws: GroupDraws,
}

impl Drop for RecordedStep {
    fn drop(&mut self) {
        self.device.forget(self.graph);
    }
}

impl Recorder {
    pub fn new(cx: &Cx, model: &ModelConfig, options: &EngineOptions) -> Result<Recorder> {
        let memory = Pool::within(&cx.pool, "decode steps");
        // Reserves the memory of the largest step in one block. Grown step by step, the pieces for
        // steps of increasing size would add up.
        let heads = 2 * model.num_heads + 2 * model.num_kv_heads;
        // Of attention, or of a convolution.
        let conv = model.conv_taps().map_or(0, |_| 4 * model.hidden_size);
        let mixer = conv.max(heads * model.head_dim);
        let row = 6 * model.hidden_size + mixer + 3 * model.intermediate_size;
        let bytes = options.max_step_tokens * row * cx.dtype.size()
            + options.max_sequences * LogitRows::bytes_of_row(model.vocab_size);
        drop(memory.alloc("decode steps", bytes)?);
        let ints = [ROW_INTS * options.max_sequences + SEED_INTS];
        Ok(Recorder {
            memory,
            rows: Tensor::new(&cx.pool, "decode rows", DType::I32, &ints)?,
            of: None,
            warm: BTreeSet::new(),
            steps: BTreeMap::new(),
            refused: false,
            replayed: 0,
        })
    }

    /// Runs `work` with its temporaries in the memory of the recorded steps.
    pub fn in_its_memory<T>(&self, cx: &mut Cx, work: impl FnOnce(&mut Cx) -> T) -> T {
        let outer = std::mem::replace(&mut cx.pool, self.memory.clone());
        let result = work(cx);
        cx.pool = outer;
        result
    }

    /// Runs a step whose rows all predict and share their sampling options. The first step with a
    /// padded row count is launched, the second is recorded, and all later ones are replayed.
    pub fn decode(
        &mut self,
        cx: &mut Cx,
        step: &DecodeStep,
        rows: &mut StepRows,
    ) -> Result<PendingGroup> {
        self.keep_if_for(cx, step.model, step.sampling);
        let n = padded_rows(rows.count()).min(step.most_rows);
        rows.pad(n);
        let arrays = rows.upload(cx, Some(&self.rows))?;
        let first = self.warm.insert(n);
        if !first && !self.refused && !self.steps.contains_key(&n) {
            match self.record(cx, step, &arrays).or_else(|e| self.record_late(cx, step, &arrays, e))
            {
                Ok(recorded) => drop(self.steps.insert(n, recorded)),
                Err(e) => {
                    cx.observer.note(&format!("decode steps are not recorded as graphs: {e}"));
                    self.refused = true;
                }
            }
        }
        if let Some(recorded) = self.steps.get(&n) {
            // SAFETY: the clone of the model in `of`, the engine and `memory` own all memory that
            // the graph uses, and `memory` gives none of it to others.
            unsafe { recorded.device.replay(recorded.graph)? };
            self.replayed += 1;
            return recorded.draws.begin_download();
        }
        self.in_its_memory(cx, |cx| draws(cx, step, &arrays)?.begin_download())
    }

    /// The second try, after which no kernel is launched early: a driver may refuse to record such
    /// launches. Error: the first try's, `e`.
    fn record_late(
        &self,
        cx: &mut Cx,
        step: &DecodeStep,
        arrays: &StepArrays,
        e: Error,
    ) -> Result<RecordedStep> {
        let device = cx.device.clone();
        if !device.launch_early(false) {
            return Err(e);
        }
        match self.record(cx, step, arrays) {
            Ok(recorded) => {
                cx.observer.note(&format!(
                    "early launches are off from now on, because recording one failed: {e}"
                ));
                Ok(recorded)
            }
            Err(_) => {
                device.launch_early(true);
                Err(e)
            }
        }
    }

    fn record(&self, cx: &mut Cx, step: &DecodeStep, arrays: &StepArrays) -> Result<RecordedStep> {
        let device = cx.device.clone();
        // A replay may reach any position.
        let arrays = arrays.reaching(step.longest);
        device.begin_capture()?;
        let draws = self.in_its_memory(cx, |cx| draws(cx, step, &arrays));
        let graph = device.end_capture();
        match (draws, graph) {
            (Ok(draws), Ok(graph)) => Ok(RecordedStep { device, graph, draws }),
            (Err(e), Ok(graph)) => {
                device.forget(graph);
                Err(e)
            }
            (_, Err(e)) => Err(e),
        }
    }

    /// Drops the recorded steps if the model, the sampling options or the kernels have changed.
    fn keep_if_for(&mut self, cx: &Cx, model: &Decoder, sampling: &Sampling) {
        let sampling = Sampling { seed: 0, ..sampling.clone() };
        let kernels = (cx.matmul, cx.attention);
        let same = self.of.as_ref().is_some_and(|of| {
            of.model.same_memory(model) && of.sampling == sampling && of.kernels == kernels
        });
        if !same {
            self.steps.clear();
            self.warm.clear();
            self.of = Some(RecordedFor { model: model.clone(), sampling, kernels });
        }
    }
}

fn draws(cx: &mut Cx, step: &DecodeStep, arrays: &StepArrays) -> Result<GroupDraws> {
    let none = || Error::op("rollout", "a decode step that samples nothing");
    (step.forward)(cx, arrays)?.pop().ok_or_else(none)
}
