//! Training with a clipped policy loss: a generation is cut into micro-batches, which one or
//! several optimizer steps go over. Layer 7.
//!
//! TRL 1.16.0's schedule: a generation has per_device_train_batch_size x steps_per_generation
//! completions of as many prompts as num_generations gives, is shuffled, and serves
//! steps_per_generation x num_iterations micro-batches.
//!
//! Invariant: the ratio at the first pass over a generation is exactly 1, because the sampler's
//! log-probs are the trainer's (`methods::online`); losses are normalised over the step batch,
//! never over what fits in memory.

use std::path::Path;

use super::advantage::Advantages;
use super::buffer::{RolloutBuffer, RolloutSchedule};
use super::env::{EnvOptions, RolloutEnv};
use super::metrics;
use super::options::{ClipOptions, OnlineConfig};
use super::rollout::{Rollout, StateReader, StateWriter, StoredRollout, starts_tensor};
use super::sampler::SampleRequest;
use super::weights::{Normalizer, off_policy_mask, token_weights, top_entropy_mask};
use super::{OnlineMethod, OnlineObjective, StepRows, env_field};
use crate::autograd::{Cx, Tape};
use crate::config::{Section, TrainingConfig};
use crate::data::order::permutation;
use crate::error::Result;
use crate::methods::offline::rows::Split;
use crate::methods::reference::floats;
use crate::methods::{BuildMethod, BuiltMethod, MethodInputs, Metric, StateFiles, StepReport};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::ops::policy::{PolicyInputs, PolicyLoss, Term, policy_loss};
use crate::rewards::Scores;
use crate::rng::seed;

/// What sets a method with a policy loss apart.
pub trait PolicyObjective {
    /// One advantage a rollout, and metrics. May generate more (baselines).
    fn advantages(&self, context: &mut AdvantageContext) -> Result<WeighedRollouts>;

    fn loss(&self) -> PolicyLoss;

    fn normalizer(&self, active_tokens: usize, steps_per_generation: usize) -> Normalizer;

    /// The options that it shares with the others. A KL weight there asks for a reference.
    fn online(&self) -> &OnlineConfig;

    /// Choices of GRPO that leave the term unchanged.
    fn extras(&self) -> PolicyExtras {
        PolicyExtras::default()
    }
}

/// Choices of GRPO that leave the term unchanged.
#[derive(Clone, Copy, Debug)]
pub struct PolicyExtras {
    pub top_entropy_quantile: f64,
    pub entropy_coef: f64,
    pub off_policy_mask_threshold: Option<f64>,
    pub dynamic_sampling: usize,
}

impl Default for PolicyExtras {
    fn default() -> Self {
        PolicyExtras {
            top_entropy_quantile: 1.0,
            entropy_coef: 0.0,
            off_policy_mask_threshold: None,
            dynamic_sampling: 0,
        }
    }
}

/// What an objective may use for its advantages.
pub struct AdvantageContext<'a> {
    pub cx: &'a mut Cx,
    pub model: &'a Decoder,
    pub env: &'a mut RolloutEnv,
    pub rollouts: &'a [Rollout],
    pub scores: &'a Scores,
    /// Log-probs under the reference, where there is one.
    pub reference: Option<&'a [Vec<f32>]>,
    pub generation: u64,
    /// Completions of a prompt.
    pub group: usize,
}

/// The advantage of each rollout, and what to log.
pub struct WeighedRollouts {
    pub advantages: Vec<f64>,
    pub metrics: Vec<Metric>,
}

impl From<Advantages> for WeighedRollouts {
    fn from(a: Advantages) -> WeighedRollouts {
        let flat =
            a.zero_std.iter().filter(|z| **z).count() as f64 / a.zero_std.len().max(1) as f64;
        let metrics = vec![("frac_reward_zero_std".into(), flat)];
        WeighedRollouts { advantages: a.advantages, metrics }
    }
}

/// A completion to train on.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicySample {
    rollout: Rollout,
    reference: Option<Vec<f32>>,
    advantage: f64,
    /// Its tokens count.
    counts: bool,
}

impl PolicySample {
    /// The same value for each of its tokens.
    fn spread<T: Clone>(&self, value: T) -> Vec<T> {
        vec![value; self.rollout.ids.len()]
    }
}

impl StoredRollout for PolicySample {
    fn write(&self, out: &mut StateWriter) {
        self.rollout.write(out);
        out.word(u64::from(self.reference.is_some()));
        out.values(self.reference.as_deref().unwrap_or_default());
        out.word(self.advantage.to_bits());
        out.word(u64::from(self.counts));
    }

