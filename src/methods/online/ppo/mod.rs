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

use std::time::Instant;

use serde_json::Value;

use crate::autograd::{Cx, Tape};
use crate::config::{KlEstimatorChoice, PpoConfig, PpoKeys, TrainingConfig, ValueModel};
use crate::data::order::permutation;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::online::advantage::{AdaptiveKl, KlEstimator, token_rewards};
use crate::methods::online::env::{Rollout, Set, World};
use crate::methods::{Method, Metric, Recipe, Source, StepReport};
use crate::model::batch::Batch;
use crate::model::decoder::Decoder;
use crate::model::layout::{ParamSpec, Role, Task};
use crate::model::params::ParamSet;
use crate::ops::add::to_float;
use crate::ops::head::head_logps;
use crate::ops::matmul::linear;
use crate::ops::policy::{
    Level, PolicyInputs, PolicyLoss, Term, gae, policy_loss, value_loss, whiten,
};
use crate::optim::{AdamWConfig, Optimizer, schedule};
use crate::tensor::{ParamSetId, Tensor};

impl Recipe for PpoConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.online.chat_template_path.as_deref()
    }

    fn method(
        &self,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let world = World::new(&self.online, training, source)?;
        let said = format!(
            "{} prompts, {} completions each",
            world.train.len(),
            self.online.num_generations
        );
        Ok((Box::new(Ppo::new(world, &self.own, training)?), said))
    }
}

/// A completion with what PPO knows of its tokens.
#[derive(Clone)]
struct Sample {
    rollout: Rollout,
    values: Vec<f32>,
    advantages: Vec<f32>,
    returns: Vec<f32>,
}

/// What gives values: a model of its own, or a score on the policy's trunk; with its optimizer.
struct Critic {
    trunk: Option<Decoder>,
    /// The score alone, where the trunk is the policy's.
    score: Option<(ParamSet, Tensor)>,
    optimizer: Optimizer,
}

pub struct Ppo {
    world: World,
    keys: PpoKeys,
    training: TrainingConfig,
    critic: Option<Critic>,
    kl: AdaptiveKl,
    number: u64,
    generation: Option<u64>,
    buffer: Vec<Sample>,
    pending: Vec<Metric>,
}

const STATE: &str = "ppo.bin";

impl Ppo {
    pub fn new(world: World, keys: &PpoKeys, training: &TrainingConfig) -> Result<Ppo> {
        let kl = AdaptiveKl {
            coef: keys.kl_coef,
            target: keys.target_kl.unwrap_or(0.0),
            horizon: keys.kl_horizon,
        };
        let ppo = Ppo {
            world,
            keys: keys.clone(),
            training: training.clone(),
            critic: None,
            kl,
            number: 0,
            generation: None,
            buffer: Vec::new(),
            pending: Vec::new(),
        };
        let (size, group) = (ppo.size(), ppo.world.keys.num_generations);
        if !size.is_multiple_of(group) || ppo.world.train.len() < size / group {
            let rows = ppo.world.train.len();
            return Err(Error::Config(format!(
                "a generation has {size} completions (per_device_train_batch_size x gradient_accumulation_steps x \
                 num_mini_batches), {group} of each prompt, and the data has {rows} prompts: it must divide and fit"
            )));
        }
        Ok(ppo)
    }

    /// Completions of an optimizer step, and of a generation.
    fn step_rows(&self) -> usize {
        self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps
    }

    fn size(&self) -> usize {
        self.step_rows() * self.keys.num_mini_batches
    }

    fn prompts(&self) -> usize {
        self.size() / self.world.keys.num_generations
    }

    /// Optimizer steps that a generation serves.
    fn served(&self) -> usize {
        self.keys.num_ppo_epochs * self.keys.num_mini_batches
    }

