//! The gated MLP of a decoder's block as one op: gate and up, the activation, down. Layer 4.
//!
//! Invariant: the bits are those of `linear`, `glu` and `linear`. It is an op of its own because on
//! Hopper the backward of the activation is a part of down's product. Math and numerics:
//! `kernels/linear_glu_hopper.cu`, `kernels/activation.cu`, `kernels/matmul.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Recompute, Round, Upstream};
use crate::device::Layout;
use crate::error::Result;
use crate::kernels::Boxes;
use crate::ops::activation::{Act, Glu};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::linear_glu::{LinearGlu, linear_glu};
use crate::ops::matmul::{Linear, column_sums, linear, product};
use crate::ops::{expect_cols, linear_glu_hopper};
use crate::tensor::Tensor;

/// A dense layer without an adapter: its weight [n, k] and bias `[n]`.
#[derive(Clone, Copy)]
pub struct DenseLayer<'a> {
    pub weight: &'a Tensor,
    pub bias: Option<&'a Tensor>,
}

/// `(act(g) * u) w_down^T (+ bias)` with `g|u = x w_gate_up^T (+ bias)`: x [m, k] real, gate_up's
/// weight [2 f, k], down's [n, f]; the result is [m, n]. One op on the tape where the backward of
/// the activation is fused, else three.
pub fn mlp(
    cx: &mut Cx,
    x: &Tensor,
    gate_up: DenseLayer,
    down: DenseLayer,
    act: Act,
) -> Result<Tensor> {
    let fused = linear_glu_hopper::fits_backward(cx, down.weight) && x.row_count() > 0;
    if !fused || cx.tape.is_none() {
        let gated = linear_glu(cx, x, gate_up.weight, gate_up.bias, act)?;
        return linear(cx, &gated, down.weight, down.bias);
    }
    let op = Mlp { act, gate_up_bias: gate_up.bias.is_some(), down_bias: down.bias.is_some() };
    let mut inputs = vec![x, gate_up.weight, down.weight];
    inputs.extend(gate_up.bias);
    inputs.extend(down.bias);
    cx.apply1(op, &inputs)
}

/// Inputs: x, the weights of gate_up and down, then their biases.
#[derive(Debug)]
pub struct Mlp {
    pub act: Act,
    pub gate_up_bias: bool,
    pub down_bias: bool,
}

const X: usize = 0;
const GATE_UP: usize = 1;
const DOWN: usize = 2;

impl Mlp {
    fn gate_up_bias(&self) -> Option<usize> {
        self.gate_up_bias.then_some(3)
    }

    fn down_bias(&self) -> Option<usize> {
        self.down_bias.then_some(3 + usize::from(self.gate_up_bias))
    }

    fn glu(&self) -> Glu {
        Glu { act: self.act }
    }
}

