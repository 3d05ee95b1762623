//! Proximal policy optimisation with a value model (Schulman et al., 2017; Ziegler et al., arXiv
//! 1909.08593).
//!
//! A rollout is scored at its end; each token's reward is -kl_coef times its KL from the reference
//! (k1: log pi - log ref, or k3), plus the score on the last token. GAE(gamma, lam) over the values
//! gives advantages, which are whitened over the tokens of the generation, and returns, which are
//! advantages plus values. Then num_ppo_epochs passes over the generation, each cut into num_mini_batches
//! optimizer steps: policy loss -min(rho A, clip(rho, 1 +- cliprange) A), value loss max((v - R)^2,
//! (clip(v, v_old +- cliprange_value) - R)^2) / 2, both means over the tokens of the step batch.
//!
//! Formulas and names are those of TRL's PPOTrainer before it left the package. Differs: log-probs
//! of the generation are the sampler's (no second forward); a mean goes over the step batch, not
//! over a micro-batch; the value model has an optimizer and a gradient norm of its own; rows are
//! packed, so what TRL pads is not there.
//!
//! Layer 7. Invariant: a value is read at the row that predicts the token, from the same tokens as
//! the policy's log-prob.

mod critic;
mod generation;

use std::path::Path;

use critic::Critic;
use generation::PpoSample;

use super::advantage::{AdaptiveKl, KlEstimator};
use super::buffer::{RolloutBuffer, RolloutSchedule, RolloutSlot};
use super::env::RolloutEnv;
use super::metrics::sum;
use super::options::OnlineConfig;
use super::rollout::{Rollout, starts_tensor};
use super::{OnlineMethod, OnlineObjective, StepRows};
use crate::autograd::{Cx, Tape};
use crate::config::value::words;
use crate::config::{Report, TrainingConfig, section};
use crate::data::order::permutation;
use crate::error::{Error, Result};
use crate::methods::reference::floats;
use crate::methods::registry::MethodEntry;
use crate::methods::{
    BuildMethod, BuiltMethod, MethodInputs, MethodRun, Metric, StateFiles, StepReport,
};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::ops::policy::{
    ImportanceLevel, PolicyInputs, PolicyLoss, Term, policy_loss, value_loss,
};
use crate::optim::schedule;

pub const METHOD: MethodEntry = MethodEntry::new(
    "ppo",
    "Proximal policy optimisation, with a value model",
    "ppo",
    MethodRun::<PpoConfig>::boxed,
);

words! {
    /// Where PPO's values come from.
    pub enum ValueModel {
        /// A trunk of its own, which starts as the reward model's or the policy's.
        Own = "own",
        /// A score on the policy's last hidden state.
        Shared = "shared",
    }
}

section! {
    /// What TRL's `PPOConfig` was before PPO left the package.
    pub struct PpoConfig = "ppo" {
        /// Passes over a generation.
        pub num_ppo_epochs: usize = 4,
        /// Mini-batches that a pass is cut into, an optimizer step each.
        pub num_mini_batches: usize = 1,
        /// Weight of the KL divergence in the token rewards.
        pub kl_coef: f64 = 0.05,
        /// k1: log pi - log ref; k3: the unbiased one that is never negative.
        pub kl_estimator: KlEstimator = KlEstimator::K1,
        /// Ours (Ziegler et al.). Steer kl_coef so that a sequence's KL is this. none: kl_coef is
        /// fixed.
        pub target_kl: Option<f64> = None,
        /// Ours. Episodes over which a steered kl_coef moves.
        pub kl_horizon: f64 = 10000.0,
        /// The policy's ratio is clipped to 1 +- this.
        pub cliprange: f64 = 0.2,
        /// Weight of the value loss.
        pub vf_coef: f64 = 0.1,
        /// Values may leave those of the generation by this before they are clipped.
        pub cliprange_value: f64 = 0.2,
        /// Discount of later rewards.
        pub gamma: f64 = 1.0,
        /// GAE's lambda.
        pub lam: f64 = 0.95,
        /// Divide token rewards by their standard deviation.
        pub whiten_rewards: bool = false,
        /// Taken off the score of a completion that did not end. none: nothing.
        pub missing_eos_penalty: Option<f64> = None,
        /// Ours. Scores are clipped to +- this. none: they are not.
        pub reward_clip: Option<f64> = None,
        /// Ours. Where values come from: a model of its own, or a score on the policy's trunk.
        pub value_model: ValueModel = ValueModel::Own,
        /// Ours. Learning rate of the value model. none: learning_rate.
        pub value_learning_rate: Option<f64> = None,
        ..pub online: OnlineConfig = default_online(),
    }
}

