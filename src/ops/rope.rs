//! Rotary position embedding on a row of q|k|v, with the optional norm of q and k heads before it.
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

/// Angles of every position: cosine and sine, each F32 [positions, head_dim / 2] (scaling factors
/// included).
#[derive(Clone)]
pub struct RopeTable {
    pub cosine: Tensor,
    pub sine: Tensor,
}

/// Weights of the norm of q and of k: `[head_dim]` each, or `[heads head_dim]` and `[kv_heads
/// head_dim]` where the norm is over all heads.
pub struct QkNorm<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub norm: Norm,
    pub over: NormOver,
}

/// What one norm of q or k is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormOver {
    /// Each head.
    Head,
    /// All heads together.
    Heads,
}

/// Rotates (and norms) q and k of `qkv` [n, (heads + 2 kv_heads) head_dim] by `position` I32 `[n]`;
/// v is copied. Errors if the widths do not fit or the table is too short for the batch (the batch
/// checks its positions).
pub fn rope(
    cx: &mut Cx,
    qkv: &Tensor,
    table: &RopeTable,
    position: &Tensor,
    heads: usize,
    kv_heads: usize,
    norm: Option<QkNorm>,
) -> Result<Tensor> {
    let op = Rope { heads, kv_heads, norm: norm.as_ref().map(|n| (n.norm, n.over)) };
    match norm {
        Some(n) => cx.apply1(op, &[qkv, &table.cosine, &table.sine, position, n.q, n.k]),
        None => cx.apply1(op, &[qkv, &table.cosine, &table.sine, position]),
    }
}

#[derive(Debug)]
pub struct Rope {
    pub heads: usize,
    pub kv_heads: usize,
    /// Some: q and k are normed first.
    pub norm: Option<(Norm, NormOver)>,
}

impl Rope {
    /// As kernels take it: whether a norm is over all heads.
    pub(super) fn whole(&self) -> i32 {
        i32::from(self.norm.is_some_and(|(_, over)| over == NormOver::Heads))
    }

    /// Launch of a warp for each norm of each row.
    fn norms(&self, rows: usize) -> Launch {
        Launch::warps(rows * if self.whole() == 1 { 2 } else { self.heads + self.kv_heads })
    }

    /// Checks the weights of q and k for heads of `dim` values.
    pub(super) fn check_weights(&self, op: &'static str, w: &[&Tensor], dim: usize) -> Result<()> {
        let Some((_, over)) = self.norm else { return Ok(()) };
        for (w, heads) in w.iter().zip([self.heads, self.kv_heads]) {
            let width = if over == NormOver::Heads { heads * dim } else { dim };
            expect_cols(op, "the norm's weight", w, width, "is head_dim in config.json right?")?;
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
        // A half of a head in whole packs lets a thread rotate several heads by the same angles.
        let whole = (dim / 2 * size).is_multiple_of(16)
            && [x, y].iter().all(|t| t.address().is_multiple_of(16));
        let together = if whole { kernels::ROPE_HEADS } else { 1 };
        let threads = (dim / 2).div_ceil(kernels::pack_width(size)) * heads.div_ceil(together);
        let norm = if sign > 0.0 { saved.norm } else { None };
        let (rstd, wq, wk) = match norm {
            Some((rstd, wq, wk)) => (Some(rstd), Some(wq), Some(wk)),
            None => (None, None, None),
        };
        let kind = self.norm.map_or(Norm::new(0.0), |(norm, _)| norm);
        let args = kernels::RopeApplyArgs {
            y: y.out(),
            x,
            cosine: saved.cosine,
            sine: saved.sine,
            position: saved.position,
            rstd,
            wq,
            wk,
            rows: x.row_count() as i32,
            heads: self.heads as i32,
            kv: self.kv_heads as i32,
            dim: dim as i32,
            whole: self.whole(),
            plus: kind.plus(),
            once: kind.once(),
            sign,
        };
        kernels::rope_apply(
            &*cx.device,
            Launch::flat(x.row_count() * threads),
            usize::from(accumulate) + 2 * usize::from(whole),
            args,
        )
    }
}

struct Saved<'a> {
    cosine: &'a Tensor,
    sine: &'a Tensor,
    position: &'a Tensor,
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
        let dim = qkv.cols() / all;
        if qkv.cols() != all * dim
            || !dim.is_multiple_of(2)
            || x[1].cols() != dim / 2
            || x[3].numel() != qkv.row_count()
        {
            return Err(Error::op(
                "rope",
                format!(
                    "{qkv:?} with {} + 2 x {} heads, table {:?}, {} positions",
                    self.heads,
                    self.kv_heads,
                    x[1],
                    x[3].numel()
                ),
            ));
        }
        self.check_weights("rope", &x[4..], dim)?;
        let rstd = self.norm.map(|(norm, _)| self.rstd(cx, qkv, norm)).transpose()?;
        let y = cx.real("rope", qkv.shape())?;
        let norm = rstd.as_ref().map(|r| (r, x[4], x[5]));
        self.apply(
            cx,
            &y,
            qkv,
            &Saved { cosine: x[1], sine: x[2], position: x[3], norm },
            1.0,
            false,
        )?;
        let mut saved = vec![];
        if need.tape {
            saved.extend([x[1].clone(), x[2].clone(), x[3].clone()]);
            if let Some(rstd) = rstd {
                saved.extend([rstd, x[4].clone(), x[5].clone(), qkv.clone()]);
            }
        }
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let s = &node.saved;
        let saved = Saved { cosine: &s[0], sine: &s[1], position: &s[2], norm: None };
        let Some((norm, over)) = self.norm else {
            let Some((dx, accumulate)) = g.slot(0)? else { return Ok(()) };
            return self.apply(cx, &dx, dy, &saved, -1.0, accumulate);
        };
        let (rstd, wq, wk, x) = (&s[3], &s[4], &s[5], &s[6]);
        let back = cx.real("activation gradients", x.shape())?;
        self.apply(cx, &back, dy, &saved, -1.0, false)?;
        let (rows, dim) = (x.row_count(), x.cols() / (self.heads + 2 * self.kv_heads));
        let (r, h, k, d) = (rows as i32, self.heads as i32, self.kv_heads as i32, dim as i32);
        for (input, first, count) in [(4, 0, self.heads), (5, self.heads, self.kv_heads)] {
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
        let half = dim / 2;
        let mut y = x[0].clone();
        for r in 0..y.row_count() {
            let p = x[3].index(r);
            if let Some((norm, over)) = self.norm {
                let (q, rest) = y.row_mut(r).split_at_mut(self.heads * dim);
                for (part, w) in [(q, &x[4]), (&mut rest[..self.kv_heads * dim], &x[5])] {
                    let width = if over == NormOver::Heads { part.len() } else { dim };
                    part.chunks_mut(width).for_each(|n| norm.oracle(round, n, &w.data));
                }
            }
            for head in 0..self.heads + self.kv_heads {
                let row = &mut y.row_mut(r)[head * dim..(head + 1) * dim];
                for j in 0..half {
                    let (c, s) = (x[1].row(p)[j], x[2].row(p)[j]);
                    let (a, b) = (row[j], row[half + j]);
                    row[j] = round.at(a * c - b * s);
                    row[half + j] = round.at(b * c + a * s);
                }
            }
        }
        vec![y]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: 2.0 * x[0].bytes() as f64, flops: 0.0 }
    }
}

