//! Causal attention over packed sequences with shared prompts, and over a paged KV cache. Layer 4.
//!
//! Invariant: a row's bits depend on its own sequence alone, and are the same in training, prefill
//! and decode. Math, numerics and source: `kernels/attention.cu` (any dtype) and
//! `kernels/attention_mma.cu` (bf16, tensor cores).

mod launch;
pub mod oracle;
mod plan;

use std::sync::Arc;

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Case, PerfShape, Rng};
use crate::ops::{expect_cols, row_packs};
use crate::tensor::Tensor;

pub use plan::{AttnPlan, Segment};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttnShape {
    pub heads: usize,
    /// Each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Factor of q.k, mostly `head_dim^-0.5`.
    pub scale: f32,
    /// `s = c tanh(s / c)` before the softmax.
    pub softcap: Option<f32>,
    /// A query at position p sees positions `p - w + 1 ..= p`.
    pub window: Option<usize>,
}

/// Positions in one KV block and rows in one page of the cache.
pub const PAGE: usize = kernels::PAGE;

/// Softmax attention of each row of `qkv` [N, (H + 2K) D] real (q | k | v, rope applied) over the
/// rows before it in its sequence, as `plan` tells; [N, H D] real. Error if the widths do not fit
/// or D has no kernel.
pub fn attention(
    cx: &mut Cx,
    qkv: &Tensor,
    plan: &Arc<AttnPlan>,
    shape: AttnShape,
) -> Result<Tensor> {
    cx.apply1(Attention { plan: plan.clone(), shape }, &[qkv])
}

/// As [`attention`], with the keys and values (the rows' own included) read from `cache` [pages *
/// 64, 2 K D] real: row `r` is at position `row_position[r]` of the sequence whose pages are row
/// `row_sequence[r]` of `page_table` [sequences, max_pages] I32. A row of sequence -1 is padding
/// and gives 0. The bits are those of [`attention`].
pub fn attention_paged(
    cx: &mut Cx,
    qkv: &Tensor,
    cache: &Tensor,
    page_table: &Tensor,
    row_sequence: &Tensor,
    row_position: &Tensor,
    shape: AttnShape,
) -> Result<Tensor> {
    AttentionPaged { shape }.run(cx, &[qkv, cache, page_table, row_sequence, row_position])
}

/// Writes the k and v columns of each row of `qkv` to row `slots[r]` of `cache` [pages * 64, 2 K
/// D]; slot -1: nowhere.
pub fn kv_append(
    cx: &Cx,
    qkv: &Tensor,
    cache: &Tensor,
    slots: &Tensor,
    kv_heads: usize,
    head_dim: usize,
    heads: usize,
) -> Result<()> {
    KvAppend { heads, kv_heads, head_dim }.run(cx, qkv, cache, slots)
}

#[derive(Debug)]
pub struct Attention {
    pub plan: Arc<AttnPlan>,
    pub shape: AttnShape,
}

#[derive(Debug)]
pub struct AttentionPaged {
    pub shape: AttnShape,
}

#[derive(Debug)]
pub struct KvAppend {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// A shape as kernels take it: 0 is no softcap, i32::MAX no window.
struct Numbers {
    d: usize,
    heads: i32,
    kv_heads: i32,
    scale: f32,
    softcap: f32,
    window: i32,
}

impl AttnShape {
    /// The kernels' head sizes.
    pub const HEAD_DIMS: [usize; 7] = kernels::ATTENTION_FWD_D;

