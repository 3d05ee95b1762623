//! Muon's update of a matrix: momentum, Newton-Schulz orthogonalisation, step. Layer 4.
//!
//! Invariant: nothing is read back to the host; whatever changes from step to step is in device
//! memory. Math, order of operations and sources: `kernels/muon.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round, flat};
use crate::device::{DType, Launch, Layout};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::adamw::case_copy;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::matmul::product;
use crate::ops::same_length;
use crate::tensor::Tensor;

/// The quintic of a Newton-Schulz step, and the lower bound of the norm that a matrix is divided
/// by.
const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);
const EPS: f32 = 1e-7;

/// The constants of a matrix's step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    pub momentum: f32,
    pub nesterov: bool,
    pub ns_steps: usize,
    pub weight_decay: f32,
    /// The matrix's learning rate as a multiple of the step's.
    pub lr_scale: f32,
    /// Factor of the learning rate in the orthogonalised update, but not in the weight decay.
    pub adjust: f32,
}

/// A matrix [rows, cols] and its state: float values (in a float run the weights themselves), the
/// weights that kernels read, the momentum, the gradient.
pub struct MuonSlice<'a> {
    pub master: &'a Tensor,
    pub weight: &'a Tensor,
    pub m: &'a Tensor,
    pub grad: &'a Tensor,
}

/// One step of Muon; `hyper` as returned by [`crate::ops::adamw::hyper`].
pub fn muon(cx: &Cx, c: &Muon, s: &MuonSlice, hyper: &Tensor) -> Result<()> {
    same_length("muon", s.weight, [s.master, s.m, s.grad])?;
    let n = s.weight.numel() as i64;
    let x = cx.real("newton-schulz", s.weight.shape())?;
    let args = kernels::MuonMomentumArgs {
        m: s.m.out(),
        x: x.out(),
        g: s.grad,
        hyper,
        n,
        momentum: c.momentum,
        nesterov: i32::from(c.nesterov),
    };
    kernels::muon_momentum(&*cx.device, flat(s.weight), args)?;
    orthogonalise(cx, &x, c.ns_steps)?;
    let args = kernels::MuonUpdateArgs {
        p: s.master.out(),
        w: s.weight.out(),
        x: &x,
        hyper,
        n,
        weight_decay: c.weight_decay,
        lr_scale: c.lr_scale,
        adjust: c.adjust,
    };
    kernels::muon_update(&*cx.device, flat(s.weight), args)
}

/// Moves the singular values of x [rows, cols] real towards 1, in place, with `steps` Newton-Schulz
/// steps.
pub fn orthogonalise(cx: &Cx, x: &Tensor, steps: usize) -> Result<()> {
    let &[rows, cols] = x.shape() else {
        return Err(Error::op("muon", format!("{x:?} is not a matrix")));
    };
    let n = x.numel();
    let chunks = n.div_ceil(kernels::MUON_CHUNK).max(1);
    let partial = cx.scratch("newton-schulz", DType::F32, &[chunks])?;
    let args = kernels::MuonSquaresArgs { partial: partial.out(), x, n: n as i64 };
    kernels::muon_squares(&*cx.device, Launch::warps(chunks), args)?;
    let norm = cx.scratch("newton-schulz", DType::F32, &[1])?;
    let args = kernels::MuonNormArgs {
        norm: norm.out(),
        partial: &partial,
        chunks: chunks as i32,
        eps: EPS,
    };
    kernels::muon_norm(&*cx.device, Launch::warps(1), args)?;
    let args = kernels::MuonDivideArgs { x: x.out(), norm: &norm, n: n as i64 };
    kernels::muon_divide(&*cx.device, flat(x), args)?;

    let (a, b, c) = COEFFICIENTS;
    let side = rows.min(cols);
    let gram = cx.real("newton-schulz", &[side, side])?;
    let square = cx.scratch("newton-schulz", DType::F32, &[side, side])?;
    let moved = cx.scratch("newton-schulz", DType::F32, &[rows, cols])?;
    let tall = rows > cols;
    for _ in 0..steps {
        let layout = if tall { Layout::TN } else { Layout::NT };
        product(cx, layout, &gram, x, x, None, false)?;
        product(cx, Layout::NN, &square, &gram, &gram, None, false)?;
        blend(cx, &gram, &square, b, c)?;
        match tall {
            true => product(cx, Layout::NN, &moved, x, &gram, None, false)?,
            false => product(cx, Layout::NN, &moved, &gram, x, None, false)?,
        }
        blend(cx, x, &moved, a, 1.0)?;
    }
    Ok(())
}

