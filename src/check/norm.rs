//! The self-check of a norm in front of a product of few rows on Hopper: one kernel against two. Layer
//! 8.
//!
//! Invariant: the kernel runs here whether or not a decoding step would choose it. The cases of the op
//! run what is faster.

use std::sync::Arc;

use super::{CheckOutcome, check_hopper};
use crate::autograd::Cx;
use crate::config::MatmulChoice;
use crate::device::{DType, Device};
use crate::error::Result;
use crate::ops::activation::{Act, Glu};
use crate::ops::case::Rng;
use crate::ops::fastest::median;
use crate::ops::matmul::linear;
use crate::ops::mlp::DenseLayer;
use crate::ops::norm_linear::fused;
use crate::ops::rmsnorm::{Norm, NormInput};
use crate::tensor::Tensor;

/// Hidden size and columns of q|k|v and of gate|up: 0.5B, 0.6B and 1.5B models.
const SIZES: [[usize; 3]; 3] = [[896, 1152, 9728], [1024, 4096, 6144], [1536, 2048, 17_920]];
const ROWS: [usize; 3] = [1, 3, 8];
/// Timed runs, after one that is not timed.
const RUNS: usize = 5;

/// On a device with the Hopper kernels, compares results bit for bit. The name of the case has the
/// times.
pub fn check_norm(device: &Arc<dyn Device>, each: impl FnMut(&CheckOutcome)) -> Vec<CheckOutcome> {
    let layers = |[k, qkv, gate_up]: [usize; 3]| [(qkv, k, None), (gate_up, k, Some(Act::Silu))];
    let sizes = SIZES.into_iter().flat_map(layers);
    let cases = sizes.flat_map(|layer| ROWS.map(|m| (m, layer)));
    let one = |(m, (n, k, act))| compare(device, [m, n, k], act);
    check_hopper(device, "norm in front", cases, one, each)
}

/// The name of the case, and what differs.
pub fn compare(
    device: &Arc<dyn Device>,
    [m, n, k]: [usize; 3],
    act: Option<Act>,
) -> Result<(String, Vec<String>)> {
    let mut cx = Cx::new(device.clone(), DType::BF16)?;
    cx.matmul = MatmulChoice::Own;
    let mut rng = Rng(29);
    let mut tensor = |shape: &[usize], scale: f64| {
        let values: Vec<f32> = (0..shape.iter().product::<usize>().min(65_537))
            .map(|_| (scale * rng.normal()) as f32)
            .collect();
        let count = shape.iter().product();
        let all: Vec<f32> = values.iter().copied().cycle().take(count).collect();
        Tensor::from_f32(&cx.pool, "norm in front", DType::BF16, shape, &all)
    };
    let (x, residual, weight) = (tensor(&[m, k], 1.0)?, tensor(&[m, k], 1.0)?, tensor(&[k], 1.0)?);
    let (w, bias) = (tensor(&[n, k], (k as f64).powf(-0.5))?, tensor(&[n], 0.5)?);
    let input =
        NormInput { x: &x, residual: Some(&residual), weight: &weight, norm: Norm::new(1e-6) };
    let layer = DenseLayer { weight: &w, bias: Some(&bias) };
    let y = cx.real("y", &[m, if act.is_some() { n / 2 } else { n }])?;
    let sum = cx.real("sum", x.shape())?;
    let mut times = [Vec::new(), Vec::new()];
    let mut apart = None;
    for _ in 0..=RUNS {
        let start = cx.device.mark()?;
        let (rows, s) = input.rows(&mut cx)?;
        let mut out = linear(&mut cx, &rows, &w, Some(&bias))?;
        if let Some(act) = act {
            out = cx.apply1(Glu { act }, &[&out])?;
        }
        times[0].push(1000.0 * cx.device.elapsed_ms(start, cx.device.mark()?)?);
        let start = cx.device.mark()?;
        fused(&cx, &y, Some(&sum), input, layer, act)?;
        times[1].push(1000.0 * cx.device.elapsed_ms(start, cx.device.mark()?)?);
        apart = Some((out, s));
    }
    let mut differ = Vec::new();
    if let Some((out, s)) = apart {
        for (name, one, other) in [("result", &y, &out), ("sum", &sum, &s)] {
            if one.to_bytes()? != other.to_bytes()? {
                differ.push(name.to_string());
            }
        }
    }
    let [before, time] = times.each_ref().map(|times| median(&times[1..]).unwrap_or_default());
    let gate = if act.is_some() { ", gated" } else { "" };
    let case = format!("rows {m} n {n} k {k}{gate}: {time:.1} us, apart {before:.1}");
    Ok((case, differ))
}