    fn numbers(&self, op: &'static str, qkv: &Tensor) -> Result<Numbers> {
        let (h, k, d) = (self.heads, self.kv_heads, self.head_dim);
        if !Self::HEAD_DIMS.contains(&d) {
            return Err(Error::op(
                op,
                format!("no kernel for head_dim {d}; there are {:?}", Self::HEAD_DIMS),
            ));
        }
        if k == 0 || h == 0 || h % k != 0 {
            return Err(Error::op(
                op,
                format!("{h} heads do not divide among {k} key-value heads"),
            ));
        }
        expect_cols(
            op,
            "qkv",
            qkv,
            (h + 2 * k) * d,
            "it is q | k | v of num_attention_heads and num_key_value_heads",
        )?;
        if self.window == Some(0) {
            return Err(Error::op(op, "a window of 0 sees nothing; leave it out to see all"));
        }
        Ok(Numbers {
            d,
            heads: h as i32,
            kv_heads: k as i32,
            scale: self.scale,
            softcap: self.softcap.unwrap_or(0.0),
            window: self.window.map_or(i32::MAX, |w| w.min(i32::MAX as usize) as i32),
        })
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let (qkv, shape) = (x[0], &self.shape);
        let n = shape.numbers("attention", qkv)?;
        if qkv.row_count() != self.plan.rows {
            return Err(Error::op(
                "attention",
                format!("{qkv:?} and a plan of {} rows", self.plan.rows),
            ));
        }
        let out = cx.real("attention", &[self.plan.rows, shape.heads * shape.head_dim])?;
        let lse = if need.tape {
            Some(cx.float("attention lse", &[self.plan.rows, shape.heads])?)
        } else {
            None
        };
        launch::forward(cx, &n, &out, lse.as_ref(), qkv, &self.plan)?;
        let saved = lse.map_or(Vec::new(), |lse| vec![qkv.clone(), out.clone(), lse]);
        Ok(Fwd { outputs: vec![out], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dout) = &dy[0] else { return Ok(()) };
        let Some((dqkv, accumulate)) = g.slot(0)? else { return Ok(()) };
        let (qkv, out, lse) = (&node.saved[0], &node.saved[1], &node.saved[2]);
        if dqkv.stride() != qkv.stride() || !dout.is_contiguous() {
            return Err(Error::op(
                "attention",
                format!("a gradient {dqkv:?} of {qkv:?} that is laid out otherwise"),
            ));
        }
        let n = self.shape.numbers("attention", qkv)?;
        launch::backward(cx, &n, &dqkv, dout, [qkv, out, lse], &self.plan, accumulate)
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![oracle::packed(round, &self.shape, &self.plan, &x[0])]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let width = self.shape.heads * self.shape.head_dim;
        let flops = 4.0 * self.plan.pairs * width as f64;
        Cost { flops, ..Cost::memory(x, self.plan.rows * width * x[0].dtype().size()) }
    }
}

impl AttentionPaged {
    fn run(&self, cx: &Cx, x: &[&Tensor]) -> Result<Tensor> {
        let (qkv, cache, sequence, position) = (x[0], x[1], x[3], x[4]);
        let (n, shape) = (self.shape.numbers("attention_paged", qkv)?, &self.shape);
        let hint = "a cache row is k | v of one token";
        expect_cols("attention_paged", "cache", cache, 2 * shape.kv_heads * shape.head_dim, hint)?;
        let rows = qkv.row_count();
        if sequence.numel() != rows || position.numel() != rows || !cache.is_contiguous() {
            return Err(Error::op(
                "attention_paged",
                format!("{qkv:?}, sequences {sequence:?}, positions {position:?}"),
            ));
        }
        let out = cx.real("attention", &[rows, shape.heads * shape.head_dim])?;
        launch::paged(cx, &n, &out, x)?;
        Ok(out)
    }
}

impl Op for AttentionPaged {
    fn name(&self) -> &'static str {
        "attention_paged"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        Ok(Fwd { outputs: vec![self.run(cx, x)?], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![oracle::paged(round, &self.shape, x)]
    }

    /// Of full tables: how far the sequences reach is known to the device alone.
    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (rows, width) = (x[0].row_count(), self.shape.heads * self.shape.head_dim);
        let row = 2 * self.shape.kv_heads * self.shape.head_dim * x[1].dtype().size();
        let bytes = x[0].bytes() + rows * width * x[0].dtype().size() + x[2].numel() * PAGE * row;
        Cost { bytes: bytes as f64, flops: 4.0 * (rows * width * x[2].cols() * PAGE) as f64 }
    }
}

impl KvAppend {
    fn run(&self, cx: &Cx, qkv: &Tensor, cache: &Tensor, slots: &Tensor) -> Result<()> {
        let width = 2 * self.kv_heads * self.head_dim;
        expect_cols(
            "kv_append",
            "qkv",
            qkv,
            self.heads * self.head_dim + width,
            "it is q | k | v",
        )?;
        expect_cols("kv_append", "cache", cache, width, "a cache row is k | v of one token")?;
        if slots.numel() != qkv.row_count() || !width.is_multiple_of(8) || !cache.is_contiguous() {
            return Err(Error::op(
                "kv_append",
                format!("{qkv:?}, slots {slots:?}, cache {cache:?}"),
            ));
        }
        kernels::kv_append(
            &*cx.device,
            row_packs(qkv.row_count(), width, qkv.dtype()),
            kernels::KvAppendArgs {
                cache: cache.out(),
                qkv,
                slots,
                rows: qkv.row_count() as i32,
                ld: qkv.stride() as i32,
                offset: (self.heads * self.head_dim) as i32,
                width: width as i32,
            },
        )
    }
}

impl Op for KvAppend {
    fn name(&self) -> &'static str {
        "kv_append"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        self.run(cx, x[0], x[1], x[2])?;
        Ok(Fwd { outputs: vec![x[1].clone()], saved: vec![] })
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let mut cache = x[1].clone();
        let first = self.heads * self.head_dim;
        for r in (0..x[0].row_count()).filter(|r| x[2].data[*r] >= 0.0) {
            cache.row_mut(x[2].index(r)).copy_from_slice(&x[0].row(r)[first..]);
        }
        vec![cache]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let moved = x[0].row_count() * 2 * self.kv_heads * self.head_dim * x[0].dtype().size();
        Cost { bytes: 2.0 * moved as f64, flops: 0.0 }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    oracle::cases(rng)
}

pub fn paged_cases(rng: &mut Rng) -> Vec<Case> {
    oracle::paged_cases(rng)
}

pub fn append_cases(rng: &mut Rng) -> Vec<Case> {
    oracle::append_cases(rng)
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    oracle::perf(rng, s)
}

pub fn paged_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    oracle::paged_perf(rng, s)
}

pub fn append_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    oracle::append_perf(rng, s)
}
