//! The engine's own matrix product on Hopper: which kernel of `kernels/matmul_hopper.cu` runs, and
//! how. Layer 4.
//!
//! Invariant: an element's bits are those of `kernels/matmul.cu`, whatever is chosen here, so the
//! choice may depend on M. The exception is the gradient of a weight (TN), which may be a sum over
//! parts of k, in order.

use crate::autograd::Cx;
use crate::device::{DType, Launch, Layout};
use crate::error::Result;
use crate::kernels::{self, Boxes, SPLIT_BLOCKS, SPLIT_STEPS};
use crate::ops::operands::Operands;
use crate::tensor::Tensor;

/// Rows of a tile of C, and k per step.
pub(super) const ROWS: usize = 128;
const STEP: usize = 64;

/// The tile widths of a forward product (NT).
pub(super) const WIDTHS: [u32; 4] = [256, 224, 192, 128];
pub(super) const NARROWEST: usize = WIDTHS[3] as usize;

/// The width of the tiles that take the least time, if this device and these tensors allow this
/// kernel.
pub(super) fn width(cx: &Cx, p: &Operands) -> Option<usize> {
    let capabilities = cx.device.capabilities();
    let Operands { layout, c, a, b, .. } = *p;
    let (m, n, k) = p.sizes();
    let float = c.dtype() == DType::F32;
    let exists =
        matches!((layout, float), (Layout::NT, _) | (Layout::NN, false) | (Layout::TN, true));
    if !exists || !capabilities.wgmma || a.dtype() != DType::BF16 || k == 0 {
        return None;
    }
    // Pairs of C are read and written together.
    let pairs =
        n.is_multiple_of(2) && c.stride().is_multiple_of(2) && c.address().is_multiple_of(8);
    if !Boxes::fit(a) || !Boxes::fit(b) || !(if float { pairs } else { pairs && Boxes::fit(c) }) {
        return None;
    }
    Some(choose(layout, (m, n), k.div_ceil(STEP), capabilities.multiprocessors))
}

/// The product with tiles of `width` columns, where [`width`] allows it. For the gradient of a
/// weight (TN) the bits depend on the width.
pub(super) fn product(cx: &Cx, p: &Operands, width: usize) -> Result<()> {
    let multiprocessors = cx.device.capabilities().multiprocessors;
    let Operands { layout, c, a, b, bias, accumulate } = *p;
    let (m, n, k) = p.sizes();
    let float = c.dtype() == DType::F32;
    let (tiles, steps) = (tiles((m, n), width), k.div_ceil(STEP));
    let at = Launch::grid([tiles.min(multiprocessors), 1, 1]);
    // Boxes are 64 long in k where k is contiguous, otherwise 64 rows of k.
    let a = Boxes::swizzled(a, if layout == Layout::TN { 64 } else { ROWS });
    let b = Boxes::swizzled(b, if layout == Layout::NT { width } else { 64 });
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
            kernel(&*cx.device, at, width, args)
        }
        (Layout::NT, true) => {
            let c = c.out();
            let args =
                kernels::HopperNtFloatArgs { a, b, c, bias, m, n, k, ldc, accumulate, group };
            kernels::hopper_nt_float(&*cx.device, at, width, args)
        }
        (Layout::TN | Layout::NN, _) => {
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
            kernels::hopper_tn_float(&*cx.device, at, width, args)
        }
    }
}

/// The work space for tiles that several blocks share.
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

/// How many parts along k each tile is cut into, for the tiles that do not fill a wave of blocks.
/// All are cut alike: blocks that read the same rows of k at the same time share them in L2.
fn parts(tiles: usize, steps: usize) -> usize {
    match tiles % SPLIT_BLOCKS {
        0 => 1,
        left => (SPLIT_BLOCKS / left).min(steps / SPLIT_STEPS).max(1),
    }
}

/// The number of blocks that share the cut tiles; 0: none is cut.
fn workers(tiles: usize, steps: usize) -> usize {
    match parts(tiles, steps) {
        1 => 0,
        parts => tiles % SPLIT_BLOCKS * parts,
    }
}

/// Rows of tiles that are taken together, so that blocks running at the same time share L2.
pub(super) const GROUP: i32 = 8;

pub(super) fn tiles((m, n): (usize, usize), width: usize) -> usize {
    m.div_ceil(ROWS) * n.div_ceil(width)
}

/// The tile width that takes the least time: waves of tiles over the SMs, times the time of a tile.
fn choose(layout: Layout, size: (usize, usize), steps: usize, multiprocessors: usize) -> usize {
    let time = |&(width, per_column): &(usize, f64)| {
        let tiles = tiles(size, width);
        let waves = match layout {
            Layout::NT | Layout::NN => tiles.div_ceil(multiprocessors) as f64,
            Layout::TN => {
                let last = f64::from(u8::from(!tiles.is_multiple_of(SPLIT_BLOCKS)));
                (tiles / SPLIT_BLOCKS) as f64 + last / parts(tiles, steps) as f64
            }
        };
        waves * width as f64 * per_column
    };
    let widths = match layout {
        Layout::NT => widths(steps, 1.03),
        Layout::NN => widths(steps, 1.13), // loads as much as 256 columns
        Layout::TN => widths(steps, 1.03)[1..].to_vec(),
    };
    widths.iter().min_by(|x, y| time(x).total_cmp(&time(y))).map_or(128, |w| w.0)
}

/// The tile widths, and the time per column of each relative to 256, as measured on an H100. A
/// narrow tile reads more for a product but waits less between tiles, which counts where k is
/// short.
fn widths(steps: usize, at_224: f64) -> Vec<(usize, f64)> {
    match steps {
        0..32 => vec![(256, 1.0), (224, at_224.max(1.04)), (192, 1.02), (128, 1.06)],
        _ => vec![(256, 1.0), (224, at_224), (192, 1.04), (128, 1.18)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_wide_as_was_fastest_on_an_h100() {
        let width = |layout, m, n, k: usize| choose(layout, (m, n), k.div_ceil(STEP), 132);
        assert_eq!(width(Layout::NT, 8192, 8192, 8192), 256);
        assert_eq!(width(Layout::NT, 16384, 9728, 896), 256);
        assert_eq!(width(Layout::NT, 16384, 896, 4864), 224);
        assert_eq!(width(Layout::NT, 1024, 9728, 896), 128);
        assert_eq!(width(Layout::NT, 256, 9728, 896), 192);
        assert_eq!(width(Layout::NN, 16384, 896, 9728), 192);
        assert_eq!(width(Layout::NN, 16384, 896, 1152), 128);
        assert_eq!(width(Layout::TN, 896, 4864, 16384), 224);
    }

    #[test]
    fn tiles_that_do_not_fill_a_wave_are_all_cut_alike() {
        assert_eq!(workers(132, 256), 0);
        assert_eq!(workers(154, 256), 22 * 6);
        assert_eq!(workers(63, 256), 63 * 2);
        assert_eq!(workers(70, 256), 0, "two parts each are more than there are blocks");
        assert_eq!(workers(2, 32), 2 * 4, "at least 8 steps a part");
        assert_eq!(workers(2, 4), 0);
    }
}
