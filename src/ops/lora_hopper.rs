//! Launches of `kernels/lora_hopper.cu`: products with low-rank terms, and the gradients of a group
//! of adapters. Layer 4.
//!
//! Invariant: the bits are those of `kernels/lora.cu`, whatever is chosen here, so the choice may
//! depend on the tensors' addresses and on M. `ops::lora_kernels` has checked the shapes.

use crate::autograd::Cx;
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels::{self, Boxes};
use crate::ops::matmul_hopper::{self, GROUP, ROWS, tiles};
use crate::ops::operands::{Bounds, LowRank, Operands};
use crate::tensor::Tensor;

/// Columns of x or dy, and ranks, of a tile of the gradients.
const SIDE: usize = 64;

/// The width of the tiles, if this device and these tensors allow the kernel.
pub(super) fn width(cx: &Cx, p: &Operands, low: &LowRank) -> Option<usize> {
    let fit = Boxes::fit(low.t) && low.b.iter().flatten().all(|b| Boxes::fit(b));
    if fit { matmul_hopper::width(cx, p) } else { None }
}

/// `c = a b^T (+ bias)` and low-rank terms, with tiles of `width` columns, where [`width`] allows
/// it.
pub(super) fn nt(cx: &Cx, p: &Operands, low: &LowRank, width: usize) -> Result<()> {
    let (m, n, k) = p.sizes();
    let [Some(first), ..] = low.b else {
        return Err(Error::op("lora", "no segment"));
    };
    let [b0, b1, b2] = low.b.map(|b| Boxes::swizzled(b.unwrap_or(first), width));
    let [[start0, end0, rank0], [start1, end1, rank1], [start2, end2, rank2]] = low.bounds;
    let args = kernels::HopperLoraNtArgs {
        x: Boxes::swizzled(p.a, ROWS),
        w: Boxes::swizzled(p.b, width),
        y: Boxes::swizzled(p.c, 16),
        t: Boxes::swizzled(low.t, ROWS),
        b0,
        b1,
        b2,
        direct: p.c.out(),
        bias: p.bias,
        m: m as i32,
        n: n as i32,
        k: k as i32,
        ldy: p.c.stride() as i32,
        group: GROUP,
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
    let blocks = tiles((m, n), width).min(cx.device.capabilities().multiprocessors);
    kernels::hopper_lora_nt(&*cx.device, Launch::grid([blocks, 1, 1]), width, args)
}

/// What [`nn`] reads and writes beside dx: x [m, k], dt and t [m, R], dy [m, n], A [R, k]; dA and
/// dB_i where they are wanted. Bit 0 of `accumulate` adds to dA, bit i + 1 to dB_i.
pub(super) struct Gradients<'a> {
    pub x: &'a Tensor,
    pub dt: &'a Tensor,
    pub dy: &'a Tensor,
    pub t: &'a Tensor,
    pub a: &'a Tensor,
    pub da: Option<&'a Tensor>,
    pub db: [Option<&'a Tensor>; 3],
    pub accumulate: i32,
    pub bounds: Bounds,
}

impl Gradients<'_> {
    fn tiles(&self) -> usize {
        let tiles = |t: &&Tensor| t.row_count().div_ceil(SIDE) * t.cols().div_ceil(SIDE);
        self.da.iter().chain(self.db.iter().flatten()).map(tiles).sum()
    }

    /// Each segment's columns of t; of an absent one, all.
    fn t_of(&self) -> Result<[Tensor; 3]> {
        let [r0, r1, r2] = self.bounds.map(|b| b[2] as usize);
        let of = |from, rank| match rank {
            0 => Ok(self.t.clone()),
            _ => self.t.columns(from, from + rank),
        };
        Ok([of(0, r0)?, of(r0, r1)?, of(r0 + r1, r2)?])
    }
}

/// The width of dx' tiles (any, without dx), if this device and these tensors allow the kernel.
pub(super) fn width_of_gradients(cx: &Cx, dx: Option<&Operands>, g: &Gradients) -> Option<usize> {
    let read = [g.x, g.dt, g.dy, g.t, g.a];
    let on_hopper = cx.device.capabilities().wgmma && g.x.dtype() == DType::BF16;
    // Each t_i begins at a multiple of 16 bytes.
    let ranks = g.bounds.iter().all(|b| b[2] % 8 == 0);
    if !on_hopper || !ranks || !read.into_iter().all(Boxes::fit) {
        return None;
    }
    dx.map_or(Some(128), |p| matmul_hopper::width(cx, p))
}

/// `dx (+)= dy w + dt a`, given dx = dy w as operands, and the gradients, in one launch, where
/// [`width_of_gradients`] allows it.
pub(super) fn nn(cx: &Cx, dx: Option<&Operands>, g: &Gradients, width: usize) -> Result<()> {
    let (m, n, k) = (g.x.row_count(), g.dy.cols(), g.x.cols());
    let before = dx.map_or(0, |_| tiles((m, k), width));
    let blocks = (before + g.tiles()).min(cx.device.capabilities().multiprocessors);
    if blocks == 0 {
        return Ok(());
    }
    let [[start0, end0, rank0], [start1, end1, rank1], [start2, end2, rank2]] = g.bounds;
    let t = g.t_of()?;
    let [t0, t1, t2] = [0, 1, 2].map(|i| Boxes::swizzled(&t[i], SIDE));
    let [db0, db1, db2] = g.db.map(|db| db.map(Tensor::out));
    let args = kernels::HopperLoraNnArgs {
        dy: Boxes::swizzled(g.dy, ROWS),
        w: Boxes::swizzled(dx.map_or(g.a, |p| p.b), 64),
        dx: Boxes::swizzled(dx.map_or(g.x, |p| p.c), 16),
        dt: Boxes::swizzled(g.dt, ROWS),
        a: Boxes::swizzled(g.a, 64),
        x_rows: Boxes::swizzled(g.x, SIDE),
        dt_rows: Boxes::swizzled(g.dt, SIDE),
        dy_rows: Boxes::swizzled(g.dy, SIDE),
        t0,
        t1,
        t2,
        direct: dx.map(|p| p.c.out()),
        residual: dx.filter(|p| p.accumulate).map(|p| p.c),
        da: g.da.map(Tensor::out),
        db0,
        db1,
        db2,
        rows: dx.map_or(0, |_| m as i32),
        m: m as i32,
        n: n as i32,
        k: k as i32,
        lddx: dx.map_or(0, |p| p.c.stride() as i32),
        group: GROUP,
        start0,
        end0,
        rank0,
        start1,
        end1,
        rank1,
        start2,
        end2,
        rank2,
        accumulate: g.accumulate,
    };
    kernels::hopper_lora_nn(&*cx.device, Launch::grid([blocks, 1, 1]), width, args)
}
