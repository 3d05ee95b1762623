//! A linear layer and the gated activation after it, in one launch for few rows and on Hopper.
//! Layer 4.
//!
//! Invariant: wherever the engine computes the products itself, the bits are those of `linear`
//! followed by `glu`. Math and numerics: `kernels/matmul_few.cu`, `kernels/linear_glu_hopper.cu`,
//! `kernels/activation.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::{DType, Layout};
use crate::error::{Error, Result};
use crate::kernels::FEW_ROWS;
use crate::ops::activation::{Act, Glu, glu};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::library::of_few_rows;
use crate::ops::matmul::{Linear, linear, product};
use crate::ops::own::{OwnKernel, own_products};
use crate::ops::{expect_cols, few_hopper, linear_glu_hopper, matmul_few};
use crate::tensor::Tensor;

/// `y = act(g) * u` with `g|u = x w^T (+ bias)`: x [m, k] real, w [2 f, k], bias `[2 f]`; y [m, f].
/// On the tape these are two ops, since the backward needs g|u; see also `mlp`.
pub fn linear_glu(
    cx: &mut Cx,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    act: Act,
) -> Result<Tensor> {
    if cx.tape.is_some() {
        let gate_up = linear(cx, x, w, bias)?;
        return glu(cx, &gate_up, act);
    }
    LinearGlu { act, bias: bias.is_some() }.y(cx, x, w, bias)
}

/// The fused product of few rows by this kernel: y [m, f]. Error: the kernel has no such form.
pub fn fused_by(
    cx: &Cx,
    kernel: OwnKernel,
    y: &Tensor,
    operands: (&Tensor, &Tensor, Option<&Tensor>),
    act: Act,
) -> Result<()> {
    match kernel {
        OwnKernel::FewRows => matmul_few::glu(cx, y, operands, act as i32),
        OwnKernel::FewHopper => few_hopper::glu(cx, y, operands, act as i32),
        other => Err(Error::op("linear_glu", format!("no activation behind {}", other.name()))),
    }
}

/// The op without a tape.
#[derive(Debug)]
pub struct LinearGlu {
    pub act: Act,
    pub bias: bool,
}

/// Whether the kernel for few rows computes this.
fn few(cx: &Cx, x: &Tensor) -> bool {
    own_products(cx) && x.dtype() == DType::BF16 && (1..=FEW_ROWS).contains(&x.row_count())
}

impl LinearGlu {
    fn y(&self, cx: &mut Cx, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        self.check(x, w, bias)?;
        let y = cx.real("glu", &[x.row_count(), w.row_count() / 2])?;
        self.write(cx, &y, x, w, bias)?;
        Ok(y)
    }

    /// Writes y [m, f]. Not on the tape.
    pub(super) fn write(
        &self,
        cx: &Cx,
        y: &Tensor,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<()> {
        if few(cx, x) && w.row_count().is_multiple_of(2) {
            return fused_by(cx, of_few_rows(cx, x, w)?, y, (x, w, bias), self.act);
        }
        if linear_glu_hopper::fits(cx, x, w) {
            return linear_glu_hopper::forward(cx, y, None, (x, w, bias), self.act);
        }
        let gate_up = cx.real("linear", &[x.row_count(), w.row_count()])?;
        product(cx, Layout::NT, &gate_up, x, w, bias, false)?;
        Glu { act: self.act }.write(cx, y, &gate_up)
    }

    fn check(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        let hint = "check that the weights belong to this config.json";
        expect_cols("linear_glu", "weight", w, x.cols(), hint)?;
        match bias {
            Some(bias) => expect_cols("linear_glu", "bias", bias, w.row_count(), hint),
            None => Ok(()),
        }
    }

    /// y, and g|u if `keep`.
    pub(super) fn both(
        &self,
        cx: &mut Cx,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        keep: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.check(x, w, bias)?;
        let rows = x.row_count();
        if linear_glu_hopper::fits(cx, x, w) {
            let y = cx.real("glu", &[rows, w.row_count() / 2])?;
            let gate_up =
                if keep { Some(cx.real("linear", &[rows, w.row_count()])?) } else { None };
            linear_glu_hopper::forward(cx, &y, gate_up.as_ref(), (x, w, bias), self.act)?;
            return Ok((y, gate_up));
        }
        let gate_up = cx.real("linear", &[rows, w.row_count()])?;
        product(cx, Layout::NT, &gate_up, x, w, bias, false)?;
        let y = Glu { act: self.act }.of(cx, &gate_up)?;
        Ok((y, keep.then_some(gate_up)))
    }
}

impl Op for LinearGlu {
    fn name(&self) -> &'static str {
        "linear_glu"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let bias = self.bias.then(|| x[2]);
        Ok(Fwd { outputs: vec![self.y(cx, x[0], x[1], bias)?], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let gate_up = Linear { bias: self.bias }.oracle(round, x);
        Glu { act: self.act }.oracle(round, &gate_up)
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, n, k) = (x[0].row_count(), x[1].row_count(), x[0].cols());
        Cost { flops: 2.0 * (m * n * k) as f64, ..Cost::memory(x, m * n / 2 * x[0].dtype().size()) }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (m, f, k, bias, act) in [
        (1, 8, 16, false, Act::Silu),
        (5, 13, 72, true, Act::Silu),
        (17, 36, 200, true, Act::GeluTanh),
        (40, 24, 40, false, Act::Gelu),
        (70, 16, 64, false, Act::Silu),
        (130, 72, 200, true, Act::Gelu),
    ] {
        let weight = rng.array(&[2 * f, k], (k as f64).powf(-0.5));
        let x = rng.array(&[m, k], 1.0);
        let mut inputs = vec![Arg::real(x).no_grad(), Arg::real(weight).no_grad()];
        if bias {
            inputs.push(Arg::real(rng.array(&[2 * f], 0.5)).no_grad());
        }
        let label = format!("{act:?} m {m} f {f} k {k}{}", if bias { " bias" } else { "" });
        cases.push(Case::new(label, LinearGlu { act, bias }, inputs));
    }
    cases
}

/// A decode step.
pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let case = |rng: &mut Rng, m: usize| {
        let x = Arg::real(rng.array(&[m, s.hidden], 1.0)).no_grad();
        let w = Arg::real(rng.array(&[2 * s.intermediate, s.hidden], 0.02)).no_grad();
        let op = LinearGlu { act: Act::Silu, bias: false };
        Case::new(format!("silu, rows {m}"), op, vec![x, w])
    };
    vec![case(rng, 1), case(rng, FEW_ROWS)]
}
