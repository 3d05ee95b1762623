//! A norm and the linear layer behind it, with its gated activation if it has one: one launch for
//! the few rows of a decoding step on Hopper. Layer 4.
//!
//! Invariant: the bits are those of the norm, `linear` and `glu`. Math and numerics:
//! `kernels/matmul_few_hopper.cu`, `kernels/rmsnorm.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::Layout;
use crate::error::{Error, Result};
use crate::ops::activation::{Act, Glu};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::library::{self, NormProduct, Way};
use crate::ops::linear_glu::LinearGlu;
use crate::ops::matmul::{Linear, product};
use crate::ops::mlp::DenseLayer;
use crate::ops::own::own_products;
use crate::ops::rmsnorm::{Norm, NormInput, NormWeight, norm_rows};
use crate::ops::{expect_cols, few_hopper};
use crate::tensor::Tensor;

impl NormInput<'_> {
    /// Whether the norm can be computed in front of a product with `w`.
    pub fn fits(&self, cx: &Cx, w: &Tensor) -> bool {
        cx.tape.is_none() && own_products(cx) && few_hopper::norm_instance(cx, self, w).is_some()
    }
}

/// `linear`, or with `act` `linear_glu`, of the normed rows, and the sum (x if there is no
/// residual). Not on the tape. For rows without [`NormInput::fits`] the ops by themselves release
/// memory earlier.
pub fn norm_linear(
    cx: &mut Cx,
    input: NormInput,
    layer: DenseLayer,
    act: Option<Act>,
) -> Result<(Tensor, Tensor)> {
    let (residual, bias) = (input.residual.is_some(), layer.bias.is_some());
    let op = NormLinear { norm: input.norm, act, residual, bias };
    let mut inputs = vec![input.x, input.weight, layer.weight];
    inputs.extend(input.residual);
    inputs.extend(layer.bias);
    let mut out = cx.apply(op, &inputs)?;
    let sum = if residual { out.pop() } else { Some(input.x.clone()) };
    match (out.pop(), sum) {
        (Some(y), Some(sum)) => Ok((y, sum)),
        _ => Err(Error::op("norm_linear", "gave no outputs")),
    }
}

/// The kernel that has the norm in front of the product. Error: it does not take these tensors.
pub fn fused(
    cx: &Cx,
    y: &Tensor,
    sum: Option<&Tensor>,
    input: NormInput,
    layer: DenseLayer,
    act: Option<Act>,
) -> Result<()> {
    few_hopper::normed(cx, y, sum, input, (layer.weight, layer.bias), act.map(|act| act as i32))
}

/// The op without a tape. Inputs: x, the norm's weight, the layer's weight, then the residual and the
/// bias. Outputs: y, and the sum if there is a residual.
#[derive(Debug)]
pub struct NormLinear {
    pub norm: Norm,
    pub act: Option<Act>,
    pub residual: bool,
    pub bias: bool,
}

const X: usize = 0;
const NORM: usize = 1;
const WEIGHT: usize = 2;

impl NormLinear {
    fn bias<'a>(&self, x: &[&'a Tensor]) -> Option<&'a Tensor> {
        self.bias.then(|| x[3 + usize::from(self.residual)])
    }

    /// Whether the kernel with the norm in front is the faster one here.
    fn fuses(&self, cx: &Cx, p: &NormProduct) -> Result<bool> {
        if !p.input.fits(cx, p.w) {
            return Ok(false);
        }
        let apart = |p: &NormProduct| self.apart(cx, p);
        let front = |p: &NormProduct| self.front(cx, p);
        let ways: [&Way; 2] = [&apart, &front];
        library::norm_in_front(cx, p, self.act.is_some(), ways)
    }

    /// By two kernels. Returns the sum, if there is a residual.
    fn apart(&self, cx: &Cx, p: &NormProduct) -> Result<Option<Tensor>> {
        let NormInput { x, residual, weight, norm } = p.input;
        let (rows, sum) = norm_rows(cx, x, residual, weight, norm)?;
        match self.act {
            None => product(cx, Layout::NT, p.y, &rows, p.w, p.bias, false)?,
            Some(act) => LinearGlu { act, bias: self.bias }.write(cx, p.y, &rows, p.w, p.bias)?,
        }
        Ok(sum)
    }

    /// By one kernel.
    fn front(&self, cx: &Cx, p: &NormProduct) -> Result<Option<Tensor>> {
        let NormInput { x, residual, .. } = p.input;
        let sum = residual.map(|_| cx.real("residual", x.shape())).transpose()?;
        let layer = DenseLayer { weight: p.w, bias: p.bias };
        fused(cx, p.y, sum.as_ref(), p.input, layer, self.act)?;
        Ok(sum)
    }
}

