//! The operands of a matrix product. Layer 4.
//!
//! Invariant: tensors are borrowed, so their memory is live.

use crate::device::Layout;
use crate::tensor::Tensor;

/// `c = op(a) op(b) (+ bias)`, or `c += ...`, with matching sizes.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub layout: Layout,
    pub c: &'a Tensor,
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    pub accumulate: bool,
}

/// Low-rank terms of a product: for each segment of the columns of c, t_i b_i^T with its columns of
/// t and its b.
#[derive(Clone, Copy)]
pub(super) struct LowRank<'a> {
    pub t: &'a Tensor,
    pub b: [Option<&'a Tensor>; 3],
    pub bounds: Bounds,
}

/// Start, end and rank of three segments; absent ones are empty.
pub(super) type Bounds = [[i32; 3]; 3];

impl Operands<'_> {
    /// (m, n, k)
    pub fn sizes(&self) -> (usize, usize, usize) {
        let (m, k) = (self.a.row_count(), self.a.cols());
        let n = if self.layout == Layout::NT { self.b.row_count() } else { self.b.cols() };
        if self.layout == Layout::TN { (k, n, m) } else { (m, n, k) }
    }
}