fn default_online() -> OnlineConfig {
    let mut online =
        OnlineConfig { num_generations: 1, max_completion_length: 53, ..OnlineConfig::default() };
    online.sampling.temperature = 0.7;
    online
}

impl PpoConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("num_ppo_epochs", self.num_ppo_epochs, 1);
        report.at_least("num_mini_batches", self.num_mini_batches, 1);
        for (key, value) in [("gamma", self.gamma), ("lam", self.lam)] {
            report.must((0.0..=1.0).contains(&value), || format!("{key} = {value}: from 0 to 1"));
        }
        report.must(self.cliprange > 0.0, || "cliprange: must be above 0".into());
    }
}

impl BuildMethod for PpoConfig {
    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 3e-6, ..Default::default() }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let env = RolloutEnv::new(&self.online.env(), training, inputs)?;
        let parts = self.num_mini_batches * training.gradient_accumulation_steps;
        let (passes, group) = (self.num_ppo_epochs, self.online.num_generations);
        let schedule =
            RolloutSchedule::new(training, parts, passes, group, env.prompts.train.len())?;
        let summary = self.online.summary(&env);
        let ppo = Ppo {
            env,
            schedule,
            kl: AdaptiveKl {
                coef: self.kl_coef,
                target: self.target_kl.unwrap_or(0.0),
                horizon: self.kl_horizon,
            },
            options: self.clone(),
            training: training.clone(),
            critic: None,
            buffer: RolloutBuffer::default(),
        };
        Ok(BuiltMethod::new(OnlineMethod::new(ppo), summary))
    }
}

pub struct Ppo {
    env: RolloutEnv,
    options: PpoConfig,
    training: TrainingConfig,
    schedule: RolloutSchedule,
    critic: Option<Critic>,
    kl: AdaptiveKl,
    buffer: RolloutBuffer<PpoSample>,
}

/// A micro-batch: its losses, before the value loss is weighted.
struct PpoUpdate {
    policy: f32,
    value: f32,
    tokens: usize,
    metrics: Vec<Metric>,
}

impl Ppo {
    fn critic(&self) -> Result<&Critic> {
        self.critic
            .as_ref()
            .ok_or_else(|| Error::Run("the value model is missing; attach comes first".into()))
    }

