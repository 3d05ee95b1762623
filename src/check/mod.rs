//! The self-check: runs every registered op case on a device and compares it with its f64 oracle.
//! Layer 8.
//!
//! Invariant: `temper check`, the tests and CI run this same code on any device.
//!
//! Tolerances, and why. Forward, bf16: FlashAttention's rule: the error against the f64 oracle is
//! at most twice that of the naive peer (the same oracle, rounded to bf16 wherever the kernel
//! stores), plus one bf16 rounding of the largest value. Forward, f32: relative L2 error at most
//! 2e-6. Gradients, f32: relative L2 distance from f64 central differences at most 1e-5; bf16: 2 x
//! roundings x 2^-9, where `roundings` counts the bf16 stores on the longest path.

pub mod early;
pub mod gated;
pub mod head;
pub mod low_rank;
pub mod model;
pub mod norm;
pub mod products;

use std::sync::Arc;

use rayon::prelude::*;

use crate::autograd::{Cx, F64, ParamGrads, Round, Tape};
use crate::device::{DType, Device};
use crate::error::{Error, Result};
use crate::ops::case::{Arg, Case, Kind, Rng, Variant};
use crate::ops::levels;
use crate::ops::registry::registry;
use crate::tensor::{Id, ParamSetId, Tensor};

/// The result of one case of one op.
pub struct CheckOutcome {
    pub op: &'static str,
    pub case: String,
    pub dtype: DType,
    pub variant: &'static str,
    /// The largest quotient of error and tolerance over all outputs and gradients; at most 1
    /// passes.
    pub ratio: f64,
    /// None: passed.
    pub failure: Option<String>,
    /// Whether the name of the case contains measurements: times, or the fastest kernels.
    pub measured: bool,
}

impl CheckOutcome {
    /// Of a check without a tolerance.
    fn new(op: &'static str, case: String, dtype: DType, failure: Option<String>) -> CheckOutcome {
        let ratio = if failure.is_some() { f64::INFINITY } else { 0.0 };
        CheckOutcome { op, case, dtype, variant: "", ratio, failure, measured: false }
    }

    /// Of a comparison bit for bit: `differ` says what has other bits, if anything.
    fn of_bits(op: &'static str, case: String, dtype: DType, differ: &[String]) -> CheckOutcome {
        let failure = (!differ.is_empty()).then(|| format!("other bits: {}", differ.join(", ")));
        CheckOutcome::new(op, case, dtype, failure)
    }

    /// Of a comparison that also measures. `compared`: the name of the case, and what differs. An
    /// error is a failure of this case, and the others still run.
    fn of_measured(
        op: &'static str,
        dtype: DType,
        compared: Result<(String, Vec<String>)>,
    ) -> CheckOutcome {
        match compared {
            Ok((case, differ)) => {
                CheckOutcome { measured: true, ..CheckOutcome::of_bits(op, case, dtype, &differ) }
            }
            Err(e) => CheckOutcome::new(op, "error".into(), dtype, Some(e.to_string())),
        }
    }
}

/// On a device with the Hopper kernels, compares bit for bit in each case. `compare` returns the name
/// of the case, which has the times, and what differs.
fn check_hopper<T>(
    device: &Arc<dyn Device>,
    op: &'static str,
    cases: impl IntoIterator<Item = T>,
    mut compare: impl FnMut(T) -> Result<(String, Vec<String>)>,
    mut each: impl FnMut(&CheckOutcome),
) -> Vec<CheckOutcome> {
    let mut all = Vec::new();
    if !device.capabilities().wgmma {
        return all;
    }
    for case in cases {
        let outcome = CheckOutcome::of_measured(op, DType::BF16, compare(case));
        each(&outcome);
        all.push(outcome);
    }
    all
}

/// Runs every case of every registered op and level whose name contains `filter`.
pub fn check_ops(
    device: &Arc<dyn Device>,
    filter: &str,
    mut each: impl FnMut(&CheckOutcome),
) -> Vec<CheckOutcome> {
    let mut all = Vec::new();
    let entries = registry().into_iter().chain(levels::entries());
    for entry in entries.filter(|e| e.name.contains(filter)) {
        for variant in entry.variants.iter().filter(|v| v.runs_on(&**device)) {
            for &dtype in variant.dtypes {
                let mut rng = Rng(0x7e57);
                for (i, case) in (entry.cases)(&mut rng).iter().enumerate() {
                    let seed = 1000 + i as u64;
                    let mut outcome = check_case(device, case, dtype, variant, seed);
                    outcome.op = entry.name;
                    each(&outcome);
                    all.push(outcome);
                }
            }
        }
    }
    all
}

