//! Heads and scores of an attention layer. Layer 4.
//!
//! Invariant: what training, prefill and decoding share is defined once, here.

use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::expect_cols;
use crate::tensor::Tensor;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttnShape {
    pub heads: usize,
    /// Each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Factor of q.k, usually `head_dim^-0.5`.
    pub scale: f32,
    /// `s = c tanh(s / c)` before the softmax.
    pub softcap: Option<f32>,
    /// A query at position p sees positions `p - w + 1 ..= p`.
    pub window: Option<usize>,
}

/// Positions in one KV block and rows in one page of the cache.
pub const PAGE: usize = kernels::PAGE;

/// A shape as kernels take it: softcap 0 means none, window i32::MAX means none.
pub(super) struct Numbers {
    pub d: usize,
    pub heads: i32,
    pub kv_heads: i32,
    pub scale: f32,
    pub softcap: f32,
    pub window: i32,
}

impl AttnShape {
    /// The head sizes that have kernels.
    pub const HEAD_DIMS: [usize; 7] = kernels::ATTENTION_FWD_D;

    pub(super) fn numbers(&self, op: &'static str, qkv: &Tensor) -> Result<Numbers> {
        let (h, k, d) = (self.heads, self.kv_heads, self.head_dim);
        if !Self::HEAD_DIMS.contains(&d) {
            let message = format!("no kernel for head_dim {d}; supported: {:?}", Self::HEAD_DIMS);
            return Err(Error::op(op, message));
        }
        if k == 0 || h == 0 || h % k != 0 {
            let message = format!("{h} heads do not divide among {k} key-value heads");
            return Err(Error::op(op, message));
        }
        let hint = "it is q | k | v of num_attention_heads and num_key_value_heads";
        expect_cols(op, "qkv", qkv, (h + 2 * k) * d, hint)?;
        if self.window == Some(0) {
            return Err(Error::op(
                op,
                "a window of 0 attends to nothing; leave it out to attend to all positions",
            ));
        }
        if self.scale.is_nan() || self.scale <= 0.0 {
            let message = format!("a scale of {}; it must be positive", self.scale);
            return Err(Error::op(op, message));
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
