//! Launches of the products of few rows on Hopper, `kernels/matmul_few_hopper.cu`. Layer 4.
//!
//! Invariant: how a product is cut into blocks and stages changes no bit.

use crate::autograd::Cx;
use crate::device::{Capabilities, DType, Launch, Layout};
use crate::error::{Error, Result};
use crate::kernels::{
    self, Boxes, FEW_HOPPER_BARRIERS, FEW_HOPPER_STAGES, FEW_HOPPER_STEP, FEW_NORM_TILE,
};
use crate::ops::matmul_hopper;
use crate::ops::operands::Operands;
use crate::ops::prefetch::prefetch;
use crate::ops::rmsnorm::NormInput;
use crate::tensor::Tensor;

/// Whether this device and these tensors allow the kernels: bf16, bulk copies of x and w.
fn allowed(cx: &Cx, x: &Tensor, w: &Tensor) -> bool {
    cx.device.capabilities().wgmma
        && x.dtype() == DType::BF16
        && x.row_count() > 0
        && x.cols() > 0
        && Boxes::fit(x)
        && Boxes::fit(w)
}

/// Whether the kernels can compute the product.
pub(super) fn fits(cx: &Cx, p: &Operands) -> bool {
    p.layout == Layout::NT && allowed(cx, p.a, p.b)
}

/// Whether it is worth timing: the rows are few, or C has too few tiles of `matmul_hopper`.
pub(super) fn competes(cx: &Cx, p: &Operands) -> bool {
    let (m, n, _) = p.sizes();
    let idle = || {
        let tiles = matmul_hopper::tiles((m, n), matmul_hopper::NARROWEST);
        m <= kernels::FEW_HOPPER_ROWS && tiles < cx.device.capabilities().multiprocessors
    };
    fits(cx, p) && (m <= kernels::FEW_ROWS || idle())
}

/// `c = a b^T (+ bias) (+ c)`, where [`fits`] allows it.
pub(super) fn product(cx: &Cx, p: &Operands) -> Result<()> {
    let (m, n, k) = p.sizes();
    let cut = Cut::of([m, n, k], false, &cx.device.capabilities());
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
        ahead: cut.ahead as i32,
        wave: cut.wave as i32,
    };
    kernels::few_hopper_nt(&*cx.device, cut.launch, cut.width, args)
}

/// Rows of W that a load of few_hopper_glu brings: of g, then of u.
const GLU_ROWS: usize = 8;

/// `y = act(g) * u` with `g|u = x w^T (+ bias)`: x [m, k], w [2 f, k], y [m, f]. Where [`fits`] allows
/// the product, for at most [`kernels::FEW_ROWS`] rows.
pub(super) fn glu(
    cx: &Cx,
    y: &Tensor,
    (x, w, bias): (&Tensor, &Tensor, Option<&Tensor>),
    activation: i32,
) -> Result<()> {
    let (m, f, k) = (x.row_count(), y.cols(), x.cols());
    let cut = Cut::of([m, 2 * f, k], false, &cx.device.capabilities());
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
        ahead: cut.ahead as i32,
        wave: cut.wave as i32,
    };
    kernels::few_hopper_glu(&*cx.device, cut.launch, cut.width, args)
}

/// Packs of a row of k bf16 values that a lane of the norm holds.
fn packs(k: usize) -> usize {
    k.div_ceil(kernels::warp_columns(DType::BF16.size()))
}

/// The instance for this norm in front of a product with `w`; None: there is none.
pub(super) fn norm_instance(cx: &Cx, input: &NormInput, w: &Tensor) -> Option<usize> {
    let NormInput { x, residual, weight, .. } = *input;
    let whole = |t: &Tensor| t.address().is_multiple_of(16) && t.stride() == t.cols();
    let fits = allowed(cx, x, w)
        && x.row_count() <= kernels::FEW_NORM_ROWS
        && x.cols().is_multiple_of(kernels::pack_width(x.dtype().size()))
        && whole(x)
        && residual.is_none_or(whole)
        && weight.address().is_multiple_of(16);
    let held = kernels::FEW_NORM_NT_D.into_iter().find(|&held| packs(x.cols()) <= held);
    held.filter(|_| fits)
}

