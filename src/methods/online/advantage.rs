//! From rewards to advantages, on the host: those of GRPO, RLOO and REINFORCE++, and PPO's token
//! rewards. Layer 7.
//!
//! Invariant: GRPO and RLOO are TRL 1.16.0's, including its treatment of missing rewards: a
//! completion that no reward scored is excluded from all means and gets advantage 0. Standard
//! deviations have Bessel's correction.

use crate::config::value::words;
use crate::error::{Error, Result};
use crate::rewards::Scores;

words! {
    /// TRL's `scale_rewards`: the divisor of advantages.
    pub enum ScaleRewards {
        Group = "group" | "true",
        Batch = "batch",
        None = "none" | "false",
    }
}

words! {
    /// TRL's `multi_objective_aggregation`.
    pub enum RewardAggregation {
        SumThenNormalize = "sum_then_normalize",
        NormalizeThenSum = "normalize_then_sum",
    }
}

/// Advantages, and what is logged about the rewards.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    pub advantages: Vec<f64>,
    /// For each row, whether all rewards of its group (or of the batch) are equal, so that it has
    /// no gradient.
    pub zero_std: Vec<bool>,
}

/// TRL's guard against division by a standard deviation of zero.
const EPS: f64 = 1e-4;

/// GRPO. The `num_generations` completions of a prompt are adjacent.
pub fn grpo(
    scores: &Scores,
    num_generations: usize,
    scale: ScaleRewards,
    how: RewardAggregation,
) -> Result<Advantages> {
    let n = scores.each.first().map_or(0, Vec::len);
    groups(n, num_generations)?;
    let total = or_nan(&scores.total());
    if how == RewardAggregation::NormalizeThenSum {
        let mut sum = vec![0.0; n];
        for (rewards, weight) in scores.each.iter().zip(&scores.weights) {
            let rewards = or_nan(rewards);
            for (out, group) in sum.chunks_mut(num_generations).zip(rewards.chunks(num_generations))
            {
                let (mean, std) = (mean(group), deviation(group));
                for (o, r) in out.iter_mut().zip(group) {
                    let scaled = weight * (r - mean) / (std + EPS);
                    *o += if scaled.is_nan() { 0.0 } else { scaled };
                }
            }
        }
        sum.iter_mut().zip(&total).filter(|(_, t)| t.is_nan()).for_each(|(s, _)| *s = f64::NAN);
        let (mean, std) = (mean(&sum), deviation(&sum));
        let advantages = sum.iter().map(|r| zeroed((r - mean) / (std + EPS))).collect();
        return Ok(Advantages { advantages, zero_std: vec![is_zero(std); n] });
    }
    let batch_std = deviation(&total);
    let (mut advantages, mut zero_std) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for group in total.chunks(num_generations) {
        let mean = mean(group);
        let std = if scale == ScaleRewards::Batch { batch_std } else { deviation(group) };
        let divide = if scale == ScaleRewards::None { 1.0 } else { std + EPS };
        advantages.extend(group.iter().map(|r| zeroed((r - mean) / divide)));
        zero_std.extend(group.iter().map(|_| is_zero(std)));
    }
    Ok(Advantages { advantages, zero_std })
}

/// RLOO: the baseline of a completion is the mean of its siblings. `rewards` already include the KL
/// penalty (see [`rloo_rewards`]). `normalize` is TRL's `normalize_advantages`.
pub fn rloo(
    rewards: &[Option<f64>],
    num_generations: usize,
    normalize: bool,
) -> Result<Advantages> {
    groups(rewards.len(), num_generations)?;
    let rewards = or_nan(rewards);
    let (mut advantages, mut zero_std) = (Vec::new(), Vec::new());
    for group in rewards.chunks(num_generations) {
        let seen = group.iter().filter(|r| !r.is_nan());
        let (count, sum) = (seen.clone().count() as f64, seen.sum::<f64>());
        // a single scored completion has no siblings: 0 / 0, which is zeroed below
        advantages.extend(
            group
                .iter()
                .map(|r| if num_generations > 1 { r - (sum - r) / (count - 1.0) } else { 0.0 }),
        );
        let std = if num_generations > 1 { deviation(group) } else { 0.0 };
        zero_std.extend(group.iter().map(|_| is_zero(std)));
    }
    if normalize {
        let (mean, std) = (mean(&advantages), deviation(&advantages));
        advantages.iter_mut().for_each(|a| *a = (*a - mean) / (std + EPS));
    }
    advantages.iter_mut().for_each(|a| *a = zeroed(*a));
    Ok(Advantages { advantages, zero_std })
}

/// RLOO's reward: clipped to `reward_clip_range`, minus `beta` times the sequence's `sum (log
/// pi_old - log pi_ref)`.
pub fn rloo_rewards(
    rewards: &[Option<f64>],
    clip: Option<(f64, f64)>,
    beta: f64,
    kl: &[f64],
) -> Vec<Option<f64>> {
    let one = |(i, r): (usize, &Option<f64>)| {
        let r = clip.map_or((*r)?, |(low, high)| r.unwrap_or(f64::NAN).clamp(low, high));
        Some(r - if beta == 0.0 { 0.0 } else { beta * kl[i] })
    };
    rewards.iter().enumerate().map(one).collect()
}

