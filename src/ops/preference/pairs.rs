//! Losses over pairs without a reference: ORPO, the CPO family (SimPO, AlphaPO), Bradley-Terry.
//! Layer 4.
//!
//! Invariant: as for the DPO family: weighted sums over pairs, with gradients computed in the
//! forward.

use super::oracle::{log_sigmoid, smoothed};
use super::pair_loss::{PairOutputs, give_kept, pair_count, pair_inputs, pair_outputs, totals};
use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::config::value::words;
use crate::device::Launch;
use crate::error::Result;
use crate::kernels::{self, cpo_loss};
use crate::ops::case::{Arg, Case, Rng};
use crate::tensor::Tensor;

/// `nll - beta LS(log odds)`.
#[derive(Clone, Debug)]
pub struct Orpo {
    pub beta: f32,
}

/// logps, lens F32 [n, 2]: sums and token counts of the completions; weight F32 `[n]`; nll F32
/// `[1]`, the mean NLL of the chosen sequences' tokens (prompts too). Returns the loss `[1]`, the
/// rewards [n, 2], and [n, 2] LS(log odds) and log odds.
pub fn orpo(cx: &mut Cx, op: Orpo, x: [&Tensor; 4]) -> Result<[Tensor; 3]> {
    cx.apply_many(op, &x)
}

words! {
    /// TRL's `loss_type`. AlphaPO is SimPO with an alpha.
    pub enum CpoLoss {
        Sigmoid = "sigmoid",
        Hinge = "hinge",
        Ipo = "ipo",
        Simpo = "simpo",
        Alphapo = "alphapo",
    }
}

impl CpoLoss {
    /// Whether it compares mean log-probs instead of sums.
    pub fn averages(self) -> bool {
        matches!(self, CpoLoss::Ipo | CpoLoss::Simpo | CpoLoss::Alphapo)
    }

