//! Online DPO: preference pairs sampled from the policy as it is at each step (Guo et al., "Direct
//! Language Model Alignment from Online AI Feedback", 2024).
//!
//! Two completions of each prompt of a step are sampled and scored; the one with the higher reward
//! is the chosen one. With u = log pi(y|x) - log ref(y|x), summed over a completion at the sampling
//! temperature, the loss of a pair is -log sigmoid(beta (u_w - u_l)), or for `ipo` (u_w - u_l - 1 /
//! (2 beta))^2, averaged over the pairs of the step.
//!
//! Names and defaults are TRL 1.16.0's. Unlike TRL: a pair whose rewards are equal (or missing) is
//! dropped and counted, where TRL takes the first as chosen; the mean is over the pairs of the
//! step, not of a micro-batch; the prompt of a pair is computed once; prompts are not truncated
//! (`max_length`).
//!
//! Layer 7. Invariant: pairs are sampled and used within one step, so a checkpoint holds none; as
//! long as the policy is the reference, bit for bit, margins are exactly 0.

use super::buffer::RolloutBuffer;
use super::env::{EnvOptions, RolloutEnv};
use super::metrics::of_generation;
use super::options::{RolloutOptions, explores};
use super::rollout::{Rollout, starts};
use super::sampler::SampleRequest;
use super::{OnlineMethod, OnlineObjective, StepRows, env_field};
use crate::autograd::{Cx, Tape};
use crate::config::{
    ReferenceSyncOptions, Report, RewardOptions, SamplingOptions, TrainingConfig, section,
};
use crate::error::{Error, Result};
use crate::methods::offline::completions::{reward_metrics, sides, sums};
use crate::methods::offline::rows::Split;
use crate::methods::reference::floats;
use crate::methods::{
    Averages, BuildMethod, BuiltMethod, Footprint, MethodEntry, MethodInputs, Metric, StepReport,
};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::ops::preference::{self, DpoIn, DpoLoss};
use crate::rewards::Scores;

pub const METHOD: MethodEntry = MethodEntry::new::<OnlineDpoConfig>(
    "online-dpo",
    "Online DPO: two completions of a prompt, ranked by rewards",
);

section! {
    /// TRL's `OnlineDPOConfig`.
    pub struct OnlineDpoConfig = "online-dpo" {
        /// Longest completion in tokens.
        pub max_new_tokens: usize = 64,
        /// Subtracted from the reward of a completion without EOS. none: 0.
        pub missing_eos_penalty: Option<f64> = None,
        /// How strongly the policy is held to the reference model. A list has one value for each
        /// epoch; the last one applies to all later epochs.
        pub beta: Vec<f64> = vec![0.1],
        /// The loss of a pair: sigmoid or ipo.
        pub loss_type: DpoLoss = DpoLoss::Sigmoid,
        ..pub rewards: RewardOptions = RewardOptions::default(),
        ..pub sampling: SamplingOptions =
            SamplingOptions { temperature: 0.9, ..SamplingOptions::default() },
        ..pub rollout: RolloutOptions = RolloutOptions::default(),
    }
}

impl OnlineDpoConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("max_new_tokens", self.max_new_tokens, 1);
        explores(&self.sampling, report);
        report.must(!self.beta.is_empty() && self.beta.iter().all(|b| *b > 0.0), || {
            "beta: one number above 0, or one for each epoch".into()
        });
        report.must(matches!(self.loss_type, DpoLoss::Sigmoid | DpoLoss::Ipo), || {
            "loss_type: online DPO supports sigmoid and ipo; use temper dpo for the others".into()
        });
    }
}

impl BuildMethod for OnlineDpoConfig {
    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 5e-7, disable_dropout: true, ..Default::default() }
    }

    fn footprint(&self) -> Footprint {
        Footprint { sequences: 2, reference: true }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let env = EnvOptions {
            rewards: self.rewards.clone(),
            sampling: self.sampling.clone(),
            sync: ReferenceSyncOptions::default(),
            max_completion_length: self.max_new_tokens,
            max_sequences: self.rollout.max_sequences,
            generation: 2
                * training.per_device_train_batch_size
                * training.gradient_accumulation_steps,
            ..EnvOptions::default()
        };
        let env = RolloutEnv::new(&env, training, inputs)?;
        let summary = format!("{} prompts, 2 completions each", env.prompts.train.len());
        let batch = training.per_device_train_batch_size;
        let micro = env.prompts.train.len().div_ceil(batch);
        let steps = micro.div_ceil(training.gradient_accumulation_steps).max(1) as u64;
        let (options, buffer) = (self.clone(), RolloutBuffer::default());
        let method = OnlineDpo { env, options, batch, steps_per_epoch: steps, buffer };
        Ok(BuiltMethod::new(OnlineMethod::new(method), summary))
    }
}

