//! The rows of a step over the paged cache. Layer 4.
//!
//! Invariant: what a row reads and writes is data on the device, so a recorded step can be replayed.

use super::shape::AttnShape;
use crate::error::{Error, Result};
use crate::ops::expect_cols;
use crate::tensor::Tensor;

/// Where the rows of a step stand.
#[derive(Clone, Copy)]
pub struct PagedRows<'a> {
    /// I32 `[n]`: the cache row of each; -1: nowhere.
    pub slots: &'a Tensor,
    /// I32 [sequences, max pages]
    pub page_table: &'a Tensor,
    /// I32 `[n]`: the row of the page table; -1: padding.
    pub sequences: &'a Tensor,
    /// I32 `[n]`: the position in its sequence.
    pub positions: &'a Tensor,
}

impl PagedRows<'_> {
    /// Checks the arrays and the cache for the rows of `qkv`.
    pub(super) fn check(
        &self,
        op: &'static str,
        qkv: &Tensor,
        cache: &Tensor,
        shape: &AttnShape,
    ) -> Result<()> {
        let hint = "a cache row is k | v of one token";
        expect_cols(op, "cache", cache, 2 * shape.kv_heads * shape.head_dim, hint)?;
        let (rows, of_row) = (qkv.row_count(), [self.slots, self.sequences, self.positions]);
        if of_row.iter().any(|t| t.numel() != rows) || !cache.is_contiguous() {
            let message = format!(
                "{qkv:?}, sequences {:?}, positions {:?}, slots {:?}",
                self.sequences, self.positions, self.slots
            );
            return Err(Error::op(op, message));
        }
        Ok(())
    }
}
