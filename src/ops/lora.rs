//! A linear layer with low-rank additions (LoRA): the base product and, for some ranges of its
//! columns, a narrow pair beside it. Layer 4.
//!
//! Math, for segment i of the columns: y_i = x W_i^T (+ bias_i) + t_i B_i^T,  t_i = s_i xd A_i^T,
//! xd = x or its dropout. Backward: dt_i = s_i dy_i B_i;  dB_i = dy_i^T t_i;  dA = dt^T xd;  dxd =
//! dt A;  dx = dy W (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; s =
//! alpha / r, or alpha / sqrt(r): Kalajdzievski, "rsLoRA", 2023).
//!
//! Invariant: projections that share an input (q|k|v, gate|up) share one narrow product t; their A
//! are stacked into one matrix. A frozen base saves nothing: only xd and t [rows, sum of ranks] are
//! kept. W is never changed; a quantised W is dequantised for each product, into scratch. On a GPU
//! t and dt, with their scales, are one launch each for all segments (`kernels/lora.cu`). On Hopper
//! in bf16, and without a library for products, the low-rank terms are fused into the engine's own
//! products. No choice depends on the number of rows.

use std::sync::Arc;

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::config::MatmulChoice;
use crate::device::{DType, Layout};
use crate::error::{Error, Result};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::expect_cols;
use crate::ops::lora_kernels::{self as own, Read, Wanted, lora_dt, lora_grads, lora_nt, lora_t};
use crate::ops::matmul::{column_sums, product};
use crate::ops::quant::{QuantWeight, values_of};
use crate::ops::scale::scaled;
use crate::tensor::Tensor;

/// One projection's pair: the columns of y it adds to, the columns of t it reads, and its s.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    pub from: usize,
    pub cols: usize,
    pub rank_from: usize,
    pub rank: usize,
    pub scale: f32,
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