/// Two completions of a prompt, the chosen first, with their log-probs under the reference.
struct RankedPair {
    sides: [Rollout; 2],
    reference: [Vec<f32>; 2],
}

pub struct OnlineDpo {
    env: RolloutEnv,
    options: OnlineDpoConfig,
    batch: usize,
    steps_per_epoch: u64,
    buffer: RolloutBuffer<RankedPair>,
}

impl OnlineDpo {
    /// The beta of the epoch that contains a step.
    fn beta(&self, step: u64) -> f64 {
        let epoch = (step / self.steps_per_epoch) as usize;
        self.options.beta[epoch.min(self.options.beta.len() - 1)]
    }

    /// Rewards, with the penalty for completions without EOS. None: not scored.
    fn ranks(&self, rollouts: &[Rollout], scores: &Scores) -> Vec<Option<f64>> {
        let penalty = self.options.missing_eos_penalty.unwrap_or(0.0);
        let rank = |(score, r): (Option<f64>, &Rollout)| {
            score.map(|s| if r.finished { s } else { s - penalty })
        };
        scores.total().into_iter().zip(rollouts).map(rank).collect()
    }

    /// Generates, scores and ranks the pairs of a step. Returns the index of each prompt's pair.
    fn fill(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        step: u64,
        prompts: &[usize],
    ) -> Result<Vec<Option<usize>>> {
        let request = SampleRequest::new(2, step);
        let rollouts = self.env.generate(cx, model, Split::Train, prompts, request)?;
        let scores = self.env.score(cx, Split::Train, &rollouts)?;
        // As many tokens as the pairs of a micro-batch take, with a pair's prompt counted once.
        let longest = self.env.prompts.longest() + model.vocab().virtuals;
        let budget = self.batch * (longest + 2 * self.env.sampler.max_completion_length + 1);
        let Some(reference) = self.env.reference_logps(cx, &rollouts, budget)? else {
            return Err(Error::Run("the reference is missing; attach comes first".into()));
        };
        let ranks = self.ranks(&rollouts, &scores);
        let mut metrics = of_generation(&rollouts, &scores);
        metrics.extend(objective(&rollouts, &reference, &ranks, self.beta(step)));
        // Recorded as a completion's advantage: 1 chosen, -1 rejected, 0 dropped.
        let mut places = vec![1.0; rollouts.len()];
        let mut pairs = Vec::new();
        let mut pair_of_prompt = Vec::with_capacity(prompts.len());
        for i in (0..rollouts.len()).step_by(2) {
            let (won, lost) = match (ranks[i], ranks[i + 1]) {
                (Some(a), Some(b)) if a > b => (i, i + 1),
                (Some(a), Some(b)) if a < b => (i + 1, i),
                _ => {
                    (places[i], places[i + 1]) = (0.0, 0.0);
                    pair_of_prompt.push(None);
                    continue;
                }
            };
            places[lost] = -1.0;
            pair_of_prompt.push(Some(pairs.len()));
            pairs.push(RankedPair {
                sides: [won, lost].map(|k| rollouts[k].clone()),
                reference: [won, lost].map(|k| reference[k].clone()),
            });
        }
        metrics.push(("ties_dropped".into(), (prompts.len() - pairs.len()) as f64));
        self.env.record(&rollouts, &scores, &places);
        self.buffer.replace(step, pairs);
        self.buffer.pending = metrics;
        Ok(pair_of_prompt)
    }

