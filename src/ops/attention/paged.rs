//! Attention over a paged KV cache. Layer 4.
//!
//! Invariant: a row has the bits of the packed form, wherever its pages are in memory.

use super::rows::PagedRows;
use super::shape::{AttnShape, PAGE};
use super::{launch, oracle};
use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::error::{Error, Result};
use crate::ops::expect_cols;
use crate::tensor::Tensor;

/// [`attention`](super::attention) with the keys and values (including the rows' own) read from
/// `cache` [pages * 64, 2 K D] real: row `r` is at position `positions[r]` of the sequence whose pages are
/// row `sequences[r]` of `page_table`. A row of sequence -1 is padding and gives 0. Writes nothing
/// to the cache: `slots` are not used. The bits are those of [`attention`](super::attention).
pub fn attention_paged(
    cx: &mut Cx,
    qkv: &Tensor,
    cache: &Tensor,
    rows: PagedRows,
    shape: AttnShape,
) -> Result<Tensor> {
    let inputs = [qkv, cache, rows.page_table, rows.sequences, rows.positions];
    AttentionPaged { shape }.run(cx, &inputs)
}

#[derive(Debug)]
pub struct AttentionPaged {
    pub shape: AttnShape,
}

impl AttentionPaged {
    fn run(&self, cx: &Cx, x: &[&Tensor]) -> Result<Tensor> {
        let (qkv, cache, sequence, position) = (x[0], x[1], x[3], x[4]);
        let (n, shape) = (self.shape.numbers("attention_paged", qkv)?, &self.shape);
        let hint = "a cache row is k | v of one token";
        expect_cols("attention_paged", "cache", cache, 2 * shape.kv_heads * shape.head_dim, hint)?;
        let rows = qkv.row_count();
        if sequence.numel() != rows || position.numel() != rows || !cache.is_contiguous() {
            let message = format!("{qkv:?}, sequences {sequence:?}, positions {position:?}");
            return Err(Error::op("attention_paged", message));
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

    /// The cost with full page tables: only the device knows how long the sequences are.
    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (rows, width) = (x[0].row_count(), self.shape.heads * self.shape.head_dim);
        let row = 2 * self.shape.kv_heads * self.shape.head_dim * x[1].dtype().size();
        let bytes = x[0].bytes() + rows * width * x[0].dtype().size() + x[2].numel() * PAGE * row;
        Cost { bytes: bytes as f64, flops: 4.0 * (rows * width * x[2].cols() * PAGE) as f64 }
    }
}