    /// The fourth step: one micro-batch of an optimizer step over `total` tokens.
    fn update(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        rows: &[usize],
        total: usize,
        train: bool,
    ) -> Result<PpoUpdate> {
        let mut samples: Vec<&PpoSample> = rows.iter().map(|r| &self.buffer.samples[*r]).collect();
        samples.sort_by_key(|s| s.rollout.prompt);
        let rollouts: Vec<&Rollout> = samples.iter().map(|s| &s.rollout).collect();
        let batch = self.env.batch(cx, model, &rollouts)?;
        let all = |f: fn(&PpoSample) -> &[f32]| {
            floats(cx, &samples.iter().flat_map(|s| f(s).iter().copied()).collect::<Vec<f32>>())
        };
        let (old, advantage) = (all(|s| &s.rollout.logps)?, all(|s| &s.advantages)?);
        let (old_value, returns) = (all(|s| &s.values)?, all(|s| &s.returns)?);
        let weight = floats(cx, &vec![1.0 / total as f32; old.numel()])?;
        let starts = starts_tensor(cx, rollouts.iter().map(|r| r.ids.len()))?;
        let (one, vf) = (floats(cx, &[1.0])?, floats(cx, &[self.options.vf_coef as f32])?);
        let clip = self.options.cliprange as f32;
        let config = PolicyLoss {
            term: Term::Clip { epsilon: clip, epsilon_high: clip, delta: f32::INFINITY },
            level: ImportanceLevel::Token,
            beta: 0.0,
            bias_correction_kl: false,
        };
        cx.tape = train.then(Tape::default);
        let hidden = model.target_hidden(cx, &batch)?;
        let out = head_logps(cx, &hidden, &model.head, &batch.targets, self.env.scale())?;
        let inputs = PolicyInputs {
            logp: &out.logp,
            old_logp: Some(&old),
            advantage: &advantage,
            weight: &weight,
            ref_logp: None,
            scale: None,
            log_is: None,
            starts: &starts,
        };
        let policy = policy_loss(cx, &config, &inputs)?;
        let critic = self.critic()?;
        let mut seeds = vec![(policy.loss.clone(), one)];
        // A shared trunk gets both gradients in one walk; a model of its own has a tape of its own.
        if !critic.is_shared() && train {
            cx.backward(std::mem::take(&mut seeds))?;
            cx.tape = Some(Tape::default());
        }
        let values = critic.values(cx, model, &batch, Some(&hidden))?;
        let clip = self.options.cliprange_value as f32;
        let (value, value_clip) = value_loss(cx, &values, &old_value, &returns, &weight, clip)?;
        if train {
            seeds.push((value.clone(), vf));
            cx.backward(seeds)?;
        }
        let ratio = policy.ratio.to_f32()?;
        let n = ratio.len().max(1) as f64;
        let mean = |v: &[f32]| sum(v) / n;
        let clipped = policy.clip.to_f32()?.iter().filter(|c| **c != 0.0).count() as f64 / n;
        let average = mean(&ratio);
        let squares = ratio.iter().map(|r| (f64::from(*r) - average).powi(2)).sum::<f64>();
        let approx = ratio.iter().map(|r| 0.5 * f64::from(*r).ln().powi(2)).sum::<f64>() / n;
        let metrics: Vec<Metric> = vec![
            ("policy/clipfrac_avg".into(), clipped),
            ("policy/approxkl_avg".into(), approx),
            ("policy/entropy_avg".into(), mean(&out.entropy.to_f32()?)),
            ("val/clipfrac_avg".into(), mean(&value_clip.to_f32()?)),
            ("val/ratio".into(), average),
            ("val/ratio_var".into(), squares / (n - 1.0).max(1.0)),
        ];
        let (policy, value) = (policy.loss.to_f32()?[0], value.to_f32()?[0]);
        Ok(PpoUpdate { policy, value, tokens: batch.rows, metrics })
    }

    /// The samples of a micro-batch: each pass over a generation has an order of its own.
    fn rows(&self, slot: &RolloutSlot) -> Vec<usize> {
        let size = self.schedule.batch;
        self.order(slot)[slot.micro * size..(slot.micro + 1) * size].to_vec()
    }

    /// The tokens of the optimizer step that a micro-batch is in.
    fn step_tokens(&self, slot: &RolloutSlot) -> usize {
        let size = self.schedule.batch * self.schedule.accumulation;
        let step = slot.micro / self.schedule.accumulation * size;
        let rows = self.order(slot)[step..step + size].to_vec();
        rows.iter().map(|r| self.buffer.samples[*r].rollout.ids.len()).sum()
    }

    fn order(&self, slot: &RolloutSlot) -> Vec<usize> {
        let passes = self.options.num_ppo_epochs as u32;
        let stream = (slot.generation as u32).wrapping_mul(passes).wrapping_add(slot.pass as u32);
        permutation(self.schedule.size(), self.training.seed ^ 0x70_70_6f, stream)
    }