    fn read(from: &mut StateReader) -> Option<PolicySample> {
        let rollout = Rollout::read(from)?;
        let (known, reference) = (from.word()? == 1, from.values()?);
        let (advantage, counts) = (f64::from_bits(from.word()?), from.word()? == 1);
        Some(PolicySample { rollout, reference: known.then_some(reference), advantage, counts })
    }

    fn fits(&self, prompts: usize) -> bool {
        let n = self.rollout.ids.len();
        self.rollout.fits(prompts) && self.reference.as_ref().is_none_or(|r| r.len() == n)
    }
}

pub struct PolicyGradient<O> {
    env: RolloutEnv,
    objective: O,
    schedule: RolloutSchedule,
    mask_truncated: bool,
    seed: u64,
    buffer: RolloutBuffer<PolicySample>,
}

/// The clipped term with TRL's defaults beside it.
pub fn clip_term(clip: &ClipOptions) -> Term {
    let (epsilon, epsilon_high) = clip.bounds();
    Term::Clip { epsilon, epsilon_high, delta: f32::INFINITY }
}

impl OnlineConfig {
    pub fn env(&self) -> EnvOptions {
        EnvOptions {
            rewards: self.rewards.clone(),
            sampling: self.sampling.clone(),
            sync: self.sync.clone(),
            max_completion_length: self.max_completion_length,
            max_sequences: self.rollout.max_sequences,
        }
    }

    /// What to print about the data.
    pub fn summary(&self, env: &RolloutEnv) -> String {
        format!("{} prompts, {} completions each", env.prompts.train.len(), self.num_generations)
    }
}

/// TRL's defaults, and the same way to build them all.
impl<O: PolicyObjective + Section + Clone + 'static> BuildMethod for O {
    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-6, ..Default::default() }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        PolicyGradient::build(self.clone(), training, inputs)
    }
}

