//! Launches of the fused low-rank kernels, for `ops::lora`. Not on the tape. Layer 4.
//!
//! Invariant: shapes are checked here, so the kernels may trust them. Whichever kernel runs, the
//! bits are those of `kernels/lora.cu`, which has the math and the numerics.

use crate::autograd::Cx;
use crate::device::{DType, Launch, Layout};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::operands::{Bounds, LowRank, Operands};
use crate::ops::{lora_hopper, matmul_few};
use crate::tensor::Tensor;

/// Columns `start..end` of a fused projection's output have the adapter B `b` [end - start, rank],
/// contiguous.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    pub b: &'a Tensor,
    pub start: usize,
    pub end: usize,
}

impl Segment<'_> {
    fn rank(&self) -> usize {
        self.b.cols()
    }
}

/// The arguments that kernels take: start, end and rank of three segments, absent ones empty.
fn bounds(name: &'static str, segments: &[Segment], n: usize, ranks: usize) -> Result<Bounds> {
    let mut out = [[0; 3]; 3];
    let mut free = 0;
    for (i, s) in segments.iter().enumerate().take(3) {
        let fits = s.b.shape() == [s.end.saturating_sub(s.start), s.rank()] && s.b.is_contiguous();
        if !fits || s.start < free || s.end > n {
            let what = format!("adapter {:?} for columns {}..{} of {n}", s.b, s.start, s.end);
            let message = format!("{what}: ordered, apart from one another, [columns, rank]");
            return Err(Error::op(name, message));
        }
        free = s.end;
        out[i] = [s.start as i32, s.end as i32, s.rank() as i32];
    }
    let sum: usize = segments.iter().map(Segment::rank).sum();
    if segments.is_empty() || segments.len() > 3 || sum != ranks {
        let what = format!(
            "{} segments with ranks of {sum} in all, beside {ranks} columns",
            segments.len()
        );
        let message = format!("{what}: one to three, whose ranks add up to the columns");
        return Err(Error::op(name, message));
    }
    Ok(out)
}

/// Checks the rows and columns of each tensor.
fn expect(name: &'static str, shapes: &[(&Tensor, [usize; 2])]) -> Result<()> {
    match shapes.iter().find(|(t, shape)| [t.row_count(), t.cols()] != *shape) {
        Some((t, shape)) => Err(Error::op(name, format!("{t:?} where {shape:?} is expected"))),
        None => Ok(()),
    }
}

/// Which kernels run. All have the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// Those that are assumed to be fastest on the device for the operands.
    Fastest,
    /// Those of `kernels/lora.cu`, which every device has.
    Tile,
}

/// Whether steps of 16 ranks that begin with each segment's first are those of `kernels/lora.cu`,
/// which begin with the first of all: so its bits can be had segment by segment.
pub fn steps_agree(ranks: impl IntoIterator<Item = usize>) -> bool {
    let mut from = 0;
    ranks.into_iter().all(|rank| {
        let agree = rank % 8 == 0 && (from % 16 == 0 || from % 16 + rank <= 16);
        from += rank;
        agree
    })
}

fn tile(dtype: DType) -> usize {
    kernels::tile_side(dtype.size())
}

fn grid(dtype: DType, rows: usize, cols: usize, z: usize) -> Launch {
    Launch::grid([cols.div_ceil(tile(dtype)), rows.div_ceil(tile(dtype)), z])
}

/// The arguments of a kernel, with the bounds of the three segments.
macro_rules! with_bounds {
    ($args:ident, $bounds:expr, { $($fields:tt)* }) => {{
        let [[start0, end0, rank0], [start1, end1, rank1], [start2, end2, rank2]] = $bounds;
        #[rustfmt::skip]
        let args = kernels::$args {
            start0, end0, rank0, start1, end1, rank1, start2, end2, rank2, $($fields)*
        };
        args
    }};
}

/// `y = x w^T (+ bias) + t Bd^T`: x [m, k], w [n, k], t [m, R]; y [m, n]. Columns outside all
/// segments get no low-rank term.
pub fn lora_nt(
    cx: &Cx,
    y: &Tensor,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    t: &Tensor,
    segments: &[Segment],
) -> Result<()> {
    lora_nt_by(cx, Kernels::Fastest, y, (x, w, bias), t, segments)
}