impl Op for NormLinear {
    fn name(&self) -> &'static str {
        "norm_linear"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (weight, w) = (x[NORM], x[WEIGHT]);
        let (residual, bias) = (self.residual.then(|| x[3]), self.bias(x));
        let (m, k) = (x[X].row_count(), x[X].cols());
        let hint = "check that the weights belong to this config.json";
        expect_cols("norm_linear", "the norm's weight", weight, k, hint)?;
        expect_cols("norm_linear", "weight", w, k, hint)?;
        if let Some(bias) = bias {
            expect_cols("norm_linear", "bias", bias, w.row_count(), hint)?;
        }
        let y = match self.act {
            Some(_) => cx.real("glu", &[m, w.row_count() / 2])?,
            None => cx.real("linear", &[m, w.row_count()])?,
        };
        let input = NormInput { x: x[X], residual, weight, norm: self.norm };
        let p = NormProduct { input, w, bias, y: &y };
        let sum = if self.fuses(cx, &p)? { self.front(cx, &p)? } else { self.apart(cx, &p)? };
        Ok(Fwd { outputs: [Some(y), sum].into_iter().flatten().collect(), saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let mut sum = x[X].clone();
        if self.residual {
            sum = F64::from_fn(&x[X].shape, |i| round.at(x[X].data[i] + x[3].data[i]));
        }
        let mut rows = sum.clone();
        for r in 0..rows.row_count() {
            self.norm.oracle(round, rows.row_mut(r), &x[NORM].data);
        }
        let mut inputs = vec![rows, x[WEIGHT].clone()];
        inputs.extend(self.bias.then(|| x[3 + usize::from(self.residual)].clone()));
        let mut y = Linear { bias: self.bias }.oracle(round, &inputs);
        if let Some(act) = self.act {
            y = Glu { act }.oracle(round, &y);
        }
        y.extend(self.residual.then_some(sum));
        y
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, n, k) = (x[X].row_count(), x[WEIGHT].row_count(), x[X].cols());
        let columns = if self.act.is_some() { n / 2 } else { n };
        let size = x[X].dtype().size();
        let written = m * columns * size + if self.residual { x[X].bytes() } else { 0 };
        Cost { flops: 2.0 * (m * n * k) as f64, ..Cost::memory(x, written) }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (m, n, k, residual, bias, act) in [
        (1, 24, 64, false, false, None),
        (1, 40, 896, true, true, None),
        (8, 33, 136, true, false, None),
        (3, 16, 1032, false, true, None),
        (1, 26, 72, true, false, Some(Act::Silu)),
        (5, 80, 1536, true, true, Some(Act::GeluTanh)),
        (8, 34, 200, false, false, Some(Act::Gelu)),
        (9, 24, 64, true, false, None),
        (2, 24, 20, true, false, Some(Act::Silu)),
    ] {
        let weight = match n % 3 {
            0 => NormWeight::Rounded,
            1 => NormWeight::Once,
            _ => NormWeight::PlusOne,
        };
        let norm = Norm { eps: 1e-5, weight };
        let mut inputs = vec![
            rng.array(&[m, k], 1.0),
            F64::from_fn(&[k], |_| 1.0 + 0.3 * rng.normal()),
            rng.array(&[n, k], (k as f64).powf(-0.5)),
        ];
        inputs.extend(residual.then(|| rng.array(&[m, k], 1.0)));
        inputs.extend(bias.then(|| rng.array(&[n], 0.5)));
        let label =
            format!("m {m} n {n} k {k} residual {residual} bias {bias}, {act:?}, {weight:?}");
        let inputs = inputs.into_iter().map(|array| Arg::real(array).no_grad()).collect();
        cases.push(Case::new(label, NormLinear { norm, act, residual, bias }, inputs));
    }
    cases
}

/// The layers of a decoding step that have a norm in front of them.
pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let norm = Norm::new(1e-6);
    let case = |rng: &mut Rng, m: usize, n: usize, act: Option<Act>| {
        let x = Arg::real(rng.array(&[m, s.hidden], 1.0)).no_grad();
        let ones = Arg::real(F64::from_fn(&[s.hidden], |_| 1.0)).no_grad();
        let w = Arg::real(rng.array(&[n, s.hidden], 0.02)).no_grad();
        let op = NormLinear { norm, act, residual: true, bias: false };
        let name = if act.is_some() { "gated unit" } else { "qkv" };
        Case::new(format!("{name}, rows {m}"), op, vec![x.clone(), ones, w, x])
    };
    [1, 8]
        .into_iter()
        .flat_map(|m| [(m, s.qkv(), None), (m, 2 * s.intermediate, Some(Act::Silu))])
        .map(|(m, n, act)| case(rng, m, n, act))
        .collect()
}