#[derive(Default)]
struct Measured {
    ratio: f64,
    failure: Option<String>,
}

impl Measured {
    fn add(&mut self, what: String, error: f64, tolerance: f64) {
        let ratio = if error.is_finite() { error / tolerance } else { f64::INFINITY };
        self.ratio = self.ratio.max(ratio);
        if ratio > 1.0 && self.failure.is_none() {
            self.failure = Some(format!("{what}: error {error:.3e}, tolerance {tolerance:.3e}"));
        }
    }
}

/// The outputs and gradients of one case on a device.
pub struct CaseRun {
    pub outputs: Vec<Vec<f64>>,
    /// By input. None: the case does not check this gradient.
    pub gradients: Vec<Option<Vec<f64>>>,
    /// The gradients of the outputs, rounded as on the device.
    upstream: Vec<F64>,
}

/// A context with the variant's choices, and the inputs of the case on the device.
pub fn prepare_case(
    device: &Arc<dyn Device>,
    case: &Case,
    dtype: DType,
    variant: &Variant,
) -> Result<(Cx, Vec<Tensor>)> {
    let mut cx = Cx::new(device.clone(), dtype)?;
    (cx.matmul, cx.attention) = (variant.matmul, variant.attention);
    cx.set_rng(7, 3, 0)?;
    let tensors = upload(&mut cx, case, dtype)?;
    Ok((cx, tensors))
}

/// Runs a case forward and, if an input needs a gradient, backward from random gradients of the
/// outputs.
pub fn run_case(
    device: &Arc<dyn Device>,
    case: &Case,
    dtype: DType,
    variant: &Variant,
    seed: u64,
) -> Result<CaseRun> {
    let (mut cx, tensors) = prepare_case(device, case, dtype, variant)?;
    let refs: Vec<&Tensor> = tensors.iter().collect();
    cx.tape = Some(Tape::default());
    let outputs = cx.apply_dyn(case.op.clone(), &refs)?;
    let mut run = CaseRun {
        outputs: outputs.iter().map(host).collect::<Result<_>>()?,
        gradients: vec![None; tensors.len()],
        upstream: Vec::new(),
    };
    let seeds = upstream(&cx, case, &outputs, &mut Rng(seed))?;
    let mut given = seeds.iter();
    for out in &outputs {
        run.upstream.push(match differentiable(out) {
            true => F64::new(out.shape(), given.next().map_or(Ok(Vec::new()), |(_, g)| host(g))?),
            false => F64::zeros(out.shape()),
        });
    }
    if !case.inputs.iter().any(|a| a.grad) {
        return Ok(run);
    }
    cx.backward(seeds)?;
    cx.param_grads[ParamSetId::Model].finish()?;
    for (i, t) in tensors.iter().enumerate().filter(|(i, _)| case.inputs[*i].grad) {
        let Id::Param { index, .. } = t.id() else { continue };
        let slot = cx.param_grads[ParamSetId::Model].slots[index as usize].clone();
        run.gradients[i] = Some(host(
            &slot.ok_or_else(|| Error::Run(format!("no gradient buffer for input {i}")))?,
        )?);
    }
    Ok(run)
}

/// Whether an output can carry a gradient.
pub fn differentiable(out: &Tensor) -> bool {
    matches!(out.dtype(), DType::F32 | DType::BF16)
}

/// Each output that can carry a gradient, with its gradient: the constant of the case, or random
/// numbers.
pub fn upstream(
    cx: &Cx,
    case: &Case,
    outputs: &[Tensor],
    rng: &mut Rng,
) -> Result<Vec<(Tensor, Tensor)>> {
    let mut seeds = Vec::new();
    for (i, out) in outputs.iter().enumerate() {
        let up = match case.upstream.get(i).copied().flatten() {
            Some(constant) => F64::from_fn(out.shape(), |_| constant),
            None => rng.array(out.shape(), 1.0),
        };
        if differentiable(out) {
            let values: Vec<f32> = up.data.iter().map(|v| *v as f32).collect();
            let grad = Tensor::from_f32(&cx.pool, "upstream", out.dtype(), out.shape(), &values)?;
            seeds.push((out.clone(), grad));
        }
    }
    Ok(seeds)
}

