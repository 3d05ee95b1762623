//! Ops: one file each here, one `.cu` in `kernels/`, one line in [`registry`]. Layer 4.
//!
//! Invariant: forward and backward are born together, with a naive f64 oracle. Tests, `temper
//! check`, benches and the docs are loops over the registry. Ops are the only callers of kernels.

pub mod activation;
pub mod adamw;
pub mod adamw8;
pub mod add;
pub mod attention;
pub mod case;
pub mod distill;
pub mod dropout;
pub mod embedding;
pub mod head;
pub mod lora;
pub mod lora_kernels;
pub mod matmul;
pub mod policy;
pub mod preference;
pub mod prompt;
pub mod quant;
pub mod registry;
pub mod rmsnorm;
pub mod rope;
pub mod sample;
pub mod scale;

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
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

/// First-stage buffer of a two-stage sum over rows: one partial row for each 64 rows.
pub(crate) fn partials(cx: &Cx, rows: usize, cols: usize) -> Result<Tensor> {
    cx.scratch("partial sums", DType::F32, &[rows.div_ceil(64).max(1), cols])
}
