//! The DPO family: every loss of TRL's `DPOConfig.loss_type`, each divergence, lists of losses.
//! Layer 4.
//!
//! Invariant: one op is one whole list of losses, with one gradient for each sequence's log-prob;
//! the order of pairs matters to `aot` alone, as in TRL.

use super::oracle::{log_sigmoid, sigmoid, smoothed, sorted};
use super::pair_loss::{give_kept, pair_count, pair_inputs, totals};
use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::config::value::words;
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels::{self, divergence_kind, dpo_loss};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::tensor::Tensor;

words! {
    /// TRL's `loss_type`.
    pub enum DpoLoss {
        Sigmoid = "sigmoid" => dpo_loss::SIGMOID,
        Hinge = "hinge" => dpo_loss::HINGE,
        Ipo = "ipo" => dpo_loss::IPO,
        ExoPair = "exo_pair" => dpo_loss::EXO_PAIR,
        NcaPair = "nca_pair" => dpo_loss::NCA_PAIR,
        Robust = "robust" => dpo_loss::ROBUST,
        BcoPair = "bco_pair" => dpo_loss::BCO_PAIR,
        SppoHard = "sppo_hard" => dpo_loss::SPPO_HARD,
        Aot = "aot" | "aot_pair" => dpo_loss::AOT,
        AotUnpaired = "aot_unpaired" => dpo_loss::AOT_UNPAIRED,
        ApoZero = "apo_zero" => dpo_loss::APO_ZERO,
        ApoDown = "apo_down" => dpo_loss::APO_DOWN,
        Discopop = "discopop" => dpo_loss::DISCOPOP,
        Sft = "sft" => dpo_loss::SFT,
        SigmoidNorm = "sigmoid_norm" => dpo_loss::SIGMOID_NORM,
    }
}

words! {
    /// TRL's `f_divergence_type`.
    pub enum FDivergence {
        ReverseKl = "reverse_kl" => divergence_kind::REVERSE_KL,
        ForwardKl = "forward_kl" => divergence_kind::FORWARD_KL,
        Js = "js_divergence" => divergence_kind::JS,
        Alpha = "alpha_divergence" => divergence_kind::ALPHA,
    }
}

#[derive(Clone, Debug)]
pub struct Dpo {
    /// The losses and their weights.
    pub losses: Vec<(DpoLoss, f32)>,
    pub divergence: FDivergence,
    /// `f_alpha_divergence_coef`, the coefficient of the alpha divergence.
    pub f_alpha: f32,
    pub beta: f32,
    pub label_smoothing: f32,
    pub discopop_tau: f32,
}

/// The inputs of a DPO loss, F32.
pub struct DpoIn<'a> {
    /// [n, 2] summed log-probs of the completions under the policy; beside `nll` the only input
    /// with a gradient
    pub logps: &'a Tensor,
    /// [n, 2] the same under the reference; all zeros: reference-free
    pub reference: &'a Tensor,
    /// [n, 2] completion tokens, for ipo and sigmoid_norm
    pub lens: &'a Tensor,
    /// `[n]` weight of each pair in the loss
    pub weight: &'a Tensor,
    /// `[1]` mean NLL of the tokens of the chosen completions, if `sft` is in the list
    pub nll: Option<&'a Tensor>,
    /// [n, 2] WPO's mean of `logp - log sum p^2` over a completion, if `use_weighting` is on
    pub aligned: Option<&'a Tensor>,
}

impl<'a> DpoIn<'a> {
    /// The inputs without the optional ones.
    pub fn new(
        logps: &'a Tensor,
        reference: &'a Tensor,
        lens: &'a Tensor,
        weight: &'a Tensor,
    ) -> DpoIn<'a> {
        DpoIn { logps, reference, lens, weight, nll: None, aligned: None }
    }
}

/// The loss `[1]`, and the rewards [n, 2] `beta (logp - ref)`. Error if `nll` is given without the
/// loss sft, or the reverse.
pub fn dpo(cx: &mut Cx, op: Dpo, x: &DpoIn) -> Result<(Tensor, Tensor)> {
    let sft = op.losses.iter().any(|(l, _)| *l == DpoLoss::Sft);
    if sft != x.nll.is_some() {
        return Err(Error::op("dpo", "the loss sft and its nll come together or not at all"));
    }
    let mut inputs = vec![x.logps, x.reference, x.lens, x.weight];
    inputs.extend(x.nll);
    inputs.extend(x.aligned);
    cx.apply_many(op, &inputs).map(Into::into)
}

