//! The map from the products with the head to logits. Layer 4.
//!
//! Invariant: the trainer's head, distillation and the sampler apply it with one kernel, so their
//! logits have the same bits. Math: `kernels/head.cu`.

use crate::autograd::Cx;
use crate::device::Launch;
use crate::error::Result;
use crate::kernels;
use crate::tensor::Tensor;

/// A family's map from the products with the head to logits: `l = z / divisor`, then `c tanh(l /
/// c)` with a softcap c.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitMap {
    pub divisor: f32,
    pub softcap: Option<f32>,
}

impl LogitMap {
    pub const PLAIN: LogitMap = LogitMap { divisor: 1.0, softcap: None };

    /// Maps F32 products in place. The trainer's head, distillation and the sampler all call this,
    /// so their logits have the same bits.
    pub(super) fn apply(self, cx: &Cx, logits: &Tensor) -> Result<()> {
        if self == LogitMap::PLAIN {
            return Ok(());
        }
        let args = kernels::MapLogitsArgs {
            logits: logits.out(),
            n: logits.numel() as i64,
            divisor: self.divisor,
            softcap: self.cap(),
        };
        // The logits are float whatever the storage dtype, so the packs are float's too.
        let packs = logits.numel().div_ceil(kernels::pack_width(logits.dtype().size()));
        kernels::map_logits(&*cx.device, Launch::flat(packs), args)
    }

    /// d l / d z for logits that are then multiplied by `scale`, without the softcap's factor.
    pub(super) fn slope(self, scale: f32) -> f32 {
        scale / self.divisor
    }

    /// The softcap as kernels take it: 0 means none.
    pub(super) fn cap(self) -> f32 {
        self.softcap.unwrap_or(0.0)
    }

    pub(super) fn oracle(self, z: f64) -> f64 {
        let l = z / f64::from(self.divisor);
        self.softcap.map_or(l, |c| f64::from(c) * (l / f64::from(c)).tanh())
    }
}
