//! Optimizer updates: gradient norm, clipping, AdamW. Layer 4.
//!
//! Invariant: whatever changes from step to step (learning rate, bias corrections, clip factor) is
//! read from device memory. Math, order of operations and sources: `kernels/adamw.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round, flat};
use crate::device::{DType, Launch};
use crate::error::Result;
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::same_length;
use crate::rng::{M_NOISE_TAG, V_NOISE_TAG, philox};
use crate::tensor::Tensor;

/// The constants of a parameter group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub weight_decay: f32,
    /// The group's learning rate as a multiple of the step's.
    pub lr_scale: f32,
    /// Distinguishes groups in the random key of stochastic rounding.
    pub group: i32,
}

/// One range of an arena: the float master (None: `weight` itself is the parameter, stochastically
/// rounded), the weights that kernels read, both moments and the gradient, all contiguous and of
/// one length.
pub struct Slice<'a> {
    pub master: Option<&'a Tensor>,
    pub weight: &'a Tensor,
    pub m: &'a Tensor,
    pub v: &'a Tensor,
    pub grad: &'a Tensor,
}

impl Slice<'_> {
    /// The number of parameters. Error if the tensors differ in length.
    pub(crate) fn length(&self, op: &'static str) -> Result<usize> {
        same_length(op, self.weight, [self.m, self.v, self.grad])?;
        Ok(self.weight.numel())
    }
}

/// Device scalars of a step, F32 `[8]`: lr, 1 - beta1^t, sqrt(1 - beta2^t), gradient norm, clip
/// factor.
pub fn hyper(cx: &Cx) -> Result<Tensor> {
    Tensor::from_host(
        &cx.pool,
        "optimizer scalars",
        DType::F32,
        &[8],
        &[0f32, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
    )
}

/// Writes the L2 norm of `grad` (any length) and the clip factor for `max_norm` (0: no clipping)
/// into `hyper[3..5]`.
pub fn norm_and_clip(cx: &Cx, hyper: &Tensor, grad: &Tensor, max_norm: f32) -> Result<()> {
    let n = grad.numel();
    let chunks = n.div_ceil(kernels::NORM_CHUNK).max(1);
    let partial = cx.scratch("partial sums", DType::F32, &[chunks])?;
    let args = kernels::SquareSumsArgs { partial: partial.out(), g: grad, n: n as i64 };
    kernels::square_sums(&*cx.device, Launch::warps(chunks), args)?;
    let args = kernels::NormAndClipArgs {
        hyper: hyper.out(),
        partial: &partial,
        chunks: chunks as i32,
        max_norm,
    };
    kernels::norm_and_clip(&*cx.device, Launch::warps(1), args)
}

/// One AdamW step of a range. Moments are F32, or BF16 with stochastic rounding.
pub fn adamw(cx: &Cx, group: &AdamW, s: &Slice, hyper: &Tensor) -> Result<()> {
    let n = s.length("adamw")?;
    let args = kernels::AdamwArgs {
        p: s.master.map(|t| t.out()),
        w: s.weight.out(),
        m: s.m.out(),
        v: s.v.out(),
        g: s.grad,
        hyper,
        key: &cx.rng,
        n: n as i64,
        beta1: group.beta1,
        beta2: group.beta2,
        eps: group.eps,
        weight_decay: group.weight_decay,
        lr_scale: group.lr_scale,
        group: group.group,
    };
    let d = usize::from(s.master.is_none());
    match s.m.dtype() {
        DType::BF16 => {
            let at = Launch::flat(n.div_ceil(kernels::ADAMW_BF16_PACK));
            kernels::adamw_bf16(&*cx.device, at, d, args)
        }
        _ => kernels::adamw(&*cx.device, flat(s.weight), d, args),
    }
}

/// The step in f32, operation for operation: (parameter, m, v). For oracles that must agree bit for
/// bit.
pub(crate) fn exact_step(
    c: &AdamW,
    hyper: &[f64],
    x: f32,
    m: f32,
    v: f32,
    g: f32,
) -> (f32, f32, f32) {
    let h = |i: usize| hyper[i] as f32;
    let lr = h(0) * c.lr_scale;
    let e = g * h(4);
    let m = c.beta1.mul_add(m, (1.0 - c.beta1) * e);
    let v = c.beta2.mul_add(v, (1.0 - c.beta2) * e * e);
    let x = x * (1.0 - lr * c.weight_decay);
    ((-(lr / h(1))).mul_add(m / (v.sqrt() / h(2) + c.eps), x), m, v)
}

/// Rounds f32 to bf16 stochastically: up with the probability of the dropped bits. The noise of
/// value `i` is 16 bits of Philox.
fn by_chance(x: f32, key: &F64, i: usize, group: i32, kind: u32) -> f64 {
    let k = |j: usize| key.data[j] as i32 as u32;
    let words = philox([k(0), k(1)], [(i / 8) as u32, k(2), group as u32, kind]);
    let noise = words[i % 8 / 2] >> (16 * (i % 2)) & 0xffff;
    f64::from(f32::from_bits((x.to_bits() + noise) & 0xffff_0000))
}

/// A copy of an input, which the step of a case may overwrite.
pub(crate) fn case_copy(cx: &Cx, t: &Tensor) -> Result<Tensor> {
    let copy = cx.float("adamw case", t.shape())?;
    copy.copy_from(t)?;
    Ok(copy)
}

/// The op form, for the registry: inputs p (float), m, v, g, hyper; outputs p, w, m, v.
#[derive(Debug)]
struct AdamWStep(AdamW);

impl Op for AdamWStep {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (p, m, v) = (case_copy(cx, x[0])?, case_copy(cx, x[1])?, case_copy(cx, x[2])?);
        let w = cx.real("adamw case", x[0].shape())?;
        let slice = Slice { master: Some(&p), weight: &w, m: &m, v: &v, grad: x[3] };
        adamw(cx, &self.0, &slice, x[4])?;
        Ok(Fwd { outputs: vec![p, w, m, v], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let c = |v: f32| f64::from(v);
        let (b1, b2) = (c(self.0.beta1), c(self.0.beta2));
        let (lr, c1, c2, clip) =
            (x[4].data[0] * c(self.0.lr_scale), x[4].data[1], x[4].data[2], x[4].data[4]);
        let mut out = vec![x[0].clone(), x[0].clone(), x[1].clone(), x[2].clone()];
        for i in 0..x[0].data.len() {
            let g = clip * x[3].data[i];
            let m = b1 * x[1].data[i] + c(1.0 - self.0.beta1) * g;
            let v = b2 * x[2].data[i] + c(1.0 - self.0.beta2) * g * g;
            let p = x[0].data[i] * (1.0 - lr * c(self.0.weight_decay))
                - lr / c1 * m / (v.sqrt() / c2 + c(self.0.eps));
            (out[0].data[i], out[1].data[i], out[2].data[i], out[3].data[i]) =
                (p, round.at(p), m, v);
        }
        out
    }

    /// Assumes a BF16 weight.
    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: (30 * x[0].numel()) as f64, flops: 0.0 }
    }
}