/// `x = a x + b s`
fn blend(cx: &Cx, x: &Tensor, s: &Tensor, a: f32, b: f32) -> Result<()> {
    let args = kernels::MuonBlendArgs { x: x.out(), s, a, b, n: x.numel() as i64 };
    kernels::muon_blend(&*cx.device, flat(x), args)
}

/// `op(a) op(b)` of matrices in f64.
fn dot(a: &F64, b: &F64, transposed: (bool, bool)) -> F64 {
    let size = |m: &F64, t: bool| match t {
        true => (m.cols(), m.row_count()),
        false => (m.row_count(), m.cols()),
    };
    let ((m, k), (_, n)) = (size(a, transposed.0), size(b, transposed.1));
    let at = |m: &F64, t: bool, i: usize, j: usize| if t { m.row(j)[i] } else { m.row(i)[j] };
    F64::from_fn(&[m, n], |e| {
        (0..k).map(|l| at(a, transposed.0, e / n, l) * at(b, transposed.1, l, e % n)).sum()
    })
}

/// [`orthogonalise`] in f64, rounded where Numerics says.
fn orthogonalised(round: Round, u: &F64, steps: usize) -> F64 {
    let f = |v: f32| f64::from(v);
    let (a, b, c) = (f(COEFFICIENTS.0), f(COEFFICIENTS.1), f(COEFFICIENTS.2));
    let rounded =
        |m: &F64, value: &dyn Fn(usize) -> f64| F64::from_fn(&m.shape, |i| round.at(value(i)));
    let x = rounded(u, &|i| u.data[i]);
    let norm = x.data.iter().map(|v| v * v).sum::<f64>().sqrt().max(f(EPS));
    let mut x = rounded(&x, &|i| x.data[i] / norm);
    let tall = x.row_count() > x.cols();
    for _ in 0..steps {
        let gram = dot(&x, &x, (tall, !tall));
        let gram = rounded(&gram, &|i| gram.data[i]);
        let square = dot(&gram, &gram, (false, false));
        let gram = rounded(&gram, &|i| b * gram.data[i] + c * square.data[i]);
        let moved =
            if tall { dot(&x, &gram, (false, false)) } else { dot(&gram, &x, (false, false)) };
        x = rounded(&x, &|i| a * x.data[i] + moved.data[i]);
    }
    x
}

/// The op form of [`orthogonalise`], for the registry: input u real; output X.
#[derive(Debug)]
struct Orthogonalise {
    steps: usize,
}