    fn kernel_number(self) -> i32 {
        match self {
            CpoLoss::Sigmoid => cpo_loss::SIGMOID,
            CpoLoss::Hinge => cpo_loss::HINGE,
            CpoLoss::Ipo => cpo_loss::IPO,
            CpoLoss::Simpo | CpoLoss::Alphapo => cpo_loss::SIMPO,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Cpo {
    pub loss: CpoLoss,
    pub beta: f32,
    pub label_smoothing: f32,
    pub simpo_gamma: f32,
    pub alpha: f32,
    /// Weight of `nll`.
    pub cpo_alpha: f32,
}

/// Inputs as for [`orpo`], but nll is that of the chosen completions alone. Returns the loss `[1]`
/// and the rewards [n, 2].
pub fn cpo(cx: &mut Cx, op: Cpo, x: [&Tensor; 4]) -> Result<(Tensor, Tensor)> {
    cx.apply_many(op, &x).map(Into::into)
}

/// `-LS(s_w - s_l - margin) + center (s_w + s_l)^2`.
#[derive(Clone, Debug)]
pub struct BradleyTerry {
    pub center_rewards_coefficient: f32,
}

/// scores F32 [n, 2]; weight F32 `[n]`; margin F32 `[n]`. Returns the loss `[1]`.
pub fn bradley_terry(
    cx: &mut Cx,
    op: BradleyTerry,
    scores: &Tensor,
    weight: &Tensor,
    margin: Option<&Tensor>,
) -> Result<Tensor> {
    let mut inputs = vec![scores, weight];
    inputs.extend(margin);
    cx.apply1(op, &inputs)
}

impl Op for Orpo {
    fn name(&self) -> &'static str {
        "orpo"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (logps, lens, weight, nll) = (x[0], x[1], x[2], x[3]);
        let PairOutputs { n, each, grad, rewards } = pair_outputs(cx, "orpo", logps, lens, weight)?;
        let odds = cx.float("log odds", &[n, 2])?;
        let args = kernels::OrpoPairsArgs {
            each: each.out(),
            grad: grad.out(),
            rewards: rewards.out(),
            odds: odds.out(),
            logps,
            lens,
            weight,
            n: n as i32,
            beta: self.beta,
        };
        kernels::orpo_pairs(&*cx.device, Launch::flat(n), args)?;
        let (loss, dnll) = totals(cx, &each, weight, Some(nll), 1.0)?;
        let saved = vec![grad, dnll];
        Ok(Fwd { outputs: vec![loss, rewards, odds], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        give_kept(cx, node, dy, g, Some(3))
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (n, b) = (x[2].data.len(), f64::from(self.beta));
        let p = |i: usize| x[0].data[i] / x[1].data[i];
        let log1mexp = |v: f64| (-v.exp_m1()).ln();
        let log_odds =
            |i: usize| (p(2 * i) - p(2 * i + 1)) - (log1mexp(p(2 * i)) - log1mexp(p(2 * i + 1)));
        let total: f64 =
            (0..n).map(|i| x[2].data[i] * (x[3].data[0] - b * log_sigmoid(log_odds(i)))).sum();
        let odds = (0..n).flat_map(|i| [log_sigmoid(log_odds(i)), log_odds(i)]).collect();
        vec![
            F64::new(&[1], vec![total]),
            F64::from_fn(&[n, 2], |i| b * p(i)),
            F64::new(&[n, 2], odds),
        ]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 + 2 * x[0].bytes())
    }
}

impl Op for Cpo {
    fn name(&self) -> &'static str {
        "cpo"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (logps, lens, weight, nll) = (x[0], x[1], x[2], x[3]);
        let PairOutputs { n, each, grad, rewards } = pair_outputs(cx, "cpo", logps, lens, weight)?;
        let args = kernels::CpoPairsArgs {
            each: each.out(),
            grad: grad.out(),
            rewards: rewards.out(),
            logps,
            lens,
            weight,
            n: n as i32,
            kind: self.loss.kernel_number(),
            beta: self.beta,
            e: self.label_smoothing,
            gamma: self.simpo_gamma,
            alpha: self.alpha,
        };
        kernels::cpo_pairs(&*cx.device, Launch::flat(n), args)?;
        let (loss, dnll) = totals(cx, &each, weight, Some(nll), self.cpo_alpha)?;
        Ok(Fwd { outputs: vec![loss, rewards], saved: vec![grad, dnll] })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        give_kept(cx, node, dy, g, Some(3))
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (n, b, a) = (x[2].data.len(), f64::from(self.beta), f64::from(self.alpha));
        let r = |i: usize| {
            let average = self.loss.averages();
            let p = if average { x[0].data[i] / x[1].data[i] } else { x[0].data[i] };
            if a == 0.0 { p } else { (1.0 - p.exp().powf(-a)) / a }
        };
        let one = |i: usize| {
            let d = r(2 * i) - r(2 * i + 1);
            match self.loss {
                CpoLoss::Sigmoid => smoothed(b * d, f64::from(self.label_smoothing)),
                CpoLoss::Simpo | CpoLoss::Alphapo => {
                    smoothed(b * d - f64::from(self.simpo_gamma), f64::from(self.label_smoothing))
                }
                CpoLoss::Hinge => (1.0 - b * d).max(0.0),
                CpoLoss::Ipo => (d - 1.0 / (2.0 * b)).powi(2),
            }
        };
        let nll = f64::from(self.cpo_alpha) * x[3].data[0];
        let total: f64 = (0..n).map(|i| x[2].data[i] * (one(i) + nll)).sum();
        vec![F64::new(&[1], vec![total]), F64::from_fn(&[n, 2], |i| b * r(i))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 + x[0].bytes())
    }
}

impl Op for BradleyTerry {
    fn name(&self) -> &'static str {
        "bradley_terry"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let margin = x.get(2).copied();
        let mut singles = vec![("weight", x[1])];
        singles.extend(margin.map(|m| ("margin", m)));
        let n = pair_count("bradley_terry", &[("scores", x[0])], &singles)?;
        let (each, grad) = (cx.float("pair losses", &[n])?, cx.float("pair gradients", &[n, 2])?);
        let center = self.center_rewards_coefficient;
        let args = kernels::BradleyTerryPairsArgs {
            each: each.out(),
            grad: grad.out(),
            scores: x[0],
            margin,
            weight: x[1],
            n: n as i32,
            center,
        };
        kernels::bradley_terry_pairs(&*cx.device, Launch::flat(n), args)?;
        let (loss, _) = totals(cx, &each, x[1], None, 0.0)?;
        Ok(Fwd { outputs: vec![loss], saved: vec![grad] })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        give_kept(cx, node, dy, g, None)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let mut total = 0.0;
        for (i, weight) in x[1].data.iter().enumerate() {
            let (a, b) = (x[0].data[2 * i], x[0].data[2 * i + 1]);
            let margin = x.get(2).map_or(0.0, |m| m.data[i]);
            total += weight
                * (-log_sigmoid(a - b - margin)
                    + f64::from(self.center_rewards_coefficient) * (a + b).powi(2));
        }
        vec![F64::new(&[1], vec![total])]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4)
    }
}