/// The weight beside which the pairs add, [n, k].
#[derive(Clone, Copy)]
pub enum Base<'a> {
    Dense(&'a Tensor),
    Quantised(&'a Arc<QuantWeight>),
}

/// See the module docs for the math. x [m, k] real, base [n, k], bias `[n]`; y [m, n] real. `xd` is
/// x after dropout, None without dropout. Errors if the inner dimensions differ, or a pair does not
/// fit its segment.
pub fn lora_linear(
    cx: &mut Cx,
    x: &Tensor,
    xd: Option<&Tensor>,
    base: Base,
    bias: Option<&Tensor>,
    pairs: &Pairs,
) -> Result<Tensor> {
    let (dense, quantised) = match base {
        Base::Dense(w) => (Some(w), None),
        Base::Quantised(w) => (None, Some(w.clone())),
    };
    let segments = pairs.segments.clone();
    let op = LoraLinear { bias: bias.is_some(), dropped: xd.is_some(), segments, quantised };
    let mut inputs = vec![x, &pairs.scale, &pairs.a];
    inputs.extend(&pairs.b);
    inputs.extend(xd);
    inputs.extend(dense);
    inputs.extend(bias);
    cx.apply1(op, &inputs)
}

#[derive(Debug)]
pub struct LoraLinear {
    pub bias: bool,
    /// Whether xd is a separate input.
    pub dropped: bool,
    pub segments: Vec<Segment>,
    /// The weight, if it is not among the inputs.
    pub quantised: Option<Arc<QuantWeight>>,
}

/// Indices of the inputs: x, scale, A, B ..., xd, w, bias. The last three may be missing.
const SCALE: usize = 1;
const A: usize = 2;
const B: usize = 3;

impl LoraLinear {
    fn xd(&self) -> usize {
        if self.dropped { B + self.segments.len() } else { 0 }
    }

    fn w(&self) -> Option<usize> {
        self.quantised.is_none().then(|| B + self.segments.len() + usize::from(self.dropped))
    }

    fn bias(&self) -> Option<usize> {
        let w = usize::from(self.quantised.is_none());
        self.bias.then(|| B + self.segments.len() + usize::from(self.dropped) + w)
    }

    /// [n, k]
    fn shape(&self, x: &[&Tensor]) -> [usize; 2] {
        match (&self.quantised, self.w()) {
            (Some(q), _) => q.shape,
            (None, w) => w.map_or([0, 0], |w| [x[w].row_count(), x[w].cols()]),
        }
    }

    fn check(&self, x: &[&Tensor]) -> Result<()> {
        let (k, [n, wide], ranks) = (x[0].cols(), self.shape(x), x[A].row_count());
        if wide != k {
            let message = format!(
                "the weight has {wide} columns, its input {k}; check that the weights belong to \
                 this config.json"
            );
            return Err(Error::op("lora", message));
        }
        expect_cols("lora", "A", x[A], k, "check that the adapter was made for this model")?;
        expect_cols("lora", "scale", x[SCALE], ranks, "one value a row of A")?;
        for (s, b) in self.segments.iter().zip(&x[B..]) {
            if b.row_count() != s.cols
                || b.cols() != s.rank
                || s.from + s.cols > n
                || s.rank_from + s.rank > ranks
            {
                let message =
                    format!("B {b:?} does not fit {s:?} of {n} columns and {ranks} ranks");
                return Err(Error::op("lora", message));
            }
        }
        Ok(())
    }

    /// The weight in the form that a product reads.
    fn weight(&self, cx: &Cx, dense: Option<&Tensor>) -> Result<Tensor> {
        match (&self.quantised, dense) {
            (Some(q), _) => {
                let w = cx.real("dequantised weight", &q.shape)?;
                q.dequantise_into(cx, &w)?;
                Ok(w)
            }
            (None, Some(w)) => Ok(w.clone()),
            (None, None) => Err(Error::op("lora", "no weight")),
        }
    }

    /// Whether the engine's own products run, with the low-rank terms fused in, for a weight [n,
    /// k]. Training and generation must agree, so nothing here may depend on the number of rows.
    fn fused(&self, cx: &Cx, shape: [usize; 2]) -> bool {
        let own = cx.matmul == MatmulChoice::Own || !cx.device.capabilities().library_gemm;
        (own || self.fits_hopper(cx, shape)) && self.apart()
    }

    /// Whether the Hopper kernels, and those for few rows, can take every number of rows.
    fn fits_hopper(&self, cx: &Cx, [n, k]: [usize; 2]) -> bool {
        let chosen = cx.matmul != MatmulChoice::Library && cx.device.capabilities().wgmma;
        let aligned = n.is_multiple_of(8) && k.is_multiple_of(8) && k > 0;
        let ranks = self.segments.iter().map(|s| s.rank);
        chosen && cx.dtype == DType::BF16 && aligned && own::steps_agree(ranks)
    }

    /// Whether the engine computes the narrow products itself: one launch in each direction for all
    /// segments, scale included. On a CPU the library is faster.
    fn narrow(&self, cx: &Cx, fused: bool) -> bool {
        fused || (cx.device.capabilities().tensor_cores && self.apart())
    }

    /// Whether the engine's own kernels can take the segments. With PiSSA, the frozen initial pairs
    /// overlap the trained ones.
    fn apart(&self) -> bool {
        let mut pairs = self.segments.iter().zip(self.segments.iter().skip(1));
        self.segments.len() <= OWN_SEGMENTS && pairs.all(|(a, b)| a.from + a.cols <= b.from)
    }

    fn own_segments<'a>(&self, b: impl Iterator<Item = &'a Tensor>) -> Vec<own::Segment<'a>> {
        let place = |(s, b): (&Segment, &'a Tensor)| own::Segment {
            b,
            start: s.from,
            end: s.from + s.cols,
        };
        self.segments.iter().zip(b).map(place).collect()
    }
}

/// The most segments that the engine's own kernels take: q, k, v.
const OWN_SEGMENTS: usize = 3;

