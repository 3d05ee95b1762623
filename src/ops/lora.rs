//! A linear layer with low-rank additions (LoRA): the base product and, for some stretches of its columns, a narrow pair
//! beside it. Floor 2.
//!
//! Math, for segment i of the columns: y_i = x W_i^T (+ bias_i) + t_i B_i^T,  t_i = s_i xd A_i^T, xd = x or its dropout.
//! Backward: dt_i = s_i dy_i B_i;  dB_i = dy_i^T t_i;  dA = dt^T xd;  dxd = dt A;  dx = dy W (Hu et al., "LoRA: Low-Rank
//! Adaptation of Large Language Models", 2021; s = alpha / r, or alpha / sqrt(r): Kalajdzievski, "rsLoRA", 2023).
//!
//! Invariant: projections that share an input (q|k|v, gate|up) share one narrow product t, whose A lie one after the
//! other as one matrix. A frozen base saves nothing: only xd and t [rows, sum of ranks] are kept. W is never changed.

use crate::cx::Cx;
use crate::device::Layout;
use crate::error::{Error, Result};
use crate::ops::matmul::{column_sums, product};
use crate::ops::scale::scaled;
use crate::ops::{Arg, Case, Cost, F64, Fwd, Need, Op, Rng, Round, expect_cols};
use crate::tape::{Grads, Node};
use crate::tensor::Tensor;

/// One projection's pair: which columns of y it adds to, which columns of t it reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    pub from: usize,
    pub cols: usize,
    pub rank_from: usize,
    pub rank: usize,
}

/// The pairs of the projections that share an input.
#[derive(Clone)]
pub struct Pairs {
    /// [sum of ranks, k] real.
    pub a: Tensor,
    /// [cols, rank] real each.
    pub b: Vec<Tensor>,
    pub segments: Vec<Segment>,
    /// F32 [sum of ranks]: s of each row of A.
    pub scale: Tensor,
}

/// See the module. x, xd [m, k] real, w [n, k], bias [n]; y [m, n] real. `xd` may be x itself.
/// Errors if the inner dimensions differ, or a pair does not fit its segment.
pub fn lora_linear(
    cx: &mut Cx,
    x: &Tensor,
    xd: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    pairs: &Pairs,
) -> Result<Tensor> {
    let op = LoraLinear { bias: bias.is_some(), segments: pairs.segments.clone() };
    let mut inputs = vec![x, xd, w, &pairs.scale, &pairs.a];
    inputs.extend(&pairs.b);
    inputs.extend(bias);
    cx.apply1(op, &inputs)
}

#[derive(Debug)]
pub struct LoraLinear {
    pub bias: bool,
    pub segments: Vec<Segment>,
}

/// Where the B begin among the inputs: x, xd, w, scale, A, B ..., bias.
const B: usize = 5;

impl LoraLinear {
    fn check(&self, x: &[&Tensor]) -> Result<()> {
        let (k, n, ranks) = (x[0].cols(), x[2].row_count(), x[4].row_count());
        expect_cols("lora", "weight", x[2], k, "do the weights belong to this config.json?")?;
        expect_cols("lora", "A", x[4], k, "was the adapter made for this model?")?;
        expect_cols("lora", "scale", x[3], ranks, "one value a row of A")?;
        for (s, b) in self.segments.iter().zip(&x[B..]) {
            if b.row_count() != s.cols || b.cols() != s.rank || s.from + s.cols > n || s.rank_from + s.rank > ranks {
                return Err(Error::op("lora", format!("B {b:?} does not fit {s:?} of {n} columns and {ranks} ranks")));
            }
        }
        Ok(())
    }
}

