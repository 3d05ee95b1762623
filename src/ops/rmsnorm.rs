//! Root mean square norm, plain and with the preceding residual addition. Layer 4.
//!
//! Invariant: a row's result depends on that row alone. Math, numerics and source:
//! `kernels/rmsnorm.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::{RowSums, expect_cols};
use crate::tensor::Tensor;

/// A family's norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    pub eps: f32,
    pub weight: NormWeight,
}

/// How the weight w applies to h, the normed row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormWeight {
    /// `w round(h)`
    Rounded,
    /// `w h`, rounded once
    Once,
    /// `(1 + w) h`, rounded once; w is stored as the offset from 1
    PlusOne,
}

impl Norm {
    /// Llama's norm.
    pub fn new(eps: f32) -> Norm {
        Norm { eps, weight: NormWeight::Rounded }
    }

    /// The constant that kernels add to w.
    pub(super) fn plus(self) -> f32 {
        if self.weight == NormWeight::PlusOne { 1.0 } else { 0.0 }
    }

    /// Whether kernels leave h unrounded.
    pub(super) fn once(self) -> i32 {
        i32::from(self.weight != NormWeight::Rounded)
    }

    /// Norms a row in place.
    pub(super) fn oracle(self, round: Round, row: &mut [f64], w: &[f64]) {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let rstd = 1.0 / (mean + f64::from(self.eps)).sqrt();
        for (v, w) in row.iter_mut().zip(w) {
            *v = round.at(match self.weight {
                NormWeight::Rounded => w * round.at(*v * rstd),
                NormWeight::Once => w * *v * rstd,
                NormWeight::PlusOne => (1.0 + w) * *v * rstd,
            });
        }
    }
}

/// `y = w * x / sqrt(mean(x^2) + eps)`, with w applied as [`NormWeight`] says: x [rows, d] real, w
/// `[d]`; y as x. Error if the widths of w and x differ.
pub fn rmsnorm(cx: &mut Cx, x: &Tensor, w: &Tensor, norm: Norm) -> Result<Tensor> {
    cx.apply1(RmsNorm { norm }, &[x, w])
}

/// The residual stream's step: `s = x + residual`, `y = norm(s)`. Returns (y, s), both as x.
pub fn add_rmsnorm(
    cx: &mut Cx,
    x: &Tensor,
    residual: &Tensor,
    w: &Tensor,
    norm: Norm,
) -> Result<(Tensor, Tensor)> {
    let mut out = cx.apply(AddRmsNorm { norm }, &[x, residual, w])?;
    match (out.pop(), out.pop()) {
        (Some(s), Some(y)) => Ok((y, s)),
        _ => Err(Error::op("add_rmsnorm", "gave no outputs")),
    }
}

/// The input of a module in the residual stream: the norm of `x + residual`, or of x.
#[derive(Clone, Copy)]
pub struct NormInput<'a> {
    /// [rows, d] real.
    pub x: &'a Tensor,
    /// As x.
    pub residual: Option<&'a Tensor>,
    /// The norm's, `[d]`.
    pub weight: &'a Tensor,
    pub norm: Norm,
}

impl NormInput<'_> {
    /// The normed rows, and the sum (x if there is no residual).
    pub fn rows(&self, cx: &mut Cx) -> Result<(Tensor, Tensor)> {
        match self.residual {
            Some(residual) => add_rmsnorm(cx, self.x, residual, self.weight, self.norm),
            None => Ok((rmsnorm(cx, self.x, self.weight, self.norm)?, self.x.clone())),
        }
    }
}

#[derive(Debug)]
pub struct RmsNorm {
    pub norm: Norm,
}

#[derive(Debug)]
pub struct AddRmsNorm {
    pub norm: Norm,
}

/// Warps that fill a GPU, and the fewest and most rows whose weight gradients one warp adds up.
const WARPS: usize = 2048;
const FEWEST_ROWS: usize = 4;
const MOST_ROWS: usize = 64;

const HINT: &str = "check hidden_size in config.json";

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rmsnorm"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (x, w) = (x[0], x[1]);
        expect_cols("rmsnorm", "weight", w, x.cols(), HINT)?;
        let (y, rstd) = (cx.real("rmsnorm", x.shape())?, cx.float("rstd", &[x.row_count()])?);
        forward(cx, [&y, &rstd], None, x, w, self.norm)?;
        let saved = vec![x.clone(), w.clone(), rstd];
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let [s, w, rstd] = &node.saved[..] else { return Ok(()) };
        let (dx, dw) = (g.slot(0)?, g.slot(1)?);
        let dx = dx.as_ref().map(|(dx, accumulate)| (dx, None, *accumulate));
        backward(cx, Read { s, w, rstd, dy, norm: self.norm }, dx, dw)
    }

    fn recomputes_output(&self, k: usize) -> bool {
        k == 0
    }

    fn recompute_output(&self, cx: &mut Cx, node: &Node, _k: usize) -> Result<Tensor> {
        recompute(cx, node, self.norm)
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![normed(round, &x[0], &x[1], self.norm)]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].bytes())
    }
}

