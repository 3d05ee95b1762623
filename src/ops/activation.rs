//! Activations: gated (SwiGLU and its gelu siblings) and plain. Layer 4.
//!
//! Invariant: element-wise. Math: `kernels/activation.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream, flat};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::row_packs;
use crate::tensor::Tensor;

/// The activations, with the kernels' template argument D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Act {
    Silu = kernels::act::SILU,
    /// `gelu_pytorch_tanh`, `gelu_new`: the tanh approximation.
    GeluTanh = kernels::act::GELU_TANH,
    /// Exact, with erf.
    Gelu = kernels::act::GELU,
    /// Plain only: no family has a gated unit with relu.
    Relu = kernels::act::RELU,
}

/// `y = act(g) * u` for the halves g|u of each row: x [n, 2 f] real; y [n, f]. Error if the width
/// is odd.
pub fn glu(cx: &mut Cx, x: &Tensor, act: Act) -> Result<Tensor> {
    cx.apply1(Glu { act }, &[x])
}

/// `y = act(x)`, any shape.
pub fn activation(cx: &mut Cx, x: &Tensor, act: Act) -> Result<Tensor> {
    cx.apply1(Activation { act }, &[x])
}

#[derive(Debug)]
pub struct Glu {
    pub act: Act,
}

#[derive(Debug)]
pub struct Activation {
    pub act: Act,
}

impl Glu {
    /// The op without a tape.
    pub(super) fn of(&self, cx: &Cx, x: &Tensor) -> Result<Tensor> {
        let y = cx.real("glu", &[x.row_count(), x.cols() / 2])?;
        self.write(cx, &y, x)?;
        Ok(y)
    }

    /// Writes y [rows, f]. Not on the tape.
    pub(super) fn write(&self, cx: &Cx, y: &Tensor, x: &Tensor) -> Result<()> {
        let (rows, f) = (y.row_count(), y.cols());
        let args = kernels::GluFwdArgs { y: y.out(), x, rows: rows as i32, f: f as i32 };
        kernels::glu_fwd(&*cx.device, row_packs(rows, f, y.dtype()), self.act as usize, args)
    }

    /// `dx = ` (or `dx += `) the gradient of x from that of the result.
    pub(super) fn gradient(
        &self,
        cx: &Cx,
        dx: &Tensor,
        dy: &Tensor,
        x: &Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let (rows, f) = (dy.row_count(), dy.cols());
        let args = kernels::GluBwdArgs {
            dx: dx.out(),
            dy,
            x,
            rows: rows as i32,
            f: f as i32,
            accumulate: i32::from(accumulate),
        };
        kernels::glu_bwd(&*cx.device, row_packs(rows, f, dy.dtype()), self.act as usize, args)
    }
}

impl Op for Glu {
    fn name(&self) -> &'static str {
        "glu"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        if !x[0].cols().is_multiple_of(2) {
            return Err(Error::op("glu", format!("{:?} has no two halves", x[0])));
        }
        Ok(Fwd { outputs: vec![self.of(cx, x[0])?], saved: vec![x[0].clone()] })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let (Some(dy), Some((dx, acc))) = (&dy[0], g.slot(0)?) else { return Ok(()) };
        self.gradient(cx, &dx, dy, &node.saved[0], acc)
    }

    fn recomputes_output(&self, _k: usize) -> bool {
        true
    }

    fn recompute_output(&self, cx: &mut Cx, node: &Node, _k: usize) -> Result<Tensor> {
        self.of(cx, &node.saved[0])
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let f = x[0].cols() / 2;
        let mut y = F64::zeros(&[x[0].row_count(), f]);
        for r in 0..x[0].row_count() {
            for j in 0..f {
                y.row_mut(r)[j] = round.at(value(self.act, x[0].row(r)[j]) * x[0].row(r)[f + j]);
            }
        }
        vec![y]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].bytes() / 2)
    }
}

impl Activation {
    fn y(&self, cx: &Cx, x: &Tensor) -> Result<Tensor> {
        let y = cx.real("activation", x.shape())?;
        let args = kernels::ActFwdArgs { y: y.out(), x, n: y.numel() as i64 };
        kernels::act_fwd(&*cx.device, flat(&y), self.act as usize, args)?;
        Ok(y)
    }
}

impl Op for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        Ok(Fwd { outputs: vec![self.y(cx, x[0])?], saved: vec![x[0].clone()] })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let (Some(dy), Some((dx, acc))) = (&dy[0], g.slot(0)?) else { return Ok(()) };
        let n = dy.numel() as i64;
        let args = kernels::ActBwdArgs {
            dx: dx.out(),
            dy,
            x: &node.saved[0],
            n,
            accumulate: i32::from(acc),
        };
        kernels::act_bwd(&*cx.device, flat(dy), self.act as usize, args)
    }

    fn recomputes_output(&self, _k: usize) -> bool {
        true
    }

    fn recompute_output(&self, cx: &mut Cx, node: &Node, _k: usize) -> Result<Tensor> {
        self.y(cx, &node.saved[0])
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![F64::from_fn(&x[0].shape, |i| round.at(value(self.act, x[0].data[i])))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].bytes())
    }
}

fn value(act: Act, x: f64) -> f64 {
    match act {
        Act::Silu => x / (1.0 + (-x).exp()),
        Act::GeluTanh => {
            0.5 * x
                * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Act::Relu => x.max(0.0),
        Act::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
    }
}

/// erf by its Maclaurin series where that converges well, otherwise by the continued fraction of
/// erfc.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 2.5 {
        let (mut term, mut sum) = (a, a);
        for n in 1..80 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return x.signum() * sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    let mut c = a;
    for n in (1..120).rev() {
        c = a + f64::from(n) / 2.0 / c;
    }
    x.signum() * (1.0 - (-a * a).exp() / (c * std::f64::consts::PI.sqrt()))
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for act in [Act::Silu, Act::GeluTanh, Act::Gelu] {
        for (rows, f) in [(2, 9), (5, 37), (16, 64)] {
            let x = Arg::real(rng.array(&[rows, 2 * f], 2.0));
            cases.push(Case::new(format!("{act:?} rows {rows} f {f}"), Glu { act }, vec![x]));
        }
    }
    cases
}

pub fn plain_cases(rng: &mut Rng) -> Vec<Case> {
    [Act::Silu, Act::GeluTanh, Act::Gelu, Act::Relu]
        .into_iter()
        .map(|act| {
            Case::new(
                format!("{act:?}"),
                Activation { act },
                vec![Arg::real(rng.array(&[7, 45], 2.0))],
            )
        })
        .collect()
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let x = Arg::real(rng.array(&[s.tokens(), 2 * s.intermediate], 1.0));
    vec![Case::new("silu", Glu { act: Act::Silu }, vec![x])]
}

pub fn plain_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let x = Arg::real(rng.array(&[s.tokens(), s.intermediate], 1.0));
    vec![Case::new("gelu by tanh", Activation { act: Act::GeluTanh }, vec![x])]
}