/// `y = act(g) * u` with `g|u = N w^T (+ bias)`, N the normed rows, or without `act` `y = N w^T (+
/// bias)`; what is normed goes to `sum`, given with a residual. Error: [`norm_instance`] has none.
pub(super) fn normed(
    cx: &Cx,
    y: &Tensor,
    sum: Option<&Tensor>,
    input: NormInput,
    (w, bias): (&Tensor, Option<&Tensor>),
    activation: Option<i32>,
) -> Result<()> {
    let Some(held) = norm_instance(cx, &input, w) else {
        let message = format!("no norm in front of {:?} and {w:?}", input.x);
        return Err(Error::op("norm_linear", message));
    };
    let NormInput { x, residual, weight: norm_weight, norm } = input;
    let (m, n, k) = (x.row_count(), w.row_count(), x.cols());
    let cut = Cut::of([m, n, k], true, &cx.device.capabilities());
    let (m, k, rows, stages) = (m as i32, k as i32, cut.rows as i32, cut.stages as i32);
    let (ldw, ldc, sum) = (w.stride() as i32, y.stride() as i32, sum.map(|t| t.out()));
    let (ahead, wave) = (cut.ahead as i32, cut.wave as i32);
    let (eps, plus, once) = (norm.eps, norm.plus(), norm.once());
    match activation {
        None => {
            let args = kernels::FewNormNtArgs {
                w: Boxes::swizzled(w, cut.rows),
                c: y.out(),
                sum,
                x,
                res: residual,
                norm: norm_weight,
                weight: w,
                bias,
                m,
                n: n as i32,
                k,
                ldw,
                ldc,
                eps,
                plus,
                once,
                rows,
                stages,
                ahead,
                wave,
            };
            kernels::few_norm_nt(&*cx.device, cut.launch, held, args)
        }
        Some(activation) => {
            let args = kernels::FewNormGluArgs {
                w: Boxes::swizzled(w, GLU_ROWS),
                y: y.out(),
                sum,
                x,
                res: residual,
                norm: norm_weight,
                weight: w,
                bias,
                m,
                f: n as i32 / 2,
                k,
                ldw,
                ldy: ldc,
                activation,
                eps,
                plus,
                once,
                rows,
                stages,
                ahead,
                wave,
            };
            kernels::few_norm_glu(&*cx.device, cut.launch, held, args)
        }
    }
}

/// How a product is cut into blocks and stages.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// The instance of few_hopper_*, rows of X a block: 8, 16, 32, 64 or, for few_hopper_nt, 128.
    width: usize,
    /// Rows of W a block.
    rows: usize,
    stages: usize,
    /// Bytes of each row of W that are prefetched, by so many blocks.
    ahead: usize,
    wave: usize,
    launch: Launch,
}

/// Shared memory of a multiprocessor that a launch may use.
const SHARED: usize = 224 << 10;

fn width_of(m: usize) -> usize {
    m.next_power_of_two().clamp(8, kernels::FEW_ROWS)
}

/// Rows of W that a block may own.
const CUTS: [usize; 3] = [64, 32, 16];

impl Cut {
    /// The cut for m rows, n columns and k. `normed`: x is in shared memory as a whole.
    fn of([m, n, k]: [usize; 3], normed: bool, device: &Capabilities) -> Cut {
        let steps = k.div_ceil(FEW_HOPPER_STEP);
        let (width, rows) = match m <= kernels::FEW_ROWS {
            true => {
                // As many rows as leave two blocks to each multiprocessor; one, where X is read as
                // often as W.
                let least = if width_of(m) < 32 { 2 } else { 1 } * device.multiprocessors;
                let many = |rows: &usize| n.div_ceil(*rows) >= least;
                (width_of(m), CUTS.into_iter().find(many).unwrap_or(CUTS[2]))
            }
            false => fastest_cut([m, n, steps], device.multiprocessors),
        };
        let (stage, rest) = match normed {
            true => (kernels::few_hopper_stage(0), FEW_HOPPER_BARRIERS + steps * FEW_NORM_TILE),
            false => (kernels::few_hopper_stage(width), FEW_HOPPER_BARRIERS),
        };
        let grid = [n.div_ceil(rows), m.div_ceil(width), 1];
        // A norm of long rows holds so many registers that two blocks find room.
        let room = if normed && packs(k) > kernels::FEW_NORM_NT_D[0] { 2 } else { 3 };
        let at_once = (grid[0] * grid[1]).div_ceil(device.multiprocessors).clamp(1, room);
        let most = (SHARED / at_once).saturating_sub(rest) / stage;
        let stages = most.min(FEW_HOPPER_STAGES).min(steps).max(2);
        let launch =
            Launch::blocks(grid, kernels::FEW_HOPPER_THREADS as u32, stages * stage + rest);
        let (ahead, wave) = prefetch(k, rows, grid[0], at_once, device);
        Cut { width, rows, stages, ahead, wave, launch }
    }
}