impl Op for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add_rmsnorm"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (x, residual, w) = (x[0], x[1], x[2]);
        expect_cols("add_rmsnorm", "weight", w, x.cols(), HINT)?;
        if x.shape() != residual.shape() {
            let message = format!("{x:?} and residual {residual:?} differ in shape");
            return Err(Error::op("add_rmsnorm", message));
        }
        let (y, s) = (cx.real("rmsnorm", x.shape())?, cx.real("residual", x.shape())?);
        let rstd = cx.float("rstd", &[x.row_count()])?;
        forward(cx, [&y, &rstd], Some((&s, residual)), x, w, self.norm)?;
        let saved = vec![s.clone(), w.clone(), rstd];
        Ok(Fwd { outputs: vec![y, s], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let [s, w, rstd] = &node.saved[..] else { return Ok(()) };
        let Some(up) = &dy[0] else {
            // Only the sum is used further on: both inputs get its gradient.
            if let Some(ds) = &dy[1] {
                g.give(cx, 0, ds.clone())?;
                g.give(cx, 1, ds.clone())?;
            }
            return Ok(());
        };
        let wanted = g.wants(0) || g.wants(1);
        let ds = wanted.then(|| cx.real("activation gradients", s.shape())).transpose()?;
        let to = ds.as_ref().map(|ds| (ds, dy[1].as_ref(), false));
        let read = Read { s, w, rstd, dy: up, norm: self.norm };
        backward(cx, read, to, g.slot(2)?)?;
        if let Some(ds) = ds {
            g.give(cx, 0, ds.clone())?;
            g.give(cx, 1, ds)?;
        }
        Ok(())
    }

    fn recomputes_output(&self, k: usize) -> bool {
        k == 0
    }

    fn recompute_output(&self, cx: &mut Cx, node: &Node, _k: usize) -> Result<Tensor> {
        recompute(cx, node, self.norm)
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let s = F64::from_fn(&x[0].shape, |i| round.at(x[0].data[i] + x[1].data[i]));
        vec![normed(round, &s, &x[2], self.norm), s]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 2 * x[0].bytes())
    }
}

/// The kernel instance that holds a row of these tensors in registers, or 0, which takes any row,
/// if there is none: for packs that are not whole, or too many of them. All instances give the same
/// bits. A CPU does not benefit from them; strict mode, whose warps are like a GPU's, runs them
/// too.
fn instance(cx: &Cx, instances: &[usize], rows: &[&Tensor]) -> usize {
    let (d, size) = (rows[0].cols(), rows[0].dtype().size());
    let whole =
        rows.iter().all(|t| t.address().is_multiple_of(16)) && (d * size).is_multiple_of(16);
    if !whole || !(cx.device.capabilities().tensor_cores || cx.device.is_strict()) {
        return 0;
    }
    let packs = d.div_ceil(kernels::warp_columns(size));
    instances.iter().copied().find(|&held| packs <= held).unwrap_or(0)
}

/// y and rstd of x, or of x + residual, where the sum is written to `sum_residual`'s first tensor.
fn forward(
    cx: &Cx,
    [y, rstd]: [&Tensor; 2],
    sum_residual: Option<(&Tensor, &Tensor)>,
    x: &Tensor,
    w: &Tensor,
    norm: Norm,
) -> Result<()> {
    let args = kernels::RmsnormFwdArgs {
        y: y.out(),
        sum: sum_residual.map(|(sum, _)| sum.out()),
        rstd: rstd.out(),
        x,
        res: sum_residual.map(|(_, residual)| residual),
        w,
        rows: x.row_count() as i32,
        d: x.cols() as i32,
        eps: norm.eps,
        plus: norm.plus(),
        once: norm.once(),
    };
    let held = instance(
        cx,
        &kernels::RMSNORM_FWD_D,
        &[x, sum_residual.map_or(x, |(_, residual)| residual), w],
    );
    kernels::rmsnorm_fwd(&*cx.device, Launch::warps(x.row_count()), held, args)
}

/// The normed rows, and the sum if there is a residual. Not on the tape.
pub(super) fn norm_rows(
    cx: &Cx,
    x: &Tensor,
    residual: Option<&Tensor>,
    w: &Tensor,
    norm: Norm,
) -> Result<(Tensor, Option<Tensor>)> {
    let (y, rstd) = (cx.real("rmsnorm", x.shape())?, cx.float("rstd", &[x.row_count()])?);
    let sum = residual.map(|_| cx.real("residual", x.shape())).transpose()?;
    forward(cx, [&y, &rstd], sum.as_ref().zip(residual), x, w, norm)?;
    Ok((y, sum))
}