    /// The four steps of the loop: the first three. The fourth is [`Ppo::update`].
    fn fill(&mut self, cx: &mut Cx, model: &Decoder, g: u64) -> Result<()> {
        let prompts = self.world.prompts_of(g, self.prompts());
        let n = self.world.keys.num_generations;
        let rollouts = self.world.generate(cx, model, Set::Train, &prompts, n, g, false)?;
        let scores = self.world.score(cx, Set::Train, &rollouts)?;
        self.pending = self.world.metrics(&rollouts, &scores);
        let totals: Vec<f64> = scores.total().into_iter().map(|s| s.unwrap_or(0.0)).collect();
        self.world.record(&rollouts, &scores, &totals);
        let begin = Instant::now();
        self.buffer = self.advantages(cx, model, rollouts, &totals)?;
        self.generation = Some(g);
        self.world.seconds.train += begin.elapsed().as_secs_f64();
        Ok(())
    }

    fn advantages(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        rollouts: Vec<Rollout>,
        totals: &[f64],
    ) -> Result<Vec<Sample>> {
        let rows = self.training.per_device_train_batch_size;
        let reference = match self.world.reference.model() {
            Some(reference) => self.world.logps(cx, reference, &rollouts, rows)?,
            None => rollouts.iter().map(|r| r.logps.clone()).collect(),
        };
        let mut values = Vec::with_capacity(rollouts.len());
        for some in rollouts.chunks(rows) {
            let samples: Vec<(usize, &[u32])> =
                some.iter().map(|r| (r.prompt, r.ids.as_slice())).collect();
            let batch = self.world.batch(cx, model, &samples)?;
            let all = self.values(cx, model, &batch, None)?.to_f32()?;
            let mut rest = all.as_slice();
            for r in some {
                let (own, tail) = rest.split_at(r.ids.len());
                values.push(own.to_vec());
                rest = tail;
            }
        }
        let estimator = match self.keys.kl_estimator {
            KlEstimatorChoice::K1 => KlEstimator::K1,
            KlEstimatorChoice::K3 => KlEstimator::K3,
        };
        let (mut rewards, mut kls, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for ((r, q), total) in rollouts.iter().zip(&reference).zip(totals) {
            let mut score = *total;
            if let (false, Some(penalty)) = (r.finished, self.keys.missing_eos_penalty) {
                score -= penalty;
            }
            if let Some(bound) = self.keys.reward_clip {
                score = score.clamp(-bound, bound);
            }
            let (reward, kl) = token_rewards(&r.logps, q, score, self.kl.coef, estimator);
            rewards.extend(reward);
            kls.push(kl.iter().map(|k| f64::from(*k)).sum::<f64>());
            kept.push(score);
        }
        let lengths: Vec<usize> = rollouts.iter().map(|r| r.ids.len()).collect();
        let tokens: usize = lengths.iter().sum();
        let starts = cx.ints("sequence starts", &starts(&lengths))?;
        let ones = floats(cx, &vec![1.0; tokens])?;
        let mut reward = floats(cx, &rewards)?;
        if self.keys.whiten_rewards {
            // TRL keeps the mean of the rewards.
            reward = whiten(cx, &reward, &ones, false)?;
        }
        let value = floats(cx, &values.concat())?;
        let (advantage, returns) =
            gae(cx, &reward, &value, &starts, self.keys.gamma as f32, self.keys.lam as f32)?;
        let advantage = whiten(cx, &advantage, &ones, true)?.to_f32()?;
        let returns = returns.to_f32()?;
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
        let entropy =
            rollouts.iter().flat_map(|r| &r.entropies).map(|e| f64::from(*e)).sum::<f64>();
        let non_score = -self.kl.coef * mean(&kls);
        self.pending.extend([
            ("objective/kl".into(), mean(&kls)),
            ("objective/entropy".into(), entropy / rollouts.len().max(1) as f64),
            ("objective/non_score_reward".into(), non_score),
            ("objective/scores".into(), mean(&kept)),
            ("objective/rlhf_reward".into(), mean(&kept) + non_score),
            ("kl_coef".into(), self.kl.coef),
            ("val/num_eos_tokens".into(), rollouts.iter().filter(|r| r.finished).count() as f64),
        ]);
        if self.keys.target_kl.is_some() {
            self.kl.update(mean(&kls), rollouts.len());
        }
        let mut at = 0;
        let mut samples = Vec::with_capacity(rollouts.len());
        for (rollout, values) in rollouts.into_iter().zip(values) {
            let own = at..at + values.len();
            at = own.end;
            let (advantages, returns) = (advantage[own.clone()].to_vec(), returns[own].to_vec());
            samples.push(Sample { rollout, values, advantages, returns });
        }
        Ok(samples)
    }

    /// Values of the batch's targets, F32 [n]. `hidden`: the policy's, for a shared trunk that has
    /// been run already.
    fn values(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        batch: &Batch,
        hidden: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Some(critic) = &self.critic else {
            return Err(Error::Run("the value model was not made; attach comes first".into()));
        };
        let scores = match (&critic.trunk, &critic.score, hidden) {
            (Some(trunk), _, _) => {
                let hidden = trunk.target_hidden(cx, batch)?;
                trunk.scores(cx, &hidden)?
            }
            (None, Some((_, score)), Some(hidden)) => linear(cx, hidden, score, None)?,
            (None, Some((_, score)), None) => {
                let hidden = model.target_hidden(cx, batch)?;
                linear(cx, &hidden, score, None)?
            }
            (None, None, _) => {
                return Err(Error::Run("a critic has neither trunk nor score".into()));
            }
        };
        let n = scores.numel();
        to_float(cx, &scores)?.reshape(&[n])
    }

    /// The fourth step: one micro-batch of an optimizer step over `total` tokens. Returns the
    /// losses and figures.
    fn update(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        rows: &[usize],
        total: usize,
        train: bool,
    ) -> Result<(f32, f32, Vec<Metric>, usize)> {
        let mut samples: Vec<&Sample> = rows.iter().map(|r| &self.buffer[*r]).collect();
        samples.sort_by_key(|s| s.rollout.prompt);
        let pairs: Vec<(usize, &[u32])> =
            samples.iter().map(|s| (s.rollout.prompt, s.rollout.ids.as_slice())).collect();
        let lengths: Vec<usize> = pairs.iter().map(|p| p.1.len()).collect();
        let tokens: usize = lengths.iter().sum();
        let batch = self.world.batch(cx, model, &pairs)?;
        let all = |f: fn(&Sample) -> &[f32]| {
            samples.iter().flat_map(|s| f(s).iter().copied()).collect::<Vec<f32>>()
        };
        let old = floats(cx, &all(|s| &s.rollout.logps))?;
        let advantage = floats(cx, &all(|s| &s.advantages))?;
        let (old_value, returns) =
            (floats(cx, &all(|s| &s.values))?, floats(cx, &all(|s| &s.returns))?);
        let weight = floats(cx, &vec![1.0 / total as f32; tokens])?;
        let starts = cx.ints("sequence starts", &starts(&lengths))?;
        let one = floats(cx, &[1.0])?;
        let vf = floats(cx, &[self.keys.vf_coef as f32])?;
        let clip = self.keys.cliprange as f32;
        let config = PolicyLoss {
            term: Term::Clip { epsilon: clip, epsilon_high: clip, delta: f32::INFINITY },
            level: Level::Token,
            beta: 0.0,
            bias_correction_kl: false,
        };
        cx.tape = train.then(Tape::default);
        let hidden = model.target_hidden(cx, &batch)?;
        let out = head_logps(cx, &hidden, &model.head, &batch.targets, self.world.scale())?;
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
        let shared = self.critic.as_ref().is_some_and(|c| c.trunk.is_none());
        let clip_value = self.keys.cliprange_value as f32;
        // A shared trunk gets both gradients in one walk; a model of its own has a tape of its own.
        let value = if shared {
            let values = self.values(cx, model, &batch, Some(&hidden))?;
            let value = value_loss(cx, &values, &old_value, &returns, &weight, clip_value)?;
            if train {
                cx.backward(vec![(policy.loss.clone(), one), (value.0.clone(), vf)])?;
            }
            value
        } else {
            if train {
                cx.backward(vec![(policy.loss.clone(), one)])?;
                cx.tape = Some(Tape::default());
            }
            let values = self.values(cx, model, &batch, None)?;
            let value = value_loss(cx, &values, &old_value, &returns, &weight, clip_value)?;
            if train {
                cx.backward(vec![(value.0.clone(), vf)])?;
            }
            value
        };
        let (policy_value, value_value) = (policy.loss.to_f32()?[0], value.0.to_f32()?[0]);
        let n = tokens.max(1) as f64;
        let mean = |v: &[f32]| v.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let ratio = policy.ratio.to_f32()?;
        let clipped = policy.clip.to_f32()?.iter().filter(|c| **c != 0.0).count() as f64 / n;
        let average = mean(&ratio);
        let spread = ratio.iter().map(|r| (f64::from(*r) - average).powi(2)).sum::<f64>()
            / (n - 1.0).max(1.0);
        let approx = ratio.iter().map(|r| 0.5 * f64::from(*r).ln().powi(2)).sum::<f64>() / n;
        let metrics: Vec<Metric> = vec![
            ("policy/clipfrac_avg".into(), clipped),
            ("policy/approxkl_avg".into(), approx),
            ("policy/entropy_avg".into(), mean(&out.entropy.to_f32()?)),
            ("val/clipfrac_avg".into(), mean(&value.1.to_f32()?)),
            ("val/ratio".into(), average),
            ("val/ratio_var".into(), spread),
        ];
        Ok((policy_value, value_value, metrics, batch.rows))
    }

    /// The generation, the pass and the rows of virtual micro-batch `k` of this step's epoch.
    fn place(&self, k: usize) -> (u64, Vec<usize>, Vec<usize>) {
        let each = self.world.generations_an_epoch(self.prompts());
        let (accumulation, rows) =
            (self.training.gradient_accumulation_steps, self.training.per_device_train_batch_size);
        let served = self.served() * accumulation;
        let epoch = self.number / (each * self.served()) as u64;
        let g = epoch * each as u64 + (k / served) as u64;
        let within = k % served;
        let (pass, micro) = (
            within / (self.keys.num_mini_batches * accumulation),
            within % (self.keys.num_mini_batches * accumulation),
        );
        let stream =
            (g as u32).wrapping_mul(self.keys.num_ppo_epochs as u32).wrapping_add(pass as u32);
        let order = permutation(self.size(), self.training.seed ^ 0x70_70_6f, stream);
        let step = micro / accumulation * accumulation * rows;
        let own = order[micro * rows..(micro + 1) * rows].to_vec();
        (g, own, order[step..step + accumulation * rows].to_vec())
    }

    fn tokens(&self, rows: &[usize]) -> usize {
        rows.iter().map(|r| self.buffer[*r].rollout.ids.len()).sum()
    }

    fn learning_rate(&self) -> f64 {
        let each = self.world.generations_an_epoch(self.prompts()) * self.served();
        let total = self.training.total_steps(each as u64);
        let warmup = self.training.warmup_steps.of(total);
        let peak = self.keys.value_learning_rate.unwrap_or(self.training.learning_rate);
        peak * schedule::factor(self.training.lr_scheduler_type, self.number, warmup, total)
    }
}

impl Critic {
    fn params(&self) -> Result<&ParamSet> {
        match (&self.trunk, &self.score) {
            (Some(trunk), _) => Ok(&trunk.params),
            (None, Some((params, _))) => Ok(params),
            (None, None) => Err(Error::Run("a critic has neither trunk nor score".into())),
        }
    }

