//! Losses of single completions with a label: KTO, its `apo_zero_unpaired`, BCO. Layer 4.
//!
//! Invariant: the baseline (KTO's KL estimate, BCO's running mean) is an input without a gradient,
//! computed by [`kl_baseline`] or [`running_mean`] from the same batch.

use super::oracle::{log_sigmoid, sigmoid};
use super::pair_loss::{give_kept, totals};
use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::config::value::words;
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels::{self, unpaired_loss};
use crate::ops::case::{Arg, Case, Rng};
use crate::tensor::{Id, Tensor};

words! {
    /// TRL's `loss_type` of KTO, and BCO.
    pub enum UnpairedLoss {
        Kto = "kto" => unpaired_loss::KTO,
        ApoZeroUnpaired = "apo_zero_unpaired" => unpaired_loss::APO_ZERO_UNPAIRED,
        Bco = "bco" => unpaired_loss::BCO,
    }
}

#[derive(Clone, Debug)]
pub struct Unpaired {
    pub loss: UnpairedLoss,
    pub beta: f32,
    pub desirable_weight: f32,
    pub undesirable_weight: f32,
}

/// logps, reference F32 `[n]`, summed over each completion; label I32 `[n]`, 1 desirable, 0
/// undesirable; weight F32 `[n]`; baseline F32 `[1]`. Returns the loss `[1]` and the rewards `[n]`.
pub fn unpaired(cx: &mut Cx, op: Unpaired, x: [&Tensor; 5]) -> Result<(Tensor, Tensor)> {
    cx.apply_many(op, &x).map(Into::into)
}

/// KTO's z `[1]`: `max(0, mean(logps - reference))` over mismatched completions. Not on the tape.
pub fn kl_baseline(cx: &Cx, logps: &Tensor, reference: &Tensor) -> Result<Tensor> {
    mean_difference(cx, logps, reference, 0.0)
}

fn mean_difference(cx: &Cx, a: &Tensor, b: &Tensor, floor: f32) -> Result<Tensor> {
    if a.numel() != b.numel() || a.numel() == 0 {
        let message = format!("{a:?} and {b:?} are not two log-probs of each sequence");
        return Err(Error::op("mean_difference", message));
    }
    let mean = cx.float("baseline", &[1])?;
    let args = kernels::MeanDifferenceArgs { mean: mean.out(), a, b, n: a.numel() as i32, floor };
    kernels::mean_difference(&*cx.device, Launch::warps(1), args)?;
    Ok(mean)
}

/// BCO's delta `[1]`: the mean of the batches' mean rewards, over all batches so far including this
/// one. Updates `state` F32 `[2]` (mean, count), which is zero at the start of training.
pub fn running_mean(
    cx: &mut Cx,
    logps: &Tensor,
    reference: &Tensor,
    state: &Tensor,
    beta: f32,
) -> Result<Tensor> {
    cx.apply1(RunningMean { beta }, &[&logps.clone().with_id(Id::Constant), reference, state])
}

#[derive(Debug)]
pub struct RunningMean {
    pub beta: f32,
}

impl Op for RunningMean {
    fn name(&self) -> &'static str {
        "running_mean"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let mean = mean_difference(cx, x[0], x[1], f32::NEG_INFINITY)?;
        let delta = cx.float("baseline", &[1])?;
        let args = kernels::RunningMeanArgs {
            delta: delta.out(),
            state: x[2].out(),
            mean: &mean,
            scale: self.beta,
        };
        kernels::running_mean(&*cx.device, Launch::flat(1), args)?;
        Ok(Fwd { outputs: vec![delta], saved: vec![] })
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let n = x[0].data.len() as f64;
        let mean = x[0].data.iter().zip(&x[1].data).map(|(a, b)| a - b).sum::<f64>() / n
            * f64::from(self.beta);
        let (old, count) = (x[2].data[0], x[2].data[1]);
        vec![F64::new(&[1], vec![old + (mean - old) / (count + 1.0)])]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 12)
    }
}

