//! The preference losses in naive f64, from the definitions: what the kernels are checked against.
//! Layer 4.

use super::{BradleyTerry, Cpo, CpoLoss, Dpo, DpoLoss, FDivergence, Orpo, Unpaired, UnpairedLoss};
use crate::autograd::F64;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn smoothed(x: f64, e: f64) -> f64 {
    -(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x)
}

fn score(op: &Dpo, u: f64) -> f64 {
    match op.kernel_divergence() {
        FDivergence::ReverseKl => u,
        FDivergence::ForwardKl => 1.0 - (-u).exp(),
        FDivergence::Js => 2f64.ln() + log_sigmoid(u),
        FDivergence::Alpha => {
            let a = f64::from(op.f_alpha);
            (((a - 1.0) * u).min(80.0).exp() - 1.0) / (a - 1.0)
        }
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

pub fn dpo(op: &Dpo, x: &[F64], nll: Option<&F64>, aligned: Option<&F64>) -> Vec<F64> {
    let (logps, reference, lens, weight) = (&x[0].data, &x[1].data, &x[2].data, &x[3].data);
    let (n, b, e) = (weight.len(), f64::from(op.beta), f64::from(op.label_smoothing));
    let wide = |i: usize| aligned.map_or(1.0, |a| (a.data[2 * i] + a.data[2 * i + 1]).exp());
    let u = |i: usize| logps[i] - reference[i];
    let s = |i: usize| score(op, u(i));
    let average = |i: usize| s(i) / lens[i].max(1.0);
    let aot = |unpaired: bool| -> Vec<f64> {
        let (p, q) = match unpaired {
            true => (sorted((0..n).map(|i| u(2 * i))), sorted((0..n).map(|i| u(2 * i + 1)))),
            false => (
                sorted((0..n).map(|i| logps[2 * i] - logps[2 * i + 1])),
                sorted((0..n).map(|i| reference[2 * i] - reference[2 * i + 1])),
            ),
        };
        p.iter().zip(&q).map(|(p, q)| smoothed(b * (p - q), e)).collect()
    };
    let mut total = 0.0;
    for (loss, loss_weight) in &op.losses {
        let ordered = match loss {
            DpoLoss::Aot => aot(false),
            DpoLoss::AotUnpaired => aot(true),
            _ => vec![],
        };
        for i in 0..n {
            let (w, l) = (2 * i, 2 * i + 1);
            let d = b * (s(w) - s(l));
            let one = match loss {
                DpoLoss::Sigmoid => -log_sigmoid(d),
                DpoLoss::Hinge => (1.0 - d).max(0.0),
                DpoLoss::Ipo => (average(w) - average(l) - 1.0 / (2.0 * b)).powi(2),
                DpoLoss::ExoPair => {
                    sigmoid(d) * (log_sigmoid(d) - (1.0 - e).ln())
                        + sigmoid(-d) * (log_sigmoid(-d) - e.ln())
                }
                DpoLoss::NcaPair => {
                    -log_sigmoid(b * u(w))
                        - 0.5 * log_sigmoid(-b * u(w))
                        - 0.5 * log_sigmoid(-b * u(l))
                }
                DpoLoss::Robust => {
                    (-(1.0 - e) * log_sigmoid(d) + e * log_sigmoid(-d)) / (1.0 - 2.0 * e)
                }
                DpoLoss::BcoPair => -log_sigmoid(b * u(w)) - log_sigmoid(-b * u(l)),
                DpoLoss::SppoHard => (u(w) - 0.5 / b).powi(2) + (u(l) + 0.5 / b).powi(2),
                DpoLoss::Aot | DpoLoss::AotUnpaired => ordered[i],
                DpoLoss::ApoZero => 1.0 - sigmoid(b * u(w)) + sigmoid(b * u(l)),
                DpoLoss::ApoDown => sigmoid(b * u(w)) + 1.0 - sigmoid(b * (u(w) - u(l))),
                DpoLoss::Discopop => {
                    let m = sigmoid(d / f64::from(op.discopop_tau));
                    -log_sigmoid(d) * (1.0 - m) + (-d).exp() * m
                }
                DpoLoss::Sft => nll.map_or(0.0, |nll| nll.data[0]),
                DpoLoss::SigmoidNorm => -log_sigmoid(b * (average(w) - average(l))),
            };
            total += one * weight[i] * wide(i) * f64::from(*loss_weight);
        }
    }
    vec![F64::new(&[1], vec![total]), F64::from_fn(&[n, 2], |i| b * u(i))]
}

pub fn unpaired(op: &Unpaired, x: &[F64]) -> Vec<F64> {
    let (logps, reference, label, weight, base) =
        (&x[0].data, &x[1].data, &x[2].data, &x[3].data, x[4].data[0]);
    let b = f64::from(op.beta);
    let u = |i: usize| logps[i] - reference[i];
    let mut total = 0.0;
    for i in 0..logps.len() {
        let good = label[i] != 0.0;
        let one = match (op.loss, good) {
            (UnpairedLoss::Kto, true) => 1.0 - sigmoid(b * (u(i) - base)),
            (UnpairedLoss::Kto, false) => 1.0 - sigmoid(b * (base - u(i))),
            (UnpairedLoss::ApoZeroUnpaired, true) => 1.0 - sigmoid(b * u(i)),
            (UnpairedLoss::ApoZeroUnpaired, false) => sigmoid(b * u(i)),
            (UnpairedLoss::Bco, true) => -log_sigmoid(b * u(i) - base),
            (UnpairedLoss::Bco, false) => -log_sigmoid(-(b * u(i) - base)),
        };
        total += one
            * weight[i]
            * f64::from(if good { op.desirable_weight } else { op.undesirable_weight });
    }
    vec![F64::new(&[1], vec![total]), F64::from_fn(&[logps.len()], |i| b * u(i))]
}

pub fn orpo(op: &Orpo, x: &[F64]) -> Vec<F64> {
    let (n, b) = (x[2].data.len(), f64::from(op.beta));
    let p = |i: usize| x[0].data[i] / x[1].data[i];
    let log1mexp = |v: f64| (-v.exp_m1()).ln();
    let log_odds =
        |i: usize| (p(2 * i) - p(2 * i + 1)) - (log1mexp(p(2 * i)) - log1mexp(p(2 * i + 1)));
    let total: f64 =
        (0..n).map(|i| x[2].data[i] * (x[3].data[0] - b * log_sigmoid(log_odds(i)))).sum();
    let odds = (0..n).flat_map(|i| [log_sigmoid(log_odds(i)), log_odds(i)]).collect();
    vec![F64::new(&[1], vec![total]), F64::from_fn(&[n, 2], |i| b * p(i)), F64::new(&[n, 2], odds)]
}

pub fn cpo(op: &Cpo, x: &[F64]) -> Vec<F64> {
    let (n, b, a) = (x[2].data.len(), f64::from(op.beta), f64::from(op.alpha));
    let r = |i: usize| {
        let average = op.loss.averages();
        let p = if average { x[0].data[i] / x[1].data[i] } else { x[0].data[i] };
        if a == 0.0 { p } else { (1.0 - p.exp().powf(-a)) / a }
    };
    let one = |i: usize| {
        let d = r(2 * i) - r(2 * i + 1);
        match op.loss {
            CpoLoss::Sigmoid => smoothed(b * d, f64::from(op.label_smoothing)),
            CpoLoss::Simpo | CpoLoss::Alphapo => {
                smoothed(b * d - f64::from(op.simpo_gamma), f64::from(op.label_smoothing))
            }
            CpoLoss::Hinge => (1.0 - b * d).max(0.0),
            CpoLoss::Ipo => (d - 1.0 / (2.0 * b)).powi(2),
        }
    };
    let nll = f64::from(op.cpo_alpha) * x[3].data[0];
    let total: f64 = (0..n).map(|i| x[2].data[i] * (one(i) + nll)).sum();
    vec![F64::new(&[1], vec![total]), F64::from_fn(&[n, 2], |i| b * r(i))]
}

pub fn bradley_terry(op: &BradleyTerry, x: &[F64]) -> Vec<F64> {
    let mut total = 0.0;
    for (i, weight) in x[1].data.iter().enumerate() {
        let (a, b) = (x[0].data[2 * i], x[0].data[2 * i + 1]);
        let margin = x.get(2).map_or(0.0, |m| m.data[i]);
        total += weight
            * (-log_sigmoid(a - b - margin)
                + f64::from(op.center_rewards_coefficient) * (a + b).powi(2));
    }
    vec![F64::new(&[1], vec![total])]
}
