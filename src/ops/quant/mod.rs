//! Weights in 4 and 8 bits, in bitsandbytes' format: code books, [`QuantWeight`], and the linear
//! layer over one. Layer 4.
//!
//! Invariant: codes, scales and dequantised values have the bits of bitsandbytes' reference
//! (`tests/fixtures/quant.json`). Math, numerics and sources: `kernels/quant.cu`.

mod linear;
mod oracle;
mod stored;
mod weight;

use crate::autograd::Cx;
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels;
use crate::tensor::Tensor;

pub use linear::{QuantLinear, cases as linear_cases, perf as linear_perf, quant_linear};
pub(crate) use oracle::{blockwise_oracle, values_of};
pub use oracle::{cases, perf};
pub use weight::{QuantWeight, Scales, Scheme, Segment};

/// Values per NF4 scale; scales per scale in double quantisation, and 8-bit moments per scale.
pub const BLOCK4: usize = kernels::NF4_BLOCK;
pub const BLOCK8: usize = kernels::CODE8_BLOCK;

/// The NF4 map: quantiles of a normal distribution, with an exact zero (Dettmers et al., "QLoRA",
/// appendix E).
pub const NF4: [f32; kernels::NF4_MAP] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The dynamic 8-bit map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016):
/// 256 sorted values. The further a power of ten is from 1, the fewer bits are left for its values.
/// With negative values if `signed`.
pub fn dynamic_map(signed: bool) -> Vec<f32> {
    let mut map = vec![0.0, 1.0];
    for i in 0..7 {
        let steps = if signed { 1usize << i } else { 2 << i };
        // Evenly spaced from 0.1 to 1, computed from both ends to the middle as in torch.linspace.
        let step = (1.0 - 0.1f32) / steps as f32;
        let boundary = |j: usize| {
            let half = steps.div_ceil(2);
            if j < half {
                step.mul_add(j as f32, 0.1)
            } else {
                (-step).mul_add((steps - j) as f32, 1.0)
            }
        };
        let factor = 10f64.powi(i - 6) as f32;
        for j in 0..steps {
            let value = factor * ((boundary(j) + boundary(j + 1)) / 2.0);
            map.push(value);
            if signed {
                map.push(-value);
            }
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// A dynamic map on the device.
pub fn dynamic_map_tensor(cx: &Cx, signed: bool) -> Result<Tensor> {
    Tensor::from_host(
        &cx.pool,
        "8-bit map",
        DType::F32,
        &[kernels::CODE8_MAP],
        &dynamic_map(signed),
    )
}

/// Quantises `x` (flat, F32), minus `offset` if given, in blocks of 256 by `map`. Returns (codes,
/// absmax).
pub fn blockwise8_quantise(
    cx: &Cx,
    x: &Tensor,
    offset: Option<&Tensor>,
    map: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (n, blocks) = (x.numel(), x.numel().div_ceil(BLOCK8));
    let codes = Tensor::new(&cx.pool, "8-bit codes", DType::U8, &[n])?;
    let absmax = cx.float("8-bit scales", &[blocks])?;
    let args = kernels::Blockwise8QuantiseArgs {
        codes: codes.out(),
        absmax: absmax.out(),
        x,
        offset,
        map,
        n: n as i64,
    };
    kernels::blockwise8_quantise(&*cx.device, Launch::flat(blocks), args)?;
    Ok((codes, absmax))
}

/// The float values of blockwise 8-bit codes.
pub fn blockwise8_dequantise(
    cx: &Cx,
    codes: &Tensor,
    absmax: &Tensor,
    map: &Tensor,
) -> Result<Tensor> {
    let n = codes.numel();
    if absmax.numel() != n.div_ceil(BLOCK8) {
        let message = format!("{codes:?} needs {} scales, not {absmax:?}", n.div_ceil(BLOCK8));
        return Err(Error::op("blockwise8", message));
    }
    let y = cx.float("8-bit values", &[n])?;
    let args = kernels::Blockwise8DequantiseArgs { y: y.out(), codes, absmax, map, n: n as i64 };
    kernels::blockwise8_dequantise(&*cx.device, Launch::flat(n), args)?;
    Ok(y)
}