impl<O: PolicyObjective + 'static> PolicyGradient<O> {
    /// Errors: a generation that its groups do not divide.
    fn build(
        objective: O,
        training: &TrainingConfig,
        inputs: &MethodInputs,
    ) -> Result<BuiltMethod> {
        let options = objective.online().clone();
        let env = RolloutEnv::new(&options.env(), training, inputs)?;
        let parts = options.steps_per_generation.unwrap_or(training.gradient_accumulation_steps);
        let (passes, group) = (options.num_iterations, options.num_generations);
        let schedule =
            RolloutSchedule::new(training, parts, passes, group, env.prompts.train.len())?;
        let summary = options.summary(&env);
        let policy = PolicyGradient {
            env,
            objective,
            schedule,
            mask_truncated: options.mask_truncated_completions,
            seed: training.seed,
            buffer: RolloutBuffer::default(),
        };
        Ok(BuiltMethod::new(OnlineMethod::new(policy), summary))
    }

    /// Generate, score, advantages: the buffer of generation `g`.
    fn fill(&mut self, cx: &mut Cx, model: &Decoder, g: u64) -> Result<()> {
        let (rollouts, scores) = self.rollouts(cx, model, g)?;
        let reference = match self.env.reference.model() {
            Some(reference) => {
                Some(self.env.logps(cx, reference, &rollouts, self.schedule.batch)?)
            }
            None => None,
        };
        let mut context = AdvantageContext {
            cx,
            model,
            env: &mut self.env,
            rollouts: &rollouts,
            scores: &scores,
            reference: reference.as_deref(),
            generation: g,
            group: self.schedule.group,
        };
        let WeighedRollouts { advantages, metrics } = self.objective.advantages(&mut context)?;
        self.buffer.pending = metrics::of_generation(&rollouts, &scores);
        self.buffer.pending.extend(metrics);
        self.env.record(&rollouts, &scores, &advantages);
        // Shuffled, so that a micro-batch is not one group; then prompts side by side in each, to
        // share their rows.
        let order = permutation(rollouts.len(), self.seed ^ seed::ROLLOUTS, g as u32);
        let sample = |i: usize| PolicySample {
            counts: rollouts[i].finished || !self.mask_truncated,
            reference: reference.as_ref().map(|all| all[i].clone()),
            rollout: rollouts[i].clone(),
            advantage: advantages[i],
        };
        let mut samples: Vec<PolicySample> = order.into_iter().map(sample).collect();
        for some in samples.chunks_mut(self.schedule.batch) {
            some.sort_by_key(|s| s.rollout.prompt);
        }
        self.buffer.replace(g, samples);
        Ok(())
    }

    /// The scored completions of generation `g`. Groups whose rewards do not differ teach nothing:
    /// with `dynamic_sampling` they are generated anew for other prompts.
    fn rollouts(&mut self, cx: &mut Cx, model: &Decoder, g: u64) -> Result<(Vec<Rollout>, Scores)> {
        let n = self.schedule.group;
        let mut prompts = self.env.prompts.of_generation(g, self.schedule.prompts_per_generation());
        let mut generate = |cx: &mut Cx, prompts: &[usize], stream| {
            let request = SampleRequest::new(n, stream);
            let rollouts = self.env.generate(cx, model, Split::Train, prompts, request)?;
            let scores = self.env.score(cx, Split::Train, &rollouts)?;
            Ok((rollouts, scores))
        };
        let (mut rollouts, mut scores) = generate(cx, &prompts, g)?;
        for round in 0..self.objective.extras().dynamic_sampling {
            let flat = flat_groups(&scores, n);
            let order = permutation(
                self.schedule.prompts,
                self.seed ^ seed::DYNAMIC,
                (g as u32) << 4 | round as u32,
            );
            let fresh: Vec<usize> =
                order.into_iter().filter(|p| !prompts.contains(p)).take(flat.len()).collect();
            if fresh.is_empty() {
                break;
            }
            let (more, theirs) = generate(cx, &fresh, g | ((round as u64 + 1) << 48))?;
            for (i, group) in flat.iter().take(fresh.len()).enumerate() {
                prompts[*group] = fresh[i];
                for m in 0..n {
                    rollouts[group * n + m] = more[i * n + m].clone();
                    for (own, new) in scores.each.iter_mut().zip(&theirs.each) {
                        own[group * n + m] = new[i * n + m];
                    }
                }
            }
        }
        Ok((rollouts, scores))
    }

    /// The samples of micro-batch `part` of the generation.
    fn part(&self, part: usize) -> &[PolicySample] {
        let batch = self.schedule.batch;
        self.buffer.samples.get(part * batch..(part + 1) * batch).unwrap_or_default()
    }

    /// Loss and metrics of one micro-batch; with `train`, its backward.
    fn update(&self, cx: &mut Cx, model: &Decoder, part: usize, train: bool) -> Result<StepReport> {
        let samples = self.part(part);
        let rollouts: Vec<&Rollout> = samples.iter().map(|s| &s.rollout).collect();
        let lengths: Vec<usize> = rollouts.iter().map(|r| r.ids.len()).collect();
        let batch = self.env.batch(cx, model, &rollouts)?;
        cx.tape = train.then(Tape::default);
        let hidden = model.target_hidden(cx, &batch)?;
        let out = head_logps(cx, &hidden, &model.head, &batch.targets, self.env.scale())?;
        let mask: Vec<bool> = samples.iter().flat_map(|s| s.spread(s.counts)).collect();
        let counted = self.buffer.samples.iter().filter(|s| s.counts);
        let active: usize = counted.map(|s| s.rollout.ids.len()).sum();
        let normalizer = self.objective.normalizer(active, self.schedule.micro_batches);
        let accumulation = self.schedule.accumulation;
        let weights = token_weights(normalizer, &lengths, &mask, accumulation);
        let extras = self.objective.extras();
        let old: Vec<f32> = rollouts.iter().flat_map(|r| r.logps.iter().copied()).collect();
        let mut factor: Option<Vec<f32>> = None;
        if let Some(threshold) = extras.off_policy_mask_threshold {
            let now = out.logp.to_f32()?;
            let advantages: Vec<f64> = samples.iter().map(|s| s.advantage).collect();
            factor = Some(off_policy_mask(&lengths, &mask, &old, &now, &advantages, threshold));
        }
        let entropies = out.entropy.to_f32()?;
        if extras.top_entropy_quantile < 1.0 {
            let high = top_entropy_mask(&entropies, &mask, extras.top_entropy_quantile);
            factor = Some(match factor {
                Some(f) => f.iter().zip(high).map(|(a, b)| a * b).collect(),
                None => high,
            });
        }
        let loss = self.objective.loss();
        let all = |f: &dyn Fn(&PolicySample) -> Vec<f32>| {
            floats(cx, &samples.iter().flat_map(f).collect::<Vec<f32>>())
        };
        let (old, weight) = (floats(cx, &old)?, floats(cx, &weights)?);
        let advantage = all(&|s| s.spread(s.advantage as f32))?;
        let wanted = loss.beta != 0.0;
        let reference = wanted.then(|| all(&|s| s.reference.clone().unwrap_or_default()));
        let reference = reference.transpose()?;
        let factor = factor.map(|f| floats(cx, &f)).transpose()?;
        let starts = starts_tensor(cx, lengths.iter().copied())?;
        let inputs = PolicyInputs {
            logp: &out.logp,
            old_logp: Some(&old),
            advantage: &advantage,
            weight: &weight,
            ref_logp: reference.as_ref(),
            scale: factor.as_ref(),
            log_is: None,
            starts: &starts,
        };
        let done = policy_loss(cx, &loss, &inputs)?;
        let count = mask.iter().filter(|m| **m).count().max(1) as f64;
        let mean = |values: &[f32]| -> f64 {
            let counted = values.iter().zip(&mask).filter(|(_, m)| **m);
            counted.map(|(v, _)| f64::from(*v)).sum::<f64>() / count
        };
        let (entropy, accumulation) = (mean(&entropies), accumulation as f64);
        if train {
            let mut seeds = vec![(done.loss.clone(), floats(cx, &[1.0])?)];
            if extras.entropy_coef != 0.0 {
                // - coef * mean entropy / accumulation
                let up = -(extras.entropy_coef / count / accumulation) as f32;
                let ups: Vec<f32> = mask.iter().map(|m| if *m { up } else { 0.0 }).collect();
                seeds.push((out.entropy.clone(), floats(cx, &ups)?));
            }
            cx.backward(seeds)?;
        }
        let value = done.loss.to_f32()?[0] - (extras.entropy_coef * entropy / accumulation) as f32;
        let (clip, ratio) = (done.clip.to_f32()?, done.ratio.to_f32()?);
        let share = |which: f32| {
            mean(&clip.iter().map(|c| f32::from(u8::from(*c == which))).collect::<Vec<_>>())
        };
        let mut metrics: Vec<Metric> = vec![
            ("entropy".into(), entropy),
            ("clip_ratio/low_mean".into(), share(1.0)),
            ("clip_ratio/high_mean".into(), share(2.0)),
            ("clip_ratio/region_mean".into(), share(1.0) + share(2.0)),
            // Of the full distribution; exactly 0 at the first pass over a generation.
            ("sampling/ratio_off_one_max".into(), f64::from(off_one(&ratio, &mask))),
        ];
        if wanted {
            metrics.push(("kl".into(), mean(&done.kl.to_f32()?)));
        }
        Ok(StepReport { loss: value, tokens: batch.rows, metrics })
    }
}

