//! `y = a + b`, and the plain element-wise helpers that other ops use for their gradients. Layer 4.
//!
//! Invariant: one rounding, when the result is stored. Kernels: `kernels/add.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream, add_into, flat};
use crate::device::DType;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::tensor::Tensor;

/// `a + b`, both [.., n] real and of one shape.
pub fn add(cx: &mut Cx, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    cx.apply1(Add, &[a, b])
}

#[derive(Debug)]
pub struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        if x[0].shape() != x[1].shape() || !x[0].is_contiguous() || !x[1].is_contiguous() {
            let message = format!("{:?} and {:?} differ in shape or are strided", x[0], x[1]);
            return Err(Error::op("add", message));
        }
        let y = cx.real("add", x[0].shape())?;
        let args = kernels::AddFwdArgs { y: y.out(), a: x[0], b: x[1], n: y.numel() as i64 };
        kernels::add_fwd(&*cx.device, flat(&y), args)?;
        Ok(Fwd { outputs: vec![y], saved: vec![] })
    }

    fn backward(&self, cx: &mut Cx, _node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        if let Some(dy) = &dy[0] {
            g.give(cx, 0, dy.clone())?;
            g.give(cx, 1, dy.clone())?;
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![F64::from_fn(&x[0].shape, |i| round.at(x[0].data[i] + x[1].data[i]))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].bytes())
    }
}

/// `x` as F32, on the tape.
pub fn to_float(cx: &mut Cx, x: &Tensor) -> Result<Tensor> {
    cx.apply1(ToFloat, &[x])
}

#[derive(Debug)]
pub struct ToFloat;

impl Op for ToFloat {
    fn name(&self) -> &'static str {
        "to_float"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        if !x[0].is_contiguous() {
            return Err(Error::op("to_float", format!("{:?} is strided", x[0])));
        }
        let y = cx.float("to_float", x[0].shape())?;
        add_into(cx, &y, x[0], false)?;
        Ok(Fwd { outputs: vec![y], saved: vec![] })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        if node.inputs[0].dtype == DType::F32 {
            return g.give(cx, 0, dy.clone());
        }
        let dx = cx.real("to_float", dy.shape())?;
        let args = kernels::ToRealCopyArgs { y: dx.out(), x: dy, n: dx.numel() as i64 };
        kernels::to_real_copy(&*cx.device, flat(&dx), args)?;
        g.give(cx, 0, dx)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        vec![x[0].clone()]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 * x[0].numel())
    }
}

pub fn to_float_cases(rng: &mut Rng) -> Vec<Case> {
    let shapes = [vec![1], vec![33, 5], vec![1000]];
    shapes.map(|s| Case::new(format!("{s:?}"), ToFloat, vec![Arg::real(rng.array(&s, 1.0))])).into()
}

/// `y += s x`; both contiguous, of one dtype and size. Not on the tape.
pub fn axpy(cx: &Cx, y: &Tensor, x: &Tensor, s: f32) -> Result<()> {
    if y.numel() != x.numel() || y.dtype() != x.dtype() {
        return Err(Error::op("axpy", format!("{x:?} onto {y:?}")));
    }
    let args = kernels::AxpyArgs { y: y.out(), x, scale: s, n: y.numel() as i64, accumulate: 1 };
    kernels::axpy(&*cx.device, flat(y), args)
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    [vec![1], vec![7], vec![33, 5], vec![1000]]
        .into_iter()
        .map(|shape| {
            let inputs = vec![Arg::real(rng.array(&shape, 1.0)), Arg::real(rng.array(&shape, 1.0))];
            Case::new(format!("{shape:?}"), Add, inputs)
        })
        .collect()
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let inputs = [1.0, 1.0].map(|scale| Arg::real(rng.array(&[s.tokens(), s.hidden], scale)));
    vec![Case::new("residual", Add, inputs.into())]
}

pub fn to_float_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let x = Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0));
    vec![Case::new("hidden states", ToFloat, vec![x])]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::autograd::{ParamGrads, Tape};
    use crate::device::cpu::Cpu;
    use crate::ops::add::add;
    use crate::tensor::{Id, ParamSetId};

    #[test]
    fn a_gradient_that_two_values_share_is_copied_before_one_adds_to_it() {
        let mut cx = Cx::new(Arc::new(Cpu::new()), DType::F32).unwrap();
        let grad = |cx: &Cx| Tensor::new(&cx.pool, "grad", DType::F32, &[1]).unwrap();
        cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![Some(grad(&cx)), Some(grad(&cx))]);
        let param = |cx: &Cx, index| {
            Tensor::from_f32(&cx.pool, "p", DType::F32, &[1], &[1.0])
                .unwrap()
                .with_id(Id::Param { set: ParamSetId::Model, index })
        };
        let (p, q) = (param(&cx, 0), param(&cx, 1));
        cx.tape = Some(Tape::default());
        let a = add(&mut cx, &p, &p).unwrap(); // a = 2p
        let b = add(&mut cx, &q, &q).unwrap(); // b = 2q
        let s = add(&mut cx, &a, &b).unwrap(); // s = 2p + 2q
        let t = add(&mut cx, &s, &a).unwrap(); // t = 4p + 2q
        let one = Tensor::from_f32(&cx.pool, "one", DType::F32, &[1], &[1.0]).unwrap();
        cx.backward(vec![(t, one)]).unwrap();
        let got: Vec<f32> = cx.param_grads[ParamSetId::Model]
            .slots
            .iter()
            .map(|s| s.as_ref().unwrap().to_f32().unwrap()[0])
            .collect();
        assert_eq!(got, [4.0, 2.0]);
    }
}