/// REINFORCE++ (arXiv 2501.03262): rewards whitened over all tokens of the batch, where each token
/// has its sequence's reward. With `group` the mean of the prompt's completions is subtracted first
/// (the "baseline" form).
pub fn reinforce_plus_plus(
    rewards: &[Option<f64>],
    lengths: &[usize],
    group: Option<usize>,
) -> Result<Vec<f64>> {
    let mut values = or_nan(rewards);
    if let Some(size) = group {
        groups(values.len(), size)?;
        for group in values.chunks_mut(size) {
            let mean = mean(group);
            group.iter_mut().for_each(|r| *r -= mean);
        }
    }
    let weighted =
        || values.iter().zip(lengths).filter(|(r, _)| !r.is_nan()).map(|(r, l)| (*r, *l as f64));
    let tokens: f64 = weighted().map(|(_, l)| l).sum();
    if tokens < 2.0 {
        return Ok(vec![0.0; values.len()]);
    }
    let mean = weighted().map(|(r, l)| r * l).sum::<f64>() / tokens;
    let variance =
        weighted().map(|(r, l)| l * (r - mean) * (r - mean)).sum::<f64>() / (tokens - 1.0);
    Ok(values.iter().map(|r| zeroed((r - mean) / (variance + 1e-8).sqrt())).collect())
}

words! {
    /// TRL's `kl_estimator` of PPO.
    pub enum KlEstimator {
        K1 = "k1",
        K3 = "k3",
    }
}

/// PPO's rewards of a completion's tokens, and their KL from the reference.
pub struct TokenRewards {
    pub rewards: Vec<f32>,
    pub kl: Vec<f32>,
}

/// PPO's token rewards of one completion: `-kl_coef * kl_t`, and the score on the last token.
pub fn token_rewards(
    logps: &[f32],
    ref_logps: &[f32],
    score: f64,
    kl_coef: f64,
    estimator: KlEstimator,
) -> TokenRewards {
    let kl: Vec<f64> = logps
        .iter()
        .zip(ref_logps)
        .map(|(p, r)| {
            let log_ratio = f64::from(*r) - f64::from(*p);
            if estimator == KlEstimator::K1 { -log_ratio } else { log_ratio.exp_m1() - log_ratio }
        })
        .collect();
    let mut rewards: Vec<f64> = kl.iter().map(|k| -kl_coef * k).collect();
    if let Some(last) = rewards.last_mut() {
        *last += score;
    }
    let single = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect();
    TokenRewards { rewards: single(rewards), kl: single(kl) }
}

/// Adapts the KL coefficient to reach a target KL (Ziegler et al., arXiv 1909.08593, section 2.2).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveKl {
    pub coef: f64,
    pub target: f64,
    pub horizon: f64,
}

impl AdaptiveKl {
    /// Updates the coefficient after a batch of `episodes` whose mean KL per sequence was `kl`.
    pub fn update(&mut self, kl: f64, episodes: usize) {
        let error = (kl / self.target - 1.0).clamp(-0.2, 0.2);
        self.coef *= 1.0 + error * episodes as f64 / self.horizon;
    }
}

/// Mean and standard deviation of a reward for the metrics, over the rows that it scored; NaN if
/// there are too few.
pub fn mean_std(rewards: &[Option<f64>]) -> (f64, f64) {
    let values = or_nan(rewards);
    (mean(&values), deviation(&values))
}

fn groups(n: usize, size: usize) -> Result<()> {
    if size == 0 || !n.is_multiple_of(size) {
        return Err(Error::Config(format!(
            "{n} completions are not a whole number of groups of num_generations={size}"
        )));
    }
    Ok(())
}

fn or_nan(rewards: &[Option<f64>]) -> Vec<f64> {
    rewards.iter().map(|r| r.unwrap_or(f64::NAN)).collect()
}

fn zeroed(v: f64) -> f64 {
    if v.is_nan() { 0.0 } else { v }
}

/// `torch.isclose(std, 0)`.
fn is_zero(std: f64) -> bool {
    std.abs() <= 1e-8
}

fn mean(values: &[f64]) -> f64 {
    let seen = values.iter().filter(|v| !v.is_nan());
    seen.clone().sum::<f64>() / seen.count() as f64
}

/// NaN for fewer than two scored values, but 0 for a batch or group of one, as in TRL.
fn deviation(values: &[f64]) -> f64 {
    if values.len() == 1 {
        return 0.0;
    }
    let seen = values.iter().filter(|v| !v.is_nan());
    let n = seen.clone().count() as f64;
    let m = mean(values);
    (seen.map(|v| (v - m) * (v - m)).sum::<f64>() / (n - 1.0)).sqrt()
}
