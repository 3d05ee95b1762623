//! What the losses over pairs and over single completions share. Layer 4.
//!
//! Invariant: the two numbers of a pair are adjacent, chosen first.

use crate::autograd::{Cx, F64, Grads, Node, Upstream};
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::Rng;
use crate::tensor::Tensor;

/// The outputs of a loss over `n` pairs.
pub struct PairOutputs {
    pub n: usize,
    /// F32 `[n]`
    pub each: Tensor,
    /// F32 [n, 2]
    pub grad: Tensor,
    /// F32 [n, 2]
    pub rewards: Tensor,
}

/// Checks the inputs of a loss without a reference, and allocates its outputs.
pub fn pair_outputs(
    cx: &Cx,
    op: &'static str,
    logps: &Tensor,
    lens: &Tensor,
    weight: &Tensor,
) -> Result<PairOutputs> {
    let n = pair_count(op, &[("logps", logps), ("lens", lens)], &[("weight", weight)])?;
    let each = cx.float("pair losses", &[n])?;
    let [grad, rewards] = [cx.float("pair gradients", &[n, 2])?, cx.float("rewards", &[n, 2])?];
    Ok(PairOutputs { n, each, grad, rewards })
}

/// Checks the inputs of a loss over pairs and returns their number.
pub fn pair_count(
    op: &'static str,
    pairs: &[(&str, &Tensor)],
    singles: &[(&str, &Tensor)],
) -> Result<usize> {
    let n = pairs[0].1.numel() / 2;
    for (what, t) in pairs {
        if t.shape() != [n, 2] || n == 0 || t.dtype() != DType::F32 {
            let message =
                format!("{what} {t:?} is not F32 [{n}, 2]: the chosen's number, the rejected's");
            return Err(Error::op(op, message));
        }
    }
    for (what, t) in singles {
        if t.numel() != n {
            let message = format!("{what} {t:?} has not one number for each of {n} pairs");
            return Err(Error::op(op, message));
        }
    }
    Ok(n)
}

/// Totals a loss: sum of `each`, plus `factor x nll x sum of pair_weight`. Returns it and the
/// gradient of `nll`.
pub fn totals(
    cx: &Cx,
    each: &Tensor,
    weight: &Tensor,
    nll: Option<&Tensor>,
    factor: f32,
) -> Result<(Tensor, Tensor)> {
    let (loss, dnll) = (cx.float("loss", &[1])?, cx.float("loss", &[1])?);
    let n = each.numel() as i32;
    let args = kernels::PairTotalsArgs {
        loss: loss.out(),
        dnll: Some(dnll.out()),
        each,
        pair_weight: weight,
        nll,
        n,
        factor,
    };
    kernels::pair_totals(&*cx.device, Launch::warps(1), args)?;
    Ok((loss, dnll))
}

/// The gradient of input `i`: the loss's upstream times the gradient saved by the forward.
fn give_scaled(cx: &Cx, g: &mut Grads, i: usize, kept: &Tensor, upstream: &Tensor) -> Result<()> {
    let Some((out, accumulate)) = g.slot(i)? else { return Ok(()) };
    let n = kept.numel();
    let args = kernels::ScaledByUpstreamArgs {
        out: out.out(),
        grad: kept,
        upstream,
        n: n as i32,
        accumulate: i32::from(accumulate),
    };
    kernels::scaled_by_upstream(&*cx.device, Launch::flat(n), args)
}

/// The backward of a loss whose forward saved its gradients with respect to input 0 and, if given,
/// to input `nll`.
pub fn give_kept(
    cx: &Cx,
    node: &Node,
    dy: &Upstream,
    g: &mut Grads,
    nll: Option<usize>,
) -> Result<()> {
    let Some(dy) = &dy[0] else { return Ok(()) };
    give_scaled(cx, g, 0, &node.saved[0], dy)?;
    match nll {
        Some(input) => give_scaled(cx, g, input, &node.saved[1], dy),
        None => Ok(()),
    }
}

/// Inputs that the cases of losses over pairs share: log-probs of completions of some length, their
/// lengths and weights.
pub fn pair_inputs(rng: &mut Rng, n: usize, spread: f64) -> (F64, F64, F64) {
    let lens = F64::from_fn(&[n, 2], |_| (2 + rng.below(30)) as f64);
    let logps = F64::from_fn(&[n, 2], |i| -2.5 * lens.data[i] + spread * rng.normal());
    let weight = F64::from_fn(&[n], |_| (0.5 + rng.uniform()) / n as f64);
    (logps, lens, weight)
}