pub(super) fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    let nll = || Arg::watched(F64::new(&[1], vec![1.75]));
    for (n, beta, mean) in [(1, 0.1f32, 1.0), (4, 0.25, 0.02), (37, 1.0, 0.3)] {
        let (_, lens, weight) = pair_inputs(rng, n, 1.0);
        // also near 0, where 1 - p cancels
        let logps = F64::from_fn(&[n, 2], |i| -lens.data[i] * mean * (0.05 + rng.uniform()));
        let inputs = vec![Arg::watched(logps), Arg::float(lens), Arg::float(weight), nll()];
        let case = Case::new(format!("orpo n {n} beta {beta} mean {mean}"), Orpo { beta }, inputs);
        cases.push(Case { upstream: vec![None, Some(0.0), Some(0.0)], ..case });
    }
    for loss in [CpoLoss::Sigmoid, CpoLoss::Hinge, CpoLoss::Ipo, CpoLoss::Simpo] {
        for (n, beta, e, alpha, cpo_alpha) in [
            (5, 0.1f32, 0.0f32, 0.0f32, 1.0f32),
            (37, 2.0, 0.1, 0.25, 0.5),
            (4, 1.0, 0.0, -0.5, 0.0),
        ] {
            let (mut logps, lens, weight) = pair_inputs(rng, n, 2.0);
            if loss == CpoLoss::Sigmoid || loss == CpoLoss::Hinge {
                logps.data.iter_mut().for_each(|l| *l *= 0.05); // keeps e^{-alpha r} in range
            }
            let op = Cpo { loss, beta, label_smoothing: e, simpo_gamma: 0.5, alpha, cpo_alpha };
            let label = format!("{op:?} n {n}");
            let inputs = vec![Arg::watched(logps), Arg::float(lens), Arg::float(weight), nll()];
            cases.push(Case { upstream: vec![None, Some(0.0)], ..Case::new(label, op, inputs) });
        }
    }
    for (n, center, margin) in [(1, 0.0f32, false), (6, 0.01, true), (40, 0.0, true)] {
        let (scores, margins) = (rng.array(&[n, 2], 2.0), F64::from_fn(&[n], |_| rng.uniform()));
        let mut inputs = vec![
            Arg::watched(scores),
            Arg::float(F64::from_fn(&[n], |_| rng.uniform() / n as f64)),
        ];
        if margin {
            inputs.push(Arg::float(margins));
        }
        let op = BradleyTerry { center_rewards_coefficient: center };
        let label = format!("bradley-terry n {n} center {center} margin {margin}");
        cases.push(Case::new(label, op, inputs));
    }
    cases
}