/// Recomputes y from the saved input (for the fused norm: the sum) and weight.
fn recompute(cx: &Cx, node: &Node, norm: Norm) -> Result<Tensor> {
    Ok(norm_rows(cx, &node.saved[0], None, &node.saved[1], norm)?.0)
}

/// The inputs of a norm's backward: its input, weight and rstd, and the gradient of its output.
#[derive(Clone, Copy)]
struct Read<'a> {
    s: &'a Tensor,
    w: &'a Tensor,
    rstd: &'a Tensor,
    dy: &'a Tensor,
    norm: Norm,
}

/// `ds (+)=` the gradient of the input (plus `dsum`), and `dw (+)=` that of the weight; each if
/// requested.
fn backward(
    cx: &Cx,
    r: Read,
    ds: Option<(&Tensor, Option<&Tensor>, bool)>,
    dw: Option<(Tensor, bool)>,
) -> Result<()> {
    let (rows, d) = (r.s.row_count(), r.s.cols());
    // The partial sums are the same whichever kernel computes them.
    let per = rows.div_ceil(WARPS).clamp(FEWEST_ROWS, MOST_ROWS);
    let sums = dw
        .is_some()
        .then(|| RowSums::chunks(cx, rows.div_ceil(per).max(1), d, r.s.dtype()))
        .transpose()?;
    let mut taken = false;
    if let Some((ds, dsum, accumulate)) = ds {
        let held =
            instance(cx, &kernels::RMSNORM_BWD_D, &[r.s, r.w, r.dy, dsum.unwrap_or(r.dy), ds]);
        let partial = sums.as_ref().filter(|_| held > 0);
        taken = partial.is_some();
        let per = if taken { per } else { 1 };
        let args = kernels::RmsnormBwdArgs {
            ds: ds.out(),
            partial: partial.map(|sums| sums.partial.out()),
            dy: r.dy,
            dsum,
            s: r.s,
            w: r.w,
            rstd: r.rstd,
            rows: rows as i32,
            d: d as i32,
            per: per as i32,
            accumulate: i32::from(accumulate),
            plus: r.norm.plus(),
        };
        kernels::rmsnorm_bwd(&*cx.device, Launch::warps(rows.div_ceil(per)), held, args)?;
    }
    let (Some(sums), Some((dw, accumulate))) = (sums, dw) else { return Ok(()) };
    if !taken {
        let args = kernels::RmsnormDwArgs {
            partial: sums.partial.out(),
            dy: r.dy,
            s: r.s,
            rstd: r.rstd,
            rows: rows as i32,
            d: d as i32,
            per: per as i32,
        };
        kernels::rmsnorm_dw(&*cx.device, sums.first, args)?;
    }
    sums.finish(cx, &dw, accumulate)
}

fn normed(round: Round, s: &F64, w: &F64, norm: Norm) -> F64 {
    let mut y = s.clone();
    for r in 0..s.row_count() {
        norm.oracle(round, y.row_mut(r), &w.data);
    }
    y
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, d) in [
        (1, 5),
        (3, 7),
        (70, 64),
        (130, 96),
        (5, 300),
        (2, 1031),
        (20, 384),
        (6, 768),
        (3, 1024),
        (2, 1536),
        (2, 2048),
    ] {
        let x = rng.array(&[rows, d], 1.5);
        let w = F64::from_fn(&[d], |_| 1.0 + 0.3 * rng.normal());
        let r = rng.array(&[rows, d], 1.0);
        for weight in [NormWeight::Rounded, NormWeight::Once, NormWeight::PlusOne] {
            let (plain, added) = (Norm { eps: 1e-5, weight }, Norm { eps: 1e-6, weight });
            let kind = match weight {
                NormWeight::Rounded => String::new(),
                other => format!(" {other:?}"),
            };
            let inputs = vec![Arg::real(x.clone()), Arg::param(w.clone())];
            let label = format!("rows {rows} d {d}{kind}");
            cases.push(Case::new(label, RmsNorm { norm: plain }, inputs));
            let inputs = vec![Arg::real(x.clone()), Arg::real(r.clone()), Arg::param(w.clone())];
            let label = format!("residual rows {rows} d {d}{kind}");
            cases.push(Case::new(label, AddRmsNorm { norm: added }, inputs));
        }
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let mut rows = || Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0));
    let (x, residual) = (rows(), rows());
    let w = Arg::param(F64::from_fn(&[s.hidden], |_| 1.0));
    let norm = Norm::new(1e-5);
    let plain = Case::new("plain", RmsNorm { norm }, vec![x.clone(), w.clone()]);
    vec![plain, Case::new("residual", AddRmsNorm { norm }, vec![x, residual, w])]
}