/// [`lora_nt`] by given kernels.
pub fn lora_nt_by(
    cx: &Cx,
    kernels: Kernels,
    y: &Tensor,
    (x, w, bias): (&Tensor, &Tensor, Option<&Tensor>),
    t: &Tensor,
    segments: &[Segment],
) -> Result<()> {
    let (m, n, k, ranks) = (x.row_count(), w.row_count(), x.cols(), t.cols());
    let bounds = bounds("lora_nt", segments, n, ranks)?;
    expect("lora_nt", &[(y, [m, n]), (w, [n, k]), (t, [m, ranks])])?;
    if m == 0 {
        return Ok(());
    }
    let agree = k > 0 && steps_agree(segments.iter().map(Segment::rank));
    if kernels == Kernels::Fastest && x.dtype() == DType::BF16 && agree {
        let p = Operands { layout: Layout::NT, c: y, a: x, b: w, bias, accumulate: false };
        let low = LowRank { t, b: [0, 1, 2].map(|i| segments.get(i).map(|s| s.b)), bounds };
        if matmul_few::fits(&p) {
            return matmul_few::with_low_rank(cx, &p, &low);
        }
        if let Some(width) = lora_hopper::width(cx, &p, &low) {
            return lora_hopper::nt(cx, &p, &low, width);
        }
    }
    let args = with_bounds!(LoraNtArgs, bounds, {
        y: y.out(),
        x,
        w,
        bias,
        t,
        b0: segments[0].b,
        b1: segments.get(1).map(|s| s.b),
        b2: segments.get(2).map(|s| s.b),
        m: m as i32,
        n: n as i32,
        k: k as i32,
        ranks: ranks as i32,
        ldx: x.stride() as i32,
        ldw: w.stride() as i32,
        ldy: y.stride() as i32,
        ldt: t.stride() as i32,
    });
    kernels::lora_nt(&*cx.device, grid(x.dtype(), m, n, 1), args)
}

/// `t = scale x a^T`: x [m, k], a [R, k] (the A of all segments, stacked), scale F32 `[R]`; t [m,
/// R].
pub fn lora_t(cx: &Cx, t: &Tensor, x: &Tensor, a: &Tensor, scale: &Tensor) -> Result<()> {
    let (m, k, ranks) = (x.row_count(), x.cols(), a.row_count());
    expect("lora_t", &[(t, [m, ranks]), (a, [ranks, k])])?;
    if !a.is_contiguous() {
        return Err(Error::op("lora_t", format!("{a:?} is strided")));
    }
    let bounds = [[0, k as i32, ranks as i32], [0; 3], [0; 3]];
    narrow(cx, 0, [t, x, scale], &[a], bounds)
}

/// `dt_i = scale_i dy_i b_i` for all segments in one launch: dy [m, n], scale F32 `[R]`; dt [m, R].
pub fn lora_dt(
    cx: &Cx,
    dt: &Tensor,
    dy: &Tensor,
    segments: &[Segment],
    scale: &Tensor,
) -> Result<()> {
    let bounds = bounds("lora_dt", segments, dy.cols(), dt.cols())?;
    expect("lora_dt", &[(dt, [dy.row_count(), dt.cols()])])?;
    let b: Vec<&Tensor> = segments.iter().map(|s| s.b).collect();
    narrow(cx, 1, [dt, dy, scale], &b, bounds)
}

/// The narrow products of [`lora_t`] (`d` 0) and [`lora_dt`] (`d` 1), with the weights `w`.
fn narrow(
    cx: &Cx,
    d: usize,
    [out, x, scale]: [&Tensor; 3],
    w: &[&Tensor],
    bounds: Bounds,
) -> Result<()> {
    let m = x.row_count();
    if scale.numel() != out.cols() {
        let message = format!("scale {scale:?} beside {out:?}: one value a rank");
        return Err(Error::op("lora_narrow", message));
    }
    if m == 0 {
        return Ok(());
    }
    let widest = bounds.iter().map(|b| b[2] as usize).max().unwrap_or(0);
    let blocks = [widest.div_ceil(kernels::NARROW_COLS), m.div_ceil(kernels::NARROW_ROWS), w.len()];
    let args = with_bounds!(LoraNarrowArgs, bounds, {
        out: out.out(),
        x,
        w0: w[0],
        w1: w.get(1).copied(),
        w2: w.get(2).copied(),
        scale,
        m: m as i32,
        ldx: x.stride() as i32,
        ldout: out.stride() as i32,
    });
    kernels::lora_narrow(&*cx.device, Launch::grid(blocks), d, args)
}

/// A gradient buffer (F32, contiguous) and whether to add to its contents.
pub type Slot<'a> = Option<(&'a Tensor, bool)>;

/// The gradients that [`lora_grads`] computes: dx [m, k] real, with the weight w [n, k] and the A
/// of all segments, stacked [R, k]; da [R, k] and db_i [end - start, rank], float.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    pub dx: Slot<'a>,
    /// Given where dx is.
    pub w: Option<&'a Tensor>,
    pub a: &'a Tensor,
    pub da: Slot<'a>,
    pub db: &'a [Slot<'a>],
}

/// The inputs of [`lora_grads`]: x [m, k], dt and t [m, R], dy [m, n].
#[derive(Clone, Copy)]
pub struct Read<'a> {
    pub x: &'a Tensor,
    pub dt: &'a Tensor,
    pub dy: &'a Tensor,
    pub t: &'a Tensor,
}

/// `dx (+)= dy w + dt a`, `da (+)= dt^T x` and `db_i (+)= dy_i^T t_i`, for the slots that are
/// given: one launch on Hopper, elsewhere one for dx and one for the others.
pub fn lora_grads(cx: &Cx, to: &Wanted, r: &Read, segments: &[Segment]) -> Result<()> {
    lora_grads_by(cx, Kernels::Fastest, to, r, segments)
}

