//! Online DPO: preference pairs that the policy makes itself, as it is at the step (Guo et al.,
//! "Direct Language Model Alignment from Online AI Feedback", 2024).
//!
//! Two completions of each prompt of a step are drawn and scored; the one with the higher reward is
//! the chosen one. With u = log pi(y|x) - log ref(y|x), summed over a completion at the sampling
//! temperature, the loss of a pair is -log sigmoid(beta (u_w - u_l)), or for `ipo` (u_w - u_l - 1 /
//! (2 beta))^2, its mean over the pairs of the step.
//!
//! TRL 1.16.0's names and defaults. Differs: a pair whose rewards do not differ (or lack one) is
//! dropped and counted, where TRL takes the first as chosen; the mean goes over the pairs of the
//! step, not over a micro-batch's; the prompt of a pair is computed once; prompts are not cut
//! (`max_length`).
//!
//! Layer 7. Invariant: pairs are made and used within one step, so a checkpoint holds none; as long
//! as the policy is the reference, bit for bit, margins are exactly 0.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use crate::autograd::{Cx, Tape};
use crate::config::{DpoLoss, OnlineDpoConfig, OnlineDpoLoss, TrainingConfig};
use crate::error::{Error, Result};
use crate::methods::offline::completions::{floats, reward_figures, sides, sums};
use crate::methods::online::env::{Rollout, Set, World};
use crate::methods::{Averages, Footprint, Method, Metric, Recipe, Source, StepReport};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::ops::preference::{self, Divergence, DpoIn};
use crate::rewards::Scores;

impl Recipe for OnlineDpoConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.chat_template_path.as_deref()
    }

    fn footprint(&self) -> Footprint {
        Footprint { sequences: 2, reference: true }
    }

    fn disable_dropout(&self) -> bool {
        true
    }

    fn method(
        &self,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let world = World::new(&self.online(), training, source)?;
        let said = format!("{} prompts, 2 completions each", world.train.len());
        Ok((Box::new(OnlineDpo::new(world, self, training)), said))
    }
}

/// Two completions of a prompt, the chosen first, with their log-probs under the reference.
struct Pair {
    sides: [Rollout; 2],
    reference: [Vec<f32>; 2],
}

pub struct OnlineDpo {
    world: World,
    keys: OnlineDpoConfig,
    batch: usize,
    steps_per_epoch: u64,
    number: u64,
    /// Of the step at hand.
    pairs: Vec<Pair>,
}

impl OnlineDpo {
    pub fn new(world: World, keys: &OnlineDpoConfig, training: &TrainingConfig) -> OnlineDpo {
        let batch = training.per_device_train_batch_size;
        let steps =
            world.train.len().div_ceil(batch).div_ceil(training.gradient_accumulation_steps);
        OnlineDpo {
            world,
            keys: keys.clone(),
            batch,
            steps_per_epoch: steps.max(1) as u64,
            number: 0,
            pairs: vec![],
        }
    }

    /// The beta of the epoch that the step is in.
    fn beta(&self) -> f64 {
        let epoch = (self.number / self.steps_per_epoch) as usize;
        self.keys.beta[epoch.min(self.keys.beta.len() - 1)]
    }

    /// Rewards with the penalty of those that did not end. None: not scored.
    fn ranks(&self, rollouts: &[Rollout], scores: &Scores) -> Vec<Option<f64>> {
        let penalty = self.keys.missing_eos_penalty.unwrap_or(0.0);
        let total = scores.total();
        total
            .iter()
            .zip(rollouts)
            .map(|(s, r)| s.map(|s| if r.finished { s } else { s - penalty }))
            .collect()
    }

    /// Generate, score, rank: the pairs of a step, and for each prompt the number of its pair.
    fn fill(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        prompts: &[usize],
    ) -> Result<(Vec<Option<usize>>, Vec<Metric>)> {
        let rollouts =
            self.world.generate(cx, model, Set::Train, prompts, 2, self.number, false)?;
        let scores = self.world.score(cx, Set::Train, &rollouts)?;
        let begin = Instant::now();
        let Some(reference) = self.world.reference.model() else {
            return Err(Error::Run("the reference was not made; attach comes first".into()));
        };
        let reference = self.world.logps(cx, reference, &rollouts, 2 * self.batch)?;
        let ranks = self.ranks(&rollouts, &scores);
        let mut metrics = self.world.metrics(&rollouts, &scores);
        metrics.extend(objective(&rollouts, &reference, &ranks, self.beta()));
        let mut places = vec![1.0; rollouts.len()];
        self.pairs.clear();
        let mut of_prompt = Vec::with_capacity(prompts.len());
        for i in (0..rollouts.len()).step_by(2) {
            let (won, lost) = match (ranks[i], ranks[i + 1]) {
                (Some(a), Some(b)) if a > b => (i, i + 1),
                (Some(a), Some(b)) if a < b => (i + 1, i),
                _ => {
                    (places[i], places[i + 1]) = (0.0, 0.0);
                    of_prompt.push(None);
                    continue;
                }
            };
            places[lost] = -1.0;
            of_prompt.push(Some(self.pairs.len()));
            self.pairs.push(Pair {
                sides: [rollouts[won].clone(), rollouts[lost].clone()],
                reference: [reference[won].clone(), reference[lost].clone()],
            });
        }
        metrics.push(("ties_dropped".into(), (prompts.len() - self.pairs.len()) as f64));
        // What stands as a completion's advantage: 1 chosen, -1 rejected, 0 dropped.
        self.world.record(&rollouts, &scores, &places);
        self.world.seconds.train += begin.elapsed().as_secs_f64();
        Ok((of_prompt, metrics))
    }