    /// From the reward model where there is one, else from the policy's base with a score of zero.
    fn new(
        cx: &mut Cx,
        model: &Decoder,
        world: &World,
        keys: &PpoKeys,
        training: &TrainingConfig,
    ) -> Result<Critic> {
        let config = AdamWConfig::of(training);
        if keys.value_model == ValueModel::Shared {
            let hidden = model.config.hidden_size;
            let spec = ParamSpec {
                name: "score.weight".into(),
                shape: vec![1, hidden],
                role: Role::Score,
                layer: None,
            };
            let params = ParamSet::new(cx, ParamSetId::Value, vec![spec])?;
            let score = params.required(None, Role::Score)?;
            let optimizer = Optimizer::new(cx, &params, config)?;
            return Ok(Critic { trunk: None, score: Some((params, score)), optimizer });
        }
        let from = world.reward_model.as_ref().map_or(model, |r| r.decoder());
        let mut shape = from.config.clone();
        if shape.vocab_size != model.config.vocab_size {
            let (theirs, ours) = (shape.vocab_size, model.config.vocab_size);
            return Err(Error::Config(format!(
                "the reward model has a vocabulary of {theirs}, the policy of {ours}: a value model cannot start from it; \
                 set value_model=shared"
            )));
        }
        shape.task = Task::SequenceClassification { labels: 1 };
        let trunk =
            Decoder::builder(shape).set(ParamSetId::Value).positions(world.longest()).build(cx)?;
        for (i, spec) in trunk.params.specs.iter().enumerate() {
            if let Some(at) = from.params.by_name(&spec.name) {
                trunk.params.store(i, &from.params.weight_view(at)?.to_f32()?)?;
            }
        }
        let optimizer = Optimizer::new(cx, &trunk.params, config)?;
        Ok(Critic { trunk: Some(trunk), score: None, optimizer })
    }
}

impl Method for Ppo {
    fn rows(&self) -> usize {
        self.world.train.len()
    }

