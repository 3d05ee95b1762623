//! The engine's own matrix product on Hopper: which of `kernels/matmul_hopper.cu` runs, and how.
//! Layer 4.
//!
//! Invariant: an element's bits are those of `kernels/matmul.cu`, whatever is chosen here, so the
//! choice may depend on M; but a gradient of a weight (TN) may be a sum of parts of k in their order.

use crate::autograd::Cx;
use crate::device::{DType, Launch, Layout};
use crate::error::Result;
use crate::kernels::{self, Boxes, SPLIT_BLOCKS, SPLIT_STEPS};
use crate::tensor::Tensor;

/// Rows of a tile of C, and k of a step.
const ROWS: usize = 128;
const STEP: usize = 64;

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
    // Pairs of C are read and written at once.
    let pairs =
        n.is_multiple_of(2) && c.stride().is_multiple_of(2) && c.address().is_multiple_of(8);
    if !Boxes::fit(a) || !Boxes::fit(b) || !(if float { pairs } else { pairs && Boxes::fit(c) }) {
        return Ok(false);
    }
    let (tiles, width) = choose(layout, (m, n), capabilities.multiprocessors);
    let at = Launch::grid([tiles.min(capabilities.multiprocessors), 1, 1]);
    // Boxes: along k where that is contiguous, else 64 rows of k.
    let a = Boxes::swizzled(a, if layout == Layout::TN { 64 } else { ROWS });
    let b = Boxes::swizzled(b, if layout == Layout::NT { width } else { 64 });
    let steps = k.div_ceil(STEP);
    let (m, n, k, accumulate) = (m as i32, n as i32, k as i32, i32::from(accumulate));
    let (ldc, group) = (c.stride() as i32, GROUP);
    match (layout, float) {
        (Layout::NT | Layout::NN, false) => {
            let residual = (accumulate != 0).then_some(c);
            let (direct, c) = (c.out(), Boxes::swizzled(c, 16));
            let ldr = ldc;
            let args =
                kernels::HopperNtArgs { a, b, c, direct, residual, bias, m, n, k, ldc, ldr, group };
            let kernel = match layout {
                Layout::NT => kernels::hopper_nt,
                _ => kernels::hopper_nn,
            };
            kernel(&*cx.device, at, width, args)?;
        }
        (Layout::NT, true) => {
            let c = c.out();
            let args =
                kernels::HopperNtFloatArgs { a, b, c, bias, m, n, k, ldc, accumulate, group };
            kernels::hopper_nt_float(&*cx.device, at, width, args)?;
        }
        (Layout::TN, true) => {
            let workers = workers(tiles, steps);
            let shared = Shared::new(cx, workers, width)?;
            let (parts, flags) = match &shared {
                Some(s) => (Some(s.parts.out()), Some(s.flags.out())),
                None => (None, None),
            };
            let at = match workers {
                0 => at,
                _ if tiles < SPLIT_BLOCKS => Launch::grid([workers, 1, 1]),
                _ => Launch::grid([SPLIT_BLOCKS, 1, 1]),
            };
            let (c, workers) = (c.out(), workers as i32);
            let args = kernels::HopperTnFloatArgs {
                a,
                b,
                c,
                parts,
                flags,
                bias,
                m,
                n,
                k,
                ldc,
                accumulate,
                workers,
                group,
            };
            kernels::hopper_tn_float(&*cx.device, at, width, args)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// The work space of tiles that several blocks share.
struct Shared {
    parts: Tensor,
    flags: Tensor,
}

impl Shared {
    fn new(cx: &Cx, workers: usize, width: usize) -> Result<Option<Shared>> {
        if workers == 0 {
            return Ok(None);
        }
        let shape = [workers, kernels::hopper_part(width)];
        let parts = Tensor::new(&cx.pool, "matmul parts", DType::F32, &shape)?;
        let flags = Tensor::new(&cx.pool, "matmul flags", DType::I32, &[workers, 2])?;
        flags.zero()?;
        Ok(Some(Shared { parts, flags }))
    }
}

/// Into how many parts the steps of those tiles are cut that do not fill a wave of blocks; 0: they
/// are not.
fn workers(tiles: usize, steps: usize) -> usize {
    let left = tiles % SPLIT_BLOCKS;
    let workers = (left * steps / SPLIT_STEPS).min(SPLIT_BLOCKS);
    if workers > left { workers } else { 0 }
}

/// Rows of tiles that are taken together, so that blocks at work side by side share what L2 holds.
const GROUP: i32 = 8;

/// How many tiles of which width take the least time. A narrow tile reads more for a product:
/// measured on an H100 at 8192^3, per column, 1.00 at 256, 1.02 at 192, 1.09 at 128.
fn choose(layout: Layout, (m, n): (usize, usize), multiprocessors: usize) -> (usize, usize) {
    const WIDTHS: [(usize, f64); 4] = [(256, 1.0), (224, 1.01), (192, 1.02), (128, 1.09)];
    let split = layout == Layout::TN;
    let choice = |width: usize| m.div_ceil(ROWS) * n.div_ceil(width);
    let time = |&(width, per_column): &(usize, f64)| {
        let tiles = choice(width);
        // Waves of tiles over the multiprocessors; gradients fill the last one.
        let waves = match split {
            true => tiles as f64 / SPLIT_BLOCKS as f64,
            false => tiles.div_ceil(multiprocessors) as f64,
        };
        waves * width as f64 * per_column
    };
    let possible = WIDTHS.iter().filter(|w| !split || w.0 < 256);
    let width = possible.min_by(|x, y| time(x).total_cmp(&time(y))).map_or(128, |w| w.0);
    (choice(width), width)
}
