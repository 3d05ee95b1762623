//! Proximal policy optimisation with a value model (Schulman et al., 2017; Ziegler et al., arXiv
//! 1909.08593).
//!
//! A rollout is scored at its end; each token's reward is -kl_coef times its KL from the reference
//! (k1: log pi - log ref, or k3), plus the score on the last token. GAE(gamma, lam) over the values
//! gives advantages, which are whitened over the tokens of the generation, and returns, which are
//! advantages plus values. Then num_ppo_epochs passes over the generation follow, each cut into
//! num_mini_batches optimizer steps: policy loss -min(rho A, clip(rho, 1 +- cliprange) A), value
//! loss max((v - R)^2, (clip(v, v_old +- cliprange_value) - R)^2) / 2, both averaged over the
//! tokens of the step batch.
//!
//! Formulas and names are those of TRL's PPOTrainer before it left the package. Unlike TRL:
//! log-probs of the generation are the sampler's (no second forward); means are over the step
//! batch, not over a micro-batch; the value model has its own optimizer and gradient norm; rows are
//! packed, so there is no padding.
//!
//! Layer 7. Invariant: a value is read at the row that predicts the token, from the same tokens as
//! the policy's log-prob.

pub mod critic;
mod generation;
mod options;

use std::path::Path;

use critic::Critic;
use generation::{GenerationContext, PpoSample};

use super::advantage::AdaptiveKl;
use super::buffer::{RolloutBuffer, RolloutSchedule, RolloutSlot};
use super::env::RolloutEnv;
use super::metrics::of_generation;
use super::rollout::{Rollout, split, starts_tensor};
use super::sampler::SampleRequest;
use super::{OnlineMethod, OnlineObjective, StepRows, env_field};
use crate::autograd::{Cx, Tape};
use crate::config::TrainingConfig;
use crate::data::order::permutation;
use crate::error::{Error, Result};
use crate::methods::offline::rows::Split;
use crate::methods::reference::floats;
use crate::methods::{
    BuildMethod, BuiltMethod, MethodEntry, MethodInputs, Metric, StateFiles, StepReport,
};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::ops::policy::{
    ImportanceLevel, PolicyInputs, PolicyLoss, Term, policy_loss, value_loss,
};
use crate::optim::schedule::Schedule;
use crate::rng::seed;
use crate::tensor::Tensor;

pub use options::{PpoConfig, ValueModel};

pub const METHOD: MethodEntry =
    MethodEntry::new::<PpoConfig>("ppo", "Proximal policy optimisation, with a value model");

impl BuildMethod for PpoConfig {
    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 3e-6, ..Default::default() }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let parts = self.num_mini_batches * training.gradient_accumulation_steps;
        let generation = training.per_device_train_batch_size * parts;
        let env = RolloutEnv::new(&self.online.env(generation), training, inputs)?;
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

/// The outputs of a chunk, still on the device.
struct PpoOutput {
    /// The indices of its completions in the generation.
    rows: Vec<usize>,
    tokens: usize,
    /// Policy loss and value loss.
    losses: [Tensor; 2],
    /// Ratio, clip, entropy and value clip of each token.
    values: [Tensor; 4],
}

/// The results of some micro-batches, with the value loss not yet weighted.
struct PpoUpdate {
    policy: f32,
    value: f32,
    tokens: usize,
    metrics: Vec<Metric>,
}

impl Ppo {
    fn critic(&self) -> Result<&Critic> {
        self.critic.as_ref().ok_or_else(no_critic)
    }

