//! The loop of a clipped policy loss: a generation is cut into micro-batches, which one or several
//! optimizer steps go over. Layer 7.
//!
//! TRL 1.16.0's schedule: a generation has per_device_train_batch_size x steps_per_generation
//! completions of as many prompts as num_generations gives, is shuffled, and serves
//! steps_per_generation x num_iterations micro-batches.
//!
//! Invariant: the ratio at the first pass over a generation is exactly 1, because the sampler's
//! log-probs are the trainer's (`methods::online`); a normaliser goes by the step batch, never by
//! what fits in memory.

use std::time::Instant;

use serde_json::{Value, json};

use super::env::{Rollout, Set, World};
use crate::autograd::{Cx, Tape};
use crate::config::TrainingConfig;
use crate::data::order::permutation;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::online::weights::{
    Normalizer, off_policy_mask, token_weights, top_entropy_mask,
};
use crate::methods::{Method, Metric, StepReport};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::ops::policy::{PolicyInputs, PolicyLoss, policy_loss};
use crate::rewards::Scores;
use crate::tensor::Tensor;

/// What sets a method of this kind apart.
pub trait Objective {
    /// One advantage a rollout, and metrics. May generate more (baselines).
    fn advantages(
        &mut self,
        act: &mut Act,
        rollouts: &[Rollout],
        scores: &Scores,
    ) -> Result<(Vec<f64>, Vec<Metric>)>;

    fn loss(&self) -> PolicyLoss;

    fn normalizer(&self, active_tokens: usize, steps_per_generation: usize) -> Normalizer;

    /// Whether log-probs under the reference are wanted: for the loss, or for rewards.
    fn wants_reference(&self) -> bool;

    /// Further choices, TRL's defaults.
    fn options(&self) -> Options {
        Options::default()
    }
}

/// Choices of GRPO that leave the term as it is.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub top_entropy_quantile: f64,
    pub entropy_coef: f64,
    pub off_policy_mask_threshold: Option<f64>,
    pub dynamic_sampling: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            top_entropy_quantile: 1.0,
            entropy_coef: 0.0,
            off_policy_mask_threshold: None,
            dynamic_sampling: 0,
        }
    }
}

/// What an objective may use while it makes advantages.
pub struct Act<'a> {
    pub cx: &'a mut Cx,
    pub model: &'a Decoder,
    pub world: &'a mut World,
    /// Log-probs under the reference, where there is one.
    pub reference: Option<&'a [Vec<f32>]>,
    pub generation: u64,
}

/// A completion as it is trained on.
#[derive(Clone, Debug, PartialEq)]
struct Sample {
    rollout: Rollout,
    reference: Option<Vec<f32>>,
    advantage: f64,
    /// Its tokens count.
    counts: bool,
}

pub struct Policy<O> {
    pub world: World,
    pub objective: O,
    batch: usize,
    accumulation: usize,
    seed: u64,
    number: u64,
    generation: Option<u64>,
    buffer: Vec<Sample>,
    pending: Vec<Metric>,
}

const STATE: &str = "rollouts.json";

impl<O: Objective> Policy<O> {
    /// Errors: a generation that its groups do not divide.
    pub fn new(world: World, objective: O, training: &TrainingConfig) -> Result<Policy<O>> {
        let policy = Policy {
            world,
            objective,
            batch: training.per_device_train_batch_size,
            accumulation: training.gradient_accumulation_steps,
            seed: training.seed,
            number: 0,
            generation: None,
            buffer: Vec::new(),
            pending: Vec::new(),
        };
        let (size, group) = (policy.generation_size(), policy.world.keys.num_generations);
        if !size.is_multiple_of(group) {
            return Err(Error::Config(format!(
                "a generation has {size} completions (per_device_train_batch_size x steps_per_generation), which \
                 num_generations = {group} does not divide; change one of the three"
            )));
        }
        let prompts = size / group;
        if policy.world.train.len() < prompts {
            let rows = policy.world.train.len();
            return Err(Error::Config(format!(
                "a generation takes {prompts} prompts, the data has {rows}"
            )));
        }
        Ok(policy)
    }

