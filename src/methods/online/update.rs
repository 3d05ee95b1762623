//! The update of a clipped policy loss: forward and backward over the completions of some
//! micro-batches. Layer 7.
//!
//! Weights come from TRL's micro-batches, which define their normalisers; the completions are
//! computed in chunks that keep those of a prompt together (`chunks`).
//!
//! Invariant: a token's log-prob, weight and metrics do not depend on its chunk, so chunks change
//! the order of the gradient's sums alone. If an option needs all tokens of a micro-batch at once
//! (`top_entropy_quantile`), the chunks are the micro-batches.

use std::ops::Range;

use super::policy::{PolicyGradient, PolicyObjective, PolicySample};
use super::rollout::{Rollout, split, starts_tensor};
use super::weights::{off_policy_mask, token_weights, top_entropy_mask};
use crate::autograd::{Cx, Tape};
use crate::error::Result;
use crate::methods::reference::floats;
use crate::methods::{Metric, StepReport};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::ops::policy::{PolicyInputs, policy_loss};
use crate::tensor::Tensor;

/// The weights of a completion, computed on the host before the forward.
struct SampleWeights {
    /// One weight per token.
    loss: Vec<f32>,
    /// The upstream of its tokens' entropies.
    entropy: f32,
}

/// The outputs of a chunk, still on the device.
struct ChunkOutput {
    samples: Vec<usize>,
    tokens: usize,
    loss: Tensor,
    /// In the order of [`TokenValues`].
    values: [Tensor; 3],
    kl: Option<Tensor>,
}

/// Logged values of each token, by completion: entropy, clip, ratio, and the divergence from the
/// reference, if there is one.
struct TokenValues {
    values: [Vec<Vec<f32>>; 3],
    kl: Option<Vec<Vec<f32>>>,
}

