//! Rotary position embedding on rows of q|k|v, with the optional norm of q and k heads before it.
//! Layer 4.
//!
//! Invariant: a row's result depends on that row and its position alone. Math and numerics:
//! `kernels/rope.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::rmsnorm::{Norm, NormWeight};
use crate::ops::{RowSums, expect_cols};
use crate::tensor::Tensor;

/// The angles of every position: cosine and sine, each F32 [positions, turned / 2] (scaling factors
/// included), for the first `turned` values of a head; and the optional factor of q, F32
/// `[positions]`.
#[derive(Clone)]
pub struct RopeTable {
    pub cosine: Tensor,
    pub sine: Tensor,
    pub q_scale: Option<Tensor>,
}

/// Weights of the norms of q and k: `[head_dim]` each, or `[heads head_dim]` and `[kv_heads
/// head_dim]` if the norm is over all heads.
pub struct QkNorm<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub norm: Norm,
    pub over: NormOver,
}

/// The range of one norm of q or k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormOver {
    /// Each head.
    Head,
    /// All heads together.
    Heads,
}

/// Rotates (and norms) q and k of `qkv` [n, (heads + 2 kv_heads) head_dim] by `position` I32 `[n]`;
/// v is copied. Without a table nothing is rotated; without a norm either, the result is `qkv`
/// itself. Errors if the widths do not match or the table is too short for the batch (the batch
/// checks its positions).
pub fn rope(
    cx: &mut Cx,
    qkv: &Tensor,
    table: Option<&RopeTable>,
    position: &Tensor,
    heads: usize,
    kv_heads: usize,
    norm: Option<QkNorm>,
) -> Result<Tensor> {
    let op = Rope::new(heads, kv_heads, table, norm.as_ref());
    if op.is_identity() {
        return Ok(qkv.clone());
    }
    cx.apply1(op, &rope_inputs(&[qkv, position], table, norm.as_ref()))
}

/// The inputs of the op: the fixed ones, then those of the table and of the norm.
pub(super) fn rope_inputs<'a>(
    first: &[&'a Tensor],
    table: Option<&'a RopeTable>,
    norm: Option<&QkNorm<'a>>,
) -> Vec<&'a Tensor> {
    let mut inputs = first.to_vec();
    if let Some(table) = table {
        inputs.extend([&table.cosine, &table.sine]);
        inputs.extend(&table.q_scale);
    }
    inputs.extend(norm.iter().flat_map(|n| [n.q, n.k]));
    inputs
}

#[derive(Clone, Copy, Debug)]
pub struct Rope {
    pub heads: usize,
    pub kv_heads: usize,
    /// Number of leading values of a head that are rotated: 0 without a table.
    pub turned: usize,
    /// Whether q is multiplied by a factor of its position.
    pub scaled: bool,
    /// Norm q and k first.
    pub norm: Option<(Norm, NormOver)>,
}

/// A kernel's optional arguments among an op's inputs.
#[derive(Clone, Copy, Default)]
pub(super) struct RopeArgs<'a, T> {
    pub cosine: Option<&'a T>,
    pub sine: Option<&'a T>,
    pub q_scale: Option<&'a T>,
    pub wq: Option<&'a T>,
    pub wk: Option<&'a T>,
}

impl Rope {
    pub(super) fn new(
        heads: usize,
        kv_heads: usize,
        table: Option<&RopeTable>,
        norm: Option<&QkNorm>,
    ) -> Rope {
        Rope {
            heads,
            kv_heads,
            turned: table.map_or(0, |t| 2 * t.cosine.cols()),
            scaled: table.is_some_and(|t| t.q_scale.is_some()),
            norm: norm.map(|n| (n.norm, n.over)),
        }
    }

    fn is_identity(&self) -> bool {
        self.turned == 0 && !self.scaled && self.norm.is_none()
    }