impl Dpo {
    /// A single loss with the reverse KL and without smoothing.
    pub fn plain(loss: DpoLoss, beta: f32) -> Dpo {
        Dpo {
            losses: vec![(loss, 1.0)],
            divergence: FDivergence::ReverseKl,
            f_alpha: 0.5,
            beta,
            label_smoothing: 0.0,
            discopop_tau: 0.05,
        }
    }

    /// With a coefficient of 1 the alpha divergence is the reverse KL.
    fn kernel_divergence(&self) -> FDivergence {
        let limit = self.divergence == FDivergence::Alpha && (self.f_alpha - 1.0).abs() < 1e-6;
        if limit { FDivergence::ReverseKl } else { self.divergence }
    }

    fn sft_weight(&self) -> Option<f32> {
        let sft = self.losses.iter().filter(|(l, _)| *l == DpoLoss::Sft);
        sft.map(|(_, w)| *w).reduce(|a, b| a + b)
    }

    /// The f-divergence's function of a log-ratio.
    fn score(&self, u: f64) -> f64 {
        match self.kernel_divergence() {
            FDivergence::ReverseKl => u,
            FDivergence::ForwardKl => 1.0 - (-u).exp(),
            FDivergence::Js => 2f64.ln() + log_sigmoid(u),
            FDivergence::Alpha => {
                let a = f64::from(self.f_alpha);
                (((a - 1.0) * u).min(80.0).exp() - 1.0) / (a - 1.0)
            }
        }
    }

    /// The optional inputs: nll, aligned.
    fn optional<'a, T>(&self, x: &'a [T]) -> (Option<&'a T>, Option<&'a T>) {
        match self.sft_weight() {
            Some(_) => (x.get(4), x.get(5)),
            None => (None, x.get(4)),
        }
    }
}

