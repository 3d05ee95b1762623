//! The self-check of a gated MLP on Hopper: one op, whose activation is computed inside the
//! products, against three. Layer 8.
//!
//! Invariant: the sizes are those of models, for which a block has many tiles; the cases of the ops
//! are small.

use std::sync::Arc;

use super::{CheckOutcome, check_hopper};
use crate::autograd::{Cx, ParamGrads, Recompute, Tape};
use crate::config::MatmulChoice;
use crate::device::{DType, Device};
use crate::error::Result;
use crate::ops::activation::{Act, glu};
use crate::ops::case::Rng;
use crate::ops::fastest::median;
use crate::ops::matmul::linear;
use crate::ops::mlp::{DenseLayer, mlp};
use crate::tensor::{Id, ParamSetId, Tensor};

/// Rows, hidden size and columns of the gated unit: 0.5B, 0.6B and 1.5B models.
const SIZES: [[usize; 3]; 3] = [[16_384, 896, 4864], [4_000, 1024, 3072], [8_192, 1536, 8960]];
/// Timed runs, after one that is not timed.
const RUNS: usize = 3;

/// On a device with the Hopper kernels, compares results and gradients bit for bit. The name of the
/// case has the times.
pub fn check_gated(device: &Arc<dyn Device>, each: impl FnMut(&CheckOutcome)) -> Vec<CheckOutcome> {
    let both = |sizes| [Recompute::Off, Recompute::Light].map(|recompute| (sizes, recompute));
    let cases = SIZES.into_iter().flat_map(both);
    check_hopper(device, "gated unit", cases, |(sizes, how)| compare(device, sizes, how), each)
}

/// The name of the case, and what differs.
pub fn compare(
    device: &Arc<dyn Device>,
    sizes: [usize; 3],
    recompute: Recompute,
) -> Result<(String, Vec<String>)> {
    let mut unit = Unit::new(device, sizes, recompute)?;
    let (apart, apart_times) = unit.run(false)?;
    let (fused, times) = unit.run(true)?;
    let names = ["result", "gradient of gate_up", "gradient of down"];
    let differ = (0..3).filter(|i| apart[*i] != fused[*i]).map(|i| names[i].into()).collect();
    let [m, k, f] = sizes;
    let mut case = format!("rows {m} hidden {k} f {f}, recompute {}", recompute.word());
    for (name, (time, before)) in
        ["forward", "backward"].into_iter().zip(times.into_iter().zip(apart_times))
    {
        case += &format!("; {name} {time:.0} us, by three ops {before:.0}");
    }
    Ok((case, differ))
}

/// An MLP with its operands.
struct Unit {
    cx: Cx,
    x: Tensor,
    dy: Tensor,
    /// Of gate_up and of down.
    weights: [Tensor; 2],
}

impl Unit {
    fn new(device: &Arc<dyn Device>, [m, k, f]: [usize; 3], recompute: Recompute) -> Result<Unit> {
        let mut cx = Cx::new(device.clone(), DType::BF16)?;
        (cx.matmul, cx.recompute) = (MatmulChoice::Own, recompute);
        let mut rng = Rng(23);
        let values: Vec<f32> = (0..65_537).map(|_| rng.normal() as f32).collect();
        let tensor = |rows: usize, cols: usize, scale: f32| {
            let some: Vec<f32> =
                values.iter().map(|v| scale * v).cycle().take(rows * cols).collect();
            Tensor::from_f32(&cx.pool, "gated unit", DType::BF16, &[rows, cols], &some)
        };
        let (x, dy) = (tensor(m, k, 1.0)?, tensor(m, k, 0.5)?);
        let scale = |n: usize| (n as f32).powf(-0.5);
        let weights = [tensor(2 * f, k, scale(k))?, tensor(k, f, scale(f))?];
        let slots = weights.iter().map(|w| cx.float("gradient", w.shape()).map(Some));
        let slots: Result<Vec<Option<Tensor>>> = slots.collect();
        cx.param_grads[ParamSetId::Model] = ParamGrads::new(slots?);
        let id = |index| Id::Param { set: ParamSetId::Model, index };
        let [w, down] = weights;
        Ok(Unit { cx, x, dy, weights: [w.with_id(id(0)), down.with_id(id(1))] })
    }

    /// The bytes of the result and of both gradients, and the median times of forward and backward
    /// in microseconds.
    fn run(&mut self, one_op: bool) -> Result<([Vec<u8>; 3], [f32; 2])> {
        let Unit { cx, x, dy, weights: [w, down] } = self;
        let mut times = [Vec::new(), Vec::new()];
        let mut y: Option<Tensor> = None;
        for _ in 0..=RUNS {
            drop(y.take());
            cx.tape = Some(Tape::default());
            cx.param_grads[ParamSetId::Model].reset();
            let start = cx.device.mark()?;
            let out = match one_op {
                true => {
                    let layer = |weight| DenseLayer { weight, bias: None };
                    mlp(cx, x, layer(w), layer(down), Act::Silu)?
                }
                false => {
                    let gate_up = linear(cx, x, w, None)?;
                    let gated = glu(cx, &gate_up, Act::Silu)?;
                    linear(cx, &gated, down, None)?
                }
            };
            let middle = [cx.device.mark()?, cx.device.mark()?];
            cx.backward(vec![(out.clone(), dy.clone())])?;
            let end = cx.device.mark()?;
            let [forward_end, backward_start] = middle;
            let intervals = [(start, forward_end), (backward_start, end)];
            for (times, (from, to)) in times.iter_mut().zip(intervals) {
                times.push(1000.0 * cx.device.elapsed_ms(from, to)?);
            }
            y = Some(out);
        }
        let mut bytes = [Vec::new(), Vec::new(), Vec::new()];
        let gradients = cx.param_grads[ParamSetId::Model].slots.iter().flatten();
        for (bytes, t) in bytes.iter_mut().zip(y.iter().chain(gradients)) {
            *bytes = t.to_bytes()?;
        }
        Ok((bytes, times.each_ref().map(|times| median(&times[1..]).unwrap_or_default())))
    }
}
