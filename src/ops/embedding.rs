//! Token embedding, and the selection of rows (those that have a target, before the head). Layer 4.
//!
//! Invariant: the backward adds the places of a token in order, so it is deterministic. Kernels:
//! `kernels/embedding.cu`.

use std::sync::Arc;

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::column_warps;
use crate::tensor::Tensor;

/// Token ids on the device, and the places of each distinct token, sorted on the host for the
/// backward.
#[derive(Clone)]
pub struct TokenIndex {
    pub ids: Tensor,
    pub(crate) unique: Tensor,
    pub(crate) starts: Tensor,
    pub(crate) order: Tensor,
    /// The distinct ids, ascending, on the host.
    distinct: Arc<[i32]>,
}

impl TokenIndex {
    /// `ids` must be below the vocabulary size plus virtual tokens; the caller (the batch) has
    /// checked them.
    pub fn new(cx: &Cx, ids: &[u32]) -> Result<TokenIndex> {
        let ints: Vec<i32> = ids.iter().map(|i| *i as i32).collect();
        let [unique, starts, order] = sorted_places(&ints);
        Ok(TokenIndex {
            ids: cx.ints("token ids", &ints)?,
            unique: cx.ints("token index", &unique)?,
            starts: cx.ints("token index", &starts)?,
            order: cx.ints("token index", &order)?,
            distinct: unique.into(),
        })
    }

    /// An index for forwards without a tape: nothing is sorted, and a backward is an error.
    pub fn for_generation(ids: Tensor) -> Result<TokenIndex> {
        let none = ids.view(0, ids.dtype(), &[0])?;
        Ok(TokenIndex {
            ids,
            unique: none.clone(),
            starts: none.clone(),
            order: none,
            distinct: Arc::new([]),
        })
    }

    /// The number of distinct ids below `vocab`.
    pub(crate) fn distinct_below(&self, vocab: usize) -> usize {
        self.distinct.partition_point(|id| (*id as usize) < vocab)
    }
}

pub(crate) fn sorted_places(ids: &[i32]) -> [Vec<i32>; 3] {
    let mut order: Vec<i32> = (0..ids.len() as i32).collect();
    order.sort_by_key(|i| ids[*i as usize]); // stable: places stay in order
    let (mut unique, mut starts) = (Vec::new(), Vec::new());
    for (at, place) in order.iter().enumerate() {
        let id = ids[*place as usize];
        if unique.last() != Some(&id) {
            unique.push(id);
            starts.push(at as i32);
        }
    }
    starts.push(ids.len() as i32);
    [unique, starts, order]
}

/// `y[i] = w[ids[i]]`: w [vocab, d] real; y [n, d] real.
pub fn embedding(cx: &mut Cx, w: &Tensor, index: &TokenIndex) -> Result<Tensor> {
    cx.apply1(Embedding, &[w, &index.ids, &index.unique, &index.starts, &index.order])
}

/// `y[i] = x[index[i]]`: x [n, d] real, index I32 `[m]` in range and without repetition; y [m, d].
pub fn gather_rows(cx: &mut Cx, x: &Tensor, index: &Tensor) -> Result<Tensor> {
    cx.apply1(GatherRows, &[x, index])
}

#[derive(Debug)]
pub struct Embedding;

#[derive(Debug)]
pub struct GatherRows;

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let y = gathered(cx, x[0], x[1])?;
        let saved = x[2..5].iter().map(|t| (*t).clone()).collect();
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let (Some(dy), Some((dw, accumulate))) = (&dy[0], g.slot(0)?) else { return Ok(()) };
        if node.saved[2].numel() != dy.row_count() {
            return Err(Error::op(
                "embedding",
                "these token ids were made for generation: no gradient flows to them",
            ));
        }
        if !accumulate {
            dw.zero()?;
        }
        let (unique, starts, order) = (&node.saved[0], &node.saved[1], &node.saved[2]);
        sum_places(cx, &dw, dy, unique, starts, order, 0)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        vec![gather_oracle(&x[0], &x[1])]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        copied_rows(x[0], x[1])
    }
}