    /// Index of the norm's weights among [`Rope::args`].
    fn norm_at(&self) -> usize {
        if self.turned == 0 { 0 } else { 2 + usize::from(self.scaled) }
    }

    /// The optional arguments, from the inputs after the fixed ones.
    pub(super) fn args<'a, T>(&self, rest: &[&'a T]) -> RopeArgs<'a, T> {
        let at = |i: usize, on: bool| if on { rest.get(i).copied() } else { None };
        let (turns, norm) = (self.turned > 0, self.norm_at());
        RopeArgs {
            cosine: at(0, turns),
            sine: at(1, turns),
            q_scale: at(2, self.scaled),
            wq: at(norm, self.norm.is_some()),
            wk: at(norm + 1, self.norm.is_some()),
        }
    }

    /// Whether the whole of each head of `dim` values, or nothing, is rotated, and q is not scaled.
    pub(super) fn is_plain(&self, dim: usize) -> bool {
        (self.turned == 0 || self.turned == dim) && !self.scaled
    }

    /// Whether heads of `dim` values need the kernels with partial rotation or scaling of q.
    pub(super) fn more(&self, dim: usize) -> bool {
        self.turned != dim || self.scaled
    }

    /// Whether heads of `dim` values fit the table.
    pub(super) fn fits(&self, dim: usize, args: &RopeArgs<Tensor>) -> bool {
        let half = self.turned / 2;
        let table = [args.cosine, args.sine];
        dim.is_multiple_of(2)
            && self.turned.is_multiple_of(2)
            && self.turned <= dim
            && table.iter().flatten().all(|t| t.cols() == half)
            && table.iter().flatten().count() == if half == 0 { 0 } else { 2 }
            && (!self.scaled || half > 0)
    }

    /// Whether the norm is over all heads, as kernels take it.
    pub(super) fn whole(&self) -> i32 {
        i32::from(self.norm.is_some_and(|(_, over)| over == NormOver::Heads))
    }

    /// One warp per norm of each row.
    fn norms(&self, rows: usize) -> Launch {
        Launch::warps(rows * if self.whole() == 1 { 2 } else { self.heads + self.kv_heads })
    }

    /// Checks the norm weights of q and k for heads of `dim` values.
    pub(super) fn check_weights(
        &self,
        op: &'static str,
        args: &RopeArgs<Tensor>,
        dim: usize,
    ) -> Result<()> {
        let Some((_, over)) = self.norm else { return Ok(()) };
        for (w, heads) in [(args.wq, self.heads), (args.wk, self.kv_heads)] {
            let Some(w) = w else { continue };
            let width = if over == NormOver::Heads { heads * dim } else { dim };
            expect_cols(op, "the norm's weight", w, width, "check head_dim in config.json")?;
        }
        Ok(())
    }

    /// F32 [rows, heads + kv_heads]: rstd of each head's norm.
    pub(super) fn rstd(&self, cx: &Cx, qkv: &Tensor, norm: Norm) -> Result<Tensor> {
        let rows = qkv.row_count();
        let rstd = cx.float("rstd", &[rows, self.heads + self.kv_heads])?;
        let args = kernels::HeadRstdArgs {
            rstd: rstd.out(),
            x: qkv,
            rows: rows as i32,
            heads: self.heads as i32,
            kv: self.kv_heads as i32,
            dim: (qkv.cols() / (self.heads + 2 * self.kv_heads)) as i32,
            whole: self.whole(),
            eps: norm.eps,
        };
        kernels::head_rstd(&*cx.device, self.norms(rows), args)?;
        Ok(rstd)
    }

    fn apply(
        &self,
        cx: &Cx,
        y: &Tensor,
        x: &Tensor,
        saved: &Saved,
        sign: f32,
        accumulate: bool,
    ) -> Result<()> {
        let heads = self.heads + 2 * self.kv_heads;
        let (dim, size) = (x.cols() / heads, x.dtype().size());
        // If half a head is a whole number of packs, a thread can rotate several heads by the same
        // angles.
        let halves = [self.turned / 2, (dim - self.turned) / 2];
        let whole = halves.iter().all(|half| (half * size).is_multiple_of(16))
            && [x, y].iter().all(|t| t.address().is_multiple_of(16));
        let together = if whole { kernels::ROPE_HEADS } else { 1 };
        let packs: usize = halves.iter().map(|h| h.div_ceil(kernels::pack_width(size))).sum();
        let threads = packs * heads.div_ceil(together);
        let norm = if sign > 0.0 { saved.norm } else { None };
        let (rstd, wq, wk) = match norm {
            Some((rstd, wq, wk)) => (Some(rstd), Some(wq), Some(wk)),
            None => (None, None, None),
        };
        let kind = self.norm.map_or(Norm::new(0.0), |(norm, _)| norm);
        let args = kernels::RopeApplyArgs {
            y: y.out(),
            x,
            cosine: saved.args.cosine,
            sine: saved.args.sine,
            q_scale: saved.args.q_scale,
            position: saved.position,
            rstd,
            wq,
            wk,
            rows: x.row_count() as i32,
            heads: self.heads as i32,
            kv: self.kv_heads as i32,
            dim: dim as i32,
            turned: self.turned as i32,
            whole: self.whole(),
            plus: kind.plus(),
            once: kind.once(),
            sign,
        };
        kernels::rope_apply(
            &*cx.device,
            Launch::flat(x.row_count() * threads),
            usize::from(accumulate) + 2 * usize::from(whole) + 4 * usize::from(self.more(dim)),
            args,
        )
    }
}

