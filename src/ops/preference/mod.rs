//! The preference losses: from log-probs summed over sequences to one loss. Layer 4.
//!
//! Invariant: everything here is F32 in every build, and a loss is a weighted sum over pairs (or
//! sequences) whose weights the caller gives (1 / pairs, over gradient accumulation): no loss knows
//! how many micro-batches a step has. A pair's numbers lie together: [n, 2], the chosen first.
//! Math: `kernels/preference.cu`.
//!
//! The way to a loss: the head's log-probs `[tokens]` -> [`segment_sums`] -> `[sequences]` -> one
//! of the ops below. Rewards and other figures come with the loss and carry no gradient.

mod dpo;
mod oracle;
mod pairs;
mod unpaired;

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::tensor::Tensor;

pub use dpo::{Dpo, DpoIn, DpoLoss, FDivergence, dpo};
pub use pairs::{BradleyTerry, Cpo, CpoLoss, Orpo, bradley_terry, cpo, orpo};
pub use unpaired::{RunningMean, Unpaired, UnpairedLoss, kl_baseline, running_mean, unpaired};

/// Sums of `weights x values` over segments: values, weights F32 `[n]`; `starts` I32 [s + 1],
/// ascending, the last at most n: segment k is `starts[k]..starts[k + 1]`. Returns F32 `[s]`;
/// gradients flow to `values` alone.
pub fn segment_sums(
    cx: &mut Cx,
    values: &Tensor,
    weights: &Tensor,
    starts: &Tensor,
) -> Result<Tensor> {
    cx.apply1(SegmentSums, &[values, weights, starts])
}

#[derive(Debug)]
pub struct SegmentSums;

impl Op for SegmentSums {
    fn name(&self) -> &'static str {
        "segment_sums"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let (values, weights, starts) = (x[0], x[1], x[2]);
        if values.numel() != weights.numel() || starts.numel() < 2 {
            let message = format!(
                "{values:?} needs as many weights ({weights:?}), and {starts:?} a start and an end"
            );
            return Err(Error::op("segment_sums", message));
        }
        let segments = starts.numel() - 1;
        let sums = cx.float("sequence sums", &[segments])?;
        let at = Launch::warps(segments);
        kernels::segment_sums_fwd(
            &*cx.device,
            at,
            kernels::SegmentSumsFwdArgs {
                sums: sums.out(),
                values,
                weights: Some(weights),
                starts,
                segments: segments as i32,
            },
        )?;
        let saved = if need.tape { vec![weights.clone(), starts.clone()] } else { vec![] };
        Ok(Fwd { outputs: vec![sums], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let (Some(dy), Some((dx, accumulate))) = (&dy[0], g.slot(0)?) else { return Ok(()) };
        let (weights, starts) = (&node.saved[0], &node.saved[1]);
        let (segments, n) = (dy.numel() as i32, dx.numel());
        let at = Launch::flat(n);
        kernels::segment_sums_bwd(
            &*cx.device,
            at,
            kernels::SegmentSumsBwdArgs {
                dvalues: dx.out(),
                dsums: dy,
                weights: Some(weights),
                starts,
                segments,
                n: n as i32,
                accumulate: i32::from(accumulate),
            },
        )
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let segment = |k: usize| x[2].index(k)..x[2].index(k + 1);
        let sum = |k: usize| segment(k).map(|i| x[0].data[i] * x[1].data[i]).sum();
        vec![F64::from_fn(&[x[2].data.len() - 1], sum)]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 * x[2].numel())
    }
}

/// Checks the inputs of a loss over pairs and gives their number.
fn pair_count(
    op: &'static str,
    pairs: &[(&str, &Tensor)],
    singles: &[(&str, &Tensor)],
) -> Result<usize> {
    let n = pairs[0].1.numel() / 2;
    for (what, t) in pairs {
        if t.shape() != [n, 2] || n == 0 || t.dtype() != DType::F32 {
            return Err(Error::op(
                op,
                format!("{what} {t:?} is not F32 [{n}, 2]: the chosen's number, the rejected's"),
            ));
        }
    }
    for (what, t) in singles {
        if t.numel() != n {
            return Err(Error::op(
                op,
                format!("{what} {t:?} has not one number for each of {n} pairs"),
            ));
        }
    }
    Ok(n)
}