impl Op for Mlp {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let hint = "check that the weights belong to this config.json";
        let (down, down_bias) = (x[DOWN], self.down_bias().map(|i| x[i]));
        let first = LinearGlu { act: self.act, bias: self.gate_up_bias };
        let bias = self.gate_up_bias().map(|i| x[i]);
        let (y, gate_up) = first.both(cx, x[X], x[GATE_UP], bias, need.tape)?;
        expect_cols("mlp", "down's weight", down, y.cols(), hint)?;
        if let Some(bias) = down_bias {
            expect_cols("mlp", "down's bias", bias, down.row_count(), hint)?;
        }
        let out = cx.real("linear", &[y.row_count(), down.row_count()])?;
        product(cx, Layout::NT, &out, &y, down, down_bias, false)?;
        let mut saved = Vec::new();
        if let Some(gate_up) = gate_up {
            saved.extend([gate_up, x[GATE_UP].clone(), down.clone()]);
            if need.inputs[GATE_UP] {
                saved.push(x[X].clone()); // a frozen weight needs no input
            }
            if need.inputs[DOWN] && cx.recompute != Recompute::Light {
                saved.push(y);
            }
        }
        Ok(Fwd { outputs: vec![out], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let [gate_up, w, down, rest @ ..] = node.saved.as_slice() else { return Ok(()) };
        let (x, rest) = rest.split_at(usize::from(g.wants(GATE_UP)));
        // y, and whether it is still to be computed.
        let (mut y, missing) = (rest.first().cloned(), g.wants(DOWN) && rest.is_empty());
        let bias = self.gate_up_bias().filter(|i| g.wants(*i));
        let mut gradient = None;
        if g.wants(X) || g.wants(GATE_UP) || bias.is_some() {
            let (d_gate_up, made) = self.d_gate_up(cx, gate_up, (dy, down), missing)?;
            (gradient, y) = (Some(d_gate_up), made.or(y));
        } else if missing {
            y = Some(self.glu().of(cx, gate_up)?);
        }
        if let (Some(y), Some((dw, accumulate))) = (&y, g.slot(DOWN)?) {
            product(cx, Layout::TN, &dw, dy, y, None, accumulate)?;
        }
        drop(y);
        if let Some(i) = self.down_bias()
            && let Some((db, accumulate)) = g.slot(i)?
        {
            column_sums(cx, &db, dy, accumulate)?;
        }
        let Some(gradient) = gradient else { return Ok(()) };
        if let Some((dx, accumulate)) = g.slot(X)? {
            product(cx, Layout::NN, &dx, &gradient, w, None, accumulate)?;
        }
        if let (Some(x), Some((dw, accumulate))) = (x.first(), g.slot(GATE_UP)?) {
            product(cx, Layout::TN, &dw, &gradient, x, None, accumulate)?;
        }
        if let Some(i) = bias
            && let Some((db, accumulate)) = g.slot(i)?
        {
            column_sums(cx, &db, &gradient, accumulate)?;
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let layer = |x: F64, weight: usize, bias: Option<usize>, all: &[F64]| {
            let mut inputs = vec![x, all[weight].clone()];
            inputs.extend(bias.map(|i| all[i].clone()));
            Linear { bias: bias.is_some() }.oracle(round, &inputs).remove(0)
        };
        let gate_up = layer(x[X].clone(), GATE_UP, self.gate_up_bias(), x);
        let y = self.glu().oracle(round, &[gate_up]).remove(0);
        vec![layer(y, DOWN, self.down_bias(), x)]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, k) = (x[X].row_count(), x[X].cols());
        let (twice, n) = (x[GATE_UP].row_count(), x[DOWN].row_count());
        let flops = 2.0 * m as f64 * (twice * k + twice / 2 * n) as f64;
        // y is written and read.
        Cost { flops, ..Cost::memory(x, m * (n + twice) * x[X].dtype().size()) }
    }
}

impl Mlp {
    /// The gradient of g|u, and the gated unit's value if it is `missing`. Where the kernel is fused,
    /// the gradient takes the place of g|u, which nothing needs any more.
    fn d_gate_up(
        &self,
        cx: &Cx,
        gate_up: &Tensor,
        (dy, down): (&Tensor, &Tensor),
        missing: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let shape = [dy.row_count(), down.cols()];
        let fits = Boxes::fit(dy) && dy.row_count() > 0;
        if fits && linear_glu_hopper::fits_backward(cx, down) {
            let y = if missing { Some(cx.real("glu", &shape)?) } else { None };
            linear_glu_hopper::backward(cx, gate_up, y.as_ref(), (dy, down), self.act)?;
            return Ok((gate_up.clone(), y));
        }
        let y = if missing { Some(self.glu().of(cx, gate_up)?) } else { None };
        let d_gated = cx.real("activation gradients", &shape)?;
        product(cx, Layout::NN, &d_gated, dy, down, None, false)?;
        let d_gate_up = cx.real("activation gradients", gate_up.shape())?;
        self.glu().gradient(cx, &d_gate_up, &d_gated, gate_up, false)?;
        Ok((d_gate_up, y))
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (m, k, f, n, biases, act) in [
        (5, 12, 7, 9, [false, false], Act::Silu),
        (9, 16, 24, 16, [true, true], Act::GeluTanh),
        (130, 8, 72, 8, [true, false], Act::Silu),
        (20, 24, 136, 24, [false, true], Act::Gelu),
    ] {
        let mut weight = |rows: usize, cols: usize| {
            Arg::param(rng.array(&[rows, cols], (cols as f64).powf(-0.5)))
        };
        let mut inputs = vec![weight(2 * f, k), weight(n, f)];
        inputs.insert(0, Arg::real(rng.array(&[m, k], 1.0)));
        for (bias, n) in biases.into_iter().zip([2 * f, n]) {
            inputs.extend(bias.then(|| Arg::param(rng.array(&[n], 0.5))));
        }
        let label = format!("{act:?} m {m} k {k} f {f} n {n}, biases {biases:?}");
        let [gate_up_bias, down_bias] = biases;
        let mut case = Case::new(label, Mlp { act, gate_up_bias, down_bias }, inputs);
        case.roundings = 6.0; // g|u, y and the result; the gradients of y, of g|u and of x
        cases.push(case);
    }
    cases
}

/// A layer's MLP.
pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let op = Mlp { act: Act::Silu, gate_up_bias: false, down_bias: false };
    let inputs = vec![
        Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0)),
        Arg::param(rng.array(&[2 * s.intermediate, s.hidden], 0.02)),
        Arg::param(rng.array(&[s.hidden, s.intermediate], 0.02)),
    ];
    vec![Case::new("silu", op, inputs)]
}