impl Op for LoraLinear {
    fn name(&self) -> &'static str {
        "lora_linear"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        self.check(x)?;
        let (rows, [n, _], ranks) = (x[0].row_count(), self.shape(x), x[A].row_count());
        let (xd, bias, dense) = (x[self.xd()], self.bias().map(|i| x[i]), self.w().map(|i| x[i]));
        let b = x[B..B + self.segments.len()].iter().copied();
        let fused = self.fused(cx, self.shape(x));
        let y = cx.real("linear", &[rows, n])?;
        let t = cx.real("lora", &[rows, ranks])?;
        if self.narrow(cx, fused) {
            lora_t(cx, &t, xd, x[A], x[SCALE])?;
        } else {
            let narrow = cx.real("lora", &[rows, ranks])?;
            product(cx, Layout::NT, &narrow, xd, x[A], None, false)?;
            scaled(cx, &t, &narrow, x[SCALE], None, false)?;
        }
        let w = self.weight(cx, dense)?;
        if fused {
            lora_nt(cx, &y, x[0], &w, bias, &t, &self.own_segments(b.clone()))?;
        } else {
            product(cx, Layout::NT, &y, x[0], &w, bias, false)?;
            for (s, b) in self.segments.iter().zip(b.clone()) {
                let (y, t) = (
                    y.columns(s.from, s.from + s.cols)?,
                    t.columns(s.rank_from, s.rank_from + s.rank)?,
                );
                product(cx, Layout::NT, &y, &t, b, None, true)?;
            }
        }
        let mut saved = Vec::new();
        if need.tape {
            saved.extend([xd.clone(), x[SCALE].clone(), x[A].clone(), t]);
            saved.extend(b.cloned());
            saved.extend(dense.cloned());
            if self.w().is_some_and(|w| need.inputs[w]) {
                saved.push(x[0].clone());
            }
        }
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let [xd, scale, a, t, rest @ ..] = &node.saved[..] else { return Ok(()) };
        let (b, rest) = rest.split_at(self.segments.len());
        let (dense, x) = if self.quantised.is_some() {
            (None, rest.first())
        } else {
            (rest.first(), rest.get(1))
        };
        let fused = self.fused(cx, [dy.cols(), xd.cols()]);
        let dt = cx.real("lora", t.shape())?;
        if self.narrow(cx, fused) {
            lora_dt(cx, &dt, dy, &self.own_segments(b.iter()), scale)?;
        } else {
            let narrow = cx.real("lora", t.shape())?;
            for (s, b) in self.segments.iter().zip(b) {
                let to = narrow.columns(s.rank_from, s.rank_from + s.rank)?;
                product(
                    cx,
                    Layout::NN,
                    &to,
                    &dy.columns(s.from, s.from + s.cols)?,
                    b,
                    None,
                    false,
                )?;
            }
            scaled(cx, &dt, &narrow, scale, None, false)?;
        }
        let dx = g.slot(0)?;
        let w = dx.is_some().then(|| self.weight(cx, dense)).transpose()?;
        if self.dropped || !fused {
            if let (Some((dx, accumulate)), Some(w)) = (&dx, &w) {
                product(cx, Layout::NN, dx, dy, w, None, *accumulate)?;
            }
            let low = if self.dropped {
                g.slot(self.xd())?
            } else {
                dx.clone().map(|(dx, _)| (dx, true))
            };
            if let Some((dxd, accumulate)) = low {
                product(cx, Layout::NN, &dxd, &dt, a, None, accumulate)?;
            }
        }
        let da = g.slot(A)?;
        let db = (0..b.len()).map(|i| g.slot(B + i)).collect::<Result<Vec<_>>>()?;
        if fused {
            fn borrowed(slot: &Option<(Tensor, bool)>) -> own::Slot<'_> {
                slot.as_ref().map(|(t, add)| (t, *add))
            }
            let db: Vec<own::Slot> = db.iter().map(borrowed).collect();
            let dx = if self.dropped { None } else { borrowed(&dx) };
            let to = Wanted { dx, w: w.as_ref(), a, da: borrowed(&da), db: &db };
            let read = Read { x: xd, dt: &dt, dy, t };
            lora_grads(cx, &to, &read, &self.own_segments(b.iter()))?;
        } else {
            if let Some((da, accumulate)) = &da {
                product(cx, Layout::TN, da, &dt, xd, None, *accumulate)?;
            }
            for (s, db) in self.segments.iter().zip(&db) {
                let Some((db, accumulate)) = db else { continue };
                let (dy, t) = (
                    dy.columns(s.from, s.from + s.cols)?,
                    t.columns(s.rank_from, s.rank_from + s.rank)?,
                );
                product(cx, Layout::TN, db, &dy, &t, None, *accumulate)?;
            }
        }
        if let (Some(w), Some(x)) = (self.w(), x)
            && let Some((dw, accumulate)) = g.slot(w)?
        {
            product(cx, Layout::TN, &dw, dy, x, None, accumulate)?;
        }
        if let Some(bias) = self.bias()
            && let Some((db, accumulate)) = g.slot(bias)?
        {
            column_sums(cx, &db, dy, accumulate)?;
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let dot = |p: &[f64], q: &[f64]| p.iter().zip(q).map(|(a, b)| a * b).sum::<f64>();
        let w = match &self.quantised {
            // A weight that cannot be read back gives no outputs, which no check accepts as a
            // result.
            Some(q) => match values_of(q, round) {
                Ok(w) => w,
                Err(_) => return vec![],
            },
            None => x[self.w().unwrap_or_default()].clone(),
        };
        let (rows, n, xd) = (x[0].row_count(), w.row_count(), &x[self.xd()]);
        let mut y = F64::zeros(&[rows, n]);
        for r in 0..rows {
            let t: Vec<f64> = (0..x[A].row_count())
                .map(|i| round.at(x[SCALE].data[i] * round.at(dot(xd.row(r), x[A].row(i)))))
                .collect();
            for c in 0..n {
                let bias = self.bias().map_or(0.0, |b| x[b].data[c]);
                y.row_mut(r)[c] = round.at(dot(x[0].row(r), w.row(c)) + bias);
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
        let (m, [n, k], ranks) = (x[0].row_count(), self.shape(x), x[A].row_count());
        let narrow: usize = self.segments.iter().map(|s| s.cols * s.rank).sum();
        // A quantised weight is read in its own format, then written and read in the storage dtype.
        let weight =
            self.quantised.as_ref().map_or(0, |q| q.bytes() + 2 * n * k * x[0].dtype().size());
        let moved = weight + m * n * x[0].dtype().size();
        Cost { flops: 2.0 * (m * (n * k + ranks * k + narrow)) as f64, ..Cost::memory(x, moved) }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    type Three = (usize, usize, usize); // m, n, k; or for a pair: from, columns, rank
    let shapes: [(Three, &[Three], bool, bool); 7] = [
        ((3, 5, 7), &[(0, 5, 2)], false, false),
        ((33, 48, 24), &[(0, 32, 8), (32, 8, 8), (40, 8, 8)], true, false),
        ((70, 40, 32), &[(8, 16, 4), (32, 8, 3)], true, true),
        ((130, 64, 48), &[(0, 64, 16)], false, true),
        ((65, 136, 16), &[(0, 72, 16), (72, 32, 16), (104, 32, 16)], true, false),
        ((5, 24, 16), &[(0, 24, 64)], false, true),
        // PiSSA's frozen initial pair beside the trained one.
        ((6, 24, 16), &[(0, 24, 8), (0, 24, 8)], false, false),
    ];
    for ((m, n, k), pairs, bias, dropped) in shapes {
        let x = rng.array(&[m, k], 1.0);
        let (mut segments, mut rank_from) = (Vec::new(), 0);
        for &(from, cols, rank) in pairs {
            let scale = if rank_from % 2 == 0 { 2.0 } else { 0.7 };
            segments.push(Segment { from, cols, rank_from, rank, scale });
            rank_from += rank;
        }
        let small = (k as f64).powf(-0.5);
        let scales: Vec<f64> =
            segments.iter().flat_map(|s| vec![f64::from(s.scale); s.rank]).collect();
        let mut inputs = vec![
            Arg::real(x),
            Arg::float(F64::new(&[rank_from], scales)),
            Arg::param(rng.array(&[rank_from, k], small)),
        ];
        inputs.extend(segments.iter().map(|s| Arg::param(rng.array(&[s.cols, s.rank], 0.5))));
        if dropped {
            inputs.push(Arg::real(rng.array(&[m, k], 1.0)));
        }
        inputs.push(Arg::param(rng.array(&[n, k], small)));
        if bias {
            inputs.push(Arg::param(rng.array(&[n], 0.5)));
        }
        let label = format!(
            "m {m} n {n} k {k} pairs {pairs:?}{}{}",
            if bias { " bias" } else { "" },
            if dropped { " dropped" } else { "" }
        );
        cases.push(Case::new(
            label,
            LoraLinear { bias, dropped, segments, quantised: None },
            inputs,
        ));
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let (n, k, rank) = (s.intermediate, s.hidden, 16);
    let segments =
        [0, 1].map(|i| Segment { from: i * n, cols: n, rank_from: i * rank, rank, scale: 2.0 });
    let inputs = vec![
        Arg::real(rng.array(&[s.tokens(), k], 1.0)),
        Arg::float(F64::from_fn(&[2 * rank], |_| 2.0)),
        Arg::param(rng.array(&[2 * rank, k], 0.02)),
        Arg::param(rng.array(&[n, rank], 0.02)),
        Arg::param(rng.array(&[n, rank], 0.02)),
        Arg::param(rng.array(&[2 * n, k], 0.02)),
    ];
    let op = LoraLinear { bias: false, dropped: false, segments: segments.into(), quantised: None };
    vec![Case::new("gate_up of rank 16", op, inputs)]
}