/// Runs one case of an op, registered or not, and compares outputs and gradients with its oracle.
pub fn check_case(
    device: &Arc<dyn Device>,
    case: &Case,
    dtype: DType,
    variant: &Variant,
    seed: u64,
) -> CheckOutcome {
    let mut measured = Measured::default();
    let result = measure(device, case, dtype, variant, seed, &mut measured);
    CheckOutcome {
        op: case.op.name(),
        case: case.label.clone(),
        dtype,
        variant: variant.name,
        ratio: measured.ratio,
        failure: result.err().map(|e| e.to_string()).or(measured.failure),
        measured: false,
    }
}

fn measure(
    device: &Arc<dyn Device>,
    case: &Case,
    dtype: DType,
    variant: &Variant,
    seed: u64,
    measured: &mut Measured,
) -> Result<()> {
    // The oracle computes from the stored values, as the device does.
    let stored: Vec<F64> = case.inputs.iter().map(|a| quantise(a, dtype)).collect();
    let oracle = case.op.oracle(Round::None, &stored);
    let peer = case.op.oracle(if dtype == DType::BF16 { Round::Bf16 } else { Round::F32 }, &stored);
    let run = run_case(device, case, dtype, variant, seed)?;
    if run.outputs.len() != oracle.len() {
        return Err(Error::Run(format!(
            "{} outputs, its reference has {}",
            run.outputs.len(),
            oracle.len()
        )));
    }
    for (i, (got, want)) in run.outputs.iter().zip(&oracle).enumerate() {
        if case.skip.contains(&i) {
            continue;
        }
        if got.len() != want.data.len() {
            return Err(Error::Run(format!(
                "output {i} has {} values, its reference {}",
                got.len(),
                want.data.len()
            )));
        }
        if case.exact {
            let wrong = got.iter().zip(&peer[i].data).filter(|(a, b)| a != b).count();
            measured.add(
                format!("output {i}: {wrong} values differ, exact ones expected"),
                wrong as f64,
                0.5,
            );
        } else if dtype == DType::BF16 {
            let largest = max_abs(&want.data);
            let slack = largest * 2f64.powi(-8) + 1e-12;
            let tolerance = 2.0 * max_difference(&peer[i].data, &want.data) + slack;
            measured.add(format!("output {i}"), max_difference(got, &want.data), tolerance);
        } else {
            measured.add(format!("output {i}"), relative_l2(got, &want.data), 2e-6);
        }
    }
    check_gradients(case, &stored, &run, dtype, seed, measured);
    Ok(())
}

fn check_gradients(
    case: &Case,
    stored: &[F64],
    run: &CaseRun,
    dtype: DType,
    seed: u64,
    measured: &mut Measured,
) {
    let weights = &run.upstream;
    let tolerance = if dtype == DType::BF16 { 2.0 * case.roundings * 2f64.powi(-9) } else { 1e-5 };
    let mut rng = Rng(seed ^ 0xd1ff);
    for (i, got) in run.gradients.iter().enumerate().filter_map(|(i, g)| Some((i, g.as_ref()?))) {
        let n = case.inputs[i].value.data.len();
        let coordinates: Vec<usize> =
            if n <= 64 { (0..n).collect() } else { (0..64).map(|_| rng.below(n)).collect() };
        let mut directions: Vec<Vec<f64>> = coordinates
            .into_iter()
            .map(|c| (0..n).map(|j| f64::from(u8::from(j == c))).collect())
            .collect();
        for _ in 0..8 {
            let v: Vec<f64> = (0..n).map(|_| rng.normal()).collect();
            let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
            directions.push(v.iter().map(|x| x / norm).collect());
        }
        // Nearly all of the check's time is spent here.
        let (ours, theirs): (Vec<f64>, Vec<f64>) = directions
            .par_iter()
            .map(|v| {
                let ours = got.iter().zip(v).map(|(g, v)| g * v).sum::<f64>();
                (ours, directional(case, stored, weights, i, v))
            })
            .unzip();
        // If the exact gradient cancels to nothing, rounding errors of the terms remain. Then the
        // error is relative to the gradient of the outputs.
        let scale = l2(&theirs)
            .max(1e-3 * l2(&weights.iter().flat_map(|w| w.data.clone()).collect::<Vec<_>>()));
        let error = ours.iter().zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
            / scale.max(1e-30);
        measured.add(format!("gradient of input {i}"), error, tolerance);
    }
}