pub(super) fn case(
    rng: &mut Rng,
    rows: usize,
    [heads, kv, dim]: [usize; 3],
    norm: Option<(NormWeight, NormOver)>,
    last: usize,
) -> Case {
    let angle = F64::from_fn(&[last, dim / 2], |i| {
        (i / (dim / 2)) as f64 * 100f64.powf(-((i % (dim / 2)) as f64) / (dim / 2) as f64)
    });
    let cosine = F64::from_fn(&angle.shape, |i| angle.data[i].cos());
    let sine = F64::from_fn(&angle.shape, |i| angle.data[i].sin());
    let position: Vec<i32> = (0..rows).map(|_| rng.below(last) as i32).collect();
    let qkv = rng.array(&[rows, (heads + 2 * kv) * dim], 1.0);
    let mut inputs =
        vec![Arg::real(qkv), Arg::float(cosine), Arg::float(sine), Arg::ints(&position)];
    if let Some((_, over)) = norm {
        for heads in [heads, kv] {
            let width = if over == NormOver::Heads { heads * dim } else { dim };
            inputs.push(Arg::param(F64::from_fn(&[width], |_| 1.0 + 0.2 * rng.normal())));
        }
    }
    let normed = match norm {
        None => String::new(),
        Some((NormWeight::Rounded, NormOver::Head)) => " normed".into(),
        Some((weight, over)) => format!(" normed {weight:?} {over:?}"),
    };
    let norm = norm.map(|(weight, over)| (Norm { eps: 1e-6, weight }, over));
    let op = Rope { heads, kv_heads: kv, norm };
    Case::new(format!("rows {rows} heads {heads}/{kv} dim {dim}{normed}"), op, inputs)
}

/// Qwen3's norm, OLMo 2's and Gemma 3's.
pub(super) const QWEN3: Option<(NormWeight, NormOver)> =
    Some((NormWeight::Rounded, NormOver::Head));
pub(super) const OLMO2: Option<(NormWeight, NormOver)> = Some((NormWeight::Once, NormOver::Heads));
pub(super) const GEMMA3: Option<(NormWeight, NormOver)> =
    Some((NormWeight::PlusOne, NormOver::Head));

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let shapes = [
        (3, [2, 1, 16], None),
        (40, [4, 2, 32], None),
        (5, [3, 3, 6], None),
        (37, [4, 2, 64], QWEN3),
        (3, [2, 2, 24], QWEN3),
        (37, [4, 2, 64], OLMO2),
        (130, [3, 1, 6], OLMO2),
        (37, [4, 2, 64], GEMMA3),
    ];
    shapes.map(|(rows, heads, norm)| case(rng, rows, heads, norm, 50)).into()
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    vec![case(rng, s.tokens(), [s.heads, s.kv_heads, s.head_dim], None, s.length)]
}
