//! A generation of PPO: completions, token rewards, advantages and returns. Layer 7.
//!
//! Invariant: advantages are whitened over the tokens of the whole generation.

use super::critic::Critic;
use super::options::PpoConfig;
use crate::autograd::Cx;
use crate::error::Result;
use crate::methods::Metric;
use crate::methods::online::advantage::token_rewards;
use crate::methods::online::env::RolloutEnv;
use crate::methods::online::metrics::{mean, sum};
use crate::methods::online::rollout::{
    Rollout, StateReader, StateWriter, StoredRollout, split, starts_tensor,
};
use crate::methods::reference::floats;
use crate::model::decoder::Decoder;
use crate::ops::policy::{gae, whiten};

/// A completion with PPO's values for its tokens.
#[derive(Clone)]
pub struct PpoSample {
    pub rollout: Rollout,
    pub values: Vec<f32>,
    pub advantages: Vec<f32>,
    pub returns: Vec<f32>,
}

impl StoredRollout for PpoSample {
    fn write(&self, out: &mut StateWriter) {
        self.rollout.write(out);
        for values in [&self.values, &self.advantages, &self.returns] {
            out.values(values);
        }
    }

    fn read(from: &mut StateReader) -> Option<PpoSample> {
        let rollout = Rollout::read(from)?;
        let (values, advantages, returns) = (from.values()?, from.values()?, from.values()?);
        Some(PpoSample { rollout, values, advantages, returns })
    }

    fn fits(&self, prompts: usize) -> bool {
        let n = self.rollout.ids.len();
        let lists = [&self.values, &self.advantages, &self.returns];
        self.rollout.fits(prompts) && lists.iter().all(|list| list.len() == n)
    }
}

/// The inputs of a generation's advantages.
pub struct GenerationContext<'a> {
    pub env: &'a mut RolloutEnv,
    pub critic: &'a Critic,
    pub options: &'a PpoConfig,
    pub kl_coef: f64,
    /// Tokens computed at once.
    pub budget: usize,
}

/// A generation to train on, and metrics to log.
pub struct WeighedGeneration {
    pub samples: Vec<PpoSample>,
    pub metrics: Vec<Metric>,
    /// Mean KL per sequence from the reference.
    pub mean_kl: f64,
}

impl GenerationContext<'_> {
    /// A completion's score after penalty and clipping.
    fn final_score(&self, rollout: &Rollout, score: f64) -> f64 {
        let penalty = self.options.missing_eos_penalty.filter(|_| !rollout.finished);
        let score = score - penalty.unwrap_or(0.0);
        self.options.reward_clip.map_or(score, |bound| score.clamp(-bound, bound))
    }

    /// Computes token rewards, advantages and returns of scored completions.
    pub fn weigh(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        rollouts: Vec<Rollout>,
        totals: &[f64],
    ) -> Result<WeighedGeneration> {
        let reference = self.env.reference_logps(cx, &rollouts, self.budget)?;
        let reference =
            reference.unwrap_or_else(|| rollouts.iter().map(|r| r.logps.clone()).collect());
        let values = self.env.in_chunks(model, &rollouts, self.budget, |some| {
            let batch = self.env.batch(cx, model, some)?;
            self.critic.values(cx, model, &batch, None)?.to_f32()
        })?;
        let (mut rewards, mut kls, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for ((r, q), total) in rollouts.iter().zip(&reference).zip(totals) {
            let score = self.final_score(r, *total);
            let of = token_rewards(&r.logps, q, score, self.kl_coef, self.options.kl_estimator);
            rewards.extend(of.rewards);
            kls.push(sum(&of.kl));
            kept.push(score);
        }
        let lengths = || rollouts.iter().map(|r| r.ids.len());
        let starts = starts_tensor(cx, lengths())?;
        let ones = floats(cx, &vec![1.0; rewards.len()])?;
        let mut reward = floats(cx, &rewards)?;
        if self.options.whiten_rewards {
            // TRL keeps the mean of the rewards.
            reward = whiten(cx, &reward, &ones, false)?;
        }
        let value = floats(cx, &values.concat())?;
        let (gamma, lam) = (self.options.gamma as f32, self.options.lam as f32);
        let (advantage, returns) = gae(cx, &reward, &value, &starts, gamma, lam)?;
        let advantage = whiten(cx, &advantage, &ones, true)?.to_f32()?;
        let mean = |v: &[f64]| mean(v.iter().copied());
        let entropy: f64 = rollouts.iter().map(|r| sum(&r.entropies)).sum();
        let non_score = -self.kl_coef * mean(&kls);
        let metrics = vec![
            ("objective/kl".into(), mean(&kls)),
            ("objective/entropy".into(), entropy / rollouts.len().max(1) as f64),
            ("objective/non_score_reward".into(), non_score),
            ("objective/scores".into(), mean(&kept)),
            ("objective/rlhf_reward".into(), mean(&kept) + non_score),
            ("kl_coef".into(), self.kl_coef),
            ("val/num_eos_tokens".into(), rollouts.iter().filter(|r| r.finished).count() as f64),
        ];
        let mean_kl = mean(&kls);
        let (advantage, returns) =
            (split(&advantage, lengths()), split(&returns.to_f32()?, lengths()));
        let parts = advantage.into_iter().zip(returns);
        let sample = |((rollout, values), (advantages, returns))| PpoSample {
            rollout,
            values,
            advantages,
            returns,
        };
        let samples = rollouts.into_iter().zip(values).zip(parts).map(sample).collect();
        Ok(WeighedGeneration { samples, metrics, mean_kl })
    }
}