/// d/dt of sum(weights * f(x + t v)) at 0, by a five-point central difference in f64.
fn directional(case: &Case, x: &[F64], weights: &[F64], i: usize, v: &[f64]) -> f64 {
    let h = 1e-4;
    let at = |t: f64| -> f64 {
        let mut moved = x.to_vec();
        moved[i].data.iter_mut().zip(v).for_each(|(a, b)| *a += t * b);
        let y = case.op.oracle(Round::None, &moved);
        y.iter()
            .zip(weights)
            .map(|(y, w)| y.data.iter().zip(&w.data).map(|(a, b)| a * b).sum::<f64>())
            .sum()
    };
    (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h)
}

/// The inputs on the device. Inputs whose gradient is checked become parameters of
/// [`ParamSetId::Model`], so that the backward pass writes their gradients into the slots that are
/// made here.
fn upload(cx: &mut Cx, case: &Case, dtype: DType) -> Result<Vec<Tensor>> {
    let mut slots = Vec::new();
    let mut tensors = Vec::new();
    for arg in &case.inputs {
        let value = &quantise(arg, dtype);
        let real: Vec<f32> = value.data.iter().map(|v| *v as f32).collect();
        let mut t = match arg.kind {
            Kind::Real => Tensor::from_f32(&cx.pool, "case input", dtype, &value.shape, &real)?,
            Kind::Float => {
                Tensor::from_f32(&cx.pool, "case input", DType::F32, &value.shape, &real)?
            }
            Kind::Int => {
                let ints: Vec<i32> = value.data.iter().map(|v| *v as i32).collect();
                Tensor::from_host(&cx.pool, "case input", DType::I32, &value.shape, &ints)?
            }
        };
        if arg.grad {
            t = t.with_id(Id::Param { set: ParamSetId::Model, index: slots.len() as u32 });
            // The gradient of a parameter is f32, that of an activation has the storage dtype.
            let kind = if arg.param || arg.kind == Kind::Float { DType::F32 } else { dtype };
            slots.push(Some(Tensor::new(&cx.pool, "case gradient", kind, &value.shape)?));
        }
        tensors.push(t);
    }
    cx.param_grads[ParamSetId::Model] = ParamGrads::new(slots);
    Ok(tensors)
}

fn quantise(arg: &Arg, dtype: DType) -> F64 {
    let round = match (arg.kind, dtype) {
        (Kind::Real, DType::BF16) => Round::Bf16,
        (Kind::Real | Kind::Float, _) => Round::F32,
        (Kind::Int, _) => Round::None,
    };
    F64::from_fn(&arg.value.shape, |i| round.at(arg.value.data[i]))
}

fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(match t.dtype() {
        DType::I32 => t.to_vec::<i32>()?.into_iter().map(f64::from).collect(),
        DType::U32 => t.to_vec::<u32>()?.into_iter().map(f64::from).collect(),
        DType::U8 => t.to_vec::<u8>()?.into_iter().map(f64::from).collect(),
        _ => t.to_f32()?.into_iter().map(f64::from).collect(),
    })
}

fn max_abs(a: &[f64]) -> f64 {
    a.iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn max_difference(a: &[f64], b: &[f64]) -> f64 {
    let worst = a
        .iter()
        .zip(b)
        .fold(0.0f64, |m, (x, y)| if (x - y).is_nan() { f64::NAN } else { m.max((x - y).abs()) });
    if a.iter().any(|v| v.is_nan()) { f64::NAN } else { worst }
}

fn l2(a: &[f64]) -> f64 {
    a.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn relative_l2(a: &[f64], b: &[f64]) -> f64 {
    let d: Vec<f64> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    l2(&d) / l2(b).max(1e-30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_one_comparison_is_its_failure_and_the_next_one_runs() {
        let device: Arc<dyn Device> = Arc::new(crate::device::cpu::Cpu::new().with_wgmma());
        let compare = |case: &str| match case {
            "broken" => Err(Error::Device("no memory".into())),
            case => Ok((case.to_string(), vec!["y".to_string(); usize::from(case == "wrong")])),
        };
        let mut seen = Vec::new();
        let cases = ["broken", "wrong", "right"];
        check_hopper(&device, "test", cases, compare, |o| {
            seen.push((o.failure.clone().unwrap_or_default(), o.measured));
        });
        let expected = [("no memory", false), ("other bits: y", true), ("", true)];
        assert_eq!(seen, expected.map(|(failure, measured)| (failure.to_string(), measured)));
    }
}
