//! The matrix product of a linear layer, and the raw product that other ops build on. Layer 4.
//!
//! Invariant: with `matmul=own` and `exact`, the bits of a row of a forward product do not depend
//! on its batch, whichever kernel runs (see `library` and `own`).

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Layout;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::library::{self, Ran};
use crate::ops::operands::Operands;
use crate::ops::own::OwnKernel;
use crate::ops::{RowSums, expect_cols};
use crate::tensor::Tensor;

/// `y = x w^T (+ bias)`: x [m, k] real, w [n, k] (an HF `weight`), bias `[n]`; y [m, n] real.
/// Errors if the inner dimensions differ.
pub fn linear(cx: &mut Cx, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(b) => cx.apply1(Linear { bias: true }, &[x, w, b]),
        None => cx.apply1(Linear { bias: false }, &[x, w]),
    }
}

#[derive(Debug)]
pub struct Linear {
    pub bias: bool,
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let (a, w) = (x[0], x[1]);
        expect_cols(
            "linear",
            "weight",
            w,
            a.cols(),
            "check that the weights belong to this config.json",
        )?;
        let bias = self.bias.then(|| x[2]);
        if let Some(b) = bias {
            let hint = "check that the weights belong to this config.json";
            expect_cols("linear", "bias", b, w.row_count(), hint)?;
        }
        let y = cx.real("linear", &[a.row_count(), w.row_count()])?;
        product(cx, Layout::NT, &y, a, w, bias, false)?;
        let mut saved = Vec::new();
        if need.tape {
            saved.push(w.clone());
            if need.inputs[1] {
                saved.push(a.clone()); // a frozen weight needs no input
            }
        }
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        if let Some((da, accumulate)) = g.slot(0)? {
            product(cx, Layout::NN, &da, dy, &node.saved[0], None, accumulate)?;
        }
        if let (Some(a), Some((dw, accumulate))) = (node.saved.get(1), g.slot(1)?) {
            product(cx, Layout::TN, &dw, dy, a, None, accumulate)?;
        }
        if self.bias
            && let Some((db, accumulate)) = g.slot(2)?
        {
            column_sums(cx, &db, dy, accumulate)?;
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let (a, w) = (&x[0], &x[1]);
        let mut y = F64::zeros(&[a.row_count(), w.row_count()]);
        for r in 0..a.row_count() {
            for c in 0..w.row_count() {
                let dot: f64 = a.row(r).iter().zip(w.row(c)).map(|(p, q)| p * q).sum();
                y.row_mut(r)[c] = round.at(dot + if self.bias { x[2].data[c] } else { 0.0 });
            }
        }
        vec![y]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, n, k) = (x[0].row_count(), x[1].row_count(), x[0].cols());
        Cost { flops: 2.0 * (m * n * k) as f64, ..Cost::memory(x, m * n * x[0].dtype().size()) }
    }
}

/// `c = op(a) op(b) (+ bias)`, or `c += ...`; c real or f32, operands and bias in the storage
/// dtype. Not on the tape.
pub fn product(
    cx: &Cx,
    layout: Layout,
    c: &Tensor,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    accumulate: bool,
) -> Result<()> {
    let (m, k) =
        if layout == Layout::TN { (a.cols(), a.row_count()) } else { (a.row_count(), a.cols()) };
    let (n, kb) =
        if layout == Layout::NT { (b.row_count(), b.cols()) } else { (b.cols(), b.row_count()) };
    if k != kb || c.row_count() != m || c.cols() != n {
        let message = format!("{layout:?} product of {a:?} and {b:?} into {c:?}");
        return Err(Error::op("matmul", message));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    let operands = Operands { layout, c, a, b, bias, accumulate };
    match library::run(cx, &operands)? {
        Ran::Library => Ok(()),
        Ran::Not(own) => own.run(cx, &operands),
    }
}

/// The product by one of the engine's own kernels. Error if it cannot compute it.
pub fn product_by(
    cx: &Cx,
    kernel: OwnKernel,
    layout: Layout,
    c: &Tensor,
    (a, b): (&Tensor, &Tensor),
    bias: Option<&Tensor>,
    accumulate: bool,
) -> Result<()> {
    kernel.run(cx, &Operands { layout, c, a, b, bias, accumulate })
}

/// `out[c] (+)= sum_r x[r, c]` in f32, in a fixed order.
pub fn column_sums(cx: &Cx, out: &Tensor, x: &Tensor, accumulate: bool) -> Result<()> {
    let (rows, cols) = (x.row_count(), x.cols());
    let sums = RowSums::new(cx, rows, cols, x.dtype())?;
    let args = kernels::ColumnSumsArgs {
        partial: sums.partial.out(),
        x,
        rows: rows as i32,
        cols: cols as i32,
        ld: x.stride() as i32,
    };
    kernels::column_sums(&*cx.device, sums.first, args)?;
    sums.finish(cx, out, accumulate)
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (m, n, k, bias) in [
        (1, 1, 1, false),
        (5, 3, 7, true),
        (64, 48, 32, false),
        (70, 136, 40, true),
        (33, 17, 100, false),
        (130, 24, 72, true),
    ] {
        let mut inputs = vec![
            Arg::real(rng.array(&[m, k], 1.0)),
            Arg::param(rng.array(&[n, k], (k as f64).powf(-0.5))),
        ];
        if bias {
            inputs.push(Arg::param(rng.array(&[n], 0.5)));
        }
        let label = format!("m {m} n {n} k {k}{}", if bias { " bias" } else { "" });
        cases.push(Case::new(label, Linear { bias }, inputs));
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let inputs = vec![
        Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0)),
        Arg::param(rng.array(&[2 * s.intermediate, s.hidden], 0.02)),
    ];
    vec![Case::new("gate_up", Linear { bias: false }, inputs)]
}