    /// Loss and metrics of some of the step's `total` pairs; with `train`, also the backward.
    fn update(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        pairs: &[&RankedPair],
        total: usize,
        beta: f64,
        train: bool,
    ) -> Result<StepReport> {
        let n = pairs.len();
        let rollouts: Vec<&Rollout> = pairs.iter().flat_map(|p| &p.sides).collect();
        let batch = self.env.batch(cx, model, &rollouts)?;
        let starts = starts(rollouts.iter().map(|r| r.ids.len()));
        let ones = vec![1.0; starts[starts.len() - 1]];
        let reference: Vec<f32> = pairs.iter().flat_map(|p| p.reference.concat()).collect();
        // Summed by the same kernel as the policy's, otherwise margins would not be 0 at the first
        // step.
        let reference = floats(cx, &reference)?;
        let reference = sums(cx, &reference, &ones, &starts)?.reshape(&[n, 2])?;
        // TRL's ipo uses sums here, not means.
        let lens = floats(cx, &vec![1.0; 2 * n])?.reshape(&[n, 2])?;
        let weight = floats(cx, &vec![(1.0 / total.max(1) as f64) as f32; n])?;
        let one = floats(cx, &[1.0])?;
        cx.tape = train.then(Tape::default);
        let hidden = model.target_hidden(cx, &batch)?;
        let out = head_logps(cx, &hidden, &model.head, &batch.targets, self.env.scale())?;
        let logps = sums(cx, &out.logp, &ones, &starts)?.reshape(&[n, 2])?;
        let op = preference::Dpo::plain(self.options.loss_type, beta as f32);
        let x = DpoIn::new(&logps, &reference, &lens, &weight);
        let (loss, rewards) = preference::dpo(cx, op, &x)?;
        if train {
            cx.backward(vec![(loss.clone(), one)])?;
        }
        let mut metrics = reward_metrics(&rewards.to_f32()?);
        metrics.extend(sides("logps", &logps.to_f32()?));
        Ok(StepReport { loss: loss.to_f32()?[0], tokens: batch.rows, metrics })
    }
}

/// TRL's `objective/*` metrics; the sampler's log-probs are the policy's.
fn objective(
    rollouts: &[Rollout],
    reference: &[Vec<f32>],
    ranks: &[Option<f64>],
    beta: f64,
) -> Vec<Metric> {
    let n = rollouts.len().max(1) as f64;
    let sum = |v: &[f32]| v.iter().map(|x| f64::from(*x)).sum::<f64>();
    let own = rollouts.iter().map(|r| sum(&r.logps)).sum::<f64>() / n;
    let theirs = reference.iter().map(|r| sum(r)).sum::<f64>() / n;
    let ended = rollouts.iter().filter(|r| r.finished).count() as f64;
    let non_score = -beta * (own - theirs);
    let mut all: Vec<Metric> = vec![
        ("objective/kl".into(), own - theirs),
        ("objective/entropy".into(), -own),
        ("objective/non_score_reward".into(), non_score),
        ("val/contain_eos_token".into(), ended / n),
        ("beta".into(), beta),
    ];
    let known: Vec<f64> = ranks.iter().flatten().copied().collect();
    if !known.is_empty() {
        let mean = known.iter().sum::<f64>() / known.len() as f64;
        all.push(("objective/scores".into(), mean));
        all.push(("objective/rlhf_reward".into(), mean + non_score));
    }
    let margins: Vec<f64> =
        ranks.chunks_exact(2).filter_map(|p| Some((p[0]? - p[1]?).abs())).collect();
    if !margins.is_empty() {
        all.push((
            "objective/scores_margin".into(),
            margins.iter().sum::<f64>() / margins.len() as f64,
        ));
    }
    all
}

impl OnlineObjective for OnlineDpo {
    env_field!();

    fn wants_reference(&self) -> bool {
        true
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, at: StepRows) -> Result<StepReport> {
        let pair_of_prompt = self.fill(cx, model, at.step, &at.micro.concat())?;
        let mut report = StepReport::default();
        report.metrics.append(&mut self.buffer.pending);
        let (mut from, mut averages) = (0, Averages::default());
        let (total, beta) = (self.buffer.samples.len(), self.beta(at.step));
        for rows in at.micro {
            let own = pair_of_prompt[from..from + rows.len()].iter().flatten();
            let pairs: Vec<&RankedPair> = own.map(|p| &self.buffer.samples[*p]).collect();
            from += rows.len();
            if pairs.is_empty() {
                continue;
            }
            let update = self.update(cx, model, &pairs, total, beta, true)?;
            report.loss += update.loss;
            report.tokens += update.tokens;
            averages.add(update.metrics);
        }
        report.metrics.extend(averages.take());
        Ok(report)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, step: u64, row: usize) -> Result<f32> {
        let own = self.buffer.samples.iter().filter(|p| p.sides[0].prompt == row);
        let pairs: Vec<&RankedPair> = own.collect();
        if pairs.is_empty() {
            return Ok(0.0);
        }
        Ok(self.update(cx, model, &pairs, pairs.len(), self.beta(step), false)?.loss)
    }
}
