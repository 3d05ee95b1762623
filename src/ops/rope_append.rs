//! Rope on the paged path: q is rotated in place, k and v go to the cache. One launch for what
//! training does with `head_rstd`, `rope_apply` and the packed rows. Layer 4.
//!
//! Invariant: the values have the bits of [`rope`](super::rope::rope). Math and numerics:
//! `kernels/rope.cu`.

use super::rope::{CaseOptions, NormOver, QkNorm, Rope, RopeTable, SHAPES, rope_inputs};
use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::expect_cols;
use crate::ops::rmsnorm::Norm;
use crate::ops::rope;
use crate::tensor::Tensor;

/// Rotates (and norms) the q columns of `qkv` [n, (heads + 2 kv_heads) head_dim] in place, and
/// writes k, rotated too, and v of row `r` to row `slots[r]` of `cache` [rows, 2 kv_heads
/// head_dim]; slot -1: nowhere. Without a table nothing is rotated. The k and v columns of `qkv`
/// are unchanged. Not on the tape.
#[allow(clippy::too_many_arguments)]
pub fn rope_append(
    cx: &mut Cx,
    qkv: &Tensor,
    cache: &Tensor,
    table: Option<&RopeTable>,
    position: &Tensor,
    slots: &Tensor,
    heads: usize,
    kv_heads: usize,
    norm: Option<QkNorm>,
) -> Result<()> {
    let op = RopeAppend(Rope::new(heads, kv_heads, table, norm.as_ref()));
    op.run(cx, &rope_inputs(&[qkv, cache, position, slots], table, norm.as_ref()))
}

#[derive(Debug)]
pub struct RopeAppend(pub Rope);

impl RopeAppend {
    /// `x`: qkv, cache, position, slots, then the inputs of the table and the norm.
    pub(super) fn run(&self, cx: &Cx, x: &[&Tensor]) -> Result<()> {
        let (qkv, cache, position, slots) = (x[0], x[1], x[2], x[3]);
        let Rope { heads, kv_heads, turned, norm, .. } = self.0;
        let (all, rows) = (heads + 2 * kv_heads, qkv.row_count());
        let (dim, rest) = (qkv.cols() / all, self.0.args(&x[4..]));
        expect_cols("rope_append", "qkv", qkv, all * dim, "it is q | k | v")?;
        let hint = "a cache row is k | v of one token";
        expect_cols("rope_append", "cache", cache, 2 * kv_heads * dim, hint)?;
        let counts = position.numel() == rows && slots.numel() == rows;
        if !self.0.fits(dim, &rest) || !counts || !qkv.is_contiguous() || !cache.is_contiguous() {
            let message = format!("{qkv:?}, table {:?}, {position:?}, {slots:?}", rest.cosine);
            return Err(Error::op("rope_append", message));
        }
        self.0.check_weights("rope_append", &rest, dim)?;
        // A norm over all heads must be computed before any head is rotated in place.
        let norms = match norm {
            Some((norm, NormOver::Heads)) => Some(self.0.rstd(cx, qkv, norm)?),
            _ => None,
        };
        let kind = norm.map_or(Norm::new(0.0), |(norm, _)| norm);
        let args = kernels::RopeAppendArgs {
            qkv: qkv.out(),
            cache: cache.out(),
            cosine: rest.cosine,
            sine: rest.sine,
            q_scale: rest.q_scale,
            position,
            slots,
            norms: norms.as_ref(),
            wq: rest.wq,
            wk: rest.wk,
            rows: rows as i32,
            heads: heads as i32,
            kv: kv_heads as i32,
            dim: dim as i32,
            turned: turned as i32,
            eps: kind.eps,
            plus: kind.plus(),
            once: kind.once(),
        };
        let kind = usize::from(norm.is_some()) + 2 * usize::from(self.0.more(dim));
        kernels::rope_append(&*cx.device, Launch::warps(rows * all), kind, args)
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
        let mut inputs = vec![x[0].clone(), x[2].clone()];
        inputs.extend(x[4..].iter().cloned());
        let rotated = &self.0.oracle(round, &inputs)[0];
        let (mut qkv, mut cache) = (x[0].clone(), x[1].clone());
        let q = qkv.cols() * self.0.heads / (self.0.heads + 2 * self.0.kv_heads);
        for r in 0..qkv.row_count() {
            qkv.row_mut(r)[..q].copy_from_slice(&rotated.row(r)[..q]);
            if x[3].data[r] >= 0.0 {
                cache.row_mut(x[3].index(r)).copy_from_slice(&rotated.row(r)[q..]);
            }
        }
        vec![qkv, cache]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: 2.0 * x[0].bytes() as f64, flops: 0.0 }
    }
}

/// A case of rope whose rows go to distinct rows of a cache, in reverse order; every seventh goes
/// nowhere.
fn case(rng: &mut Rng, rows: usize, heads: [usize; 3], options: CaseOptions, last: usize) -> Case {
    let plain = rope::case(rng, rows, heads, options, last);
    let [h, kv, dim] = heads;
    let slot = |r: i32| if r % 7 == 6 { -1 } else { rows as i32 - r };
    let mut inputs = plain.inputs;
    inputs.insert(1, Arg::real(rng.array(&[rows + 1, 2 * kv * dim], 1.0)));
    inputs.insert(3, Arg::ints(&(0..rows as i32).map(slot).collect::<Vec<_>>()));
    let inputs = inputs.into_iter().map(|input| Arg { param: false, ..input }.no_grad()).collect();
    let op = RopeAppend(Rope {
        heads: h,
        kv_heads: kv,
        turned: options.turned.unwrap_or(dim),
        scaled: options.scaled,
        norm: options.norm(),
    });
    Case::new(plain.label, op, inputs)
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let own = [
        (9, [3, 3, 6], CaseOptions::PLAIN),
        (15, [2, 1, 128], CaseOptions::NORMED),
        (9, [2, 1, 16], CaseOptions { turned: Some(0), ..CaseOptions::PLAIN }),
    ];
    let shapes = SHAPES.into_iter().chain(own);
    shapes.map(|(rows, heads, options)| case(rng, rows, heads, options, 50)).collect()
}

/// A decode step.
pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let heads = [s.heads, s.kv_heads, s.head_dim];
    vec![case(rng, s.sequences, heads, CaseOptions::PLAIN, s.length)]
}
