//! Multiplication by a factor per column, some of them learned (IA3's vectors, DoRA's magnitudes),
//! and by one constant for all. Layer 4.
//!
//! Invariant: columns outside all segments are unchanged. Math and sources: `kernels/scale.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::matmul::column_sums;
use crate::ops::{RowSums, expect_cols, row_packs};
use crate::tensor::Tensor;

/// `y = c x (+ bias)`, with `c[j]` = `s[j]` / `norm[j]` for the columns covered by a vector of
/// `scales`, else 1: x [rows, cols] real; `scales`: (first column, s `[n]` real); norm F32
/// `[cols]`, a constant in the gradient; bias `[cols]` real; y as x.
pub fn scale_columns(
    cx: &mut Cx,
    x: &Tensor,
    scales: &[(usize, Tensor)],
    norm: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let starts = scales.iter().map(|s| s.0).collect();
    let op = ScaleColumns { starts, norm: norm.is_some(), bias: bias.is_some() };
    let inputs: Vec<&Tensor> =
        std::iter::once(x).chain(norm).chain(bias).chain(scales.iter().map(|s| &s.1)).collect();
    cx.apply1(op, &inputs)
}

/// `y = c x` with a constant c: x real; y as x, rounded once.
pub fn multiply(cx: &mut Cx, x: &Tensor, factor: f32) -> Result<Tensor> {
    cx.apply1(Multiply { factor }, &[x])
}

/// The L2 norm of each row of w F32 [rows, cols]: F32 `[rows]`. Not on the tape.
pub fn row_norms(cx: &Cx, w: &Tensor) -> Result<Tensor> {
    let rows = w.row_count();
    let norm = cx.float("row norms", &[rows])?;
    let args =
        kernels::RowNormsArgs { norm: norm.out(), w, rows: rows as i32, cols: w.cols() as i32 };
    kernels::row_norms(&*cx.device, Launch::warps(rows), args)?;
    Ok(norm)
}

#[derive(Debug)]
pub struct ScaleColumns {
    pub starts: Vec<usize>,
    pub norm: bool,
    pub bias: bool,
}

impl ScaleColumns {
    /// The optional inputs, and the index of the first vector.
    fn split<'a, T>(&self, x: &'a [T]) -> (Option<&'a T>, Option<&'a T>, usize) {
        let bias = 1 + usize::from(self.norm);
        (self.norm.then(|| &x[1]), self.bias.then(|| &x[bias]), bias + usize::from(self.bias))
    }
}

/// `y (+)= c x (+ bias)`; c F32 [cols]. Not on the tape.
pub(crate) fn scaled(
    cx: &Cx,
    y: &Tensor,
    x: &Tensor,
    c: &Tensor,
    bias: Option<&Tensor>,
    add: bool,
) -> Result<()> {
    let (rows, cols) = (x.row_count(), x.cols());
    let args = kernels::ScaleColumnsArgs {
        y: y.out(),
        x,
        c,
        bias,
        rows: rows as i32,
        cols: cols as i32,
        accumulate: i32::from(add),
    };
    kernels::scale_columns(&*cx.device, row_packs(rows, cols, x.dtype()), args)
}

impl Op for ScaleColumns {
    fn name(&self) -> &'static str {
        "scale_columns"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let (norm, bias, first) = self.split(x);
        let cols = x[0].cols();
        if let Some(norm) = norm {
            expect_cols("scale_columns", "norm", norm, cols, "it has one value a column")?;
        }
        let c = cx.float("column factors", &[cols])?;
        let args = kernels::ColumnFactorArgs { c: c.out(), s: None, norm: None, cols: cols as i32 };
        kernels::column_factor(&*cx.device, Launch::flat(cols), args)?;
        for (start, s) in self.starts.iter().zip(&x[first..]) {
            let end = start + s.numel();
            if end > cols {
                let message = format!("a vector for columns {start}..{end}, the rows have {cols}");
                return Err(Error::op("scale_columns", message));
            }
            let norm = norm.map(|n| n.rows(*start, end)).transpose()?;
            let c = c.rows(*start, end)?;
            let n = s.numel();
            let args = kernels::ColumnFactorArgs {
                c: c.out(),
                s: Some(s),
                norm: norm.as_ref(),
                cols: n as i32,
            };
            kernels::column_factor(&*cx.device, Launch::flat(n), args)?;
        }
        let y = cx.real("scaled", x[0].shape())?;
        scaled(cx, &y, x[0], &c, bias.copied(), false)?;
        let mut saved = Vec::new();
        if need.tape {
            saved.push(c);
            if need.inputs[first..].contains(&true) {
                saved.push(x[0].clone());
                saved.extend(norm.map(|n| (*n).clone()));
            }
        }
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let (_, _, first) = self.split(&node.inputs);
        if let Some((dx, accumulate)) = g.slot(0)? {
            scaled(cx, &dx, dy, &node.saved[0], None, accumulate)?;
        }
        if self.bias
            && let Some((db, accumulate)) = g.slot(first - 1)?
        {
            column_sums(cx, &db, dy, accumulate)?;
        }
        let Some(x) = node.saved.get(1) else { return Ok(()) };
        let (rows, cols) = (dy.row_count(), dy.cols());
        let sums = RowSums::new(cx, rows, cols, dy.dtype())?;
        let args = kernels::ColumnDotsArgs {
            partial: sums.partial.out(),
            dy,
            x,
            rows: rows as i32,
            cols: cols as i32,
        };
        kernels::column_dots(&*cx.device, sums.first, args)?;
        let dc = cx.float("column factors", &[cols])?;
        sums.finish(cx, &dc, false)?;
        for (i, start) in self.starts.iter().enumerate() {
            let n: usize = node.inputs[first + i].shape.iter().product();
            let Some((ds, accumulate)) = g.slot(first + i)? else { continue };
            let dc = dc.rows(*start, start + n)?;
            let norm = node.saved.get(2).map(|norm| norm.rows(*start, start + n)).transpose()?;
            let args = kernels::ColumnFactorGradArgs {
                ds: ds.out(),
                dc: &dc,
                norm: norm.as_ref(),
                cols: n as i32,
                accumulate: i32::from(accumulate),
            };
            kernels::column_factor_grad(&*cx.device, Launch::flat(n), args)?;
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let (norm, bias, first) = self.split(x);
        let cols = x[0].cols();
        let mut c = vec![1.0; cols];
        for (start, s) in self.starts.iter().zip(&x[first..]) {
            for (j, v) in s.data.iter().enumerate() {
                c[start + j] = v / norm.map_or(1.0, |n| n.data[start + j]);
            }
        }
        let value = |i: usize| c[i % cols] * x[0].data[i] + bias.map_or(0.0, |b| b.data[i % cols]);
        vec![F64::from_fn(&x[0].shape, |i| round.at(value(i)))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].bytes())
    }
}

