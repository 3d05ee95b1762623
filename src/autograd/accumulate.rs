//! Adds one gradient to the buffer of another. These are the only kernels that the tape launches
//! itself. Layer 3.
//!
//! Invariant: parameter gradients are f32 for every storage dtype; a sum is rounded once, when it
//! is stored.

use super::context::Cx;
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels;
use crate::tensor::Tensor;

/// `slot = grad`, or `slot += grad` with `accumulate`. Both have one dtype, or `slot` is F32 and
/// `grad` is BF16. Error: any other pair of dtypes.
pub fn add_into(cx: &Cx, slot: &Tensor, grad: &Tensor, accumulate: bool) -> Result<()> {
    let n = slot.numel() as i64;
    let acc = i32::from(accumulate);
    if slot.dtype() == grad.dtype() {
        return kernels::axpy(
            &*cx.device,
            flat(slot),
            kernels::AxpyArgs { y: slot.out(), x: grad, scale: 1.0, n, accumulate: acc },
        );
    }
    if slot.dtype() == DType::F32 {
        return kernels::to_float_copy(
            &*cx.device,
            flat(grad),
            kernels::ToFloatCopyArgs { y: slot.out(), x: grad, n, accumulate: acc },
        );
    }
    Err(Error::op("add_into", format!("{grad:?} into {slot:?}")))
}

/// One thread for each 16 bytes of `t`.
pub fn flat(t: &Tensor) -> Launch {
    Launch::flat(t.numel().div_ceil(kernels::pack_width(t.dtype().size())))
}