impl Op for Orthogonalise {
    fn name(&self) -> &'static str {
        "orthogonalise"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let y = cx.real("newton-schulz", x[0].shape())?;
        y.copy_from(x[0])?;
        orthogonalise(cx, &y, self.steps)?;
        Ok(Fwd { outputs: vec![y], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![orthogonalised(round, &x[0], self.steps)]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (r, c) = (x[0].row_count() as f64, x[0].cols() as f64);
        let side = r.min(c);
        let flops = self.steps as f64 * (4.0 * side * r * c + 2.0 * side * side * side);
        Cost { flops, ..Cost::memory(x, x[0].bytes()) }
    }
}

/// The op form of [`fn@muon`]: inputs p, m, g float, hyper; outputs p, w, m.
#[derive(Debug)]
struct MuonStep(Muon);

impl Op for MuonStep {
    fn name(&self) -> &'static str {
        "muon"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (p, m) = (case_copy(cx, x[0])?, case_copy(cx, x[1])?);
        let w = cx.real("muon case", x[0].shape())?;
        w.zero()?;
        muon(cx, &self.0, &MuonSlice { master: &p, weight: &w, m: &m, grad: x[2] }, x[3])?;
        Ok(Fwd { outputs: vec![p, w, m], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let (c, f) = (&self.0, |v: f32| f64::from(v));
        let (lr, clip) = (x[3].data[0] * f(c.lr_scale), x[3].data[4]);
        let m = F64::from_fn(&x[1].shape, |i| {
            x[1].data[i] + (1.0 - f(c.momentum)) * (clip * x[2].data[i] - x[1].data[i])
        });
        let u = F64::from_fn(&m.shape, |i| {
            let g = clip * x[2].data[i];
            if c.nesterov { g + f(c.momentum) * (m.data[i] - g) } else { m.data[i] }
        });
        let o = orthogonalised(round, &u, c.ns_steps);
        let p = F64::from_fn(&m.shape, |i| {
            x[0].data[i] * (1.0 - lr * f(c.weight_decay)) - lr * f(c.adjust) * o.data[i]
        });
        let w = F64::from_fn(&p.shape, |i| round.at(p.data[i]));
        vec![p, w, m]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let matrix = [x[0]];
        let products = Orthogonalise { steps: self.0.ns_steps }.cost(&matrix);
        Cost { bytes: 22.0 * x[0].numel() as f64 + products.bytes, flops: products.flops }
    }
}

const CASE: Muon = Muon {
    momentum: 0.95,
    nesterov: true,
    ns_steps: 5,
    weight_decay: 0.1,
    lr_scale: 0.5,
    adjust: 1.5,
};

/// p, m, g and the scalars as in the middle of training; a learning rate of 1 makes the update
/// visible beside p.
fn step_inputs(rng: &mut Rng, shape: &[usize]) -> Vec<Arg> {
    let hyper = F64::new(&[8], vec![1.0, 1.0, 1.0, 2.0, 0.5, 0.0, 0.0, 0.0]);
    let arrays = [rng.array(shape, 0.1), rng.array(shape, 0.1), rng.array(shape, 1.0), hyper];
    arrays.into_iter().map(Arg::float).collect()
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, cols, nesterov) in
        [(1, 1, true), (5, 3, false), (24, 40, true), (33, 17, true), (8, 130, false)]
    {
        let label = format!("rows {rows} cols {cols} nesterov {nesterov}");
        let step = MuonStep(Muon { nesterov, ..CASE });
        cases.push(Case::new(label, step, step_inputs(rng, &[rows, cols])));
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let inputs = step_inputs(rng, &[s.intermediate, s.hidden]);
    vec![Case::new("with copies of the inputs", MuonStep(CASE), inputs)]
}

pub fn orthogonalise_cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, cols, steps) in
        [(1, 1, 5), (1, 9, 5), (7, 5, 1), (16, 16, 5), (48, 20, 5), (20, 70, 5), (64, 130, 3)]
    {
        let u = Arg::real(rng.array(&[rows, cols], 1.0)).no_grad();
        let label = format!("rows {rows} cols {cols} steps {steps}");
        cases.push(Case::new(label, Orthogonalise { steps }, vec![u]));
    }
    // A zero matrix: the gradient of LoRA's A while B is zero.
    let zero = Arg::real(F64::zeros(&[6, 4])).no_grad();
    cases.push(Case::new("zero", Orthogonalise { steps: 5 }, vec![zero]));
    cases
}

pub fn orthogonalise_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let u = Arg::real(rng.array(&[s.intermediate, s.hidden], 1.0)).no_grad();
    vec![Case::new("up projection", Orthogonalise { steps: 5 }, vec![u])]
}