/// Adds a loss up: sum of `each`, plus `factor x nll x sum of pair_weight`. Returns it and the
/// gradient of `nll`.
fn totals(
    cx: &Cx,
    each: &Tensor,
    weight: &Tensor,
    nll: Option<&Tensor>,
    factor: f32,
) -> Result<(Tensor, Tensor)> {
    let (loss, dnll) = (cx.float("loss", &[1])?, cx.float("loss", &[1])?);
    let n = each.numel() as i32;
    let at = Launch::warps(1);
    kernels::pair_totals(
        &*cx.device,
        at,
        kernels::PairTotalsArgs {
            loss: loss.out(),
            dnll: Some(dnll.out()),
            each,
            pair_weight: weight,
            nll,
            n,
            factor,
        },
    )?;
    Ok((loss, dnll))
}

/// The gradient of input `i`: the loss's upstream times what the forward kept.
fn give_scaled(cx: &Cx, g: &mut Grads, i: usize, kept: &Tensor, upstream: &Tensor) -> Result<()> {
    let Some((out, accumulate)) = g.slot(i)? else { return Ok(()) };
    let n = kept.numel();
    let at = Launch::flat(n);
    kernels::scaled_by_upstream(
        &*cx.device,
        at,
        kernels::ScaledByUpstreamArgs {
            out: out.out(),
            grad: kept,
            upstream,
            n: n as i32,
            accumulate: i32::from(accumulate),
        },
    )
}

pub fn segment_cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, starts) in [(1, vec![0, 1]), (40, vec![0, 7, 7, 12, 40]), (700, vec![3, 300, 301, 690])]
    {
        let weights = F64::from_fn(&[n], |_| [0.0, 1.0, 0.5][rng.below(3)]);
        let values = Arg { grad: true, ..Arg::float(rng.array(&[n], 2.0)) };
        let inputs = vec![values, Arg::float(weights), Arg::ints(&starts)];
        cases.push(Case::new(format!("n {n} segments {}", starts.len() - 1), SegmentSums, inputs));
    }
    cases
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = dpo::cases(rng);
    cases.extend(unpaired::cases(rng));
    cases.extend(pairs::cases(rng));
    cases
}

/// What the cases of a loss over pairs share: log-probs of completions of some length, and the
/// lengths.
fn pair_inputs(rng: &mut Rng, n: usize, spread: f64) -> (F64, F64, F64) {
    let lens = F64::from_fn(&[n, 2], |_| (2 + rng.below(30)) as f64);
    let logps = F64::from_fn(&[n, 2], |i| -2.5 * lens.data[i] + spread * rng.normal());
    let weight = F64::from_fn(&[n], |_| (0.5 + rng.uniform()) / n as f64);
    (logps, lens, weight)
}

fn with_grad(value: F64) -> Arg {
    Arg { grad: true, ..Arg::float(value) }
}