impl<O: PolicyObjective + 'static> PolicyGradient<O> {
    /// Loss and metrics of some micro-batches of the generation, all of one optimizer step; with
    /// `train`, also their backward.
    pub(super) fn update(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        parts: Range<usize>,
        train: bool,
    ) -> Result<StepReport> {
        let samples: Vec<&PolicySample> = parts.flat_map(|part| self.part(part)).collect();
        let weights = self.sample_weights(&samples);
        let mut outputs = Vec::new();
        for chunk in self.update_chunks(model, &samples) {
            outputs.push(self.chunk(cx, model, &samples, &weights, chunk, train)?);
        }
        // Nothing is read back before the last backward is launched.
        self.report(&samples, outputs)
    }

    fn update_chunks(&self, model: &Decoder, samples: &[&PolicySample]) -> Vec<Vec<usize>> {
        if self.objective.extras().top_entropy_quantile < 1.0 {
            let numbers: Vec<usize> = (0..samples.len()).collect();
            return numbers.chunks(self.schedule.batch).map(<[usize]>::to_vec).collect();
        }
        let budget = self.env.budget(model, &self.schedule, self.schedule.whole_groups());
        self.env.chunks(model, samples.iter().map(|s| &s.rollout), budget)
    }

    /// The weights of each completion, normalised over its micro-batch.
    fn sample_weights(&self, samples: &[&PolicySample]) -> Vec<SampleWeights> {
        let counted = self.buffer.samples.iter().filter(|s| s.counts);
        let active: usize = counted.map(|s| s.rollout.ids.len()).sum();
        let normalizer = self.objective.normalizer(active, self.schedule.micro_batches);
        let accumulation = self.schedule.accumulation;
        let coef = self.objective.extras().entropy_coef;
        let mut all = Vec::with_capacity(samples.len());
        for micro in samples.chunks(self.schedule.batch) {
            let lengths: Vec<usize> = micro.iter().map(|s| s.rollout.ids.len()).collect();
            let mask = mask(micro);
            let weights = token_weights(normalizer, &lengths, &mask, accumulation);
            // - coef * mean entropy / accumulation
            let up = -(coef / count(&mask) / accumulation as f64) as f32;
            let entropy = |s: &PolicySample| if s.counts { up } else { 0.0 };
            let each = split(&weights, lengths).into_iter().zip(micro);
            all.extend(each.map(|(loss, s)| SampleWeights { loss, entropy: entropy(s) }));
        }
        all
    }

    /// The forward of some completions; with `train`, also the backward.
    fn chunk(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        samples: &[&PolicySample],
        weights: &[SampleWeights],
        chunk: Vec<usize>,
        train: bool,
    ) -> Result<ChunkOutput> {
        let own: Vec<&PolicySample> = chunk.iter().map(|i| samples[*i]).collect();
        let rollouts: Vec<&Rollout> = own.iter().map(|s| &s.rollout).collect();
        let lengths: Vec<usize> = rollouts.iter().map(|r| r.ids.len()).collect();
        let batch = self.env.batch(cx, model, &rollouts)?;
        cx.tape = train.then(Tape::default);
        let hidden = model.target_hidden(cx, &batch)?;
        let out = head_logps(cx, &hidden, &model.head, &batch.targets, self.env.scale())?;
        let extras = self.objective.extras();
        let old: Vec<f32> = rollouts.iter().flat_map(|r| r.logps.iter().copied()).collect();
        let mut factor: Option<Vec<f32>> = None;
        if let Some(threshold) = extras.off_policy_mask_threshold {
            let (now, mask) = (out.logp.to_f32()?, mask(&own));
            let advantages: Vec<f64> = own.iter().map(|s| s.advantage).collect();
            factor = Some(off_policy_mask(&lengths, &mask, &old, &now, &advantages, threshold));
        }
        if extras.top_entropy_quantile < 1.0 {
            let entropies = out.entropy.to_f32()?;
            let high = top_entropy_mask(&entropies, &mask(&own), extras.top_entropy_quantile);
            factor = Some(match factor {
                Some(f) => f.iter().zip(high).map(|(a, b)| a * b).collect(),
                None => high,
            });
        }
        let loss = self.objective.loss();
        let all = |f: &dyn Fn(&PolicySample) -> Vec<f32>| {
            floats(cx, &own.iter().flat_map(|s| f(s)).collect::<Vec<f32>>())
        };
        let old = floats(cx, &old)?;
        let weight: Vec<f32> =
            chunk.iter().flat_map(|i| weights[*i].loss.iter().copied()).collect();
        let weight = floats(cx, &weight)?;
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
        if train {
            let mut seeds = vec![(done.loss.clone(), floats(cx, &[1.0])?)];
            if extras.entropy_coef != 0.0 {
                let ups: Vec<f32> =
                    chunk.iter().flat_map(|i| samples[*i].spread(weights[*i].entropy)).collect();
                seeds.push((out.entropy.clone(), floats(cx, &ups)?));
            }
            cx.backward(seeds)?;
        }
        Ok(ChunkOutput {
            samples: chunk,
            tokens: batch.rows,
            loss: done.loss,
            values: [out.entropy, done.clip, done.ratio],
            kl: wanted.then_some(done.kl),
        })
    }

    /// Reads the chunks' outputs back; metrics are means over each of TRL's micro-batches.
    fn report(&self, samples: &[&PolicySample], outputs: Vec<ChunkOutput>) -> Result<StepReport> {
        let mut report = StepReport::default();
        for output in &outputs {
            report.loss += output.loss.to_f32()?[0];
            report.tokens += output.tokens;
        }
        let TokenValues { values: [entropies, clips, ratios], kl } =
            TokenValues::read(samples, &outputs)?;
        drop(outputs);
        let coef = self.objective.extras().entropy_coef / self.schedule.accumulation as f64;
        for (m, micro) in samples.chunks(self.schedule.batch).enumerate() {
            let from = m * self.schedule.batch;
            let mask = mask(micro);
            let of = |values: &[Vec<f32>]| values[from..from + micro.len()].concat();
            let mean = |values: &[f32]| -> f64 {
                let counted = values.iter().zip(&mask).filter(|(_, m)| **m);
                counted.map(|(v, _)| f64::from(*v)).sum::<f64>() / count(&mask)
            };
            let (entropy, clip) = (mean(&of(&entropies)), of(&clips));
            let share = |which: f32| {
                mean(&clip.iter().map(|c| f32::from(u8::from(*c == which))).collect::<Vec<_>>())
            };
            report.loss -= (coef * entropy) as f32;
            let mut metrics: Vec<Metric> = vec![
                ("entropy".into(), entropy),
                ("clip_ratio/low_mean".into(), share(1.0)),
                ("clip_ratio/high_mean".into(), share(2.0)),
                ("clip_ratio/region_mean".into(), share(1.0) + share(2.0)),
                // For the full distribution; exactly 0 at the first pass over a generation.
                ("sampling/ratio_off_one_max".into(), f64::from(off_one(&of(&ratios), &mask))),
            ];
            if let Some(kl) = &kl {
                metrics.push(("kl".into(), mean(&of(kl))));
            }
            report.metrics.extend(metrics);
        }
        Ok(report)
    }
}

impl TokenValues {
    fn read(samples: &[&PolicySample], outputs: &[ChunkOutput]) -> Result<TokenValues> {
        let all = |tensor: &dyn Fn(&ChunkOutput) -> Option<Tensor>| -> Result<Vec<Vec<f32>>> {
            let mut by_sample = vec![Vec::new(); samples.len()];
            for output in outputs {
                let Some(values) = tensor(output) else { continue };
                let lengths = output.samples.iter().map(|i| samples[*i].rollout.ids.len());
                let each = split(&values.to_f32()?, lengths);
                for (i, values) in output.samples.iter().zip(each) {
                    by_sample[*i] = values;
                }
            }
            Ok(by_sample)
        };
        let value = |k: usize| all(&|output| Some(output.values[k].clone()));
        let wanted = outputs.iter().any(|output| output.kl.is_some());
        Ok(TokenValues {
            values: [value(0)?, value(1)?, value(2)?],
            kl: wanted.then(|| all(&|output| output.kl.clone())).transpose()?,
        })
    }
}

/// Which tokens count in the loss.
fn mask(samples: &[&PolicySample]) -> Vec<bool> {
    samples.iter().flat_map(|s| s.spread(s.counts)).collect()
}

/// How many count, at least 1.
fn count(mask: &[bool]) -> f64 {
    mask.iter().filter(|m| **m).count().max(1) as f64
}

/// The largest distance of a ratio from 1.
fn off_one(ratio: &[f32], mask: &[bool]) -> f32 {
    ratio.iter().zip(mask).filter(|(_, m)| **m).map(|(r, _)| (r - 1.0).abs()).fold(0.0, f32::max)
}