struct Saved<'a> {
    position: &'a Tensor,
    args: RopeArgs<'a, Tensor>,
    /// rstd, wq, wk
    norm: Option<(&'a Tensor, &'a Tensor, &'a Tensor)>,
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let qkv = x[0];
        let all = self.heads + 2 * self.kv_heads;
        let (dim, position) = (qkv.cols() / all, x[1]);
        let args = self.args(&x[2..]);
        if qkv.cols() != all * dim || !self.fits(dim, &args) || position.numel() != qkv.row_count()
        {
            let message = format!("{qkv:?}, table {:?}, {position:?}: {self:?}", args.cosine);
            return Err(Error::op("rope", message));
        }
        self.check_weights("rope", &args, dim)?;
        let rstd = self.norm.map(|(norm, _)| self.rstd(cx, qkv, norm)).transpose()?;
        let y = cx.real("rope", qkv.shape())?;
        let norm = match (&rstd, args.wq, args.wk) {
            (Some(rstd), Some(wq), Some(wk)) => Some((rstd, wq, wk)),
            _ => None,
        };
        self.apply(cx, &y, qkv, &Saved { position, args, norm }, 1.0, false)?;
        let mut saved = vec![];
        if need.tape {
            saved.extend(x[1..].iter().map(|t| (*t).clone()));
            if let Some(rstd) = rstd {
                saved.extend([rstd, qkv.clone()]);
            }
        }
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let s: Vec<&Tensor> = node.saved.iter().collect();
        let args = self.args(&s[1..]);
        let saved = Saved { position: s[0], args, norm: None };
        let Some((norm, over)) = self.norm else {
            let Some((dx, accumulate)) = g.slot(0)? else { return Ok(()) };
            return self.apply(cx, &dx, dy, &saved, -1.0, accumulate);
        };
        let weights = 2 + self.norm_at(); // their index among the inputs
        let (wq, wk, rstd, x) = (s[weights - 1], s[weights], s[weights + 1], s[weights + 2]);
        let back = cx.real("activation gradients", x.shape())?;
        self.apply(cx, &back, dy, &saved, -1.0, false)?;
        let (rows, dim) = (x.row_count(), x.cols() / (self.heads + 2 * self.kv_heads));
        let (r, h, k, d) = (rows as i32, self.heads as i32, self.kv_heads as i32, dim as i32);
        for (input, first, count) in
            [(weights, 0, self.heads), (weights + 1, self.heads, self.kv_heads)]
        {
            let Some((dw, accumulate)) = g.slot(input)? else { continue };
            let (count, width) = match over {
                NormOver::Head => (count, dim),
                NormOver::Heads => (1, count * dim),
            };
            let sums = RowSums::new(cx, rows * count, width, x.dtype())?;
            let args = kernels::HeadNormDwArgs {
                partial: sums.partial.out(),
                d: &back,
                x,
                rstd,
                rows: r,
                heads: h,
                kv: k,
                dim: d,
                first: first as i32,
                count: count as i32,
                width: width as i32,
            };
            kernels::head_norm_dw(&*cx.device, sums.first, args)?;
            sums.finish(cx, &dw, accumulate)?;
        }
        if g.wants(0) {
            let args = kernels::HeadNormBwdArgs {
                d: back.out(),
                x,
                rstd,
                wq,
                wk,
                rows: r,
                heads: h,
                kv: k,
                dim: d,
                whole: self.whole(),
                plus: norm.plus(),
            };
            kernels::head_norm_bwd(&*cx.device, self.norms(rows), args)?;
            g.give(cx, 0, back)?;
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let all = self.heads + 2 * self.kv_heads;
        let dim = x[0].cols() / all;
        let half = self.turned / 2;
        let rest: Vec<&F64> = x[2..].iter().collect();
        let args = self.args(&rest);
        let mut y = x[0].clone();
        for r in 0..y.row_count() {
            let p = x[1].index(r);
            if let (Some((norm, over)), Some(wq), Some(wk)) = (self.norm, args.wq, args.wk) {
                let (q, rest) = y.row_mut(r).split_at_mut(self.heads * dim);
                for (part, w) in [(q, wq), (&mut rest[..self.kv_heads * dim], wk)] {
                    let width = if over == NormOver::Heads { part.len() } else { dim };
                    part.chunks_mut(width).for_each(|n| norm.oracle(round, n, &w.data));
                }
            }
            for head in 0..self.heads + self.kv_heads {
                let row = &mut y.row_mut(r)[head * dim..(head + 1) * dim];
                let scale = args.q_scale.filter(|_| head < self.heads).map_or(1.0, |s| s.data[p]);
                if let (Some(cosine), Some(sine)) = (args.cosine, args.sine) {
                    for j in 0..half {
                        let (c, s) = (cosine.row(p)[j], sine.row(p)[j]);
                        let (a, b) = (row[j], row[half + j]);
                        (row[j], row[half + j]) = (a * c - b * s, b * c + a * s);
                    }
                }
                row.iter_mut().for_each(|v| *v = round.at(*v * scale));
            }
        }
        vec![y]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: 2.0 * x[0].bytes() as f64, flops: 0.0 }
    }
}