impl Op for Unpaired {
    fn name(&self) -> &'static str {
        "unpaired"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let n = x[0].numel();
        if n == 0 || x[1..4].iter().any(|t| t.numel() != n) || x[4].numel() != 1 {
            let message = format!(
                "{:?} needs a reference, a label and a weight each, and one baseline",
                x[0]
            );
            return Err(Error::op("unpaired", message));
        }
        let each = cx.float("pair losses", &[n])?;
        let [grad, rewards] = [cx.float("pair gradients", &[n])?, cx.float("rewards", &[n])?];
        let args = kernels::UnpairedRowsArgs {
            each: each.out(),
            grad: grad.out(),
            rewards: rewards.out(),
            logps: x[0],
            base: x[1],
            label: x[2],
            weight: x[3],
            baseline: x[4],
            n: n as i32,
            kind: self.loss as i32,
            beta: self.beta,
            desirable: self.desirable_weight,
            undesirable: self.undesirable_weight,
        };
        kernels::unpaired_rows(&*cx.device, Launch::flat(n), args)?;
        let (loss, _) = totals(cx, &each, x[3], None, 0.0)?;
        Ok(Fwd { outputs: vec![loss, rewards], saved: vec![grad] })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        give_kept(cx, node, dy, g, None)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (logps, reference, label, weight, base) =
            (&x[0].data, &x[1].data, &x[2].data, &x[3].data, x[4].data[0]);
        let b = f64::from(self.beta);
        let u = |i: usize| logps[i] - reference[i];
        let mut total = 0.0;
        for i in 0..logps.len() {
            let good = label[i] != 0.0;
            let one = match (self.loss, good) {
                (UnpairedLoss::Kto, true) => 1.0 - sigmoid(b * (u(i) - base)),
                (UnpairedLoss::Kto, false) => 1.0 - sigmoid(b * (base - u(i))),
                (UnpairedLoss::ApoZeroUnpaired, true) => 1.0 - sigmoid(b * u(i)),
                (UnpairedLoss::ApoZeroUnpaired, false) => sigmoid(b * u(i)),
                (UnpairedLoss::Bco, true) => -log_sigmoid(b * u(i) - base),
                (UnpairedLoss::Bco, false) => -log_sigmoid(-(b * u(i) - base)),
            };
            total += one
                * weight[i]
                * f64::from(if good { self.desirable_weight } else { self.undesirable_weight });
        }
        vec![F64::new(&[1], vec![total]), F64::from_fn(&[logps.len()], |i| b * u(i))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 + x[0].bytes())
    }
}

pub(super) fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for loss in [UnpairedLoss::Kto, UnpairedLoss::ApoZeroUnpaired, UnpairedLoss::Bco] {
        for (n, beta, desirable, undesirable) in [(1, 0.1f32, 1.0f32, 1.0f32), (35, 0.3, 1.3, 0.7)]
        {
            let logps = F64::from_fn(&[n], |_| -40.0 + 5.0 * rng.normal());
            let reference = F64::from_fn(&[n], |i| logps.data[i] + 3.0 * rng.normal());
            let label: Vec<i32> = (0..n).map(|_| rng.below(2) as i32).collect();
            let inputs = vec![
                Arg::watched(logps),
                Arg::float(reference),
                Arg::ints(&label),
                Arg::float(F64::from_fn(&[n], |_| (0.5 + rng.uniform()) / n as f64)),
                Arg::float(F64::new(&[1], vec![0.75])),
            ];
            let op = Unpaired {
                loss,
                beta,
                desirable_weight: desirable,
                undesirable_weight: undesirable,
            };
            let label = format!("{loss:?} n {n} beta {beta}");
            cases.push(Case { upstream: vec![None, Some(0.0)], ..Case::new(label, op, inputs) });
        }
    }
    for (n, count) in [(1, 0.0), (40, 3.0)] {
        let (a, b) = (rng.array(&[n], 4.0), rng.array(&[n], 4.0));
        let state = F64::new(&[2], vec![0.5 * count, count]);
        let inputs = vec![Arg::float(a), Arg::float(b), Arg::float(state)];
        let label = format!("running mean n {n} after {count}");
        cases.push(Case::new(label, RunningMean { beta: 0.1 }, inputs));
    }
    cases
}
