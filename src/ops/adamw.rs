//! State writers of the optimizer: gradient norm, clipping, AdamW. Floor 2.
//!
//! Invariant: what changes from step to step (learning rate, bias corrections, clip factor) is read from device memory.
//! Math, order of operations and sources: `kernels/adamw.cu`.

use crate::cx::Cx;
use crate::device::{DType, Launch, kernels};
use crate::error::{Error, Result};
use crate::ops::add::flat;
use crate::ops::{Arg, Case, Cost, F64, Fwd, Need, Op, Rng, Round};
use crate::tensor::Tensor;

/// The constants of a parameter group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub weight_decay: f32,
    /// The group's learning rate as a share of the step's.
    pub lr_scale: f32,
    /// Tells groups apart in the random key of stochastic rounding.
    pub group: i32,
}

/// One range of an arena: float master (None: `weight` itself is the parameter, stochastically rounded), the weights that
/// kernels read, both moments and the gradient; all contiguous and of one length.
pub struct Slice<'a> {
    pub master: Option<&'a Tensor>,
    pub weight: &'a Tensor,
    pub m: &'a Tensor,
    pub v: &'a Tensor,
    pub grad: &'a Tensor,
}

/// Device scalars of a step, F32 [8]: lr, 1 - beta1^t, sqrt(1 - beta2^t), gradient norm, clip factor.
pub fn hyper(cx: &Cx) -> Result<Tensor> {
    Tensor::from_host(&cx.pool, "optimizer scalars", DType::F32, &[8], &[0f32, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
}

/// Writes the L2 norm of `grad` (any length) and the clip factor for `max_norm` (0: no clipping) into `hyper[3..5]`.
pub fn norm_and_clip(cx: &Cx, hyper: &Tensor, grad: &Tensor, max_norm: f32) -> Result<()> {
    let n = grad.numel();
    let chunks = n.div_ceil(8192).max(1);
    let partial = cx.scratch("partial sums", DType::F32, &[chunks])?;
    kernels::square_sums(&*cx.device, Launch::warps(chunks), partial.out(), grad, n as i64)?;
    kernels::norm_and_clip(&*cx.device, Launch::warps(1), hyper.out(), &partial, chunks as i32, max_norm)
}

/// One AdamW step of a range.
pub fn adamw(cx: &Cx, group: &AdamW, s: &Slice, hyper: &Tensor) -> Result<()> {
    let n = s.weight.numel();
    if [s.m, s.v, s.grad].iter().any(|t| t.numel() != n) {
        return Err(Error::op("adamw", format!("{:?} and its moments or gradient differ in length", s.weight)));
    }
    kernels::adamw(
        &*cx.device,
        flat(s.weight),
        usize::from(s.master.is_none()),
        s.master.map(|t| t.out()),
        s.weight.out(),
        s.m.out(),
        s.v.out(),
        s.grad,
        hyper,
        &cx.rng,
        n as i64,
        group.beta1,
        group.beta2,
        group.eps,
        group.weight_decay,
        group.lr_scale,
        group.group,
    )
}

/// The op form, for the registry: inputs p (float), m, v, g, hyper; outputs p, w, m, v.
#[derive(Debug)]
struct AdamWStep(AdamW);

impl Op for AdamWStep {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let fresh = |t: &Tensor| -> Result<Tensor> {
            let copy = cx.float("adamw case", t.shape())?;
            copy.copy_from(t)?;
            Ok(copy)
        };
        let (p, m, v) = (fresh(x[0])?, fresh(x[1])?, fresh(x[2])?);
        let w = cx.real("adamw case", x[0].shape())?;
        let slice = Slice { master: Some(&p), weight: &w, m: &m, v: &v, grad: x[3] };
        adamw(cx, &self.0, &slice, x[4])?;
        Ok(Fwd { outputs: vec![p, w, m, v], saved: vec![] })
    }

    fn reference(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let c = |v: f32| f64::from(v);
        let (b1, b2) = (c(self.0.beta1), c(self.0.beta2));
        let (lr, c1, c2, clip) = (x[4].data[0] * c(self.0.lr_scale), x[4].data[1], x[4].data[2], x[4].data[4]);
        let mut out = vec![x[0].clone(), x[0].clone(), x[1].clone(), x[2].clone()];
        for i in 0..x[0].data.len() {
            let g = clip * x[3].data[i];
            let m = b1 * x[1].data[i] + c(1.0 - self.0.beta1) * g;
            let v = b2 * x[2].data[i] + c(1.0 - self.0.beta2) * g * g;
            let p = x[0].data[i] * (1.0 - lr * c(self.0.weight_decay)) - lr / c1 * m / (v.sqrt() / c2 + c(self.0.eps));
            (out[0].data[i], out[1].data[i], out[2].data[i], out[3].data[i]) = (p, round.at(p), m, v);
        }
        out
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: (28 * x[0].numel()) as f64, flops: 0.0 }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    [1, 37, 300]
        .into_iter()
        .map(|n| {
            let group = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, lr_scale: 0.5, group: 0 };
            let square = F64::from_fn(&[n], |_| rng.uniform() * 1e-2);
            let hyper = F64::new(&[8], vec![1e-3, 0.271, 0.0547, 2.0, 0.5, 0.0, 0.0, 0.0]);
            let arrays = [rng.array(&[n], 1.0), rng.array(&[n], 0.1), square, rng.array(&[n], 1.0), hyper];
            let inputs = arrays.into_iter().map(Arg::float).collect();
            Case::new(format!("n {n}"), AdamWStep(group), inputs)
        })
        .collect()
}