/// Bytes a cycle that a multiprocessor can load, and that each gets from L2 when all load (10.6 TB/s on
/// an H100).
const LOADED_ALONE: f64 = 64.0;
const LOADED_TOGETHER: f64 = 46.0;

/// The rows of X and of W of a block, for more than [`kernels::FEW_ROWS`] rows, that take the least
/// time by what its tiles load and multiply. *Predicted*, not measured.
fn fastest_cut([m, n, steps]: [usize; 3], multiprocessors: usize) -> (usize, usize) {
    let cycles = |(width, rows): (usize, usize)| {
        let blocks = m.div_ceil(width) * n.div_ceil(rows);
        let bytes = (128 * (width + rows)) as f64;
        // A wgmma of 64 x width takes width / 2 cycles for 16 of k.
        let step = (bytes / LOADED_ALONE).max(2.0 * width as f64);
        let alone = blocks.div_ceil(multiprocessors) as f64 * step;
        let together = blocks as f64 * bytes / (LOADED_TOGETHER * multiprocessors as f64);
        steps as f64 * alone.max(together)
    };
    let all = [64, 128].into_iter().flat_map(|width| CUTS.map(|rows| (width, rows)));
    all.min_by(|x, y| cycles(*x).total_cmp(&cycles(*y))).unwrap_or((64, CUTS[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fill_the_multiprocessors_and_their_shared_memory() {
        let device = Capabilities { wgmma: true, ..Capabilities::GPU };
        let cut = |m, n, k| {
            let c = Cut::of([m, n, k], false, &device);
            (c.width, c.rows, c.stages, c.launch.grid[0], c.launch.shared >> 10)
        };
        assert_eq!(cut(1, 896, 4864), (8, 16, 8, 56, 73));
        assert_eq!(cut(1, 1152, 896), (8, 16, 8, 72, 73));
        assert_eq!(cut(16, 9728, 896), (16, 32, 7, 304, 71));
        assert_eq!(cut(64, 151_936, 896), (64, 64, 4, 2374, 65));
        // One block a multiprocessor where X is as long as W.
        assert_eq!(cut(64, 9728, 896), (64, 64, 6, 152, 97));
        // More rows: X is cut, too, and wide tiles load less where there are enough of them.
        assert_eq!(cut(65, 896, 896), (64, 16, 8, 56, 129));
        assert_eq!(cut(256, 896, 4864), (64, 32, 8, 28, 129));
        assert_eq!(cut(256, 1152, 896), (64, 64, 8, 18, 129));
        assert_eq!(cut(1024, 896, 896), (128, 64, 8, 14, 193));
        for (m, n, k) in [(1, 8, 8), (64, 40_000, 18_944), (33, 896, 64), (1000, 8, 896)] {
            let c = Cut::of([m, n, k], false, &device);
            let rows = c.width * c.launch.grid[1] as usize;
            assert!(c.launch.shared <= 227 << 10 && rows >= m && c.stages >= 2, "{c:?}");
        }
    }

    #[test]
    fn what_is_prefetched_fits_the_cache() {
        let device = Capabilities { wgmma: true, ..Capabilities::GPU };
        let ahead = |m, n, k| {
            let c = Cut::of([m, n, k], false, &device);
            assert!(c.ahead * c.rows * c.wave <= 20 << 20 && c.ahead <= 2 * k, "{c:?}");
            (c.ahead, c.wave)
        };
        assert_eq!(ahead(1, 896, 4864), (9728, 56));
        assert_eq!(ahead(1, 9728, 896), (1792, 304));
        assert_eq!(ahead(1, 151_936, 896), (768, 396)); // the head: the first of six waves, in part
        assert_eq!(ahead(1, 16, 60), (0, 1));
    }
}
