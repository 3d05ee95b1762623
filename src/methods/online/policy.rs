//! Training with a clipped policy loss: a generation is cut into micro-batches, which one or
//! several optimizer steps pass over. Layer 7. The update itself is in `update`.
//!
//! TRL 1.16.0's schedule: a generation has per_device_train_batch_size x steps_per_generation
//! completions, num_generations per prompt; it is shuffled, and serves steps_per_generation x
//! num_iterations micro-batches.
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
use super::rollout::{Rollout, StateReader, StateWriter, StoredRollout};
use super::sampler::SampleRequest;
use super::weights::Normalizer;
use super::{OnlineMethod, OnlineObjective, StepRows, env_field};
use crate::autograd::Cx;
use crate::config::{Section, TrainingConfig};
use crate::data::order::permutation;
use crate::error::Result;
use crate::methods::offline::rows::Split;
use crate::methods::{BuildMethod, BuiltMethod, MethodInputs, Metric, StateFiles, StepReport};
use crate::model::decoder::Decoder;
use crate::ops::policy::{PolicyLoss, Term};
use crate::rewards::Scores;
use crate::rng::seed;

/// What distinguishes methods with a policy loss.
pub trait PolicyObjective {
    /// One advantage per rollout, and metrics. May generate more completions (baselines).
    fn advantages(&self, context: &mut AdvantageContext) -> Result<WeighedRollouts>;

    fn loss(&self) -> PolicyLoss;

    fn normalizer(&self, active_tokens: usize, steps_per_generation: usize) -> Normalizer;

    /// The options shared with the other methods. A KL weight there requires a reference.
    fn online(&self) -> &OnlineConfig;

    /// GRPO's options that leave the loss term unchanged.
    fn extras(&self) -> PolicyExtras {
        PolicyExtras::default()
    }
}

/// GRPO's options that leave the loss term unchanged.
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

/// The inputs of an objective's advantages.
pub struct AdvantageContext<'a> {
    pub cx: &'a mut Cx,
    pub model: &'a Decoder,
    pub env: &'a mut RolloutEnv,
    pub rollouts: &'a [Rollout],
    pub scores: &'a Scores,
    /// Log-probs under the reference, if there is one.
    pub reference: Option<&'a [Vec<f32>]>,
    pub generation: u64,
    /// Completions per prompt.
    pub group: usize,
}

/// The advantage of each rollout, and metrics to log.
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
    pub(super) rollout: Rollout,
    pub(super) reference: Option<Vec<f32>>,
    pub(super) advantage: f64,
    /// Whether its tokens count in the loss.
    pub(super) counts: bool,
}

impl PolicySample {
    /// `value` for each of its tokens.
    pub(super) fn spread<T: Clone>(&self, value: T) -> Vec<T> {
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
    pub(super) env: RolloutEnv,
    pub(super) objective: O,
    pub(super) schedule: RolloutSchedule,
    mask_truncated: bool,
    seed: u64,
    pub(super) buffer: RolloutBuffer<PolicySample>,
}

/// The clipped term, with TRL's defaults for the other options.
pub fn clip_term(clip: &ClipOptions) -> Term {
    let (epsilon, epsilon_high) = clip.bounds();
    Term::Clip { epsilon, epsilon_high, delta: f32::INFINITY }
}

impl OnlineConfig {
    /// The options of the environment; a generation has `generation` completions.
    pub fn env(&self, generation: usize) -> EnvOptions {
        EnvOptions {
            generation,
            rewards: self.rewards.clone(),
            sampling: self.sampling.clone(),
            sync: self.sync.clone(),
            max_completion_length: self.max_completion_length,
            max_sequences: self.rollout.max_sequences,
            environment: self.environment.clone(),
        }
    }

    /// A summary of the data, to print.
    pub fn summary(&self, env: &RolloutEnv) -> String {
        let n = self.num_generations;
        let completions = if n == 1 { "completion" } else { "completions" };
        format!("{} prompts, {n} {completions} each", env.prompts.train.len())
    }
}

/// TRL's defaults, and one way to build all policy objectives.
impl<O: PolicyObjective + Section + Clone + 'static> BuildMethod for O {
    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-6, ..Default::default() }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        PolicyGradient::build(self.clone(), training, inputs)
    }
}

impl<O: PolicyObjective + 'static> PolicyGradient<O> {
    /// Errors if groups do not divide a generation.
    fn build(
        objective: O,
        training: &TrainingConfig,
        inputs: &MethodInputs,
    ) -> Result<BuiltMethod> {
        let options = objective.online().clone();
        let parts = options.steps_per_generation.unwrap_or(training.gradient_accumulation_steps);
        let generation = training.per_device_train_batch_size * parts;
        let env = RolloutEnv::new(&options.env(generation), training, inputs)?;
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

    /// Fills the buffer with generation `g`: generate, score, compute advantages.
    fn fill(&mut self, cx: &mut Cx, model: &Decoder, g: u64) -> Result<()> {
        let (rollouts, scores) = self.rollouts(cx, model, g)?;
        // The groups of a generation are whole here.
        let budget = self.env.budget(model, &self.schedule, true);
        let reference = self.env.reference_logps(cx, &rollouts, budget)?;
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
        // Shuffled as TRL shuffles, so that a micro-batch is not one group; then sorted by prompt
        // within each micro-batch. Which completions are computed together is a separate choice:
        // see `update`.
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

    /// The scored completions of generation `g`. Groups whose rewards are all equal have no
    /// gradient: with `dynamic_sampling` they are replaced by completions of other prompts.
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
            // Sixteen rounds a generation have a stream each; more take another seed.
            let (more_rounds, round_of) = ((round as u64 >> 4) << 32, round as u32 & 15);
            let order = permutation(
                self.schedule.prompts,
                self.seed ^ seed::DYNAMIC ^ more_rounds,
                (g as u32) << 4 | round_of,
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
    pub(super) fn part(&self, part: usize) -> &[PolicySample] {
        let batch = self.schedule.batch;
        self.buffer.samples.get(part * batch..(part + 1) * batch).unwrap_or_default()
    }
}

/// Indices of the groups of `n` whose summed rewards are all equal.
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
        for slots in self.schedule.spans(at.step, at.micro) {
            if self.buffer.is_due(&slots[0])? {
                self.fill(cx, model, slots[0].generation)?;
                report.metrics.append(&mut self.buffer.pending);
            }
            let parts = slots[0].micro..slots[0].micro + slots.len();
            report.add(self.update(cx, model, parts, true)?);
        }
        Ok(report)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, step: u64, row: usize) -> Result<f32> {
        let slot = self.schedule.slot(step, row);
        Ok(self.update(cx, model, slot.micro..slot.micro + 1, false)?.loss)
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