impl Op for Dpo {
    fn name(&self) -> &'static str {
        "dpo"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (logps, reference, lens, weight) = (x[0], x[1], x[2], x[3]);
        let pairs = [("logps", logps), ("reference", reference), ("lens", lens)];
        let n = pair_count("dpo", &pairs, &[("weight", weight)])?;
        let (nll, aligned) = self.optional(x);
        if self.losses.is_empty() {
            return Err(Error::op("dpo", "has no losses; name one in loss_type"));
        }
        let [each, pair_weight] = [cx.float("pair losses", &[n])?, cx.float("pair losses", &[n])?];
        let [grad, rewards] = [cx.float("pair gradients", &[n, 2])?, cx.float("rewards", &[n, 2])?];
        let (divergence, alpha) = (self.kernel_divergence() as i32, self.f_alpha);
        for (i, (loss, loss_weight)) in self.losses.iter().enumerate() {
            let sorted = match loss {
                DpoLoss::Aot | DpoLoss::AotUnpaired => {
                    Some(self.sort(cx, logps, reference, n, *loss)?)
                }
                _ => None,
            };
            let args = kernels::DpoPairsArgs {
                each: each.out(),
                grad: grad.out(),
                rewards: rewards.out(),
                pair_weight: pair_weight.out(),
                logps,
                base: reference,
                lens,
                weight,
                aligned: aligned.copied(),
                sorted: sorted.as_ref().map(|s| &s.0),
                rank: sorted.as_ref().map(|s| &s.1),
                n: n as i32,
                kind: *loss as i32,
                divergence,
                alpha,
                beta: self.beta,
                e: self.label_smoothing,
                tau: self.discopop_tau,
                loss_weight: *loss_weight,
                accumulate: i32::from(i > 0),
            };
            kernels::dpo_pairs(&*cx.device, Launch::flat(n), args)?;
        }
        let (loss, dnll) =
            totals(cx, &each, &pair_weight, nll.copied(), self.sft_weight().unwrap_or(0.0))?;
        let saved = vec![grad, dnll];
        Ok(Fwd { outputs: vec![loss, rewards], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        give_kept(cx, node, dy, g, self.sft_weight().map(|_| 4))
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (nll, aligned) = self.optional(x);
        let (logps, reference, lens, weight) = (&x[0].data, &x[1].data, &x[2].data, &x[3].data);
        let (n, b, e) = (weight.len(), f64::from(self.beta), f64::from(self.label_smoothing));
        let wide = |i: usize| aligned.map_or(1.0, |a| (a.data[2 * i] + a.data[2 * i + 1]).exp());
        let u = |i: usize| logps[i] - reference[i];
        let s = |i: usize| self.score(u(i));
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
        for (loss, loss_weight) in &self.losses {
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
                        let m = sigmoid(d / f64::from(self.discopop_tau));
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

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 + x[0].bytes())
    }
}

impl Dpo {
    fn sort(
        &self,
        cx: &Cx,
        logps: &Tensor,
        reference: &Tensor,
        n: usize,
        loss: DpoLoss,
    ) -> Result<(Tensor, Tensor)> {
        let sorted = cx.float("pair order", &[2 * n])?;
        let rank = cx.scratch("pair order", DType::I32, &[2 * n])?;
        let unpaired = i32::from(loss == DpoLoss::AotUnpaired);
        let args = kernels::AotSortArgs {
            sorted: sorted.out(),
            rank: rank.out(),
            logps,
            base: reference,
            n: n as i32,
            unpaired,
        };
        kernels::aot_sort(&*cx.device, Launch::flat(2 * n), args)?;
        Ok((sorted, rank))
    }
}

pub(super) fn cases(rng: &mut Rng) -> Vec<Case> {
    use DpoLoss::*;
    let mut cases = Vec::new();
    let mut case = |losses: &[(DpoLoss, f32)],
                    divergence: (_, f32),
                    beta,
                    e: f32,
                    aligned: bool| {
        let n = [1, 4, 37][cases.len() % 3];
        let (logps, lens, weight) = pair_inputs(rng, n, 3.0);
        let reference = F64::from_fn(&[n, 2], |i| logps.data[i] + 3.0 * rng.normal());
        let op = Dpo {
            losses: losses.to_vec(),
            divergence: divergence.0,
            f_alpha: divergence.1,
            beta,
            label_smoothing: e,
            discopop_tau: 0.5,
        };
        let mut inputs =
            vec![Arg::watched(logps), Arg::float(reference), Arg::float(lens), Arg::float(weight)];
        if op.sft_weight().is_some() {
            inputs.push(Arg::watched(F64::new(&[1], vec![2.25])));
        }
        if aligned {
            inputs.push(Arg::float(F64::from_fn(&[n, 2], |_| -rng.uniform())));
        }
        let label = format!("n {n} {losses:?} {divergence:?} beta {beta} e {e} aligned {aligned}");
        // Rewards are metrics: they carry no gradient.
        cases.push(Case { upstream: vec![None, Some(0.0)], ..Case::new(label, op, inputs) });
    };
    let kl = (FDivergence::ReverseKl, 0.0);
    for loss in [
        Sigmoid,
        Hinge,
        Ipo,
        NcaPair,
        BcoPair,
        SppoHard,
        ApoZero,
        ApoDown,
        Discopop,
        SigmoidNorm,
        Aot,
        AotUnpaired,
    ] {
        case(&[(loss, 1.0)], kl, 0.3, 0.0, false);
        case(&[(loss, 1.0)], kl, 0.1, 0.0, false);
    }
    for loss in [ExoPair, Robust, Aot, AotUnpaired] {
        case(&[(loss, 0.7)], kl, 0.2, 0.1, false);
        case(&[(loss, 0.7)], kl, 0.2, 0.01, true);
    }
    for divergence in [
        (FDivergence::ForwardKl, 0.0),
        (FDivergence::Js, 0.0),
        (FDivergence::Alpha, 0.5),
        (FDivergence::Alpha, 1.0),
    ] {
        for loss in [Sigmoid, Ipo, SigmoidNorm] {
            case(&[(loss, 1.0)], divergence, 0.1, 0.0, false);
        }
    }
    case(&[(Sft, 1.0)], kl, 0.1, 0.0, false);
    case(&[(Sigmoid, 0.8), (BcoPair, 0.2), (Sft, 1.0)], kl, 0.1, 0.0, false);
    case(&[(Sigmoid, 0.8), (Aot, 0.2), (Sft, 1.0)], kl, 0.1, 0.0, true);
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let n = s.sequences.max(1);
    let (logps, lens, weight) = pair_inputs(rng, n, 3.0);
    let reference = F64::from_fn(&[n, 2], |i| logps.data[i] + rng.normal());
    let op = Dpo::plain(DpoLoss::Sigmoid, 0.1);
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
        let op = Dpo { losses: losses.to_vec(), ..Dpo::plain(DpoLoss::Sigmoid, 0.1) };
        let x = DpoIn::new(&logps, &reference, &lens, &weight);
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
