//! Launches of `kernels/linear_glu_hopper.cu`: a gated unit in the product before it, and its
//! backward in the product behind it. Layer 4.
//!
//! Invariant: the bits are those of the engine's own product and `kernels/activation.cu`, so the
//! choice changes none. Where it pays is a matter of k alone: the tiles are smaller than those of
//! `matmul_hopper`, which for a long k costs more time than the activation (`docs/kernels.md`).

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::Result;
use crate::kernels::{self, Boxes};
use crate::ops::activation::Act;
use crate::ops::hopper_turns::{BOX, WARP_ROWS, WIDTH, grid, height};
use crate::ops::matmul_hopper::GROUP;
use crate::ops::own::own_products;
use crate::tensor::Tensor;

/// The height of the backward's tiles, whose sums leave no registers for a third unit.
const BACKWARD_HEIGHT: usize = 2;
/// The longest k for which the forward is predicted to be faster than two kernels.
const FORWARD_K: usize = 2047;
/// The same for the backward, which saves more.
const BACKWARD_K: usize = 4096;

/// Whether this device multiplies by w with these kernels, for gated units of f columns.
fn possible(cx: &Cx, w: &Tensor, f: usize) -> bool {
    let multiplies = own_products(cx) && cx.device.capabilities().wgmma;
    // Rows of f values begin at multiples of 16 bytes.
    multiplies && w.dtype() == DType::BF16 && Boxes::fit(w) && f > 0 && f.is_multiple_of(8)
}

/// Whether [`forward`] computes this: x [m, k], w [2 f, k].
pub(super) fn fits(cx: &Cx, x: &Tensor, w: &Tensor) -> bool {
    let (k, twice) = (w.cols(), w.row_count());
    let sizes = x.row_count() > 0 && (1..=FORWARD_K).contains(&k) && twice.is_multiple_of(2);
    sizes && Boxes::fit(x) && possible(cx, w, twice / 2)
}

/// Whether [`backward`] computes this for a gradient in whole rows: w [k, f].
pub(super) fn fits_backward(cx: &Cx, w: &Tensor) -> bool {
    let k = w.row_count();
    (1..=BACKWARD_K).contains(&k) && k.is_multiple_of(8) && possible(cx, w, w.cols())
}

/// `y = act(g) * u` with `g|u = x w^T (+ bias)`, where [`fits`] allows it: x [m, k], w [2 f, k],
/// y [m, f]; g|u goes to `gate_up` [m, 2 f], if given.
pub(super) fn forward(
    cx: &Cx,
    y: &Tensor,
    gate_up: Option<&Tensor>,
    (x, w, bias): (&Tensor, &Tensor, Option<&Tensor>),
    act: Act,
) -> Result<()> {
    let (m, f, k) = (x.row_count(), y.cols(), x.cols());
    let tn = f.div_ceil(WIDTH / 2);
    let height = height((m, tn), cx.device.capabilities().multiprocessors);
    let tm = m.div_ceil(height * BOX);
    let halves = gate_up.map(|t| halves(t, f)).transpose()?;
    let boxes = |t| Boxes::swizzled(t, WARP_ROWS);
    let args = kernels::HopperGluNtArgs {
        a: Boxes::swizzled(x, height * BOX),
        w: Boxes::swizzled(w, BOX),
        gate: boxes(halves.as_ref().map_or(y, |h| &h[0])),
        up: boxes(halves.as_ref().map_or(y, |h| &h[1])),
        y: boxes(y),
        bias,
        m: m as i32,
        f: f as i32,
        tm: tm as i32,
        tn: tn as i32,
        steps: k.div_ceil(BOX) as i32,
        keep: i32::from(gate_up.is_some()),
        group: GROUP,
    };
    kernels::hopper_glu_nt(&*cx.device, grid(cx, tm * tn), 8 * height + act as usize, args)
}

/// The gradient of g|u from that of the product behind the gated unit, `y w^T`, where
/// [`fits_backward`] allows it: dy [m, k], w [k, f]; `gate_up` [m, 2 f] becomes its gradient. The
/// gated unit's value goes to `y` [m, f], if given.
pub(super) fn backward(
    cx: &Cx,
    gate_up: &Tensor,
    y: Option<&Tensor>,
    (dy, w): (&Tensor, &Tensor),
    act: Act,
) -> Result<()> {
    let (m, f, k) = (dy.row_count(), w.cols(), dy.cols());
    let (tm, tn) = (m.div_ceil(BACKWARD_HEIGHT * BOX), f.div_ceil(WIDTH));
    let [gate, up] = halves(gate_up, f)?;
    let boxes = |t| Boxes::swizzled(t, WARP_ROWS);
    let args = kernels::HopperGluNnArgs {
        a: Boxes::swizzled(dy, BACKWARD_HEIGHT * BOX),
        w: Boxes::swizzled(w, BOX),
        gate: boxes(&gate),
        up: boxes(&up),
        y: boxes(y.unwrap_or(&gate)),
        gate_up: gate_up.out(),
        m: m as i32,
        f: f as i32,
        tm: tm as i32,
        tn: tn as i32,
        steps: k.div_ceil(BOX) as i32,
        keep: i32::from(y.is_some()),
        group: GROUP,
    };
    kernels::hopper_glu_nn(&*cx.device, grid(cx, tm * tn), act as usize, args)
}

fn halves(gate_up: &Tensor, f: usize) -> Result<[Tensor; 2]> {
    Ok([gate_up.columns(0, f)?, gate_up.columns(f, 2 * f)?])
}
