//! Rope on the paged path: q is rotated where it is, k and v go to the cache. One launch for what
//! training does with `head_rstd`, `rope_apply` and the packed rows. Layer 4.
//!
//! Invariant: the values have the bits of [`rope`](super::rope::rope). Math and numerics:
//! `kernels/rope.cu`.

use super::rope::{GEMMA3, NormOver, OLMO2, QWEN3, QkNorm, Rope, RopeTable};
use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::expect_cols;
use crate::ops::rmsnorm::{Norm, NormWeight};
use crate::ops::rope;
use crate::tensor::Tensor;

/// Rotates (and norms) the q columns of `qkv` [n, (heads + 2 kv_heads) head_dim] in place, and
/// writes k, rotated too, and v of row `r` to row `slots[r]` of `cache` [rows, 2 kv_heads
/// head_dim]; slot -1: nowhere. The k and v columns of `qkv` stay as they were. Not on the tape.
#[allow(clippy::too_many_arguments)]
pub fn rope_append(
    cx: &mut Cx,
    qkv: &Tensor,
    cache: &Tensor,
    table: &RopeTable,
    position: &Tensor,
    slots: &Tensor,
    heads: usize,
    kv_heads: usize,
    norm: Option<QkNorm>,
) -> Result<()> {
    let op = RopeAppend(Rope { heads, kv_heads, norm: norm.as_ref().map(|n| (n.norm, n.over)) });
    let x = [qkv, cache, &table.cosine, &table.sine, position, slots];
    match norm {
        Some(n) => op.run(cx, &[&x[..], &[n.q, n.k]].concat()),
        None => op.run(cx, &x),
    }
}

#[derive(Debug)]
pub struct RopeAppend(pub Rope);

impl RopeAppend {
    /// `x`: qkv, cache, cosine, sine, position, slots and, with a norm, its two weights.
    fn run(&self, cx: &Cx, x: &[&Tensor]) -> Result<()> {
        let (qkv, cache, Rope { heads, kv_heads, norm }) = (x[0], x[1], &self.0);
        let (all, rows) = (heads + 2 * kv_heads, qkv.row_count());
        let dim = qkv.cols() / all;
        expect_cols("rope_append", "qkv", qkv, all * dim, "it is q | k | v")?;
        let hint = "a cache row is k | v of one token";
        expect_cols("rope_append", "cache", cache, 2 * kv_heads * dim, hint)?;
        let fits = dim.is_multiple_of(2) && x[2].cols() == dim / 2;
        let counts = x[4].numel() == rows && x[5].numel() == rows;
        if !fits || !counts || !qkv.is_contiguous() || !cache.is_contiguous() {
            let message = format!("{qkv:?}, table {:?}, {:?}, slots {:?}", x[2], x[4], x[5]);
            return Err(Error::op("rope_append", message));
        }
        self.0.check_weights("rope_append", &x[6..], dim)?;
        // A norm over all heads is taken before any of them is rotated in place.
        let norms = match norm {
            Some((norm, NormOver::Heads)) => Some(self.0.rstd(cx, qkv, *norm)?),
            _ => None,
        };
        let kind = norm.map_or(Norm::new(0.0), |(norm, _)| norm);
        let args = kernels::RopeAppendArgs {
            qkv: qkv.out(),
            cache: cache.out(),
            cosine: x[2],
            sine: x[3],
            position: x[4],
            slots: x[5],
            norms: norms.as_ref(),
            wq: x.get(6).copied(),
            wk: x.get(7).copied(),
            rows: rows as i32,
            heads: *heads as i32,
            kv: *kv_heads as i32,
            dim: dim as i32,
            eps: kind.eps,
            plus: kind.plus(),
            once: kind.once(),
        };
        let normed = usize::from(norm.is_some());
        kernels::rope_append(&*cx.device, Launch::warps(rows * all), normed, args)
    }
}

impl Op for RopeAppend {
    fn name(&self) -> &'static str {
        "rope_append"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        self.run(cx, x)?;
        Ok(Fwd { outputs: vec![x[0].clone(), x[1].clone()], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let mut inputs = vec![x[0].clone(), x[2].clone(), x[3].clone(), x[4].clone()];
        inputs.extend(x[6..].iter().cloned());
        let rotated = &self.0.oracle(round, &inputs)[0];
        let (mut qkv, mut cache) = (x[0].clone(), x[1].clone());
        let q = qkv.cols() * self.0.heads / (self.0.heads + 2 * self.0.kv_heads);
        for r in 0..qkv.row_count() {
            qkv.row_mut(r)[..q].copy_from_slice(&rotated.row(r)[..q]);
            if x[5].data[r] >= 0.0 {
                cache.row_mut(x[5].index(r)).copy_from_slice(&rotated.row(r)[q..]);
            }
        }
        vec![qkv, cache]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: 2.0 * x[0].bytes() as f64, flops: 0.0 }
    }
}

/// A case of rope whose rows go to distinct rows of a cache, the last first; each seventh nowhere.
fn case(
    rng: &mut Rng,
    rows: usize,
    heads: [usize; 3],
    norm: Option<(NormWeight, NormOver)>,
    last: usize,
) -> Case {
    let plain = rope::case(rng, rows, heads, norm, last);
    let [h, kv, dim] = heads;
    let slot = |r: i32| if r % 7 == 6 { -1 } else { rows as i32 - r };
    let mut inputs = plain.inputs;
    inputs.insert(1, Arg::real(rng.array(&[rows + 1, 2 * kv * dim], 1.0)));
    inputs.insert(5, Arg::ints(&(0..rows as i32).map(slot).collect::<Vec<_>>()));
    let inputs = inputs.into_iter().map(|input| Arg { param: false, ..input }.no_grad()).collect();
    let norm = norm.map(|(weight, over)| (Norm { eps: 1e-6, weight }, over));
    let op = RopeAppend(Rope { heads: h, kv_heads: kv, norm });
    Case::new(plain.label, op, inputs)
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let shapes = [
        (3, [2, 1, 16], None),
        (40, [4, 2, 32], None),
        (9, [3, 3, 6], None),
        (37, [4, 2, 64], QWEN3),
        (15, [2, 1, 128], QWEN3),
        (3, [2, 2, 24], QWEN3),
        (37, [4, 2, 64], OLMO2),
        (9, [3, 1, 6], OLMO2),
        (37, [4, 2, 64], GEMMA3),
    ];
    shapes.map(|(rows, heads, norm)| case(rng, rows, heads, norm, 50)).into()
}

/// A decode step.
pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    vec![case(rng, s.sequences, [s.heads, s.kv_heads, s.head_dim], None, s.length)]
}