    fn steps_per_generation(&self) -> usize {
        self.world.keys.steps_per_generation.unwrap_or(self.accumulation)
    }

    fn generation_size(&self) -> usize {
        self.batch * self.steps_per_generation()
    }

    fn prompts(&self) -> usize {
        self.generation_size() / self.world.keys.num_generations
    }

    /// Micro-batches that a generation serves.
    fn served(&self) -> usize {
        self.steps_per_generation() * self.world.keys.num_iterations
    }

    /// Generate, score, advantages: the buffer of generation `g`.
    fn fill(&mut self, cx: &mut Cx, model: &Decoder, g: u64) -> Result<()> {
        let n = self.world.keys.num_generations;
        let mut prompts = self.world.prompts_of(g, self.prompts());
        let mut rollouts = self.world.generate(cx, model, Set::Train, &prompts, n, g, false)?;
        let mut scores = self.world.score(cx, Set::Train, &rollouts)?;
        for round in 0..self.objective.options().dynamic_sampling {
            let flat = flat_groups(&scores, n);
            if flat.is_empty() {
                break;
            }
            // Other prompts for the groups that teach nothing; a round's draws are its own.
            let order = permutation(
                self.world.train.len(),
                self.seed ^ 0x6479_6e61,
                (g as u32) << 4 | round as u32,
            );
            let fresh: Vec<usize> =
                order.into_iter().filter(|p| !prompts.contains(p)).take(flat.len()).collect();
            if fresh.is_empty() {
                break;
            }
            let draw = g | ((round as u64 + 1) << 48);
            let more = self.world.generate(cx, model, Set::Train, &fresh, n, draw, false)?;
            let theirs = self.world.score(cx, Set::Train, &more)?;
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
        let begin = Instant::now();
        let reference = match self.world.reference.model() {
            Some(reference) if self.objective.wants_reference() => {
                Some(self.world.logps(cx, reference, &rollouts, self.batch)?)
            }
            _ => None,
        };
        let mut act = Act {
            cx,
            model,
            world: &mut self.world,
            reference: reference.as_deref(),
            generation: g,
        };
        let (advantages, metrics) = self.objective.advantages(&mut act, &rollouts, &scores)?;
        self.pending = self.world.metrics(&rollouts, &scores);
        self.pending.extend(metrics);
        self.world.record(&rollouts, &scores, &advantages);
        let mut reference = reference.map(|r| r.into_iter());
        let samples: Vec<Sample> = rollouts
            .into_iter()
            .zip(advantages)
            .map(|(rollout, advantage)| Sample {
                counts: rollout.finished || !self.world.keys.mask_truncated_completions,
                reference: reference.as_mut().and_then(Iterator::next),
                rollout,
                advantage,
            })
            .collect();
        // Shuffled, so that a micro-batch is not one group; then prompts side by side in each, to
        // share their rows.
        let order = permutation(samples.len(), self.seed ^ 0x726f_6c6c, g as u32);
        self.buffer = order.into_iter().map(|i| samples[i].clone()).collect();
        for some in self.buffer.chunks_mut(self.batch) {
            some.sort_by_key(|s| s.rollout.prompt);
        }
        self.generation = Some(g);
        self.world.seconds.train += begin.elapsed().as_secs_f64();
        Ok(())
    }

    /// The generation and the part of it that virtual row `k` of this step's epoch is.
    fn place(&self, k: usize) -> (u64, usize) {
        let each = self.world.generations_an_epoch(self.prompts());
        let micro = each * self.served();
        let epoch = self.number / micro.div_ceil(self.accumulation) as u64;
        let g = epoch * each as u64 + (k / self.served()) as u64;
        (g, k % self.steps_per_generation())
    }

    /// Loss and figures of one micro-batch; with `train`, its backward.
    fn micro(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        part: usize,
        train: bool,
    ) -> Result<(f32, Vec<Metric>, usize)> {
        let samples = &self.buffer[part * self.batch..(part + 1) * self.batch];
        let rows: Vec<(usize, &[u32])> =
            samples.iter().map(|s| (s.rollout.prompt, s.rollout.ids.as_slice())).collect();
        let lengths: Vec<usize> = rows.iter().map(|r| r.1.len()).collect();
        let batch = self.world.batch(cx, model, &rows)?;
        if train {
            cx.tape = Some(Tape::default());
        }
        let hidden = model.target_hidden(cx, &batch)?;
        let out = head_logps(cx, &hidden, &model.head, &batch.targets, self.world.scale())?;
        let mask: Vec<bool> =
            samples.iter().flat_map(|s| vec![s.counts; s.rollout.ids.len()]).collect();
        let active: usize =
            self.buffer.iter().filter(|s| s.counts).map(|s| s.rollout.ids.len()).sum();
        let normalizer = self.objective.normalizer(active, self.steps_per_generation());
        let weights = token_weights(normalizer, &lengths, &mask, self.accumulation);
        let options = self.objective.options();
        let n = mask.len();
        let floats = |values: &[f32]| {
            Tensor::from_host(&cx.pool, "policy inputs", DType::F32, &[values.len()], values)
        };
        let old: Vec<f32> = samples.iter().flat_map(|s| s.rollout.logps.iter().copied()).collect();
        let advantage: Vec<f32> =
            samples.iter().flat_map(|s| vec![s.advantage as f32; s.rollout.ids.len()]).collect();
        let mut factor: Option<Vec<f32>> = None;
        if let Some(threshold) = options.off_policy_mask_threshold {
            let now = out.logp.to_f32()?;
            let advantages: Vec<f64> = samples.iter().map(|s| s.advantage).collect();
            factor = Some(off_policy_mask(&lengths, &mask, &old, &now, &advantages, threshold));
        }
        if options.top_entropy_quantile < 1.0 {
            let high =
                top_entropy_mask(&out.entropy.to_f32()?, &mask, options.top_entropy_quantile);
            factor = Some(match factor {
                Some(f) => f.iter().zip(high).map(|(a, b)| a * b).collect(),
                None => high,
            });
        }
        let loss = self.objective.loss();
        let reference: Option<Vec<f32>> = (loss.beta != 0.0)
            .then(|| samples.iter().flat_map(|s| s.reference.iter().flatten().copied()).collect());
        let starts: Vec<i32> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |at, l| {
                *at += *l as i32;
                Some(*at)
            }))
            .collect();
        let (old_t, advantage_t, weight_t) =
            (floats(&old)?, floats(&advantage)?, floats(&weights)?);
        let factor = factor.map(|f| floats(&f)).transpose()?;
        let reference = reference.map(|r| floats(&r)).transpose()?;
        let one = floats(&[1.0])?;
        let starts = cx.ints("sequence starts", &starts)?;
        let inputs = PolicyInputs {
            logp: &out.logp,
            old_logp: Some(&old_t),
            advantage: &advantage_t,
            weight: &weight_t,
            ref_logp: reference.as_ref(),
            scale: factor.as_ref(),
            log_is: None,
            starts: &starts,
        };
        let done = policy_loss(cx, &loss, &inputs)?;
        let entropies = out.entropy.to_f32()?;
        let count = mask.iter().filter(|m| **m).count().max(1) as f64;
        let mean = |values: &[f32]| -> f64 {
            values.iter().zip(&mask).filter(|(_, m)| **m).map(|(v, _)| f64::from(*v)).sum::<f64>()
                / count
        };
        let entropy = mean(&entropies);
        let mut value = done.loss.to_f32()?[0];
        if train {
            let mut seeds = vec![(done.loss.clone(), one)];
            if options.entropy_coef != 0.0 {
                // - coef * mean entropy / accumulation
                let up = -(options.entropy_coef / count / self.accumulation as f64) as f32;
                let ups: Vec<f32> = mask.iter().map(|m| if *m { up } else { 0.0 }).collect();
                seeds.push((
                    out.entropy.clone(),
                    Tensor::from_host(&cx.pool, "policy inputs", DType::F32, &[n], &ups)?,
                ));
            }
            cx.backward(seeds)?;
        }
        value -= (options.entropy_coef * entropy / self.accumulation as f64) as f32;
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
        if loss.beta != 0.0 {
            metrics.push(("kl".into(), mean(&done.kl.to_f32()?)));
        }
        Ok((value, metrics, batch.rows))
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

impl<O: Objective> Method for Policy<O> {
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
        let wanted = self.objective.wants_reference();
        self.world.attach(cx, model, wanted)
    }

