//! A custom op: forward and backward, the f64 oracle that defines it, and the check that
//! holds both against the oracle and its central differences.
//!
//! This one computes on the host, which is the quickest way to a correct op; a kernel can replace
//! the loops later, under the same check. `cargo run --example new_op` takes a second.

use temper::autograd::{Cost, F64, Fwd, Grads, Need, Node, Op, Round};
use temper::check::check_case;
use temper::config::DeviceChoice;
use temper::device::{self, DType};
use temper::error::Error;
use temper::ops::case::{Arg, Case, DEFAULT, Rng};
use temper::tensor::Tensor;
use temper::{Cx, Result};

/// `y = x tanh(x)`, element by element: x of any shape and real dtype, y as x.
#[derive(Debug)]
struct SmoothAbs;

impl Op for SmoothAbs {
    fn name(&self) -> &'static str {
        "smooth_abs"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let y: Vec<f32> = x[0].to_f32()?.iter().map(|v| v * v.tanh()).collect();
        let y = Tensor::from_f32(&cx.pool, "smooth_abs", x[0].dtype(), x[0].shape(), &y)?;
        let saved = if need.tape { vec![x[0].clone()] } else { vec![] };
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(
        &self,
        cx: &mut Cx,
        node: &Node,
        dy: &[Option<Tensor>],
        g: &mut Grads,
    ) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let x = &node.saved[0];
        let slope = |v: f32| v.tanh() + v * (1.0 - v.tanh() * v.tanh());
        let pairs = x.to_f32()?.into_iter().zip(dy.to_f32()?);
        let dx: Vec<f32> = pairs.map(|(v, up)| up * slope(v)).collect();
        let dx = Tensor::from_f32(&cx.pool, "smooth_abs", x.dtype(), x.shape(), &dx)?;
        g.give(cx, 0, dx)
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![F64::from_fn(&x[0].shape, |i| round.at(x[0].data[i] * x[0].data[i].tanh()))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].bytes())
    }
}

fn main() -> Result<()> {
    let device = device::open(DeviceChoice::Auto)?;
    let mut rng = Rng(1);
    for dtype in [DType::F32, DType::BF16] {
        for shape in [vec![1], vec![33, 5], vec![1000]] {
            let inputs = vec![Arg::real(rng.array(&shape, 1.0))];
            let case = Case::new(format!("{shape:?}"), SmoothAbs, inputs);
            let outcome = check_case(&device, &case, dtype, &DEFAULT, 7);
            let (name, ratio) = (dtype.name(), outcome.ratio);
            println!("{} {name} {shape:?}: error / tolerance {ratio:.3}", outcome.op);
            if let Some(failure) = outcome.failure {
                return Err(Error::Run(failure));
            }
        }
    }
    Ok(())
}