    fn eval_rows(&self) -> usize {
        self.world.eval.len()
    }

    fn longest(&self) -> usize {
        self.world.longest()
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        self.world.attach(cx, model, self.keys.kl_coef != 0.0)?;
        self.critic = Some(Critic::new(cx, model, &self.world, &self.keys, &self.training)?);
        Ok(())
    }

    fn micro_batches(&self) -> Option<usize> {
        let steps = self.world.generations_an_epoch(self.prompts()) * self.served();
        Some(steps * self.training.gradient_accumulation_steps)
    }

    fn begin(&mut self, number: u64) -> Result<()> {
        self.number = number;
        Ok(())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<StepReport> {
        let mut report = StepReport { loss: 0.0, tokens: 0, metrics: Vec::new() };
        if let Some(critic) = &self.critic {
            cx.param_grads[critic.params()?.set].reset();
        }
        let (mut policy, mut value) = (0f32, 0f32);
        for k in micro.iter().flat_map(|m| m.iter()) {
            let (g, rows, step) = self.place(*k);
            if self.generation != Some(g) {
                if !k.is_multiple_of(self.served() * self.training.gradient_accumulation_steps) {
                    let message = format!(
                        "the completions of generation {g} are not there; resume from an earlier checkpoint"
                    );
                    return Err(Error::Run(message));
                }
                self.fill(cx, model, g)?;
                report.metrics.append(&mut self.pending);
            }
            let begin = Instant::now();
            let total = self.tokens(&step);
            let (p, v, metrics, tokens) = self.update(cx, model, &rows, total, true)?;
            self.world.seconds.train += begin.elapsed().as_secs_f64();
            (policy, value) = (policy + p, value + v);
            report.tokens += tokens;
            report.metrics.extend(metrics);
        }
        report.metrics.push(("loss/policy_avg".into(), f64::from(policy)));
        report.metrics.push(("loss/value_avg".into(), f64::from(value)));
        report.loss = policy + self.keys.vf_coef as f32 * value;
        let rate = self.learning_rate();
        if let Some(critic) = &self.critic {
            let norm = critic.optimizer.measure(cx, critic.params()?, rate, self.number + 1)?;
            report.metrics.push(("val/grad_norm".into(), f64::from(norm)));
            if !norm.is_finite() {
                report.loss = f32::NAN;
            }
        }
        report.metrics.extend(self.world.take_seconds());
        Ok(report)
    }

    fn stepped(&mut self, cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        if let Some(critic) = &self.critic {
            critic.optimizer.apply(cx, critic.params()?)?;
        }
        self.world.reference.stepped(model, done)
    }

    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, _batch: usize) -> Result<Vec<Metric>> {
        self.world.evaluate(cx, model)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32> {
        let (_, rows, _) = self.place(row);
        let total = self.tokens(&rows);
        let (policy, value, _, _) = self.update(cx, model, &rows, total, false)?;
        Ok(policy + value)
    }

    fn row_source(&self, row: usize) -> String {
        let (_, rows, _) = self.place(row);
        let source = |r: &usize| self.world.train[self.buffer[*r].rollout.prompt].source.clone();
        rows.iter().map(source).collect::<Vec<_>>().join(" + ")
    }

    fn take_completions(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.world.log)
    }

    fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = self.world.reference.state()?;
        let mut out = Writer::default();
        out.word(self.generation.unwrap_or(u64::MAX));
        out.word(self.kl.coef.to_bits());
        out.word(self.buffer.len() as u64);
        for s in &self.buffer {
            out.word(s.rollout.prompt as u64);
            out.word(u64::from(s.rollout.finished));
            out.bytes(s.rollout.text.as_bytes());
            out.bytes(bytemuck::cast_slice(&s.rollout.ids));
            for v in [&s.rollout.logps, &s.rollout.entropies, &s.values, &s.advantages, &s.returns]
            {
                out.bytes(bytemuck::cast_slice(v));
            }
        }
        if let Some(critic) = &self.critic {
            for values in critic.optimizer.dump(critic.params()?)? {
                out.bytes(&values);
            }
        }
        files.push((STATE.into(), out.0));
        Ok(files)
    }

    fn restore(&mut self, _cx: &mut Cx, dir: &std::path::Path) -> Result<()> {
        self.world.reference.restore(dir)?;
        let path = dir.join(STATE);
        let data = fsio::read(&path)?;
        let mut from = Reader { rest: &data };
        let cut = || Error::checkpoint(&path, "is cut short");
        let generation = from.word().ok_or_else(cut)?;
        self.generation = (generation != u64::MAX).then_some(generation);
        self.kl.coef = f64::from_bits(from.word().ok_or_else(cut)?);
        let n = from.word().ok_or_else(cut)?;
        self.buffer.clear();
        for _ in 0..n {
            let sample = (|| {
                let (prompt, finished) = (from.word()? as usize, from.word()? == 1);
                let text = String::from_utf8_lossy(from.bytes()?).into_owned();
                let ids = from.values::<u32>()?;
                let (logps, entropies) = (from.values::<f32>()?, from.values::<f32>()?);
                let rollout = Rollout { prompt, ids, logps, entropies, finished, text };
                let (values, advantages, returns) =
                    (from.values()?, from.values()?, from.values()?);
                Some(Sample { rollout, values, advantages, returns })
            })();
            self.buffer.push(sample.ok_or_else(cut)?);
        }
        if let Some(critic) = &self.critic {
            let mut next = || from.bytes().ok_or_else(cut);
            critic.optimizer.restore(critic.params()?, &mut next)?;
        }
        Ok(())
    }
}

fn floats(cx: &Cx, values: &[f32]) -> Result<Tensor> {
    Tensor::from_host(&cx.pool, "ppo inputs", DType::F32, &[values.len()], values)
}

/// Where sequences start, and where the last ends.
fn starts(lengths: &[usize]) -> Vec<i32> {
    let mut out = vec![0];
    out.extend(lengths.iter().scan(0, |at, l| {
        *at += *l as i32;
        Some(*at)
    }));
    out
}

/// Little-endian words, and byte strings with their length before them.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn word(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }

    fn bytes(&mut self, b: &[u8]) {
        self.word(b.len() as u64);
        self.0.extend_from_slice(b);
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn word(&mut self) -> Option<u64> {
        let (head, tail) = self.rest.split_first_chunk::<8>()?;
        self.rest = tail;
        Some(u64::from_le_bytes(*head))
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let n = self.word()? as usize;
        let (head, tail) = self.rest.split_at_checked(n)?;
        self.rest = tail;
        Some(head)
    }

    fn values<T: bytemuck::Pod>(&mut self) -> Option<Vec<T>> {
        let bytes = self.bytes()?;
        bytes.len().is_multiple_of(size_of::<T>()).then(|| bytemuck::pod_collect_to_vec(bytes))
    }
}
