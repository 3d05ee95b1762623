//! Launches of the products of few rows, `kernels/matmul_few.cu`. Layer 4.
//!
//! Invariant: an element's bits are those of `kernels/matmul.cu`, however a product is cut into
//! blocks and stages.

use crate::autograd::Cx;
use crate::device::{Capabilities, DType, Launch, Layout};
use crate::error::{Error, Result};
use crate::kernels::{self, FEW_COLS, FEW_ROWS, FEW_STAGES};
use crate::ops::operands::{LowRank, Operands};
use crate::ops::prefetch::prefetch;
use crate::tensor::Tensor;

/// Whether this is such a product.
pub(super) fn fits(p: &Operands) -> bool {
    p.layout == Layout::NT && p.a.dtype() == DType::BF16 && (1..=FEW_ROWS).contains(&p.sizes().0)
}

/// `c = a b^T (+ bias) (+ c)`, where [`fits`] allows it.
pub(super) fn product(cx: &Cx, p: &Operands) -> Result<()> {
    let (m, n, k) = p.sizes();
    let cut = Cut::of(m, n.div_ceil(FEW_COLS), k, &cx.device.capabilities());
    let float = p.c.dtype() == DType::F32;
    let args = kernels::FewNtArgs {
        c: (!float).then(|| p.c.out()),
        cf: float.then(|| p.c.out()),
        x: p.a,
        w: p.b,
        bias: p.bias,
        m: m as i32,
        n: n as i32,
        k: k as i32,
        ldx: p.a.stride() as i32,
        ldw: p.b.stride() as i32,
        ldc: p.c.stride() as i32,
        accumulate: i32::from(p.accumulate),
        warps: cut.warps as i32,
        shift: cut.shift as i32,
        ahead: cut.ahead as i32,
        wave: cut.wave as i32,
    };
    kernels::few_nt(&*cx.device, cut.launch, cut.rows, args)
}

/// `c = a b^T (+ bias)` and low-rank terms, where [`fits`] allows it; c is real.
pub(super) fn with_low_rank(cx: &Cx, p: &Operands, low: &LowRank) -> Result<()> {
    let (m, n, k) = p.sizes();
    let cut = Cut::of(m, n.div_ceil(FEW_COLS), k, &cx.device.capabilities());
    let [[start0, end0, rank0], [start1, end1, rank1], [start2, end2, rank2]] = low.bounds;
    let [Some(b0), b1, b2] = low.b else {
        return Err(Error::op("lora", "no segment"));
    };
    let args = kernels::FewLoraNtArgs {
        c: p.c.out(),
        x: p.a,
        w: p.b,
        bias: p.bias,
        t: low.t,
        b0,
        b1,
        b2,
        m: m as i32,
        n: n as i32,
        k: k as i32,
        ranks: low.t.cols() as i32,
        ldx: p.a.stride() as i32,
        ldw: p.b.stride() as i32,
        ldc: p.c.stride() as i32,
        ldt: low.t.stride() as i32,
        warps: cut.warps as i32,
        shift: cut.shift as i32,
        ahead: cut.ahead as i32,
        wave: cut.wave as i32,
        start0,
        end0,
        rank0,
        start1,
        end1,
        rank1,
        start2,
        end2,
        rank2,
    };
    kernels::few_lora_nt(&*cx.device, cut.launch, cut.rows, args)
}

/// `y = act(g) * u` with `g|u = x w^T (+ bias)`: x [m, k] of at most [`FEW_ROWS`] rows, w [2 f, k],
/// y [m, f], all bf16.
pub(super) fn glu(
    cx: &Cx,
    y: &Tensor,
    (x, w, bias): (&Tensor, &Tensor, Option<&Tensor>),
    activation: i32,
) -> Result<()> {
    let (m, f, k) = (x.row_count(), y.cols(), x.cols());
    let cut = Cut::of(m, f.div_ceil(FEW_COLS / 2), k, &cx.device.capabilities());
    let args = kernels::FewGluArgs {
        y: y.out(),
        x,
        w,
        bias,
        m: m as i32,
        f: f as i32,
        k: k as i32,
        ldx: x.stride() as i32,
        ldw: w.stride() as i32,
        ldy: y.stride() as i32,
        activation,
        warps: cut.warps as i32,
        shift: cut.shift as i32,
        ahead: cut.ahead as i32,
        wave: cut.wave as i32,
    };
    kernels::few_glu(&*cx.device, cut.launch, cut.rows, args)
}

