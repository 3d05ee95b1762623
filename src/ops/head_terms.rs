//! The products whose sum is the logits: hidden rows times the head's weight and, with LoRA on the
//! head, a narrow product times the pair's B. Layer 4.
//!
//! Math: z = x W^T + t B^T, t = s xd A^T, xd = x or its dropout; dx = dz W, dW = dz^T x, dt = dz B,
//! dB = dz^T t. t is an ordinary value on the tape, so A and xd get their gradients from there.
//!
//! Invariant: terms are added in one order, whether the trainer, distillation or the sampler asks
//! for the logits, so a row has the same bits in all of them.

use crate::autograd::{Cx, F64};
use crate::device::Layout;
use crate::error::{Error, Result};
use crate::ops::dropout::dropout;
use crate::ops::expect_cols;
use crate::ops::matmul::{linear, product};
use crate::ops::scale::{Multiply, multiply};
use crate::tensor::{Id, Tensor};

/// LoRA's pair on the head.
#[derive(Clone, Debug)]
pub struct HeadPair {
    /// [r, d] real
    pub a: Tensor,
    /// [vocab, r] real
    pub b: Tensor,
    pub scale: f32,
    /// Dropout of the pair's input; applied only with a tape, that is in training.
    pub dropout: f32,
}

impl HeadPair {
    /// `s xd A^T` [n, r] real.
    pub(super) fn narrow(&self, cx: &mut Cx, x: &Tensor) -> Result<Tensor> {
        let drops = cx.tape.is_some() && self.dropout > 0.0;
        let dropped = if drops { Some(dropout(cx, x, self.dropout)?) } else { None };
        let t = linear(cx, dropped.as_ref().unwrap_or(x), &self.a, None)?;
        if self.scale == 1.0 { Ok(t) } else { multiply(cx, &t, self.scale) }
    }

    /// The same without a tape, with the same launches.
    pub(super) fn narrow_alone(&self, cx: &Cx, x: &Tensor) -> Result<Tensor> {
        let t = cx.real("linear", &[x.row_count(), self.a.row_count()])?;
        product(cx, Layout::NT, &t, x, &self.a, None, false)?;
        if self.scale == 1.0 { Ok(t) } else { Multiply { factor: self.scale }.of(cx, &t) }
    }
}

/// One of the products: rows [n, k] times the transpose of a weight [vocab, k].
pub struct LogitTerm<'a> {
    pub rows: &'a Tensor,
    pub weight: &'a Tensor,
}

/// The terms among an op's inputs: x and W, then t and B if present.
pub(super) fn terms<'a>(main: [&'a Tensor; 2], pair: &[&'a Tensor]) -> Vec<LogitTerm<'a>> {
    let mut terms = vec![LogitTerm { rows: main[0], weight: main[1] }];
    if let [rows, weight] = *pair {
        terms.push(LogitTerm { rows, weight });
    }
    terms
}

/// Error if the pair does not fit the first term.
pub(super) fn check(name: &'static str, terms: &[LogitTerm]) -> Result<()> {
    let [main, pair] = terms else { return Ok(()) };
    expect_cols(name, "the pair's B", pair.weight, pair.rows.cols(), "is it this head's?")?;
    let sizes = |t: &LogitTerm| (t.rows.row_count(), t.weight.row_count());
    if sizes(main) != sizes(pair) {
        let message = format!("{:?} and {:?} do not fit the head", pair.rows, pair.weight);
        return Err(Error::op(name, message));
    }
    Ok(())
}

/// F32 logits of rows `from..to`.
pub(super) fn logits_of(
    cx: &Cx,
    logits: &Tensor,
    terms: &[LogitTerm],
    (from, to): (usize, usize),
) -> Result<()> {
    for (i, term) in terms.iter().enumerate() {
        let rows = term.rows.rows(from, to)?;
        product(cx, Layout::NT, logits, &rows, term.weight, None, i > 0)?;
    }
    Ok(())
}

/// A buffer and whether to add to its contents.
pub type TermSlot = Option<(Tensor, bool)>;

/// Where a term's gradients go.
#[derive(Default)]
pub struct TermSlots {
    pub rows: TermSlot,
    pub weight: TermSlot,
}

impl TermSlots {
    /// The gradient of the rows alone, to `dx`.
    pub fn of_rows(dx: &Tensor) -> TermSlots {
        TermSlots { rows: Some((dx.clone(), false)), weight: None }
    }
}

/// Slots for gradients that are computed in a forward: new buffers for rows, the parameters' own
/// for weights. `wants`: whether rows and weight need one, per term.
pub(super) fn slots_in_forward(
    cx: &mut Cx,
    name: &'static str,
    terms: &[LogitTerm],
    wants: &[[bool; 2]],
) -> Result<Vec<TermSlots>> {
    let mut all = Vec::new();
    for (term, [rows, weight]) in terms.iter().zip(wants) {
        let rows = match rows {
            true => Some((cx.real("activation gradients", term.rows.shape())?, false)),
            false => None,
        };
        let weight = match (weight, term.weight.id()) {
            (true, Id::Param { set, index }) => cx.param_grads[set].slot(index),
            (true, _) => {
                let message = "the head's weight is no parameter; use head_logps";
                return Err(Error::op(name, message));
            }
            _ => None,
        };
        all.push(TermSlots { rows, weight });
    }
    Ok(all)
}

/// The gradients of rows `from..to`, from those of their logits.
pub fn gradients_of(
    cx: &Cx,
    dlogits: &Tensor,
    terms: &[LogitTerm],
    slots: &mut [TermSlots],
    (from, to): (usize, usize),
) -> Result<()> {
    for (term, slot) in terms.iter().zip(slots) {
        if let Some((dx, accumulate)) = &slot.rows {
            let dx = dx.rows(from, to)?;
            product(cx, Layout::NN, &dx, dlogits, term.weight, None, *accumulate)?;
        }
        if let Some((dw, accumulate)) = &mut slot.weight {
            product(cx, Layout::TN, dw, dlogits, &term.rows.rows(from, to)?, None, *accumulate)?;
            *accumulate = true;
        }
    }
    Ok(())
}

/// What the gradient of logits is computed from; each F32 `[rows]`, the target I32.
pub struct RowGradient {
    pub target: Tensor,
    pub lse: Tensor,
    /// Upstream of log p(target).
    pub logp: Tensor,
    pub entropy: Option<Tensor>,
    /// Upstream of the entropy; needs `entropy`.
    pub by_entropy: Option<Tensor>,
}

impl RowGradient {
    pub fn rows(&self, from: usize, to: usize) -> Result<RowGradient> {
        let some = |t: &Option<Tensor>| t.as_ref().map(|t| t.rows(from, to)).transpose();
        Ok(RowGradient {
            target: self.target.rows(from, to)?,
            lse: self.lse.rows(from, to)?,
            logp: self.logp.rows(from, to)?,
            entropy: some(&self.entropy)?,
            by_entropy: some(&self.by_entropy)?,
        })
    }
}

/// Row `r` of the oracle's logits before the map; `pair` is t and B.
pub(super) fn oracle_row(x: &F64, w: &F64, pair: &[F64], r: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let logit = |j: usize| {
        let low = if let [t, b] = pair { dot(t.row(r), b.row(j)) } else { 0.0 };
        dot(x.row(r), w.row(j)) + low
    };
    (0..w.row_count()).map(logit).collect()
}