/// [`AdamWStep`] with moments in BF16; inputs p, m, v, g, hyper, key. Compared bit for bit.
#[derive(Debug)]
struct Bf16Step(AdamW);

impl Op for Bf16Step {
    fn name(&self) -> &'static str {
        "adamw_bf16"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        cx.rng.copy_from(x[5])?;
        let half = |t: &Tensor| {
            Tensor::from_f32(&cx.pool, "adamw case", DType::BF16, t.shape(), &t.to_f32()?)
        };
        let (p, w) = (case_copy(cx, x[0])?, cx.real("adamw case", x[0].shape())?);
        let (m, v) = (half(x[1])?, half(x[2])?);
        let slice = Slice { master: Some(&p), weight: &w, m: &m, v: &v, grad: x[3] };
        adamw(cx, &self.0, &slice, x[4])?;
        Ok(Fwd { outputs: vec![p, w, m, v], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let mut out = vec![x[0].clone(), x[0].clone(), x[1].clone(), x[2].clone()];
        for i in 0..x[0].data.len() {
            let at = |j: usize| x[j].data[i] as f32;
            let half = |j: usize| Round::Bf16.at(x[j].data[i]) as f32;
            let (p, m, v) = exact_step(&self.0, &x[4].data, at(0), half(1), half(2), at(3));
            out[0].data[i] = f64::from(p);
            out[1].data[i] = round.at(f64::from(p));
            out[2].data[i] = by_chance(m, &x[5], i, self.0.group, M_NOISE_TAG);
            out[3].data[i] = by_chance(v, &x[5], i, self.0.group, V_NOISE_TAG);
        }
        out
    }

    /// Assumes a BF16 weight.
    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: (22 * x[0].numel()) as f64, flops: 0.0 }
    }
}

/// p, m, v, g and hyper as in the middle of training.
pub(crate) fn case_inputs(rng: &mut Rng, n: usize) -> Vec<Arg> {
    let square = F64::from_fn(&[n], |_| rng.uniform() * 1e-2);
    let hyper = F64::new(&[8], vec![1e-3, 0.271, 0.0547, 2.0, 0.5, 0.0, 0.0, 0.0]);
    let arrays = [rng.array(&[n], 1.0), rng.array(&[n], 0.1), square, rng.array(&[n], 1.0), hyper];
    arrays.into_iter().map(Arg::float).collect()
}

pub(crate) const CASE: AdamW =
    AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, lr_scale: 0.5, group: 0 };

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let lengths = [1, 37, 300];
    let mut cases: Vec<Case> = lengths
        .iter()
        .map(|&n| Case::new(format!("n {n}"), AdamWStep(CASE), case_inputs(rng, n)))
        .collect();
    for n in lengths {
        let mut inputs = case_inputs(rng, n);
        inputs.push(Arg::ints(&[11, 5, 3, 0]));
        let mut case =
            Case::new(format!("n {n} bf16 moments"), Bf16Step(AdamW { group: 1, ..CASE }), inputs);
        case.exact = true;
        cases.push(case);
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let inputs = case_inputs(rng, s.hidden * s.intermediate);
    vec![Case::new("with copies of the inputs", AdamWStep(CASE), inputs)]
}
