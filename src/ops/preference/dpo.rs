//! The DPO family: every loss of TRL's `DPOConfig.loss_type`, each divergence, lists of losses.
//! Layer 4.
//!
//! Invariant: one op is one whole list of losses, with one gradient for each sequence's log-prob;
//! the order of pairs matters to `aot` alone, as in TRL.

use super::{give_scaled, oracle, pair_count, pair_inputs, totals, with_grad};
use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::config::value::words;
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels::{self, divergence_kind, dpo_loss};
use crate::ops::case::{Arg, Case, Rng};
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
    /// `f_alpha_divergence_coef`, of the alpha divergence.
    pub f_alpha: f32,
    pub beta: f32,
    pub label_smoothing: f32,
    pub discopop_tau: f32,
}

/// What a DPO loss is made of, F32.
pub struct DpoIn<'a> {
    /// [n, 2] summed log-probs of the completions, by the policy: the only ones with a gradient,
    /// beside `nll`.
    pub logps: &'a Tensor,
    /// [n, 2] the same by the reference; all zeros: reference-free
    pub reference: &'a Tensor,
    /// [n, 2] completion tokens, for ipo and sigmoid_norm
    pub lens: &'a Tensor,
    /// `[n]` a pair's weight in the loss
    pub weight: &'a Tensor,
    /// `[1]` mean NLL of the chosen completions' tokens, where `sft` is in the list
    pub nll: Option<&'a Tensor>,
    /// [n, 2] WPO's mean of `logp - log sum p^2` over a completion, where `use_weighting` is on
    pub aligned: Option<&'a Tensor>,
}

/// The loss `[1]`, and the rewards [n, 2] `beta (logp - ref)`.
pub fn dpo(cx: &mut Cx, op: Dpo, x: &DpoIn) -> Result<(Tensor, Tensor)> {
    let sft = op.losses.iter().any(|(l, _)| *l == DpoLoss::Sft);
    if sft != x.nll.is_some() {
        return Err(Error::op("dpo", "the loss sft and its nll come together or not at all"));
    }
    let mut inputs = vec![x.logps, x.reference, x.lens, x.weight];
    inputs.extend(x.nll);
    inputs.extend(x.aligned);
    let mut out = cx.apply(op, &inputs)?;
    match (out.pop(), out.pop()) {
        (Some(rewards), Some(loss)) => Ok((loss, rewards)),
        _ => Err(Error::op("dpo", "gave no outputs")),
    }
}

impl Dpo {
    /// At a coefficient of 1 the alpha divergence is the reverse KL.
    pub(super) fn kernel_divergence(&self) -> FDivergence {
        let limit = self.divergence == FDivergence::Alpha && (self.f_alpha - 1.0).abs() < 1e-6;
        if limit { FDivergence::ReverseKl } else { self.divergence }
    }

    fn sft_weight(&self) -> Option<f32> {
        let sft = self.losses.iter().filter(|(l, _)| *l == DpoLoss::Sft);
        sft.map(|(_, w)| *w).reduce(|a, b| a + b)
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

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
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
            kernels::dpo_pairs(
                &*cx.device,
                Launch::flat(n),
                kernels::DpoPairsArgs {
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
                },
            )?;
        }
        let (loss, dnll) =
            totals(cx, &each, &pair_weight, nll.copied(), self.sft_weight().unwrap_or(0.0))?;
        let saved = if need.tape { vec![grad, dnll] } else { vec![] };
        Ok(Fwd { outputs: vec![loss, rewards], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        give_scaled(cx, g, 0, &node.saved[0], dy)?;
        match self.sft_weight() {
            Some(_) => give_scaled(cx, g, 4, &node.saved[1], dy),
            None => Ok(()),
        }
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (nll, aligned) = self.optional(x);
        oracle::dpo(self, x, nll, aligned)
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
        let at = Launch::flat(2 * n);
        kernels::aot_sort(
            &*cx.device,
            at,
            kernels::AotSortArgs {
                sorted: sorted.out(),
                rank: rank.out(),
                logps,
                base: reference,
                n: n as i32,
                unpaired,
            },
        )?;
        Ok((sorted, rank))
    }
}

pub(super) fn cases(rng: &mut Rng) -> Vec<Case> {
    use DpoLoss::*;
    let mut cases = Vec::new();
    let mut case =
        |losses: &[(DpoLoss, f32)], divergence: (_, f32), beta, e: f32, aligned: bool| {
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
                vec![with_grad(logps), Arg::float(reference), Arg::float(lens), Arg::float(weight)];
            if op.sft_weight().is_some() {
                inputs.push(with_grad(F64::new(&[1], vec![2.25])));
            }
            if aligned {
                inputs.push(Arg::float(F64::from_fn(&[n, 2], |_| -rng.uniform())));
            }
            let label =
                format!("n {n} {losses:?} {divergence:?} beta {beta} e {e} aligned {aligned}");
            // Rewards are figures: nothing flows back through them.
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