pub fn segment_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let starts: Vec<i32> = (0..=s.sequences).map(|i| (i * s.length) as i32).collect();
    let inputs = vec![
        Arg::float(rng.array(&[s.tokens()], 2.0)),
        Arg::float(F64::from_fn(&[s.tokens()], |_| 1.0)),
        Arg::ints(&starts),
    ];
    vec![Case::new("sequences", SegmentSums, inputs)]
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let n = s.sequences.max(1);
    let (logps, lens, weight) = pair_inputs(rng, n, 3.0);
    let reference = F64::from_fn(&[n, 2], |i| logps.data[i] + rng.normal());
    let op = Dpo {
        losses: vec![(DpoLoss::Sigmoid, 1.0)],
        divergence: FDivergence::ReverseKl,
        f_alpha: 0.5,
        beta: 0.1,
        label_smoothing: 0.0,
        discopop_tau: 0.05,
    };
    let inputs = [logps, reference, lens, weight].map(Arg::float);
    vec![Case::new("dpo", op, inputs.into())]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::cpu::Cpu;

    fn float(cx: &Cx, shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::from_f32(&cx.pool, "test", DType::F32, shape, values).unwrap()
    }

    fn loss_of(losses: &[(DpoLoss, f32)], logps: &[f32], reference: &[f32]) -> (f32, Vec<f32>) {
        let mut cx = Cx::new(Arc::new(Cpu::new()), DType::F32).unwrap();
        let n = logps.len() / 2;
        let shape = [n, 2];
        let (logps, reference) = (float(&cx, &shape, logps), float(&cx, &shape, reference));
        let (lens, weight) =
            (float(&cx, &shape, &vec![5.0; 2 * n]), float(&cx, &[n], &vec![1.0 / n as f32; n]));
        let op = Dpo {
            losses: losses.to_vec(),
            divergence: FDivergence::ReverseKl,
            f_alpha: 0.5,
            beta: 0.1,
            label_smoothing: 0.0,
            discopop_tau: 0.05,
        };
        let x = DpoIn {
            logps: &logps,
            reference: &reference,
            lens: &lens,
            weight: &weight,
            nll: None,
            aligned: None,
        };
        let (loss, rewards) = dpo(&mut cx, op, &x).unwrap();
        (loss.to_f32().unwrap()[0], rewards.to_f32().unwrap())
    }

    #[test]
    fn a_policy_that_is_its_reference_has_a_loss_of_exactly_ln_2() {
        let logps = [-31.25, -40.5, -7.125, -3.0, -100.3, -99.9, -0.1, -55.0];
        let (loss, rewards) = loss_of(&[(DpoLoss::Sigmoid, 1.0)], &logps, &logps);
        assert_eq!(loss, std::f32::consts::LN_2);
        assert_eq!(rewards, [0.0; 8]);
    }

    #[test]
    fn far_from_the_reference_losses_grow_like_a_line_and_nan_stays_nan() {
        let far = |d: f32| loss_of(&[(DpoLoss::Sigmoid, 1.0)], &[d, 0.0], &[0.0, 0.0]).0;
        assert_eq!(far(-1e6), 1e5);
        assert_eq!(far(1e6), 0.0);
        assert!(far(f32::NAN).is_nan());
        for loss in [DpoLoss::Aot, DpoLoss::AotUnpaired] {
            let (loss, _) = loss_of(&[(loss, 1.0)], &[f32::NAN, 0.0, 1.0, 2.0], &[0.0; 4]);
            assert!(loss.is_nan());
        }
    }

    #[test]
    fn a_list_without_its_nll_is_refused() {
        let mut cx = Cx::new(Arc::new(Cpu::new()), DType::F32).unwrap();
        let (pairs, single) = (float(&cx, &[1, 2], &[0.0, 0.0]), float(&cx, &[1], &[1.0]));
        let x = DpoIn {
            logps: &pairs,
            reference: &pairs,
            lens: &pairs,
            weight: &single,
            nll: None,
            aligned: None,
        };
        let op = |loss| Dpo {
            losses: vec![(loss, 1.0)],
            divergence: FDivergence::ReverseKl,
            f_alpha: 0.5,
            beta: 0.1,
            label_smoothing: 0.0,
            discopop_tau: 0.05,
        };
        assert!(
            dpo(&mut cx, op(DpoLoss::Sft), &x).unwrap_err().to_string().contains("come together")
        );
        let x = DpoIn { lens: &single, ..x };
        assert!(
            dpo(&mut cx, op(DpoLoss::Sigmoid), &x)
                .unwrap_err()
                .to_string()
                .contains("is not F32 [1, 2]")
        );
    }
}
