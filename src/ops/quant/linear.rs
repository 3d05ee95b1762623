//! The linear layer over a frozen quantised weight. Layer 4.
//!
//! Invariant: the tape holds no dequantised weight; each product dequantises into scratch of the
//! storage dtype.

use std::sync::Arc;

use super::oracle::{dequantised, values_of};
use super::{QuantWeight, Scheme};
use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Layout;
use crate::error::{Error, Result};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::expect_cols;
use crate::ops::matmul::{column_sums, product};
use crate::tensor::Tensor;

/// `y = x w^T (+ bias)`: x [m, k] real, w [n, k] quantised and frozen, bias `[n]`; y [m, n] real.
pub fn quant_linear(
    cx: &mut Cx,
    x: &Tensor,
    w: &Arc<QuantWeight>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let op = QuantLinear { weight: w.clone(), bias: bias.is_some() };
    match bias {
        Some(b) => cx.apply1(op, &[x, b]),
        None => cx.apply1(op, &[x]),
    }
}

#[derive(Debug)]
pub struct QuantLinear {
    pub weight: Arc<QuantWeight>,
    pub bias: bool,
}

impl QuantLinear {
    fn dequantised(&self, cx: &Cx) -> Result<Tensor> {
        let w = cx.real("dequantised weight", &self.weight.shape)?;
        self.weight.dequantise_into(cx, &w)?;
        Ok(w)
    }
}

const HINT: &str = "check that the weights belong to this config.json";

impl Op for QuantLinear {
    fn name(&self) -> &'static str {
        "quant_linear"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let [n, k] = self.weight.shape;
        expect_cols("quant_linear", "input", x[0], k, HINT)?;
        let bias = self.bias.then(|| x[1]);
        if let Some(b) = bias {
            expect_cols("quant_linear", "bias", b, n, HINT)?;
        }
        let y = cx.real("linear", &[x[0].row_count(), n])?;
        product(cx, Layout::NT, &y, x[0], &self.dequantised(cx)?, bias, false)?;
        Ok(Fwd { outputs: vec![y], saved: vec![] })
    }

    fn backward(&self, cx: &mut Cx, _node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        if let Some((dx, accumulate)) = g.slot(0)? {
            product(cx, Layout::NN, &dx, dy, &self.dequantised(cx)?, None, accumulate)?;
        }
        if self.bias
            && let Some((db, accumulate)) = g.slot(1)?
        {
            column_sums(cx, &db, dy, accumulate)?;
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        // A weight that cannot be read back gives no outputs, which no check accepts as a result.
        match values_of(&self.weight, round) {
            Ok(w) => vec![product_of(round, &x[0], &w, self.bias.then(|| &x[1]))],
            Err(_) => vec![],
        }
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, [n, k]) = (x[0].row_count(), self.weight.shape);
        // The dequantised weight is written and read once.
        let moved = self.weight.bytes() + (m * n + 2 * n * k) * x[0].dtype().size();
        Cost { flops: 2.0 * (m * n * k) as f64, ..Cost::memory(x, moved) }
    }
}

fn product_of(round: Round, x: &F64, w: &F64, bias: Option<&F64>) -> F64 {
    let mut y = F64::zeros(&[x.row_count(), w.row_count()]);
    for r in 0..x.row_count() {
        for c in 0..w.row_count() {
            let dot: f64 = x.row(r).iter().zip(w.row(c)).map(|(p, q)| p * q).sum();
            y.row_mut(r)[c] = round.at(dot + bias.map_or(0.0, |b| b.data[c]));
        }
    }
    y
}

/// The op form, for the registry: the weight is the last input, and is quantised first.
#[derive(Debug)]
struct FromFloat {
    scheme: Scheme,
    rows: Vec<usize>,
    bias: bool,
}

impl FromFloat {
    fn op(&self, cx: &Cx, w: &Tensor) -> Result<QuantLinear> {
        let weight = Arc::new(QuantWeight::from_tensor(cx, w, &self.rows, self.scheme)?);
        Ok(QuantLinear { weight, bias: self.bias })
    }
}

impl Op for FromFloat {
    fn name(&self) -> &'static str {
        "quant_linear"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let (w, inputs) = x.split_last().ok_or_else(|| Error::op("quant_linear", "no weight"))?;
        let fwd = self.op(cx, w)?.forward(cx, inputs, need)?;
        Ok(Fwd { saved: vec![(*w).clone()], ..fwd })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        self.op(cx, &node.saved[0])?.backward(cx, node, dy, g)
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let w = dequantised(round, &x[x.len() - 1], &self.rows, self.scheme);
        vec![product_of(round, &x[0], &w, self.bias.then(|| &x[1]))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, n, k) = (x[0].row_count(), x[x.len() - 1].row_count(), x[0].cols());
        Cost { flops: 2.0 * (m * n * k) as f64, ..Cost::memory(x, m * n * x[0].dtype().size()) }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let double = Scheme::Nf4 { double: true };
    let mut cases = Vec::new();
    for (m, rows, k, scheme, bias) in [
        (1, vec![1], 1, double, false),
        (5, vec![3, 2], 7, double, true),
        (9, vec![40, 8, 8], 64, double, false),
        (33, vec![24, 16], 48, Scheme::Nf4 { double: false }, true),
        (7, vec![6, 5], 19, Scheme::Int8, true),
    ] {
        let n: usize = rows.iter().sum();
        let mut inputs = vec![Arg::real(rng.array(&[m, k], 1.0))];
        if bias {
            inputs.push(Arg::param(rng.array(&[n], 0.5)));
        }
        inputs.push(Arg::real(rng.array(&[n, k], (k as f64).powf(-0.5))).no_grad());
        let label =
            format!("m {m} rows {rows:?} k {k} {scheme:?}{}", if bias { " bias" } else { "" });
        cases.push(Case::new(label, FromFloat { scheme, rows, bias }, inputs));
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let inputs = vec![
        Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0)),
        Arg::real(rng.array(&[s.intermediate, s.hidden], 0.02)).no_grad(),
    ];
    let (scheme, rows) = (Scheme::Nf4 { double: true }, vec![s.intermediate]);
    let op = FromFloat { scheme, rows, bias: false };
    vec![Case::new("with quantising the weight", op, inputs)]
}