/// The largest distance of a ratio from 1.
fn off_one(ratio: &[f32], mask: &[bool]) -> f32 {
    ratio.iter().zip(mask).filter(|(_, m)| **m).map(|(r, _)| (r - 1.0).abs()).fold(0.0, f32::max)
}

/// Groups of `n` whose summed rewards do not differ.
fn flat_groups(scores: &Scores, n: usize) -> Vec<usize> {
    let total = scores.total();
    let flat = |group: &[Option<f64>]| group.windows(2).all(|w| w[0] == w[1]);
    total.chunks(n).enumerate().filter(|(_, g)| flat(g)).map(|(i, _)| i).collect()
}

impl<O: PolicyObjective + 'static> OnlineObjective for PolicyGradient<O> {
    env_field!();

    fn wants_reference(&self) -> bool {
        self.objective.online().beta != 0.0
    }

    fn micro_batches(&self) -> Option<usize> {
        Some(self.schedule.epoch())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, at: StepRows) -> Result<StepReport> {
        let mut report = StepReport::default();
        for k in at.micro.iter().copied().flatten() {
            let slot = self.schedule.slot(at.step, *k);
            if self.buffer.is_due(&slot)? {
                self.fill(cx, model, slot.generation)?;
                report.metrics.append(&mut self.buffer.pending);
            }
            report.add(self.update(cx, model, slot.micro, true)?);
        }
        Ok(report)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, step: u64, row: usize) -> Result<f32> {
        let slot = self.schedule.slot(step, row);
        Ok(self.update(cx, model, slot.micro, false)?.loss)
    }

    fn row_source(&self, step: u64, row: usize) -> String {
        let samples = self.part(self.schedule.slot(step, row).micro).iter();
        let mut sources: Vec<&str> =
            samples.map(|s| self.env.prompts.train[s.rollout.prompt].source.as_str()).collect();
        sources.dedup();
        sources.join(" + ")
    }

    fn state(&self) -> Result<StateFiles> {
        self.buffer.state(|_| Ok(()))
    }

    fn restore(&mut self, dir: &Path) -> Result<()> {
        let limits = (self.env.prompts.train.len(), self.schedule.size());
        self.buffer.restore(dir, limits, |_| Ok(Some(())))
    }
}