    /// Loss and figures of some pairs, of `total` in the step; with `train`, the backward.
    fn update(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        pairs: &[&Pair],
        total: usize,
        train: bool,
    ) -> Result<(f32, Vec<Metric>, usize)> {
        let n = pairs.len();
        let samples: Vec<(usize, &[u32])> =
            pairs.iter().flat_map(|p| &p.sides).map(|r| (r.prompt, r.ids.as_slice())).collect();
        let batch = self.world.batch(cx, model, &samples)?;
        let mut starts = vec![0];
        for (_, ids) in &samples {
            starts.push(starts[starts.len() - 1] + ids.len());
        }
        let ones = vec![1.0; starts[starts.len() - 1]];
        let reference: Vec<f32> =
            pairs.iter().flat_map(|p| &p.reference).flatten().copied().collect();
        // The same sums by the same kernel, or margins would not be 0 at the first step.
        let reference = floats(cx, &reference)?;
        let reference = sums(cx, &reference, &ones, &starts)?.reshape(&[n, 2])?;
        // TRL's ipo is of sums here, not of means.
        let lens = floats(cx, &vec![1.0; 2 * n])?.reshape(&[n, 2])?;
        let weight = floats(cx, &vec![(1.0 / total.max(1) as f64) as f32; n])?;
        let one = floats(cx, &[1.0])?;
        cx.tape = train.then(Tape::default);
        let hidden = model.target_hidden(cx, &batch)?;
        let out = head_logps(cx, &hidden, &model.head, &batch.targets, self.world.scale())?;
        let logps = sums(cx, &out.logp, &ones, &starts)?.reshape(&[n, 2])?;
        let loss = match self.keys.loss_type {
            OnlineDpoLoss::Sigmoid => DpoLoss::Sigmoid,
            OnlineDpoLoss::Ipo => DpoLoss::Ipo,
        };
        let op = preference::Dpo {
            losses: vec![(loss, 1.0)],
            divergence: Divergence::ReverseKl,
            beta: self.beta() as f32,
            label_smoothing: 0.0,
            discopop_tau: 1.0,
        };
        let x = DpoIn {
            logps: &logps,
            reference: &reference,
            lens: &lens,
            weight: &weight,
            nll: None,
            aligned: None,
        };
        let (loss, rewards) = preference::dpo(cx, op, &x)?;
        if train {
            cx.backward(vec![(loss.clone(), one)])?;
        }
        let mut metrics = reward_figures(&rewards.to_f32()?);
        metrics.extend(sides("logps", &logps.to_f32()?));
        Ok((loss.to_f32()?[0], metrics, batch.rows))
    }
}

/// TRL's `objective/*` figures; log-probs of the sampler are the policy's.
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

impl Method for OnlineDpo {
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
        self.world.attach(cx, model, true)
    }

    fn begin(&mut self, number: u64) -> Result<()> {
        self.number = number;
        Ok(())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<StepReport> {
        let mut report = StepReport { loss: 0.0, tokens: 0, metrics: Vec::new() };
        let (of_prompt, metrics) = self.fill(cx, model, &micro.concat())?;
        report.metrics = metrics;
        let begin = Instant::now();
        let (mut at, mut figures) = (0, Averages::default());
        for rows in micro {
            let own = of_prompt[at..at + rows.len()].iter().flatten();
            let pairs: Vec<&Pair> = own.map(|p| &self.pairs[*p]).collect();
            at += rows.len();
            if pairs.is_empty() {
                continue;
            }
            let (loss, metrics, tokens) = self.update(cx, model, &pairs, self.pairs.len(), true)?;
            report.loss += loss;
            report.tokens += tokens;
            figures.add(metrics);
        }
        report.metrics.extend(figures.take());
        self.world.seconds.train += begin.elapsed().as_secs_f64();
        report.metrics.extend(self.world.take_seconds());
        Ok(report)
    }

    fn stepped(&mut self, _cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        self.world.reference.stepped(model, done)
    }

    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, _batch: usize) -> Result<Vec<Metric>> {
        self.world.evaluate(cx, model)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32> {
        let pairs: Vec<&Pair> = self.pairs.iter().filter(|p| p.sides[0].prompt == row).collect();
        if pairs.is_empty() {
            Ok(0.0)
        } else {
            Ok(self.update(cx, model, &pairs, pairs.len(), false)?.0)
        }
    }

    fn row_source(&self, row: usize) -> String {
        self.world.train[row].source.clone()
    }

    fn take_completions(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.world.log)
    }

    fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
        self.world.reference.state()
    }

    fn restore(&mut self, _cx: &mut Cx, dir: &Path) -> Result<()> {
        self.world.reference.restore(dir)
    }
}