/// The options of a case beside its sizes.
#[derive(Clone, Copy, Default)]
pub(super) struct CaseOptions {
    pub norm: Option<(NormWeight, NormOver)>,
    /// Rotated values of a head, if not all.
    pub turned: Option<usize>,
    pub scaled: bool,
}

impl CaseOptions {
    pub const PLAIN: CaseOptions = CaseOptions { norm: None, turned: None, scaled: false };
    /// The norms of Qwen3, OLMo 2 and Gemma 3.
    pub const NORMED: CaseOptions =
        CaseOptions { norm: Some((NormWeight::Rounded, NormOver::Head)), ..CaseOptions::PLAIN };
    pub const OLMO2: CaseOptions =
        CaseOptions { norm: Some((NormWeight::Once, NormOver::Heads)), ..CaseOptions::PLAIN };
    pub const GEMMA3: CaseOptions =
        CaseOptions { norm: Some((NormWeight::PlusOne, NormOver::Head)), ..CaseOptions::PLAIN };

    pub fn norm(&self) -> Option<(Norm, NormOver)> {
        self.norm.map(|(weight, over)| (Norm { eps: 1e-6, weight }, over))
    }
}

pub(super) fn case(
    rng: &mut Rng,
    rows: usize,
    [heads, kv, dim]: [usize; 3],
    options: CaseOptions,
    last: usize,
) -> Case {
    let turned = options.turned.unwrap_or(dim);
    let half = turned / 2;
    let angle = F64::from_fn(&[last, half], |i| {
        (i / half) as f64 * 100f64.powf(-((i % half) as f64) / half as f64)
    });
    let cosine = F64::from_fn(&angle.shape, |i| angle.data[i].cos());
    let sine = F64::from_fn(&angle.shape, |i| angle.data[i].sin());
    let position: Vec<i32> = (0..rows).map(|_| rng.below(last) as i32).collect();
    let qkv = rng.array(&[rows, (heads + 2 * kv) * dim], 1.0);
    let mut inputs = vec![Arg::real(qkv), Arg::ints(&position)];
    if turned > 0 {
        inputs.extend([Arg::float(cosine), Arg::float(sine)]);
    }
    if options.scaled {
        inputs.push(Arg::float(F64::from_fn(&[last], |i| 1.0 + (i / 8) as f64 * 0.25)));
    }
    if let Some((_, over)) = options.norm {
        for heads in [heads, kv] {
            let width = if over == NormOver::Heads { heads * dim } else { dim };
            inputs.push(Arg::param(F64::from_fn(&[width], |_| 1.0 + 0.2 * rng.normal())));
        }
    }
    let norm = options.norm();
    let op = Rope { heads, kv_heads: kv, turned, scaled: options.scaled, norm };
    let mut label = format!("rows {rows} heads {heads}/{kv} dim {dim}");
    label += &match options.norm {
        None => String::new(),
        Some((NormWeight::Rounded, NormOver::Head)) => " normed".into(),
        Some((weight, over)) => format!(" normed {weight:?} {over:?}"),
    };
    label += if options.scaled { " q scaled" } else { "" };
    if turned != dim {
        label += &format!(" turned {turned}");
    }
    Case::new(label, op, inputs)
}

