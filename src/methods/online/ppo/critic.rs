//! The source of PPO's values: a separate model, a separate LoRA on the policy's base, or a score
//! on the policy's trunk; and its optimizer. Layer 7.
//!
//! Invariant: a value is read at the row that predicts the token.

use super::options::{PpoConfig, ValueModel};
use crate::autograd::Cx;
use crate::config::{LoraBias, TrainingConfig};
use crate::error::{Error, Result};
use crate::methods::online::rollout::{StateReader, StateWriter};
use crate::model::adapter::Adapter;
use crate::model::adapter::config::{AdapterConfig, AdapterKind, LoraConfig, Targets};
use crate::model::adapter::target::HEAD;
use crate::model::batch::Batch;
use crate::model::decoder::Decoder;
use crate::model::layout::{ModelConfig, Task};
use crate::model::params::ParamSet;
use crate::model::specs::{ParamSpec, Role};
use crate::ops::add::to_float;
use crate::ops::matmul::linear;
use crate::optim::{AdamWConfig, Optimizer};
use crate::rng::seed;
use crate::tensor::{ParamSetId, Tensor};

pub struct Critic {
    source: ValueSource,
    pub optimizer: Optimizer,
}

enum ValueSource {
    /// Separate weights, or a separate adapter on the policy's base.
    Own(Box<Decoder>),
    /// The score alone; the trunk is the policy's.
    Shared { params: Box<ParamSet>, score: Tensor },
}

impl Critic {
    /// A separate trunk is initialised from `start`: the reward model if there is one, otherwise
    /// the policy's base with a zero score. A LoRA always starts from the policy's base with a zero
    /// score. `longest`: tokens of the longest sequence.
    pub fn new(
        cx: &mut Cx,
        policy: &Decoder,
        start: &Decoder,
        options: &PpoConfig,
        longest: usize,
        training: &TrainingConfig,
    ) -> Result<Critic> {
        let source = match options.value_model {
            ValueModel::Shared => shared(cx, policy)?,
            ValueModel::Own => ValueSource::Own(Box::new(own(cx, policy, start, longest)?)),
            ValueModel::Lora => {
                let mut trunk = lora(cx, policy, options, training.seed ^ seed::PPO)?;
                trunk.ensure_positions(cx, longest)?;
                ValueSource::Own(Box::new(trunk))
            }
        };
        let optimizer = Optimizer::new(cx, params(&source), AdamWConfig::of(training))?;
        Ok(Critic { source, optimizer })
    }

    /// The trained parameters.
    pub fn params(&self) -> &ParamSet {
        params(&self.source)
    }

    /// The model that computes the values. None for a score on the policy's trunk.
    pub fn trunk(&self) -> Option<&Decoder> {
        match &self.source {
            ValueSource::Own(trunk) => Some(trunk),
            ValueSource::Shared { .. } => None,
        }
    }

    /// Whether values come from the policy's trunk.
    pub fn is_shared(&self) -> bool {
        matches!(self.source, ValueSource::Shared { .. })
    }

    /// Values of the batch's targets, F32 `[n]`. `hidden` is the policy's, if its trunk has already
    /// run.
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

    /// Starts a step: refreshes what is derived from the parameters (they may come from a
    /// checkpoint), and lets new gradients overwrite the old ones.
    pub fn reset(&self, cx: &mut Cx) -> Result<()> {
        cx.param_grads[params(&self.source).set].reset();
        match &self.source {
            ValueSource::Own(trunk) => trunk.refresh(cx),
            ValueSource::Shared { .. } => Ok(()),
        }
    }

    /// Returns the gradient's norm, and prepares the optimizer to apply step `step` (from 1).
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

    /// None if the state ends too early.
    pub fn read(&self, from: &mut StateReader) -> Result<Option<()>> {
        self.optimizer.restore(params(&self.source), &mut || from.bytes())
    }
}

fn params(source: &ValueSource) -> &ParamSet {
    match source {
        ValueSource::Own(trunk) => trunk.trained(),
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
            "the reward model has a vocabulary of {theirs}, but the policy has {ours}, so a \
             value model cannot start from it; set value_model=shared"
        )));
    }
    shape.task = Task::SequenceClassification { labels: 1 };
    let trunk = Decoder::builder(shape).set(ParamSetId::Value).positions(longest).build(cx)?;
    for (i, spec) in trunk.params.specs.iter().enumerate() {
        if let Some(values) = start.params.values(cx, &spec.name)? {
            trunk.params.store(i, &values)?;
        }
    }
    Ok(trunk)
}

/// The policy's base with a separate LoRA and a zero score.
fn lora(cx: &Cx, policy: &Decoder, options: &PpoConfig, seed: u64) -> Result<Decoder> {
    let Some(adapter) = &policy.adapter else {
        return Err(Error::Config(
            "value_model = lora: its LoRA needs a base that does not change; set use_peft=true, or \
             value_model=own or shared"
                .into(),
        ));
    };
    let task = Task::SequenceClassification { labels: 1 };
    let plain = LoraConfig {
        r: 16,
        alpha: 32.0,
        dropout: 0.0,
        targets: Targets::AllLinear,
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        use_rslora: false,
        use_dora: false,
        bias: LoraBias::None,
        layers: None,
        init: "true".into(),
    };
    let mut kind = match &adapter.config.kind {
        AdapterKind::Lora(c) => LoraConfig {
            dropout: plain.dropout,
            bias: plain.bias,
            init: plain.init.clone(),
            ..c.clone()
        },
        _ => plain,
    };
    if let Some(r) = options.value_lora_r {
        (kind.r, kind.rank_pattern) = (r, Vec::new());
    }
    if let Some(alpha) = options.value_lora_alpha {
        (kind.alpha, kind.alpha_pattern) = (alpha, Vec::new());
    }
    match (&options.value_lora_target_modules, &mut kind.targets) {
        (Some(list), targets) => *targets = Targets::of(list),
        // The policy's head does not exist in the critic.
        (None, Targets::Names(names)) => {
            names.retain(|name| name != HEAD);
            if names.is_empty() {
                kind.targets = Targets::AllLinear;
            }
        }
        (None, _) => {}
    }
    let config = AdapterConfig {
        kind: AdapterKind::Lora(kind),
        modules_to_save: vec!["score".into()],
        tied: false,
        base: adapter.config.base.clone(),
        task: task.peft_name().into(),
        raw: Default::default(),
    };
    let model = ModelConfig { task, ..policy.config.clone() };
    let own = Adapter::in_set(cx, ParamSetId::Value, config, &model, &policy.params, seed)?;
    policy.classifier(task, own)
}