    /// The value model's learning rate at a step.
    fn learning_rate(&self, step: u64) -> f64 {
        let each = self.schedule.epoch() / self.schedule.accumulation;
        let total = self.training.total_steps(each as u64);
        let warmup = self.training.warmup_steps.of(total);
        let peak = self.options.value_learning_rate.unwrap_or(self.training.learning_rate);
        peak * schedule::factor(self.training.lr_scheduler_type, step, warmup, total)
    }
}

impl OnlineObjective for Ppo {
    fn env(&self) -> &RolloutEnv {
        &self.env
    }

    fn env_mut(&mut self) -> &mut RolloutEnv {
        &mut self.env
    }

    fn wants_reference(&self) -> bool {
        self.options.kl_coef != 0.0
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        let start = self.env.scorer.reward_model.as_ref().map_or(model, |r| r.decoder());
        let (kind, longest) = (self.options.value_model, self.env.longest());
        self.critic = Some(Critic::new(cx, model, start, kind, longest, &self.training)?);
        Ok(())
    }

    fn micro_batches(&self) -> Option<usize> {
        Some(self.schedule.epoch())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, at: StepRows) -> Result<StepReport> {
        self.critic()?.reset(cx);
        let mut report = StepReport::default();
        let (mut policy, mut value) = (0f32, 0f32);
        for k in at.micro.iter().copied().flatten() {
            let slot = self.schedule.slot(at.step, *k);
            if self.buffer.is_due(&slot)? {
                self.fill(cx, model, slot.generation)?;
                report.metrics.append(&mut self.buffer.pending);
            }
            let total = self.step_tokens(&slot);
            let update = self.update(cx, model, &self.rows(&slot), total, true)?;
            (policy, value) = (policy + update.policy, value + update.value);
            report.tokens += update.tokens;
            report.metrics.extend(update.metrics);
        }
        report.metrics.push(("loss/policy_avg".into(), f64::from(policy)));
        report.metrics.push(("loss/value_avg".into(), f64::from(value)));
        let rate = self.learning_rate(at.step);
        let norm = self.critic()?.measure(cx, rate, at.step + 1)?;
        report.metrics.push(("val/grad_norm".into(), f64::from(norm)));
        let loss = policy + self.options.vf_coef as f32 * value;
        report.loss = if norm.is_finite() { loss } else { f32::NAN };
        Ok(report)
    }

    fn stepped(&mut self, cx: &mut Cx) -> Result<()> {
        self.critic()?.apply(cx)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, step: u64, row: usize) -> Result<f32> {
        let rows = self.rows(&self.schedule.slot(step, row));
        let total = rows.iter().map(|r| self.buffer.samples[*r].rollout.ids.len()).sum();
        let update = self.update(cx, model, &rows, total, false)?;
        Ok(update.policy + update.value)
    }

    fn row_source(&self, step: u64, row: usize) -> String {
        let rows = self.rows(&self.schedule.slot(step, row));
        let prompt = |r: &usize| self.buffer.samples[*r].rollout.prompt;
        let source = |r: &usize| self.env.prompts.train[prompt(r)].source.clone();
        rows.iter().map(source).collect::<Vec<_>>().join(" + ")
    }

    fn state(&self) -> Result<StateFiles> {
        self.buffer.state(|out| {
            out.word(self.kl.coef.to_bits());
            self.critic()?.write(out)
        })
    }

    fn restore(&mut self, dir: &Path) -> Result<()> {
        let (kl, critic) = (&mut self.kl, &self.critic);
        self.buffer.restore(dir, |from| {
            let Some(coef) = from.word() else { return Ok(None) };
            kl.coef = f64::from_bits(coef);
            critic.as_ref().map_or(Ok(Some(())), |c| c.read(from))
        })
    }
}