impl Op for LoraLinear {
    fn name(&self) -> &'static str {
        "lora_linear"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        self.check(x)?;
        let (rows, n, ranks) = (x[0].row_count(), x[2].row_count(), x[4].row_count());
        let bias = self.bias.then(|| x[B + self.segments.len()]);
        let y = cx.real("linear", &[rows, n])?;
        let narrow = cx.real("lora", &[rows, ranks])?;
        product(cx, Layout::NT, &narrow, x[1], x[4], None, false)?;
        let t = cx.real("lora", &[rows, ranks])?;
        scaled(cx, &t, &narrow, x[3], None, false)?;
        product(cx, Layout::NT, &y, x[0], x[2], bias, false)?;
        for (s, b) in self.segments.iter().zip(&x[B..]) {
            let (y, t) = (y.columns(s.from, s.from + s.cols)?, t.columns(s.rank_from, s.rank_from + s.rank)?);
            product(cx, Layout::NT, &y, &t, b, None, true)?;
        }
        let mut saved = Vec::new();
        if need.tape {
            saved.extend([x[1].clone(), x[2].clone(), x[3].clone(), x[4].clone(), t]);
            saved.extend(x[B..B + self.segments.len()].iter().map(|b| (*b).clone()));
            if need.inputs[2] {
                saved.push(x[0].clone());
            }
        }
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &[Option<Tensor>], g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let [xd, w, scale, a, t, rest @ ..] = &node.saved[..] else { return Ok(()) };
        let (b, x) = rest.split_at(self.segments.len());
        let dt = cx.real("lora", t.shape())?;
        if g.wants(1) || g.wants(4) {
            let narrow = cx.real("lora", t.shape())?;
            for (s, b) in self.segments.iter().zip(b) {
                let to = narrow.columns(s.rank_from, s.rank_from + s.rank)?;
                product(cx, Layout::NN, &to, &dy.columns(s.from, s.from + s.cols)?, b, None, false)?;
            }
            scaled(cx, &dt, &narrow, scale, None, false)?;
        }
        if let Some((dx, accumulate)) = g.slot(0)? {
            product(cx, Layout::NN, &dx, dy, w, None, accumulate)?;
        }
        if let Some((dxd, accumulate)) = g.slot(1)? {
            product(cx, Layout::NN, &dxd, &dt, a, None, accumulate)?;
        }
        if let Some((da, accumulate)) = g.slot(4)? {
            product(cx, Layout::TN, &da, &dt, xd, None, accumulate)?;
        }
        for (i, s) in self.segments.iter().enumerate() {
            if let Some((db, accumulate)) = g.slot(B + i)? {
                let (dy, t) = (dy.columns(s.from, s.from + s.cols)?, t.columns(s.rank_from, s.rank_from + s.rank)?);
                product(cx, Layout::TN, &db, &dy, &t, None, accumulate)?;
            }
        }
        if let (Some((dw, accumulate)), Some(x)) = (g.slot(2)?, x.first()) {
            product(cx, Layout::TN, &dw, dy, x, None, accumulate)?;
        }
        if self.bias
            && let Some((db, accumulate)) = g.slot(B + self.segments.len())?
        {
            column_sums(cx, &db, dy, accumulate)?;
        }
        Ok(())
    }

    fn reference(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let dot = |p: &[f64], q: &[f64]| p.iter().zip(q).map(|(a, b)| a * b).sum::<f64>();
        let (rows, n) = (x[0].row_count(), x[2].row_count());
        let mut y = F64::zeros(&[rows, n]);
        for r in 0..rows {
            let t: Vec<f64> = (0..x[4].row_count())
                .map(|i| round.at(x[3].data[i] * round.at(dot(x[1].row(r), x[4].row(i)))))
                .collect();
            for c in 0..n {
                let bias = if self.bias { x[B + self.segments.len()].data[c] } else { 0.0 };
                y.row_mut(r)[c] = round.at(dot(x[0].row(r), x[2].row(c)) + bias);
            }
            for (s, b) in self.segments.iter().zip(&x[B..]) {
                for c in 0..s.cols {
                    let at = &mut y.row_mut(r)[s.from + c];
                    *at = round.at(*at + dot(&t[s.rank_from..s.rank_from + s.rank], b.row(c)));
                }
            }
        }
        vec![y]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, n, k, ranks) = (x[0].row_count(), x[2].row_count(), x[0].cols(), x[4].row_count());
        let narrow: usize = self.segments.iter().map(|s| s.cols * s.rank).sum();
        Cost { flops: 2.0 * (m * (n * k + ranks * k + narrow)) as f64, ..Cost::memory(x, m * n * x[0].dtype().size()) }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    let spans: [(usize, usize, usize, &[(usize, usize, usize)], bool, bool); 4] = [
        (3, 5, 7, &[(0, 5, 2)], false, false),
        (33, 48, 24, &[(0, 32, 8), (32, 8, 8), (40, 8, 8)], true, false),
        (70, 40, 32, &[(8, 16, 4), (32, 8, 3)], true, true),
        (130, 64, 48, &[(0, 64, 16)], false, true),
    ];
    for (m, n, k, pairs, bias, apart) in spans {
        let x = rng.array(&[m, k], 1.0);
        let (mut segments, mut rank_from) = (Vec::new(), 0);
        for &(from, cols, rank) in pairs {
            segments.push(Segment { from, cols, rank_from, rank });
            rank_from += rank;
        }
        let small = (k as f64).powf(-0.5);
        // Where x and xd are one tensor on the tape their gradients add up; here they are two inputs.
        let xd = if apart { rng.array(&[m, k], 1.0) } else { x.clone() };
        let mut inputs = vec![
            Arg::real(x),
            Arg::real(xd),
            Arg::param(rng.array(&[n, k], small)),
            Arg::float(F64::from_fn(&[rank_from], |i| if i % 2 == 0 { 2.0 } else { 0.7 })),
            Arg::param(rng.array(&[rank_from, k], small)),
        ];
        inputs.extend(segments.iter().map(|s| Arg::param(rng.array(&[s.cols, s.rank], 0.5))));
        if bias {
            inputs.push(Arg::param(rng.array(&[n], 0.5)));
        }
        let label = format!("m {m} n {n} k {k} pairs {pairs:?}{}", if bias { " bias" } else { "" });
        cases.push(Case::new(label, LoraLinear { bias, segments }, inputs));
    }
    cases
}
