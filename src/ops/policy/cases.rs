//! The cases of the ops of online RL. Layer 4.
//!
//! Invariant: every term, level and optional input is covered.

use super::advantage;
use super::loss::{Policy, ValueLoss};
use super::term::{ImportanceLevel, PolicyLoss, Term};
use crate::autograd::F64;
use crate::ops::case::{Arg, Case, PerfShape, Rng};

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
        // avoid the bounds of the clip, where the derivative jumps
        let value = F64::from_fn(&[n], |i| {
            old.data[i] + [-0.5, -0.1, 0.1, 0.5][rng.below(4)] + 0.05 * rng.uniform()
        });
        let returns = F64::from_fn(&[n], |i| old.data[i] + 2.0 * rng.normal());
        let arrays = [old, returns, weights(rng, n)].map(Arg::float);
        let inputs = [Arg::watched(value)].into_iter().chain(arrays).collect();
        cases.push(Case {
            upstream: vec![None, Some(0.0)],
            ..Case::new(format!("value {n}"), ValueLoss { cliprange: 0.2 }, inputs)
        });
    }
    cases.extend(advantage::cases(rng));
    cases
}

/// Only the loss has a gradient.
fn upstream() -> Vec<Option<f64>> {
    vec![None, Some(0.0), Some(0.0), Some(0.0)]
}

/// About every fifth token is masked.
fn weights(rng: &mut Rng, n: usize) -> F64 {
    F64::from_fn(&[n], |i| {
        if i > 0 && rng.below(5) == 0 { 0.0 } else { (0.5 + rng.uniform()) / n as f64 }
    })
}

/// Log-ratios avoid the points where a derivative jumps: the clip bounds 0.8, 1.2, 1.28, 1.3 and
/// 1.7.
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
            // more often positive, so that the loss is not a difference of nearly equal terms
            advantage.push(if rng.below(3) == 0 { -0.3 } else { 1.0 } * (0.5 + rng.uniform()));
        }
        starts.push(old.len() as i32);
    }
    if matches!(config.term, Term::Vespo { .. }) {
        // phi is near 0 unless the sequence's ratio is near 1
        old = (0..n).map(|t| logp.data[t] + 0.02 * rng.normal()).collect();
    }
    let mut args = vec![Arg::watched(logp.clone()), Arg::float(logp.clone())];
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