#[derive(Debug)]
pub struct Multiply {
    pub factor: f32,
}

impl Multiply {
    /// [`multiply`] without a tape.
    pub(super) fn of(&self, cx: &Cx, x: &Tensor) -> Result<Tensor> {
        let y = cx.real("scaled", x.shape())?;
        self.run(cx, &y, x, false)?;
        Ok(y)
    }

    fn run(&self, cx: &Cx, y: &Tensor, x: &Tensor, accumulate: bool) -> Result<()> {
        let args = kernels::MultiplyArgs {
            y: y.out(),
            x,
            n: x.numel() as i64,
            c: self.factor,
            accumulate: i32::from(accumulate),
        };
        let packs = x.numel().div_ceil(kernels::pack_width(x.dtype().size()));
        kernels::multiply(&*cx.device, Launch::flat(packs), args)
    }
}

impl Op for Multiply {
    fn name(&self) -> &'static str {
        "multiply"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        Ok(Fwd { outputs: vec![self.of(cx, x[0])?], saved: vec![] })
    }

    fn backward(&self, cx: &mut Cx, _node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let (Some(dy), Some((dx, accumulate))) = (&dy[0], g.slot(0)?) else { return Ok(()) };
        self.run(cx, &dx, dy, accumulate)
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![F64::from_fn(&x[0].shape, |i| round.at(f64::from(self.factor) * x[0].data[i]))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].bytes())
    }
}

pub fn multiply_cases(rng: &mut Rng) -> Vec<Case> {
    [(1, 1, 0.22f32), (3, 7, 12.0), (70, 64, 55.5)]
        .map(|(rows, cols, factor)| {
            let x = Arg::real(rng.array(&[rows, cols], 1.0));
            Case::new(format!("rows {rows} cols {cols} by {factor}"), Multiply { factor }, vec![x])
        })
        .into()
}

pub fn multiply_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let x = Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0));
    vec![Case::new("hidden states", Multiply { factor: 0.22 }, vec![x])]
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, cols, spans, norm, bias) in [
        (3, 7, vec![(0, 7)], false, false),
        (70, 48, vec![(16, 16), (32, 16)], false, true),
        (130, 96, vec![(0, 64), (64, 32)], true, true),
        (5, 300, vec![(100, 33)], true, false),
    ] {
        let mut inputs = vec![Arg::real(rng.array(&[rows, cols], 1.0))];
        if norm {
            inputs.push(Arg::float(F64::from_fn(&[cols], |_| 0.5 + rng.uniform())));
        }
        if bias {
            inputs.push(Arg::param(rng.array(&[cols], 0.5)));
        }
        for (_, n) in &spans {
            inputs.push(Arg::param(F64::from_fn(&[*n], |_| 1.0 + 0.3 * rng.normal())));
        }
        let starts = spans.iter().map(|s| s.0).collect();
        let label =
            format!("rows {rows} cols {cols} spans {spans:?}{}", if norm { " norm" } else { "" });
        cases.push(Case::new(label, ScaleColumns { starts, norm, bias }, inputs));
    }
    cases
}

/// A constant vector on the device.
pub fn constant(cx: &Cx, values: &[f32]) -> Result<Tensor> {
    Tensor::from_host(&cx.pool, "column factors", DType::F32, &[values.len()], values)
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let x = Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0));
    let scale = Arg::param(F64::from_fn(&[s.hidden], |_| 1.0));
    let op = ScaleColumns { starts: vec![0], norm: false, bias: false };
    vec![Case::new("all columns", op, vec![x, scale])]
}
