//! Ops: one file each here, one `.cu` in `kernels/`, one line in [`registry`]. Layer 4.
//!
//! Invariant: forward and backward are written together, with a naive f64 oracle. Tests, `temper
//! check`, benches and the docs are loops over the registry. Only ops call kernels.

pub mod activation;
pub mod adamw;
pub mod adamw8;
pub mod add;
pub mod attention;
pub mod cache;
pub mod case;
pub mod distill;
pub mod dropout;
pub mod embedding;
pub mod fastest;
mod few_hopper;
pub mod head;
mod head_hopper;
pub mod head_pass;
pub mod head_terms;
mod hopper_turns;
pub mod levels;
mod library;
pub mod linear_glu;
mod linear_glu_hopper;
pub mod logit_map;
pub mod lora;
mod lora_hopper;
pub mod lora_kernels;
pub mod matmul;
mod matmul_few;
mod matmul_hopper;
pub mod mlp;
pub mod muon;
pub mod norm_linear;
mod operands;
pub mod own;
pub mod policy;
pub mod preference;
mod prefetch;
pub mod prompt;
pub mod quant;
pub mod registry;
pub mod rmsnorm;
pub mod rope;
pub mod rope_append;
pub mod sample;
pub mod scale;
pub mod short_conv;
pub mod short_conv_paged;
pub mod tokens;

use crate::autograd::Cx;
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels;
use crate::tensor::Tensor;

/// Checks that `t` is a matrix (or batch of rows) with `cols` columns.
pub(crate) fn expect_cols(
    op: &'static str,
    what: &str,
    t: &Tensor,
    cols: usize,
    hint: &str,
) -> Result<()> {
    if t.cols() == cols {
        return Ok(());
    }
    Err(Error::op(op, format!("{what} has {} columns, expected {cols}; {hint}", t.cols())))
}

/// Checks that each of `others` has as many values as `x`.
pub(crate) fn same_length<'a>(
    op: &'static str,
    x: &Tensor,
    others: impl IntoIterator<Item = &'a Tensor>,
) -> Result<()> {
    match others.into_iter().find(|t| t.numel() != x.numel()) {
        Some(t) => Err(Error::op(op, format!("{t:?} has not one value for each of {x:?}"))),
        None => Ok(()),
    }
}

/// One thread per 16 bytes of each row.
pub(crate) fn row_packs(rows: usize, cols: usize, dtype: DType) -> Launch {
    Launch::flat(rows * cols.div_ceil(kernels::pack_width(dtype.size())))
}

/// Warps that cover the columns of `n` rows (or of runs of rows), for a `KERNEL_WARP` that takes
/// [`kernels::warp_columns`] at once.
pub(crate) fn column_warps(n: usize, cols: usize, dtype: DType) -> Launch {
    Launch::warps(n * cols.div_ceil(kernels::warp_columns(dtype.size())))
}

/// A sum over rows in stages, in a fixed order: a kernel of the op, launched as `first`, writes
/// `partial`; [`RowSums::finish`] adds up its rows.
pub(crate) struct RowSums {
    /// F32, one row per chunk of rows.
    pub partial: Tensor,
    pub first: Launch,
}

/// Chunks that one thread adds up, if there are more than `ONE_STAGE`.
const STAGE: usize = 32;
const ONE_STAGE: usize = 64;

impl RowSums {
    /// For `rows` rows of `cols` columns of `dtype`, in chunks of `SUM_ROWS`.
    pub fn new(cx: &Cx, rows: usize, cols: usize, dtype: DType) -> Result<RowSums> {
        RowSums::chunks(cx, rows.div_ceil(kernels::SUM_ROWS).max(1), cols, dtype)
    }

    /// The same for a given number of chunks.
    pub fn chunks(cx: &Cx, chunks: usize, cols: usize, dtype: DType) -> Result<RowSums> {
        let partial = cx.scratch("partial sums", DType::F32, &[chunks, cols])?;
        Ok(RowSums { partial, first: column_warps(chunks, cols, dtype) })
    }

    /// `out (+)=` the sum, F32 [cols].
    pub fn finish(&self, cx: &Cx, out: &Tensor, accumulate: bool) -> Result<()> {
        let (mut chunks, cols) = (self.partial.row_count(), self.partial.cols());
        let mut partial = self.partial.clone();
        while chunks > ONE_STAGE {
            let fewer = chunks.div_ceil(STAGE);
            let sums = cx.scratch("partial sums", DType::F32, &[fewer, cols])?;
            add_chunks(cx, &sums, &partial, STAGE, false)?;
            (partial, chunks) = (sums, fewer);
        }
        add_chunks(cx, out, &partial, chunks, accumulate)
    }
}

/// `out[g] (+)=` the sum of group `g` of the rows of `partial`; a group has `group` rows.
fn add_chunks(
    cx: &Cx,
    out: &Tensor,
    partial: &Tensor,
    group: usize,
    accumulate: bool,
) -> Result<()> {
    let (chunks, cols) = (partial.row_count(), partial.cols());
    let args = kernels::SumPartialsArgs {
        out: out.out(),
        partial,
        chunks: chunks as i32,
        cols: cols as i32,
        group: group as i32,
        accumulate: i32::from(accumulate),
    };
    let mut at = Launch::flat(cols);
    at.grid[1] = chunks.div_ceil(group) as u32;
    kernels::sum_partials(&*cx.device, at, args)
}
