//! The policy loss in naive f64. Layer 4.
//!
//! Invariant: terms with a hat in `kernels/policy.cu` are computed from the second input, a
//! constant copy of the log-probs, so that finite differences of the first agree with the gradient.

use super::term::{ImportanceLevel, PolicyLoss, Term};
use crate::autograd::F64;

/// The definition of the policy loss, token by token. `optional`: ref_logp, scale, log_is.
pub(super) fn loss(c: &PolicyLoss, x: &[&F64], optional: [Option<&F64>; 3]) -> Vec<F64> {
    let [logp, now, old, advantage, weight, starts] = [0, 1, 2, 3, 4, 5].map(|i| &x[i].data);
    let [ref_logp, scale, log_is] = optional;
    let n = logp.len();
    let mut loss = F64::zeros(&[1]);
    let (mut ratio, mut kl, mut clip) = (F64::zeros(&[n]), F64::zeros(&[n]), F64::zeros(&[n]));
    let [pos_a, neg_a, pos_b, neg_b] = c.shapes().map(f64::from);
    for s in 0..starts.len() - 1 {
        let tokens = starts[s] as usize..starts[s + 1] as usize;
        let kept: Vec<usize> = tokens.clone().filter(|t| weight[*t] != 0.0).collect();
        let log_ratio = |p: &[f64], t: usize| match c.level {
            ImportanceLevel::Token => p[t] - old[t],
            ImportanceLevel::Sequence => {
                kept.iter().map(|t| p[*t] - old[*t]).sum::<f64>() / kept.len().max(1) as f64
            }
            ImportanceLevel::SequenceSum => kept.iter().map(|t| p[*t] - old[*t]).sum::<f64>(),
        };
        let correction = log_is.map_or(0.0, |l| l.data[s]);
        let log_w =
            kept.iter().map(|t| (now[*t] - old[*t]).clamp(-20.0, 20.0)).sum::<f64>() + correction;
        let log_w = log_w.clamp(1e-8f64.ln(), 20.0);
        for t in tokens {
            let (a, r) = (advantage[t], log_ratio(logp, t).exp());
            let held = log_ratio(now, t).exp();
            (ratio.data[t], clip.data[t]) = (r, 0.0);
            let term = match c.term {
                Term::Clip { epsilon, epsilon_high, delta } => {
                    let (low, high) = (1.0 - f64::from(epsilon), 1.0 + f64::from(epsilon_high));
                    let bounded = r.min(f64::from(delta));
                    clip.data[t] = match () {
                        () if bounded < low && a < 0.0 => 1.0,
                        () if bounded > high && a > 0.0 => 2.0,
                        () => 0.0,
                    };
                    -(bounded * a).min(r.clamp(low, high) * a)
                }
                Term::Cispo { epsilon_high } => {
                    clip.data[t] = if r > f64::from(epsilon_high) && a > 0.0 { 2.0 } else { 0.0 };
                    -held.min(f64::from(epsilon_high)) * a * logp[t]
                }
                Term::Sapo { .. } => {
                    let tau = if a > 0.0 { pos_a } else { neg_a };
                    -4.0 / tau * a / (1.0 + (-tau * (r - 1.0)).exp())
                }
                Term::Vespo { .. } => {
                    let (k, lambda) = if a >= 0.0 { (pos_a, pos_b) } else { (neg_a, neg_b) };
                    let lambda = lambda.max(1e-4);
                    let phi = (lambda + k * log_w - lambda * log_w.exp()).exp();
                    ratio.data[t] = phi;
                    -phi * a * logp[t]
                }
            };
            if let Some(reference) = ref_logp {
                let x = reference.data[t] - logp[t];
                kl.data[t] = (x.exp_m1() - x) * if c.bias_correction_kl { r } else { 1.0 };
            }
            if weight[t] != 0.0 {
                loss.data[0] += weight[t]
                    * (scale.map_or(1.0, |s| s.data[t]) * term + f64::from(c.beta) * kl.data[t]);
            }
        }
    }
    vec![loss, ratio, kl, clip]
}