    /// The first three of the four steps: generate, score, advantages.
    fn fill(&mut self, cx: &mut Cx, model: &Decoder, g: u64) -> Result<()> {
        let prompts = self.env.prompts.of_generation(g, self.schedule.prompts_per_generation());
        let request = SampleRequest::new(self.schedule.group, g);
        let rollouts = self.env.generate(cx, model, Split::Train, &prompts, request)?;
        let scores = self.env.score(cx, Split::Train, &rollouts)?;
        self.buffer.pending = of_generation(&rollouts, &scores);
        let totals: Vec<f64> = scores.total().into_iter().map(|s| s.unwrap_or(0.0)).collect();
        self.env.record(&rollouts, &scores, &totals);
        // The groups of a generation are whole here.
        let budget = self.env.budget(model, &self.schedule, true);
        let Some(critic) = &self.critic else { return Err(no_critic()) };
        let mut context = GenerationContext {
            env: &mut self.env,
            critic,
            options: &self.options,
            kl_coef: self.kl.coef,
            budget,
        };
        let count = rollouts.len();
        let weighed = context.weigh(cx, model, rollouts, &totals)?;
        self.buffer.pending.extend(weighed.metrics);
        if self.options.target_kl.is_some() {
            self.kl.update(weighed.mean_kl, count);
        }
        self.buffer.replace(g, weighed.samples);
        Ok(())
    }

    /// The fourth step: some completions of an optimizer step over `total` tokens. `micro` lists
    /// the micro-batches that metrics are averaged over.
    fn update(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        micro: &[Vec<usize>],
        total: usize,
        train: bool,
    ) -> Result<PpoUpdate> {
        let rows: Vec<usize> = micro.concat();
        let rollouts = rows.iter().map(|r| &self.buffer.samples[*r].rollout);
        let mut outputs = Vec::new();
        for chunk in self.env.chunks(model, rollouts, self.budget(model)) {
            let rows = chunk.into_iter().map(|i| rows[i]).collect();
            outputs.push(self.chunk(cx, model, rows, total, train)?);
        }
        self.report(micro, &outputs)
    }

    /// One forward; with `train`, also the backward.
    fn chunk(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        rows: Vec<usize>,
        total: usize,
        train: bool,
    ) -> Result<PpoOutput> {
        let samples: Vec<&PpoSample> = rows.iter().map(|r| &self.buffer.samples[*r]).collect();
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
        // With a shared trunk both gradients flow in one backward; a separate model has its own
        // tape.
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
        Ok(PpoOutput {
            rows,
            tokens: batch.rows,
            losses: [policy.loss, value],
            values: [policy.ratio, policy.clip, out.entropy, value_clip],
        })
    }

    /// Reads the chunks' outputs back, after the last backward is launched.
    fn report(&self, micro: &[Vec<usize>], outputs: &[PpoOutput]) -> Result<PpoUpdate> {
        let mut update = PpoUpdate { policy: 0.0, value: 0.0, tokens: 0, metrics: Vec::new() };
        // Ratio, clip, entropy and value clip of each token, by completion.
        let mut tokens: [Vec<Vec<f32>>; 4] =
            std::array::from_fn(|_| vec![Vec::new(); self.buffer.samples.len()]);
        for output in outputs {
            let [policy, value] = &output.losses;
            (update.policy, update.value) =
                (update.policy + policy.to_f32()?[0], update.value + value.to_f32()?[0]);
            update.tokens += output.tokens;
            for (all, values) in tokens.iter_mut().zip(&output.values) {
                let length = |r: &usize| self.buffer.samples[*r].rollout.ids.len();
                let each = split(&values.to_f32()?, output.rows.iter().map(length));
                output.rows.iter().zip(each).for_each(|(r, values)| all[*r] = values);
            }
        }
        for rows in micro {
            let of = |k: usize| {
                let all = &tokens[k];
                rows.iter().flat_map(move |r| all[*r].iter().copied())
            };
            let ratio: Vec<f32> = of(0).collect();
            let n = ratio.len().max(1) as f64;
            let mean = |k: usize| of(k).map(f64::from).sum::<f64>() / n;
            let average = mean(0);
            let squares = ratio.iter().map(|r| (f64::from(*r) - average).powi(2)).sum::<f64>();
            let approx = ratio.iter().map(|r| 0.5 * f64::from(*r).ln().powi(2)).sum::<f64>() / n;
            let metrics: [Metric; 6] = [
                ("policy/clipfrac_avg".into(), of(1).filter(|c| *c != 0.0).count() as f64 / n),
                ("policy/approxkl_avg".into(), approx),
                ("policy/entropy_avg".into(), mean(2)),
                ("val/clipfrac_avg".into(), mean(3)),
                ("val/ratio".into(), average),
                ("val/ratio_var".into(), squares / (n - 1.0).max(1.0)),
            ];
            update.metrics.extend(metrics);
        }
        Ok(update)
    }

