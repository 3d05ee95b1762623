//! Generalised advantage estimation and masked whitening on the device. Layer 4.
//!
//! Invariant: neither has a gradient; a sequence's advantages depend on that sequence alone,
//! whitening on all tokens whose mask is not 0. Math: `kernels/policy.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round, flat};
use crate::device::Launch;
use crate::error::Result;
use crate::kernels;
use crate::ops::case::{Arg, Case, Rng};
use crate::ops::same_length;
use crate::tensor::Tensor;

/// Advantages and returns, F32 `[n]`, of token rewards and values F32 `[n]`; `starts` I32
/// [sequences + 1] from 0 to n.
pub fn gae(
    cx: &mut Cx,
    rewards: &Tensor,
    values: &Tensor,
    starts: &Tensor,
    gamma: f32,
    lam: f32,
) -> Result<(Tensor, Tensor)> {
    cx.apply_many(Gae { gamma, lam }, &[rewards, values, starts]).map(Into::into)
}

/// Whitens `x` to variance 1 and mean 0 (without `shift_mean` it keeps its mean) where `mask` is
/// not 0, and sets it to 0 elsewhere; F32 `[n]`.
pub fn whiten(cx: &mut Cx, x: &Tensor, mask: &Tensor, shift_mean: bool) -> Result<Tensor> {
    cx.apply1(Whiten { shift_mean }, &[x, mask])
}

#[derive(Debug)]
struct Gae {
    gamma: f32,
    lam: f32,
}

#[derive(Debug)]
struct Whiten {
    shift_mean: bool,
}

impl Op for Gae {
    fn name(&self) -> &'static str {
        "gae"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        same_length("gae", x[0], [x[1]])?;
        let n = x[0].numel();
        let (advantage, returns) = (cx.float("advantages", &[n])?, cx.float("returns", &[n])?);
        let sequences = x[2].numel().saturating_sub(1);
        let at = Launch::flat(sequences);
        let (a, r) = (advantage.out(), returns.out());
        let args = kernels::GaeArgs {
            advantage: a,
            returns: r,
            reward: x[0],
            value: x[1],
            starts: x[2],
            sequences: sequences as i32,
            gamma: self.gamma,
            lam: self.lam,
        };
        kernels::gae(&*cx.device, at, args)?;
        Ok(Fwd { outputs: vec![advantage, returns], saved: vec![] })
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (gamma, lam) = (f64::from(self.gamma), f64::from(self.lam));
        let (reward, value, starts) = (&x[0].data, &x[1].data, &x[2].data);
        let mut advantage = F64::zeros(&x[0].shape);
        for s in 0..starts.len() - 1 {
            let (from, to) = (starts[s] as usize, starts[s + 1] as usize);
            let error = |t: usize| {
                reward[t] - value[t] + if t + 1 < to { gamma * value[t + 1] } else { 0.0 }
            };
            for t in from..to {
                advantage.data[t] =
                    (t..to).map(|u| (gamma * lam).powi((u - t) as i32) * error(u)).sum();
            }
        }
        let returns = F64::from_fn(&x[0].shape, |t| advantage.data[t] + value[t]);
        vec![advantage, returns]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 2 * x[0].bytes())
    }
}

impl Op for Whiten {
    fn name(&self) -> &'static str {
        "whiten"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        same_length("whiten", x[0], [x[1]])?;
        let n = x[0].numel();
        let (y, moments) = (cx.float("whitened", &[n])?, cx.float("moments", &[3])?);
        let args =
            kernels::MaskedMomentsArgs { moments: moments.out(), x: x[0], mask: x[1], n: n as i32 };
        kernels::masked_moments(&*cx.device, Launch::warps(1), args)?;
        let shift = i32::from(self.shift_mean);
        let args = kernels::WhitenArgs {
            y: y.out(),
            x: x[0],
            mask: x[1],
            moments: &moments,
            n: n as i64,
            shift,
        };
        kernels::whiten(&*cx.device, flat(x[0]), args)?;
        Ok(Fwd { outputs: vec![y], saved: vec![] })
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let inside: Vec<f64> =
            x[0].data.iter().zip(&x[1].data).filter(|(_, m)| **m != 0.0).map(|(v, _)| *v).collect();
        let n = inside.len() as f64;
        let mean = inside.iter().sum::<f64>() / n.max(1.0);
        let variance = inside.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        let add = if self.shift_mean { 0.0 } else { mean };
        let one = |i: usize| (x[0].data[i] - mean) / (variance + 1e-8).sqrt() + add;
        vec![F64::from_fn(&x[0].shape, |i| if x[1].data[i] != 0.0 { one(i) } else { 0.0 })]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].bytes())
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for lengths in [&[1usize][..], &[7, 0, 90, 1], &[300]] {
        let n = lengths.iter().sum();
        let mut starts = vec![0];
        lengths.iter().for_each(|l| starts.push(starts[starts.len() - 1] + *l as i32));
        let inputs = vec![
            Arg::float(rng.array(&[n], 0.5)),
            Arg::float(rng.array(&[n], 1.0)),
            Arg::ints(&starts),
        ];
        let label = format!("gae of {} sequences", lengths.len());
        cases.push(Case::new(label, Gae { gamma: 0.99, lam: 0.95 }, inputs));
        let mask = F64::from_fn(&[n], |i| if i > 0 && rng.below(4) == 0 { 0.0 } else { 1.0 });
        let inputs = vec![Arg::float(rng.array(&[n], 3.0)), Arg::float(mask)];
        cases.push(Case::new(format!("whiten {n}"), Whiten { shift_mean: n != 98 }, inputs));
    }
    cases
}
