//! Metrics of generated completions, with TRL's names. Layer 7.
//!
//! Invariant: a mean over nothing is left out, never NaN.

use super::advantage::mean_std;
use super::rollout::Rollout;
use crate::methods::Metric;
use crate::rewards::Scores;

/// Lengths and rewards of a generation.
pub fn of_generation(rollouts: &[Rollout], scores: &Scores) -> Vec<Metric> {
    let mut out: Vec<Metric> = Vec::new();
    let mut put = |name: String, value: f64| {
        if value.is_finite() {
            out.push((name.into(), value));
        }
    };
    let lengths = |only: bool| -> Vec<f64> {
        rollouts.iter().filter(|r| !only || r.finished).map(|r| r.ids.len() as f64).collect()
    };
    for (name, all) in [("", lengths(false)), ("_terminated", lengths(true))] {
        if all.is_empty() {
            continue;
        }
        let (low, high) = (all.iter().copied().fold(f64::INFINITY, f64::min), max(&all));
        put(format!("completions/mean{name}_length"), mean(all.iter().copied()));
        put(format!("completions/min{name}_length"), low);
        put(format!("completions/max{name}_length"), high);
    }
    let cut = rollouts.iter().filter(|r| !r.finished).count();
    put("completions/clipped_ratio".into(), cut as f64 / rollouts.len().max(1) as f64);
    let talks: Vec<_> = rollouts.iter().filter_map(|r| r.conversation.as_deref()).collect();
    if !talks.is_empty() {
        put("environment/mean_turns".into(), mean(talks.iter().map(|t| t.turns as f64)));
        let theirs = talks.iter().map(|t| t.sampled.iter().filter(|s| !**s).count() as f64);
        put("environment/mean_tokens".into(), mean(theirs));
    }
    for (name, each) in scores.names.iter().zip(&scores.each) {
        let (mean, std) = mean_std(each);
        put(format!("rewards/{name}/mean"), mean);
        put(format!("rewards/{name}/std"), std);
    }
    let (mean, std) = mean_std(&scores.total());
    put("reward".into(), mean);
    put("reward_std".into(), std);
    out
}

fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// The mean; 0 if there are no values.
pub fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len().max(1) as f64;
    values.sum::<f64>() / n
}

/// The sum of log-probs.
pub fn sum(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x)).sum()
}