/// [`lora_grads`] by given kernels.
pub fn lora_grads_by(
    cx: &Cx,
    kernels: Kernels,
    to: &Wanted,
    r: &Read,
    segments: &[Segment],
) -> Result<()> {
    let (m, k, n, ranks) = (r.x.row_count(), r.x.cols(), r.dy.cols(), r.dt.cols());
    let bounds = bounds("lora_grads", segments, n, ranks)?;
    expect("lora_grads", &[(r.dt, [m, ranks]), (r.dy, [m, n]), (r.t, [m, ranks])])?;
    if to.db.len() != segments.len() {
        let message = format!("{} gradients for {} segments", to.db.len(), segments.len());
        return Err(Error::op("lora_grads", message));
    }
    if let Some((da, _)) = to.da {
        expect("lora_grads", &[(da, [ranks, k])])?;
    }
    for (slot, s) in to.db.iter().zip(segments) {
        if let Some((db, _)) = slot {
            expect("lora_grads", &[(db, [s.end - s.start, s.rank()])])?;
        }
    }
    let dx = match (to.dx, to.w) {
        (Some((dx, accumulate)), Some(w)) => {
            expect("lora_grads", &[(dx, [m, k]), (w, [n, k]), (to.a, [ranks, k])])?;
            let (c, a, b) = (dx, r.dy, w);
            Some(Operands { layout: Layout::NN, c, a, b, bias: None, accumulate })
        }
        (None, _) => None,
        (Some(_), None) => return Err(Error::op("lora_grads", "dx without a weight")),
    };
    if m == 0 {
        // Sums of nothing; kernels have no tile to begin with.
        let new = to.da.iter().chain(to.db.iter().flatten()).filter(|(_, add)| !add);
        return new.into_iter().try_for_each(|(t, _)| t.zero());
    }
    let gradients = lora_hopper::Gradients {
        x: r.x,
        dt: r.dt,
        dy: r.dy,
        t: r.t,
        a: to.a,
        da: to.da.map(|(t, _)| t),
        db: [0, 1, 2].map(|i| to.db.get(i).copied().flatten().map(|(t, _)| t)),
        accumulate: accumulate_bits(to),
        bounds,
    };
    if kernels == Kernels::Fastest
        && let Some(width) = lora_hopper::width_of_gradients(cx, dx.as_ref(), &gradients)
    {
        return lora_hopper::nn(cx, dx.as_ref(), &gradients, width);
    }
    if let Some(p) = &dx {
        input_grad(cx, p, r.dt, to.a)?;
    }
    adapter_grads(cx, to, r, bounds)
}

/// Bit 0: dA is added to; bit i + 1: dB_i is.
fn accumulate_bits(to: &Wanted) -> i32 {
    let adds = |slot: Slot| i32::from(slot.is_some_and(|(_, add)| add));
    to.db.iter().enumerate().fold(adds(to.da), |bits, (i, slot)| bits | adds(*slot) << (i + 1))
}

/// dx by the tile kernel.
fn input_grad(cx: &Cx, p: &Operands, dt: &Tensor, a: &Tensor) -> Result<()> {
    let (m, k, n) = p.sizes();
    let args = kernels::LoraNnArgs {
        dx: p.c.out(),
        dy: p.a,
        w: p.b,
        dt,
        a,
        m: m as i32,
        n: n as i32,
        k: k as i32,
        ranks: dt.cols() as i32,
        lddy: p.a.stride() as i32,
        ldw: p.b.stride() as i32,
        lddx: p.c.stride() as i32,
        lddt: dt.stride() as i32,
        lda: a.stride() as i32,
        accumulate: i32::from(p.accumulate),
    };
    kernels::lora_nn(&*cx.device, grid(p.a.dtype(), m, k, 1), args)
}

/// dA and all dB by the tile kernel.
fn adapter_grads(cx: &Cx, to: &Wanted, r: &Read, bounds: Bounds) -> Result<()> {
    let tile = tile(r.x.dtype());
    let tiles = |slot: &Slot| {
        slot.map_or(0, |(t, _)| t.row_count().div_ceil(tile) * t.cols().div_ceil(tile))
    };
    let tiles = tiles(&to.da) + to.db.iter().map(tiles).sum::<usize>();
    if tiles == 0 {
        return Ok(());
    }
    let out = |i: usize| to.db.get(i).copied().flatten().map(|(t, _)| t.out());
    let args = with_bounds!(LoraGradsArgs, bounds, {
        da: to.da.map(|(t, _)| t.out()),
        db0: out(0),
        db1: out(1),
        db2: out(2),
        x: r.x,
        dt: r.dt,
        dy: r.dy,
        t: r.t,
        m: r.x.row_count() as i32,
        k: r.x.cols() as i32,
        ranks: r.dt.cols() as i32,
        ldx: r.x.stride() as i32,
        lddt: r.dt.stride() as i32,
        lddy: r.dy.stride() as i32,
        ldt: r.t.stride() as i32,
        accumulate: accumulate_bits(to),
    });
    kernels::lora_grads(&*cx.device, Launch::grid([tiles, 1, 1]), args)
}