/// How a product is cut into blocks and stages.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// The instance of the kernel: 16, 32 or 64 rows.
    rows: usize,
    /// Multiplying warps per block.
    warps: usize,
    /// A stage is `8 << shift` of k.
    shift: u32,
    /// Bytes of each row of W that are prefetched, by so many blocks.
    ahead: usize,
    wave: usize,
    launch: Launch,
}

/// Copying warps, in a block with few multiplying ones.
const COPIERS: usize = 4;
/// Copies that a thread may have in flight: the limit of the CPU's shim.
const PENDING: usize = 64;
/// A stage holds 64 to 512 of k.
const SHIFTS: std::ops::RangeInclusive<u32> = 3..=6;

impl Cut {
    /// The cut for m rows, `groups` groups of columns (one warp each), and k.
    fn of(m: usize, groups: usize, k: usize, device: &Capabilities) -> Cut {
        let rows = m.next_power_of_two().clamp(16, FEW_ROWS);
        // More warps per block only if every SM still has some blocks.
        let many = |warps: &usize| groups.div_ceil(*warps) <= 4 * device.multiprocessors;
        let warps = [1, 2, 4].into_iter().find(many).unwrap_or(8);
        let blocks = groups.div_ceil(warps);
        // Shared memory per block: an SM's, divided among the blocks that run on it at once.
        let shared = if device.wgmma { 224 << 10 } else { 96 << 10 };
        let at_once = blocks.div_ceil(device.multiprocessors).clamp(1, 3);
        let room = shared / at_once;
        let bytes = |shift: u32| FEW_STAGES * (rows + FEW_COLS * warps) * (16 << shift);
        let copiers = 32 * if warps < 8 { COPIERS } else { warps };
        let pending = |shift: u32| {
            let at_once = copiers / 8; // rows, 8 threads each
            let turns = rows.div_ceil(at_once) + (FEW_COLS * warps).div_ceil(at_once);
            (FEW_STAGES - 1) * (turns << (shift - 3))
        };
        let fits = |s: &u32| bytes(*s) <= room && pending(*s) <= PENDING && 4 << s < k;
        let shift = SHIFTS.rev().find(fits).unwrap_or(*SHIFTS.start());
        let threads = 32 * if warps < 8 { warps + COPIERS } else { warps };
        let launch = Launch::blocks([blocks, 1, 1], threads as u32, bytes(shift));
        let (ahead, wave) = prefetch(k, FEW_COLS * warps, blocks, at_once, device);
        Cut { rows, warps, shift, ahead, wave, launch }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (rows, warps, k of a stage, blocks, KiB of shared memory)
    fn cut(m: usize, n: usize, k: usize) -> (usize, usize, usize, u32, u32) {
        let device = Capabilities { wgmma: true, ..Capabilities::GPU };
        let c = Cut::of(m, n.div_ceil(FEW_COLS), k, &device);
        (c.rows, c.warps, 8 << c.shift, c.launch.grid[0], c.launch.shared >> 10)
    }

    #[test]
    fn few_columns_have_long_stages_and_many_have_many_warps() {
        assert_eq!(cut(1, 896, 4864), (16, 1, 512, 56, 128));
        assert_eq!(cut(64, 896, 4864), (64, 1, 256, 56, 160));
        assert_eq!(cut(16, 9728, 896), (16, 2, 128, 304, 48));
        assert_eq!(cut(17, 151_936, 896), (32, 8, 64, 1187, 80));
        assert_eq!(cut(3, 40, 24), (16, 1, 64, 3, 16));
    }

    #[test]
    fn a_block_fits_into_the_shared_memory_of_every_target() {
        for (device, most) in [
            (Capabilities { wgmma: true, ..Capabilities::GPU }, 227 << 10),
            (Capabilities::GPU, 99 << 10),
        ] {
            for m in [1, 16, 17, 33, 64] {
                for groups in [1, 56, 608, 1216, 9496] {
                    for k in [8, 896, 4864, 18_944] {
                        let c = Cut::of(m, groups, k, &device);
                        assert!(c.launch.shared <= most, "{c:?}");
                        assert!(c.launch.block <= 256 && c.rows >= m, "{c:?}");
                    }
                }
            }
        }
    }
}
