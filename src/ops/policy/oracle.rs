//! The policy loss in naive f64, and the cases of this file's ops. Layer 4.
//!
//! Invariant: what stands under a hat in `kernels/policy.cu` is computed from the second input, a
//! constant copy of the log-probs, so that finite differences by the first see what the gradient
//! is.

use super::{ImportanceLevel, Policy, PolicyLoss, Term, ValueLoss};
use crate::autograd::F64;
use crate::ops::case::{Arg, Case, PerfShape, Rng};

/// The definition of the policy loss, token by token.
pub(super) fn loss(op: &Policy, x: &[&F64]) -> Vec<F64> {
    let c = &op.config;
    let [logp, now, old, advantage, weight, starts] = [0, 1, 2, 3, 4, 5].map(|i| &x[i].data);
    let [ref_logp, scale, log_is] = op.optional(x);
    let n = logp.len();
    let mut loss = F64::zeros(&[1]);
    let (mut ratio, mut kl, mut clip) = (F64::zeros(&[n]), F64::zeros(&[n]), F64::zeros(&[n]));
    let [pos_a, neg_a, pos_b, neg_b] = op.shapes().map(f64::from);
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

const CLIP: Term = Term::Clip { epsilon: 0.2, epsilon_high: 0.28, delta: f32::INFINITY };

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let two_sided = Term::Clip { epsilon: 0.2, epsilon_high: 0.2, delta: 1.7 };
    let vespo = Term::Vespo { k_pos: 2.0, lambda_pos: 3.0, k_neg: 3.0, lambda_neg: 2.0 };
    let terms = [
        ("clip", CLIP),
        ("two-sided clip", two_sided),
        ("cispo", Term::Cispo { epsilon_high: 1.3 }),
        ("sapo", Term::Sapo { temperature_pos: 1.0, temperature_neg: 1.05 }),
        ("vespo", vespo),
    ];
    let mut cases = Vec::new();
    for (name, term) in terms {
        for level in
            [ImportanceLevel::Token, ImportanceLevel::Sequence, ImportanceLevel::SequenceSum]
        {
            for more in [[false; 3], [true, true, term == vespo]] {
                for lengths in [&[1usize][..], &[5, 0, 131, 64, 1]] {
                    let config = PolicyLoss {
                        term,
                        level,
                        beta: if more[0] { 0.3 } else { 0.0 },
                        bias_correction_kl: level != ImportanceLevel::Sequence,
                    };
                    let label =
                        format!("{name} {level:?} {} sequences more {}", lengths.len(), more[0]);
                    cases.push(Case {
                        upstream: upstream(),
                        ..Case::new(
                            label,
                            Policy { config, more },
                            inputs(rng, lengths, config, more),
                        )
                    });
                }
            }
        }
    }
    let plain = PolicyLoss {
        term: CLIP,
        level: ImportanceLevel::Token,
        beta: 0.1,
        bias_correction_kl: false,
    };
    let more = [true, false, false];
    cases.push(Case {
        upstream: upstream(),
        ..Case::new("plain kl", Policy { config: plain, more }, inputs(rng, &[40, 3], plain, more))
    });
    for n in [1, 37, 2500] {
        let old = rng.array(&[n], 1.0);
        // away from the bounds of the clip, where the derivative jumps
        let value = F64::from_fn(&[n], |i| {
            old.data[i] + [-0.5, -0.1, 0.1, 0.5][rng.below(4)] + 0.05 * rng.uniform()
        });
        let returns = F64::from_fn(&[n], |i| old.data[i] + 2.0 * rng.normal());
        let arrays = [old, returns, weights(rng, n)].map(Arg::float);
        let inputs = [watched(value)].into_iter().chain(arrays).collect();
        cases.push(Case {
            upstream: vec![None, Some(0.0)],
            ..Case::new(format!("value {n}"), ValueLoss { cliprange: 0.2 }, inputs)
        });
    }
    cases.extend(super::advantage::cases(rng));
    cases
}

/// Only the loss has a gradient.
fn upstream() -> Vec<Option<f64>> {
    vec![None, Some(0.0), Some(0.0), Some(0.0)]
}

fn watched(value: F64) -> Arg {
    Arg { grad: true, ..Arg::float(value) }
}

/// About every fifth token is masked.
fn weights(rng: &mut Rng, n: usize) -> F64 {
    F64::from_fn(&[n], |i| {
        if i > 0 && rng.below(5) == 0 { 0.0 } else { (0.5 + rng.uniform()) / n as f64 }
    })
}

/// Log-ratios lie away from where a derivative jumps: clip bounds 0.8, 1.2, 1.28, 1.3 and 1.7.
fn inputs(rng: &mut Rng, lengths: &[usize], config: PolicyLoss, more: [bool; 3]) -> Vec<Arg> {
    const RATIOS: [f64; 6] = [0.55, 0.72, 0.9, 1.1, 1.45, 2.2];
    let n: usize = lengths.iter().sum();
    let (mut starts, mut old, mut advantage) = (vec![0], vec![], vec![]);
    let logp = F64::from_fn(&[n], |_| -0.2 - 2.0 * rng.uniform());
    let weight = weights(rng, n);
    for (s, len) in lengths.iter().enumerate() {
        let from = old.len();
        let kept = (from..from + len).filter(|t| weight.data[*t] != 0.0).count().max(1) as f64;
        let target = RATIOS[(s + 1) % RATIOS.len()].ln()
            / if config.level == ImportanceLevel::SequenceSum { kept } else { 1.0 };
        for t in from..from + len {
            let drawn = RATIOS[rng.below(RATIOS.len())].ln() + 0.02 * rng.uniform();
            old.push(
                logp.data[t]
                    - if config.level == ImportanceLevel::Token
                        && !matches!(config.term, Term::Vespo { .. })
                    {
                        drawn
                    } else {
                        target
                    },
            );
            // positive more often, so that the loss is no difference of near equals
            advantage.push(if rng.below(3) == 0 { -0.3 } else { 1.0 } * (0.5 + rng.uniform()));
        }
        starts.push(old.len() as i32);
    }
    if matches!(config.term, Term::Vespo { .. }) {
        // phi is near 0 unless the sequence's ratio is near 1
        old = (0..n).map(|t| logp.data[t] + 0.02 * rng.normal()).collect();
    }
    let mut args = vec![watched(logp.clone()), Arg::float(logp.clone())];
    args.extend([F64::new(&[n], old), F64::new(&[n], advantage), weight].map(Arg::float));
    args.push(Arg::ints(&starts));
    if more[0] {
        args.push(Arg::float(F64::from_fn(&[n], |t| logp.data[t] + 0.6 * rng.normal())));
    }
    if more[1] {
        args.push(Arg::float(F64::from_fn(&[n], |_| [0.0, 1.0, 1.5][rng.below(3)])));
    }
    if more[2] {
        args.push(Arg::float(rng.array(&[lengths.len()], 0.2)));
    }
    args
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let (level, more) = (ImportanceLevel::Token, [true, false, false]);
    let config = PolicyLoss { term: CLIP, level, beta: 0.1, bias_correction_kl: false };
    let inputs = inputs(rng, &vec![s.length; s.sequences], config, more);
    vec![Case::new("clip with kl", Policy { config, more }, inputs)]
}