impl Op for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let y = gathered(cx, x[0], x[1])?;
        Ok(Fwd { outputs: vec![y], saved: vec![x[1].clone()] })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let (Some(dy), Some((dx, accumulate))) = (&dy[0], g.slot(0)?) else { return Ok(()) };
        if !accumulate {
            dx.zero()?;
        }
        let (n, d) = (dy.row_count(), dy.cols());
        if dx.dtype() != dy.dtype() {
            return Err(Error::op(
                "gather_rows",
                "the selected rows of a parameter have no gradient here",
            ));
        }
        let args = kernels::ScatterRowsArgs {
            x: dx.out(),
            dy,
            index: &node.saved[0],
            n: n as i32,
            d: d as i32,
        };
        kernels::scatter_rows(&*cx.device, Launch::warps(n), args)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        vec![gather_oracle(&x[0], &x[1])]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        copied_rows(x[0], x[1])
    }
}

/// `dw[id - shift] += dy` at every place of each distinct id, in order.
pub(crate) fn sum_places(
    cx: &Cx,
    dw: &Tensor,
    dy: &Tensor,
    unique: &Tensor,
    starts: &Tensor,
    order: &Tensor,
    shift: usize,
) -> Result<()> {
    let (u, d) = (unique.numel(), dy.cols());
    let args = kernels::EmbeddingBwdArgs {
        dw: dw.out(),
        dy,
        unique,
        starts,
        order,
        u: u as i32,
        d: d as i32,
        shift: shift as i32,
    };
    kernels::embedding_bwd(&*cx.device, column_warps(u, d, dy.dtype()), args)
}

fn gathered(cx: &Cx, x: &Tensor, index: &Tensor) -> Result<Tensor> {
    let (n, d) = (index.numel(), x.cols());
    let y = cx.real("gathered rows", &[n, d])?;
    let args = kernels::GatherRowsArgs { y: y.out(), x, index, n: n as i32, d: d as i32 };
    kernels::gather_rows(&*cx.device, Launch::warps(n), args)?;
    Ok(y)
}

/// The cost of copying the rows of `w` that `ids` names.
pub(crate) fn copied_rows(w: &Tensor, ids: &Tensor) -> Cost {
    Cost { bytes: 2.0 * (ids.numel() * w.cols() * w.dtype().size()) as f64, flops: 0.0 }
}

fn gather_oracle(x: &F64, index: &F64) -> F64 {
    let mut y = F64::zeros(&[index.data.len(), x.cols()]);
    for i in 0..index.data.len() {
        y.row_mut(i).copy_from_slice(x.row(index.index(i)));
    }
    y
}

fn case(rng: &mut Rng, vocab: usize, d: usize, n: usize) -> Case {
    let ids: Vec<i32> = (0..n).map(|_| rng.below(vocab) as i32).collect();
    let [unique, starts, order] = sorted_places(&ids);
    let mut inputs = vec![Arg::param(rng.array(&[vocab, d], 1.0))];
    inputs.extend([&ids, &unique, &starts, &order].map(|v| Arg::ints(v)));
    Case { exact: true, ..Case::new(format!("vocab {vocab} d {d} n {n}"), Embedding, inputs) }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    [(3, 5, 1), (20, 64, 50), (7, 300, 33)].map(|(vocab, d, n)| case(rng, vocab, d, n)).into()
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    vec![case(rng, s.vocab, s.hidden, s.tokens())]
}

fn gather_case(rng: &mut Rng, rows: usize, d: usize, index: Vec<i32>) -> Case {
    let inputs = vec![Arg::real(rng.array(&[rows, d], 1.0)), Arg::ints(&index)];
    let label = format!("{} of {rows} rows, d {d}", index.len());
    Case { exact: true, ..Case::new(label, GatherRows, inputs) }
}

pub fn gather_cases(rng: &mut Rng) -> Vec<Case> {
    [(4, 5, vec![2]), (30, 300, vec![0, 3, 4, 17, 29]), (9, 64, (0..9).collect())]
        .map(|(rows, d, index)| gather_case(rng, rows, d, index))
        .into()
}

pub fn gather_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let every_second = (0..s.tokens() as i32).step_by(2).collect();
    vec![gather_case(rng, s.tokens(), s.hidden, every_second)]
}
