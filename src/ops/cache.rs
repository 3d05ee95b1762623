//! Copies inside the paged cache of keys and values. Layer 4.
//!
//! Invariant: copies are exact. Math: `kernels/cache.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::row_packs;
use crate::tensor::Tensor;

/// In every layer of `cache` [layers * slots, width] real, copies `rows` rows from `from` on to the
/// rows from `to` on. The two ranges do not overlap.
#[derive(Clone, Copy, Debug)]
pub struct CopyCached {
    pub layers: usize,
    pub from: usize,
    pub to: usize,
    pub rows: usize,
}

impl CopyCached {
    pub fn run(&self, device: &dyn Device, cache: &Tensor) -> Result<()> {
        let (slots, width) = (cache.row_count() / self.layers, cache.cols());
        let apart = self.from.abs_diff(self.to) >= self.rows;
        if !apart || self.from.max(self.to) + self.rows > slots || !cache.is_contiguous() {
            return Err(Error::op("copy_cached", format!("{self:?} in {cache:?}")));
        }
        let args = kernels::CopyCachedArgs {
            cache: cache.out(),
            from: self.from as i32,
            to: self.to as i32,
            rows: self.rows as i32,
            slots: slots as i32,
            width: width as i32,
            layers: self.layers as i32,
        };
        kernels::copy_cached(device, row_packs(self.layers * self.rows, width, cache.dtype()), args)
    }
}

impl Op for CopyCached {
    fn name(&self) -> &'static str {
        "copy_cached"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        self.run(&*cx.device, x[0])?;
        Ok(Fwd { outputs: vec![x[0].clone()], saved: vec![] })
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let mut cache = x[0].clone();
        let slots = cache.row_count() / self.layers;
        for layer in 0..self.layers {
            for row in layer * slots..layer * slots + self.rows {
                cache.row_mut(self.to + row).copy_from_slice(x[0].row(self.from + row));
            }
        }
        vec![cache]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let bytes = 2 * self.layers * self.rows * x[0].cols() * x[0].dtype().size();
        Cost { bytes: bytes as f64, flops: 0.0 }
    }
}

fn case(rng: &mut Rng, op: CopyCached, slots: usize, width: usize) -> Case {
    let cache = Arg::real(rng.array(&[op.layers * slots, width], 1.0)).no_grad();
    let label = format!("{} rows of {} layers, width {width}", op.rows, op.layers);
    Case { exact: true, ..Case::new(label, op, vec![cache]) }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let op = |layers, from, to, rows| CopyCached { layers, from, to, rows };
    vec![case(rng, op(3, 64, 0, 63), 128, 32), case(rng, op(2, 5, 8, 3), 11, 12)]
}

/// A shared page of 24 layers.
pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let op = CopyCached { layers: 24, from: 0, to: 64, rows: 63 };
    vec![case(rng, op, 128, 2 * s.kv_heads * s.head_dim)]
}