    fn micro_batches(&self) -> Option<usize> {
        Some(self.world.generations_an_epoch(self.prompts()) * self.served())
    }

    fn begin(&mut self, number: u64) -> Result<()> {
        self.number = number;
        Ok(())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<StepReport> {
        let mut report = StepReport { loss: 0.0, tokens: 0, metrics: Vec::new() };
        for k in micro.iter().flat_map(|m| m.iter()) {
            let (g, part) = self.place(*k);
            if self.generation != Some(g) {
                if !k.is_multiple_of(self.served()) {
                    return Err(Error::Run(format!(
                        "the completions of generation {g} are not there; resume from an earlier checkpoint"
                    )));
                }
                self.fill(cx, model, g)?;
                report.metrics.append(&mut self.pending);
            }
            let begin = Instant::now();
            let (loss, metrics, rows) = self.micro(cx, model, part, true)?;
            self.world.seconds.train += begin.elapsed().as_secs_f64();
            report.loss += loss;
            report.tokens += rows;
            report.metrics.extend(metrics);
        }
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
        let (_, part) = self.place(row);
        Ok(self.micro(cx, model, part, false)?.0)
    }

    fn row_source(&self, row: usize) -> String {
        let (_, part) = self.place(row);
        let samples = self.buffer.iter().skip(part * self.batch).take(self.batch);
        let mut sources: Vec<&str> =
            samples.map(|s| self.world.train[s.rollout.prompt].source.as_str()).collect();
        sources.dedup();
        sources.join(" + ")
    }

    fn take_completions(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.world.log)
    }

    fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let samples: Vec<Value> = self
            .buffer
            .iter()
            .map(|s| {
                json!({
                    "prompt": s.rollout.prompt, "ids": s.rollout.ids, "logps": bits(&s.rollout.logps),
                    "entropies": bits(&s.rollout.entropies), "finished": s.rollout.finished, "text": s.rollout.text,
                    "reference": s.reference.as_deref().map(bits), "advantage": s.advantage.to_bits(), "counts": s.counts,
                })
            })
            .collect();
        let text = json!({ "generation": self.generation, "samples": samples }).to_string();
        let mut files = self.world.reference.state()?;
        files.push((STATE.into(), text.into_bytes()));
        Ok(files)
    }

    fn restore(&mut self, _cx: &mut Cx, dir: &std::path::Path) -> Result<()> {
        self.world.reference.restore(dir)?;
        let path = dir.join(STATE);
        let state: Value = serde_json::from_slice(&fsio::read(&path)?)
            .map_err(|e| Error::checkpoint(&path, e.to_string()))?;
        let sample = |v: &Value| -> Option<Sample> {
            let floats = |v: &Value| -> Option<Vec<f32>> {
                v.as_array()?.iter().map(|x| Some(f32::from_bits(x.as_u64()? as u32))).collect()
            };
            Some(Sample {
                rollout: Rollout {
                    prompt: v["prompt"].as_u64()? as usize,
                    ids: v["ids"]
                        .as_array()?
                        .iter()
                        .map(|x| Some(x.as_u64()? as u32))
                        .collect::<Option<_>>()?,
                    logps: floats(&v["logps"])?,
                    entropies: floats(&v["entropies"])?,
                    finished: v["finished"].as_bool()?,
                    text: v["text"].as_str()?.into(),
                },
                reference: floats(&v["reference"]),
                advantage: f64::from_bits(v["advantage"].as_u64()?),
                counts: v["counts"].as_bool()?,
            })
        };
        let samples = state["samples"]
            .as_array()
            .map(|all| all.iter().map(sample).collect::<Option<Vec<_>>>());
        let Some(Some(samples)) = samples else {
            return Err(Error::checkpoint(&path, "holds a completion that cannot be read"));
        };
        self.generation = state["generation"].as_u64();
        self.buffer = samples;
        Ok(())
    }
}
