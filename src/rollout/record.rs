//! Decode steps as graphs: one recorded for each of a few numbers of rows, then replayed. Layer 6.
//!
//! Invariant: a graph is replayed only for the model, the sampling and the kernels that it was
//! recorded with, and its memory belongs to nobody else for as long as it lives; so a replayed step
//! has the bits of a launched one.

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
use crate::tensor::Tensor;

/// The forward of an engine's step over these arrays: what each group samples.
type Forward<'a> = &'a dyn Fn(&mut Cx, &StepArrays) -> Result<Vec<GroupDraws>>;

/// What an engine's decode step is made of.
pub(super) struct DecodeStep<'a> {
    pub forward: Forward<'a>,
    pub model: &'a Decoder,
    pub sampling: &'a Sampling,
    pub most_rows: usize,
    /// Positions of the longest sequence that there can be.
    pub longest: usize,
}

pub(super) struct Recorder {
    /// What the recorded steps compute lies here. Steps that are not recorded use it too: it is
    /// there.
    memory: Arc<Pool>,
    /// I32: the arrays of a decode step.
    rows: Tensor,
    of: Option<RecordedFor>,
    /// Numbers of rows that have run once: what loads or is chosen at first use is there.
    warm: BTreeSet<usize>,
    steps: BTreeMap<usize, RecordedStep>,
    /// The device could not record a step, and the run was told so.
    refused: bool,
    pub replayed: usize,
}

/// What a graph holds as addresses and scalars. The model's memory lives on with it.
struct RecordedFor {
    model: Decoder,
    /// With seed 0: that one is on the device.
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
        // Room for the largest step in one piece: grown one by one, the pieces of growing steps would
        // add up.
        let heads = 2 * model.num_heads + 2 * model.num_kv_heads;
        // Of attention, or of a convolution.
        let conv = model.conv_taps().map_or(0, |_| 4 * model.hidden_size);
        let mixer = conv.max(heads * model.head_dim);
        let row = 6 * model.hidden_size + mixer + 3 * model.intermediate_size;
        let bytes = options.max_step_tokens * row * cx.dtype.size()
            + options.max_sequences * model.vocab_size * DType::F32.size();
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

    /// A step of rows that all predict and are sampled alike: launched the first time that there are so many, recorded the
    /// second time, replayed from then on.
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
            match self.record(cx, step, &arrays) {
                Ok(recorded) => drop(self.steps.insert(n, recorded)),
                Err(e) => {
                    cx.observer.note(&format!("decode steps are not recorded as graphs: {e}"));
                    self.refused = true;
                }
            }
        }
        if let Some(recorded) = self.steps.get(&n) {
            // SAFETY: the model's clone in `of`, the engine and `memory` hold all that the graph
            // touches, and `memory` gives nothing of it to others.
            unsafe { recorded.device.replay(recorded.graph)? };
            self.replayed += 1;
            return recorded.draws.begin_download();
        }
        self.in_its_memory(cx, |cx| draws(cx, step, &arrays)?.begin_download())
    }

    fn record(&self, cx: &mut Cx, step: &DecodeStep, arrays: &StepArrays) -> Result<RecordedStep> {
        let device = cx.device.clone();
        // A replay may come to any position.
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

    /// Forgets what was recorded for something else.
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