    /// The tokens of a chunk. Each pass has its own order, so the mini-batches of a generation
    /// split its groups.
    fn budget(&self, model: &Decoder) -> usize {
        self.env.budget(model, &self.schedule, self.schedule.whole_groups())
    }

    /// The samples of a micro-batch: each pass over a generation has its own order.
    fn rows(&self, slot: &RolloutSlot) -> Vec<usize> {
        let size = self.schedule.batch;
        let mut rows = self.order(slot)[slot.micro * size..(slot.micro + 1) * size].to_vec();
        rows.sort_by_key(|r| self.buffer.samples[*r].rollout.prompt);
        rows
    }

    /// The tokens of the optimizer step that contains a micro-batch.
    fn step_tokens(&self, slot: &RolloutSlot) -> usize {
        let size = self.schedule.batch * self.schedule.accumulation;
        let step = slot.micro / self.schedule.accumulation * size;
        let rows = self.order(slot)[step..step + size].to_vec();
        rows.iter().map(|r| self.buffer.samples[*r].rollout.ids.len()).sum()
    }

    fn order(&self, slot: &RolloutSlot) -> Vec<usize> {
        let passes = self.options.num_ppo_epochs as u32;
        let stream = (slot.generation as u32).wrapping_mul(passes).wrapping_add(slot.pass as u32);
        permutation(self.schedule.size(), self.training.seed ^ seed::PPO, stream)
    }

    /// The value model's learning rate at a step.
    fn learning_rate(&self, step: u64) -> Result<f64> {
        let each = self.schedule.epoch() / self.schedule.accumulation;
        let total = self.training.total_steps(each as u64);
        let peak = self.options.value_learning_rate.unwrap_or(self.training.learning_rate);
        Ok(Schedule::of(&self.training, peak, total)?.rate(step))
    }
}

fn no_critic() -> Error {
    Error::Run("the value model is missing; attach comes first".into())
}

impl OnlineObjective for Ppo {
    env_field!();

    fn wants_reference(&self) -> bool {
        self.options.kl_coef != 0.0
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        let start = self.env.scorer.reward_model.as_ref().map_or(model, |r| r.decoder());
        let longest = self.env.longest();
        self.critic = Some(Critic::new(cx, model, start, &self.options, longest, &self.training)?);
        Ok(())
    }

    fn micro_batches(&self) -> Option<usize> {
        Some(self.schedule.epoch())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, at: StepRows) -> Result<StepReport> {
        self.critic()?.reset(cx)?;
        let mut report = StepReport::default();
        let (mut policy, mut value) = (0f32, 0f32);
        for slots in self.schedule.spans(at.step, at.micro) {
            if self.buffer.is_due(&slots[0])? {
                self.fill(cx, model, slots[0].generation)?;
                report.metrics.append(&mut self.buffer.pending);
            }
            // Every micro-batch of a step divides by the tokens of the step.
            let total = self.step_tokens(&slots[0]);
            let micro: Vec<Vec<usize>> = slots.iter().map(|slot| self.rows(slot)).collect();
            let update = self.update(cx, model, &micro, total, true)?;
            (policy, value) = (policy + update.policy, value + update.value);
            report.tokens += update.tokens;
            report.metrics.extend(update.metrics);
        }
        report.metrics.push(("loss/policy_avg".into(), f64::from(policy)));
        report.metrics.push(("loss/value_avg".into(), f64::from(value)));
        let rate = self.learning_rate(at.step)?;
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
        let update = self.update(cx, model, &[rows], total, false)?;
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
        let limits = (self.env.prompts.train.len(), self.schedule.size());
        let (kl, critic) = (&mut self.kl, &self.critic);
        self.buffer.restore(dir, limits, |from| {
            let Some(coef) = from.word() else { return Ok(None) };
            kl.coef = f64::from_bits(coef);
            critic.as_ref().map_or(Ok(Some(())), |c| c.read(from))
        })
    }
}
