//! Launches of the products of few rows on Hopper, `kernels/matmul_few_hopper.cu`. Layer 4.
//!
//! Invariant: how a product is cut into blocks and stages changes no bit.

use crate::autograd::Cx;
use crate::device::{Capabilities, DType, Launch, Layout};
use crate::error::Result;
use crate::kernels::{self, Boxes, FEW_HOPPER_BARRIERS, FEW_HOPPER_STAGES, FEW_HOPPER_STEP};
use crate::ops::operands::Operands;
use crate::tensor::Tensor;

/// Whether this device and these tensors allow the kernels: bf16, few rows, bulk copies of x and w.
fn allowed(cx: &Cx, x: &Tensor, w: &Tensor) -> bool {
    cx.device.capabilities().wgmma
        && x.dtype() == DType::BF16
        && (1..=kernels::FEW_ROWS).contains(&x.row_count())
        && x.cols() > 0
        && Boxes::fit(x)
        && Boxes::fit(w)
}

/// Whether this is such a product.
pub(super) fn fits(cx: &Cx, p: &Operands) -> bool {
    p.layout == Layout::NT && allowed(cx, p.a, p.b)
}

/// `c = a b^T (+ bias) (+ c)`, where [`fits`] allows it.
pub(super) fn product(cx: &Cx, p: &Operands) -> Result<()> {
    let (m, n, k) = p.sizes();
    let cut = Cut::of([m, n, k], &cx.device.capabilities());
    let float = p.c.dtype() == DType::F32;
    let args = kernels::FewHopperNtArgs {
        x: Boxes::swizzled(p.a, cut.width),
        w: Boxes::swizzled(p.b, cut.rows),
        c: (!float).then(|| p.c.out()),
        cf: float.then(|| p.c.out()),
        weight: p.b,
        bias: p.bias,
        m: m as i32,
        n: n as i32,
        k: k as i32,
        ldw: p.b.stride() as i32,
        ldc: p.c.stride() as i32,
        accumulate: i32::from(p.accumulate),
        rows: cut.rows as i32,
        stages: cut.stages as i32,
    };
    kernels::few_hopper_nt(&*cx.device, cut.launch, cut.width, args)
}

/// Rows of W that a load of few_hopper_glu brings: of g, then of u.
const GLU_ROWS: usize = 8;

/// `y = act(g) * u` with `g|u = x w^T (+ bias)`: x [m, k], w [2 f, k], y [m, f]. Where `fits` allows
/// the product.
pub(super) fn glu(
    cx: &Cx,
    y: &Tensor,
    (x, w, bias): (&Tensor, &Tensor, Option<&Tensor>),
    activation: i32,
) -> Result<()> {
    let (m, f, k) = (x.row_count(), y.cols(), x.cols());
    let cut = Cut::of([m, 2 * f, k], &cx.device.capabilities());
    let args = kernels::FewHopperGluArgs {
        x: Boxes::swizzled(x, cut.width),
        w: Boxes::swizzled(w, GLU_ROWS),
        y: y.out(),
        weight: w,
        bias,
        m: m as i32,
        f: f as i32,
        k: k as i32,
        ldw: w.stride() as i32,
        ldy: y.stride() as i32,
        activation,
        rows: cut.rows as i32,
        stages: cut.stages as i32,
    };
    kernels::few_hopper_glu(&*cx.device, cut.launch, cut.width, args)
}

/// How a product is cut into blocks and stages.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// The instance of the kernel: 8, 16, 32 or 64 rows of X.
    width: usize,
    /// Rows of W a block.
    rows: usize,
    stages: usize,
    launch: Launch,
}

/// Shared memory of a multiprocessor that a launch may use.
const SHARED: usize = 224 << 10;

impl Cut {
    fn of([m, n, k]: [usize; 3], device: &Capabilities) -> Cut {
        let width = m.next_power_of_two().clamp(8, kernels::FEW_ROWS);
        // As many rows as leave two blocks to each multiprocessor.
        let many = |rows: &usize| n.div_ceil(*rows) >= 2 * device.multiprocessors;
        let rows = [64, 32].into_iter().find(many).unwrap_or(16);
        let blocks = n.div_ceil(rows);
        let at_once = blocks.div_ceil(device.multiprocessors).clamp(1, 3);
        let room = SHARED / at_once - FEW_HOPPER_BARRIERS;
        let most = room / kernels::few_hopper_stage(width);
        let stages = most.min(FEW_HOPPER_STAGES).min(k.div_ceil(FEW_HOPPER_STEP)).max(2);
        let shared = stages * kernels::few_hopper_stage(width) + FEW_HOPPER_BARRIERS;
        let launch = Launch::blocks([blocks, 1, 1], kernels::FEW_HOPPER_THREADS as u32, shared);
        Cut { width, rows, stages, launch }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fill_the_multiprocessors_and_their_shared_memory() {
        let device = Capabilities { wgmma: true, ..Capabilities::GPU };
        let cut = |m, n, k| {
            let c = Cut::of([m, n, k], &device);
            (c.width, c.rows, c.stages, c.launch.grid[0], c.launch.shared >> 10)
        };
        assert_eq!(cut(1, 896, 4864), (8, 16, 24, 56, 217));
        assert_eq!(cut(1, 1152, 896), (8, 16, 14, 72, 127));
        assert_eq!(cut(16, 9728, 896), (16, 32, 7, 304, 71));
        assert_eq!(cut(64, 151_936, 896), (64, 64, 4, 2374, 65));
        for (m, n, k) in [(1, 8, 8), (64, 40_000, 18_944), (33, 896, 64)] {
            let c = Cut::of([m, n, k], &device);
            assert!(c.launch.shared <= 227 << 10 && c.width >= m && c.stages >= 2, "{c:?}");
        }
    }
}
