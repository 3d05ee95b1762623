//! Methods that train on what the policy generates. Layer 7.
//!
//! A step is: generate, score, advantages, update. [`mod@env`] does the first two, a method the
//! third; [`policy`] is the update of a clipped policy loss.
//!
//! Invariant: prompts and sampled tokens are a function of (data, seed, generation) and of the
//! policy's weights; the sampler's log-probs are the trainer's, bit for bit, so there is no
//! old-policy forward.

pub mod advantage;
pub mod buffer;
pub mod chunks;
pub mod env;
pub mod episodes;
pub mod gkd;
pub mod grpo;
mod metrics;
pub mod on_policy_distill;
pub mod online_dpo;
pub mod options;
pub mod policy;
pub mod ppo;
pub mod prompts;
pub mod reinforce;
pub mod rloo;
pub mod rollout;
pub mod sampler;
pub mod scorer;
mod update;
pub mod weights;

use std::path::Path;
use std::time::Instant;

use env::RolloutEnv;
use serde_json::Value;

use crate::autograd::Cx;
use crate::digest::Digest;
use crate::error::Result;
use crate::methods::offline::rows::Split;
use crate::methods::{Method, Metric, RowView, StateFiles, StepReport};
use crate::model::decoder::Decoder;

/// A method over generated completions; [`OnlineMethod`] turns it into a [`Method`].
pub trait OnlineObjective {
    fn env(&self) -> &RolloutEnv;
    fn env_mut(&mut self) -> &mut RolloutEnv;

    /// Whether it needs log-probs under a reference.
    fn wants_reference(&self) -> bool {
        false
    }

    fn longest(&self) -> usize {
        self.env().longest()
    }

    /// Called once the sampler, the reference and the reward model are set up.
    fn attach(&mut self, _cx: &mut Cx, _model: &Decoder) -> Result<()> {
        Ok(())
    }

    /// See [`Method::micro_batches`].
    fn micro_batches(&self) -> Option<usize> {
        None
    }

    /// Optimizer step number `step`; [`OnlineMethod`] adds the time metrics.
    fn step(&mut self, cx: &mut Cx, model: &Decoder, at: StepRows) -> Result<StepReport>;

    fn stepped(&mut self, _cx: &mut Cx) -> Result<()> {
        Ok(())
    }

    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, _batch: usize) -> Result<Vec<Metric>> {
        self.env_mut().evaluate(cx, model)
    }

    /// See [`Method::row_loss`]; `step` is the step that failed.
    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, step: u64, row: usize) -> Result<f32>;

    fn row_source(&self, _step: u64, row: usize) -> String {
        self.env().prompts.train[row].source.clone()
    }

    /// See [`Method::row_view`].
    fn row_view(&self, row: usize) -> RowView {
        self.env().prompts.view(row)
    }

    fn state(&self) -> Result<StateFiles> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _dir: &Path) -> Result<()> {
        Ok(())
    }
}

/// The accessors of an objective whose environment is its field `env`.
macro_rules! env_field {
    () => {
        fn env(&self) -> &RolloutEnv {
            &self.env
        }
        fn env_mut(&mut self) -> &mut RolloutEnv {
            &mut self.env
        }
    };
}
pub(crate) use env_field;

/// The rows of one optimizer step.
#[derive(Clone, Copy)]
pub struct StepRows<'a> {
    /// Number of the step, from 0.
    pub step: u64,
    pub micro: &'a [&'a [usize]],
}

pub struct OnlineMethod<O> {
    pub objective: O,
    step: u64,
}

impl<O> OnlineMethod<O> {
    pub fn new(objective: O) -> OnlineMethod<O> {
        OnlineMethod { objective, step: 0 }
    }
}

impl<O: OnlineObjective> Method for OnlineMethod<O> {
    fn rows(&self) -> usize {
        self.objective.env().prompts.train.len()
    }

    fn eval_rows(&self) -> usize {
        self.objective.env().prompts.eval.len()
    }

    fn longest(&self) -> usize {
        self.objective.longest()
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        let reference = self.objective.wants_reference();
        self.objective.env_mut().attach(cx, model, reference)?;
        self.objective.attach(cx, model)
    }

    fn micro_batches(&self) -> Option<usize> {
        self.objective.micro_batches()
    }

    fn generates(&self) -> bool {
        true
    }

    fn planned_sequences(&self) -> Option<usize> {
        self.objective.env().planned_sequences()
    }

    fn set_sequences(&mut self, n: usize) {
        self.objective.env_mut().sampler.set_sequences(n);
    }

    fn begin(&mut self, number: u64) -> Result<()> {
        self.step = number;
        Ok(())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<StepReport> {
        let begin = Instant::now();
        let rows = StepRows { step: self.step, micro };
        let mut report = self.objective.step(cx, model, rows)?;
        let split = self.objective.env_mut().take_seconds(begin.elapsed().as_secs_f64());
        report.metrics.extend(split);
        Ok(report)
    }

    fn stepped(&mut self, cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        self.objective.stepped(cx)?;
        self.objective.env().reference.stepped(model, done)
    }

    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>> {
        self.objective.evaluate(cx, model, batch)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32> {
        self.objective.row_loss(cx, model, self.step, row)
    }

    fn digest_rows(&self, split: Split, digest: &mut Digest) -> Result<()> {
        self.objective.env().prompts.digest(split, digest);
        Ok(())
    }

    fn row_source(&self, row: usize) -> String {
        self.objective.row_source(self.step, row)
    }

    fn row_view(&self, row: usize) -> Result<RowView> {
        Ok(self.objective.row_view(row))
    }

    fn take_completions(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.objective.env_mut().log)
    }

    fn shown_completions(&mut self) -> Vec<String> {
        std::mem::take(&mut self.objective.env_mut().shown)
    }

    fn state(&self) -> Result<StateFiles> {
        let mut files = self.objective.env().reference.state()?;
        files.extend(self.objective.state()?);
        Ok(files)
    }

    fn restore(&mut self, _cx: &mut Cx, dir: &Path) -> Result<()> {
        self.objective.env().reference.restore(dir)?;
        self.objective.restore(dir)
    }
}
