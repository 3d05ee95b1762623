//! What gives PPO's values: a model of its own, or a score on the policy's trunk; with its
//! optimizer. Layer 7.
//!
//! Invariant: a value is read at the row that predicts the token.

use super::options::ValueModel;
use crate::autograd::Cx;
use crate::config::TrainingConfig;
use crate::error::{Error, Result};
use crate::methods::online::rollout::{StateReader, StateWriter};
use crate::model::batch::Batch;
use crate::model::decoder::Decoder;
use crate::model::layout::{ParamSpec, Role, Task};
use crate::model::params::ParamSet;
use crate::ops::add::to_float;
use crate::ops::matmul::linear;
use crate::optim::{AdamWConfig, Optimizer};
use crate::tensor::{ParamSetId, Tensor};

pub struct Critic {
    source: ValueSource,
    optimizer: Optimizer,
}

enum ValueSource {
    Own(Box<Decoder>),
    /// The score alone: the trunk is the policy's.
    Shared {
        params: Box<ParamSet>,
        score: Tensor,
    },
}

impl Critic {
    /// A trunk of its own starts as `start`, the reward model where there is one, else the policy's
    /// base with a score of zero. `longest`: tokens of the longest sequence.
    pub fn new(
        cx: &mut Cx,
        policy: &Decoder,
        start: &Decoder,
        kind: ValueModel,
        longest: usize,
        training: &TrainingConfig,
    ) -> Result<Critic> {
        let source = match kind {
            ValueModel::Shared => shared(cx, policy)?,
            ValueModel::Own => ValueSource::Own(Box::new(own(cx, policy, start, longest)?)),
        };
        let optimizer = Optimizer::new(cx, params(&source), AdamWConfig::of(training))?;
        Ok(Critic { source, optimizer })
    }

    /// Whether values come from the policy's trunk.
    pub fn is_shared(&self) -> bool {
        matches!(self.source, ValueSource::Shared { .. })
    }

    /// Values of the batch's targets, F32 `[n]`. `hidden`: the policy's, where its trunk has been
    /// run already.
    pub fn values(
        &self,
        cx: &mut Cx,
        policy: &Decoder,
        batch: &Batch,
        hidden: Option<&Tensor>,
    ) -> Result<Tensor> {
        let scores = match (&self.source, hidden) {
            (ValueSource::Own(trunk), _) => {
                let hidden = trunk.target_hidden(cx, batch)?;
                trunk.scores(cx, &hidden)?
            }
            (ValueSource::Shared { score, .. }, Some(hidden)) => linear(cx, hidden, score, None)?,
            (ValueSource::Shared { score, .. }, None) => {
                let hidden = policy.target_hidden(cx, batch)?;
                linear(cx, &hidden, score, None)?
            }
        };
        let n = scores.numel();
        to_float(cx, &scores)?.reshape(&[n])
    }

    /// Starts a step: gradients are overwritten from here on.
    pub fn reset(&self, cx: &mut Cx) {
        cx.param_grads[params(&self.source).set].reset();
    }

    /// The gradient's norm; the optimizer is ready to apply step `step` (from 1).
    pub fn measure(&self, cx: &mut Cx, learning_rate: f64, step: u64) -> Result<f32> {
        self.optimizer.measure(cx, params(&self.source), learning_rate, step)
    }

    pub fn apply(&self, cx: &Cx) -> Result<()> {
        self.optimizer.apply(cx, params(&self.source))
    }

    pub fn write(&self, out: &mut StateWriter) -> Result<()> {
        for values in self.optimizer.dump(params(&self.source))? {
            out.bytes(&values);
        }
        Ok(())
    }

    /// None: the state ends too early.
    pub fn read(&self, from: &mut StateReader) -> Result<Option<()>> {
        self.optimizer.restore(params(&self.source), &mut || from.bytes())
    }
}

fn params(source: &ValueSource) -> &ParamSet {
    match source {
        ValueSource::Own(trunk) => &trunk.params,
        ValueSource::Shared { params, .. } => params,
    }
}

fn shared(cx: &Cx, policy: &Decoder) -> Result<ValueSource> {
    let shape = vec![1, policy.config.hidden_size];
    let spec = ParamSpec { name: "score.weight".into(), shape, role: Role::Score, layer: None };
    let params = ParamSet::new(cx, ParamSetId::Value, vec![spec])?;
    let score = params.required(None, Role::Score)?;
    Ok(ValueSource::Shared { params: Box::new(params), score })
}

fn own(cx: &Cx, policy: &Decoder, start: &Decoder, longest: usize) -> Result<Decoder> {
    let mut shape = start.config.clone();
    if shape.vocab_size != policy.config.vocab_size {
        let (theirs, ours) = (shape.vocab_size, policy.config.vocab_size);
        return Err(Error::Config(format!(
            "the reward model has a vocabulary of {theirs}, the policy of {ours}: a value model \
             cannot start from it; set value_model=shared"
        )));
    }
    shape.task = Task::SequenceClassification { labels: 1 };
    let trunk = Decoder::builder(shape).set(ParamSetId::Value).positions(longest).build(cx)?;
    for (i, spec) in trunk.params.specs.iter().enumerate() {
        if let Some(at) = start.params.by_name(&spec.name) {
            trunk.params.store(i, &start.params.weight_view(at)?.to_f32()?)?;
        }
    }
    Ok(trunk)
}