/// The shapes with which both rope ops are tested, beside their own.
pub(super) const SHAPES: [(usize, [usize; 3], CaseOptions); 12] = [
    (3, [2, 1, 16], CaseOptions::PLAIN),
    (40, [4, 2, 32], CaseOptions::PLAIN),
    (37, [4, 2, 64], CaseOptions::NORMED),
    (3, [2, 2, 24], CaseOptions::NORMED),
    (21, [3, 1, 64], CaseOptions { turned: Some(32), ..CaseOptions::PLAIN }),
    (9, [2, 1, 16], CaseOptions { turned: Some(12), ..CaseOptions::NORMED }),
    (9, [2, 2, 18], CaseOptions { turned: Some(0), ..CaseOptions::NORMED }),
    (9, [4, 2, 32], CaseOptions { scaled: true, ..CaseOptions::PLAIN }),
    (9, [2, 1, 20], CaseOptions { scaled: true, turned: Some(10), ..CaseOptions::NORMED }),
    (37, [4, 2, 64], CaseOptions::OLMO2),
    (130, [3, 1, 6], CaseOptions::OLMO2),
    (37, [4, 2, 64], CaseOptions::GEMMA3),
];

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let own = [(5, [3, 3, 6], CaseOptions::PLAIN)];
    let shapes = SHAPES.into_iter().chain(own);
    shapes.map(|(rows, heads, options)| case(rng, rows, heads, options, 50)).collect()
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let heads = [s.heads, s.kv_heads, s.head_dim];
    vec![case(rng, s.tokens(), heads, CaseOptions::PLAIN, s.length)]
}
