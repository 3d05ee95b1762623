//! The engine's own matrix product on Hopper: which of `kernels/matmul_hopper.cu` runs, and how.
//! Layer 4.
//!
//! Invariant: an element's bits are those of `kernels/matmul.cu`, whatever is chosen here; so the
//! choice may depend on M.

use crate::autograd::Cx;
use crate::device::{DType, Launch, Layout};
use crate::error::Result;
use crate::kernels::{self, Boxes};
use crate::tensor::Tensor;

/// Rows of a tile of C.
const ROWS: usize = 128;

/// `c = op(a) op(b) (+ bias) (+ c)` of m x n x k, if this device and these tensors allow it:
/// Ok(false) means they do not, and nothing was done.
pub fn product(
    cx: &Cx,
    layout: Layout,
    c: &Tensor,
    (a, b, bias): (&Tensor, &Tensor, Option<&Tensor>),
    (m, n, k): (usize, usize, usize),
    accumulate: bool,
) -> Result<bool> {
    let capabilities = cx.device.capabilities();
    let float = c.dtype() == DType::F32;
    if !capabilities.wgmma || a.dtype() != DType::BF16 || k == 0 {
        return Ok(false);
    }
    if !Boxes::fit(a) || !Boxes::fit(b) || !(float || Boxes::fit(c)) {
        return Ok(false);
    }
    let width = tile_width(n, m, capabilities.multiprocessors);
    let tiles = m.div_ceil(ROWS) * n.div_ceil(width);
    let at = Launch::grid([tiles.min(capabilities.multiprocessors), 1, 1]);
    // Boxes: along k where that is contiguous, else 64 rows of k.
    let a = Boxes::swizzled(a, if layout == Layout::TN { 64 } else { ROWS });
    let b = Boxes::swizzled(b, if layout == Layout::NT { width } else { 64 });
    let (m, n, k, accumulate) = (m as i32, n as i32, k as i32, i32::from(accumulate));
    let group = GROUP;
    match (layout, float) {
        (Layout::NT | Layout::NN, false) => {
            let c = Boxes::swizzled(c, 64);
            let args =
                kernels::HopperNtArgs { a, b, c, residual: c, bias, m, n, k, accumulate, group };
            let kernel = match layout {
                Layout::NT => kernels::hopper_nt,
                _ => kernels::hopper_nn,
            };
            kernel(&*cx.device, at, width, args)?;
        }
        (Layout::NT | Layout::TN, true) => {
            let ldc = c.stride() as i32;
            let c = c.out();
            let args =
                kernels::HopperNtFloatArgs { a, b, c, bias, m, n, k, ldc, accumulate, group };
            let kernel = match layout {
                Layout::NT => kernels::hopper_nt_float,
                _ => kernels::hopper_tn_float,
            };
            kernel(&*cx.device, at, width, args)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Rows of tiles that are taken together, so that blocks at work side by side share what L2 holds.
const GROUP: i32 = 8;

/// The width of a tile that takes the least time: waves of tiles over the multiprocessors, times
/// the time of a tile. A narrow tile reads more for a product: measured on an H100 at 8192^3, per
/// column, 1.00 at 256, 1.03 at 192, 1.10 at 128.
fn tile_width(n: usize, m: usize, multiprocessors: usize) -> usize {
    let time = |&(width, per_column): &(usize, f64)| {
        let tiles = m.div_ceil(ROWS) * n.div_ceil(width);
        tiles.div_ceil(multiprocessors) as f64 * width as f64 * per_column
    };
    let widths = [(256, 1.0), (192, 1.03), (128, 1.10)];
    let best = widths.iter().min_by(|x, y| time(x).total_cmp(&time(y)));
    best.map_or(256, |w| w.0)
}
