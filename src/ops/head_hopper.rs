//! Launches of `kernels/head_hopper.cu`: the head's statistics and gradient at the end of a product,
//! without logits in memory. Layer 4.
//!
//! Invariant: the bits are those of the engine's own product and `kernels/head.cu`.

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::Result;
use crate::kernels::{self, Boxes};
use crate::ops::head_terms::{LogitTerm, RowGradient};
use crate::ops::hopper_turns::{BOX, WARP_ROWS, grid, height};
use crate::ops::logit_map::LogitMap;
use crate::ops::matmul_hopper::GROUP;
use crate::ops::own::own_products;
use crate::tensor::Tensor;

/// Whether this device computes these rows' statistics and gradients without storing their logits.
pub(super) fn fits(cx: &Cx, terms: &[LogitTerm], map: LogitMap) -> bool {
    let [LogitTerm { rows: x, weight: w }] = terms else { return false };
    // Rows of gradients begin at multiples of 16 bytes.
    let sizes = x.row_count() > 0 && x.cols() > 0 && w.row_count().is_multiple_of(8);
    let multiplies = own_products(cx) && cx.device.capabilities().wgmma;
    let operands = w.dtype() == DType::BF16 && Boxes::fit(x) && Boxes::fit(w);
    map == LogitMap::PLAIN && multiplies && sizes && operands
}

/// Parts of a row of logits.
pub(super) fn parts(vocab: usize) -> usize {
    vocab.div_ceil(kernels::LOGIT_PART)
}

/// Values of a row's statistics.
pub(super) fn part_values(vocab: usize) -> usize {
    parts(vocab) * kernels::TILE_STATS
}

/// What the product leaves in memory.
pub(super) struct Outputs<'a> {
    /// The statistics of the parts of each row, F32 [m, parts x TILE_STATS].
    pub parts: &'a Tensor,
    /// The targets, I32 `[m]`, and where their logits go, F32 `[m]`.
    pub target: Option<(&'a Tensor, &'a Tensor)>,
    /// F32 [m, vocab]
    pub logits: Option<&'a Tensor>,
}

/// The statistics of x w^T: x [m, k] real, w [vocab, k].
pub(super) fn statistics(
    cx: &Cx,
    out: &Outputs,
    (x, w): (&Tensor, &Tensor),
    scale: f32,
) -> Result<()> {
    let (m, vocab) = (x.row_count(), w.row_count());
    let (height, tm, tn) = tiles(cx, m, vocab);
    let args = kernels::HopperHeadPartsArgs {
        x: Boxes::swizzled(x, height * BOX),
        w: Boxes::swizzled(w, kernels::LOGIT_PART),
        parts: out.parts.out(),
        target_logit: out.target.map(|t| t.1.out()),
        logits: out.logits.map(|t| t.out()),
        target: out.target.map(|t| t.0),
        m: m as i32,
        vocab: vocab as i32,
        tm: tm as i32,
        tn: tn as i32,
        steps: x.cols().div_ceil(BOX) as i32,
        scale,
        group: GROUP,
    };
    kernels::hopper_head_parts(&*cx.device, grid(cx, tm * tn), height, args)
}

/// The gradient of the logits, real [m, vocab].
pub(super) fn gradient(
    cx: &Cx,
    dlogits: &Tensor,
    (x, w): (&Tensor, &Tensor),
    g: &RowGradient,
    scale: f32,
) -> Result<()> {
    let (m, vocab) = (x.row_count(), w.row_count());
    let (height, tm, tn) = tiles(cx, m, vocab);
    let args = kernels::HopperHeadGradArgs {
        x: Boxes::swizzled(x, height * BOX),
        w: Boxes::swizzled(w, kernels::LOGIT_PART),
        dl: Boxes::swizzled(dlogits, WARP_ROWS),
        target: &g.target,
        lse: &g.lse,
        entropy: g.entropy.as_ref(),
        a: &g.logp,
        b: g.by_entropy.as_ref(),
        m: m as i32,
        vocab: vocab as i32,
        tm: tm as i32,
        tn: tn as i32,
        steps: x.cols().div_ceil(BOX) as i32,
        scale,
        slope: LogitMap::PLAIN.slope(scale),
        group: GROUP,
    };
    kernels::hopper_head_grad(&*cx.device, grid(cx, tm * tn), height, args)
}

/// The height of the tiles, and their numbers down and across.
fn tiles(cx: &Cx, m: usize, vocab: usize) -> (usize, usize, usize) {
    let across = parts(vocab);
    let height = height((m, across), cx.device.capabilities().multiprocessors);
    (height, m.div_ceil(height * BOX), across)
}
