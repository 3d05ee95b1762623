//! AdamW with moments in 8 bits, block by block. Layer 4.
//!
//! Invariant: a block of 256 counts from the start of its range, so a range's codes do not depend
//! on its neighbours. Math, order of operations and source: `kernels/adamw8.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::adamw::{AdamW, CASE, Slice, case_copy, case_inputs, exact_step};
use crate::ops::case::{Case, PerfShape, Rng};
use crate::ops::quant::{
    BLOCK8, blockwise8_dequantise, blockwise8_quantise, dynamic_map, dynamic_map_tensor,
};
use crate::tensor::Tensor;

/// The two maps that all ranges share: with negative values for m, without for v.
#[derive(Clone, Debug)]
pub struct Maps {
    pub m: Tensor,
    pub v: Tensor,
}

impl Maps {
    pub fn new(cx: &Cx) -> Result<Maps> {
        Ok(Maps { m: dynamic_map_tensor(cx, true)?, v: dynamic_map_tensor(cx, false)? })
    }
}

/// One range of an arena. Its m and v are U8 codes, with one float scale for each 256 of them.
pub struct Slice8<'a> {
    pub values: Slice<'a>,
    pub m_absmax: &'a Tensor,
    pub v_absmax: &'a Tensor,
}

/// One AdamW step of a range.
pub fn adamw8(cx: &Cx, group: &AdamW, x: &Slice8, maps: &Maps, hyper: &Tensor) -> Result<()> {
    let (s, n) = (&x.values, x.values.length("adamw8")?);
    let blocks = n.div_ceil(BLOCK8);
    if [x.m_absmax, x.v_absmax].iter().any(|t| t.numel() != blocks) {
        let message = format!("{:?} needs {blocks} scales of each moment", s.weight);
        return Err(Error::op("adamw8", message));
    }
    let args = kernels::Adamw8Args {
        p: s.master.map(|t| t.out()),
        w: s.weight.out(),
        m: s.m.out(),
        v: s.v.out(),
        m_absmax: x.m_absmax.out(),
        v_absmax: x.v_absmax.out(),
        m_map: &maps.m,
        v_map: &maps.v,
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
    kernels::adamw8(&*cx.device, Launch::warps(blocks), usize::from(s.master.is_none()), args)
}

/// The op form, for the registry: inputs p, m, v (float), g, hyper; outputs p, w, and the moments
/// as codes, scales and values. Compared bit for bit.
#[derive(Debug)]
struct AdamW8Step(AdamW);

impl Op for AdamW8Step {
    fn name(&self) -> &'static str {
        "adamw8"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let maps = Maps::new(cx)?;
        let (p, w) = (case_copy(cx, x[0])?, cx.real("adamw case", x[0].shape())?);
        let (m, m_absmax) = blockwise8_quantise(cx, x[1], None, &maps.m)?;
        let (v, v_absmax) = blockwise8_quantise(cx, x[2], None, &maps.v)?;
        let values = Slice { master: Some(&p), weight: &w, m: &m, v: &v, grad: x[3] };
        let slice = Slice8 { values, m_absmax: &m_absmax, v_absmax: &v_absmax };
        adamw8(cx, &self.0, &slice, &maps, x[4])?;
        let m_values = blockwise8_dequantise(cx, &m, &m_absmax, &maps.m)?;
        let v_values = blockwise8_dequantise(cx, &v, &v_absmax, &maps.v)?;
        Ok(Fwd { outputs: vec![p, w, m, m_absmax, m_values, v, v_absmax, v_values], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let n = x[0].data.len();
        let (signed, unsigned) = (dynamic_map(true), dynamic_map(false));
        let single = |a: &F64| -> Vec<f32> { a.data.iter().map(|v| *v as f32).collect() };
        let values = |codes: &[u8], absmax: &[f32], map: &[f32]| -> Vec<f32> {
            codes
                .iter()
                .enumerate()
                .map(|(i, c)| map[usize::from(*c)] * absmax[i / BLOCK8])
                .collect()
        };
        let quantised =
            |x: &[f32], map: &[f32]| crate::ops::quant::blockwise_oracle(x, map, BLOCK8);
        let start = |x: &F64, map: &[f32]| {
            let (codes, absmax) = quantised(&single(x), map);
            values(&codes, &absmax, map)
        };
        let (mut p, g) = (single(&x[0]), single(&x[3]));
        let (mut m, mut v) = (start(&x[1], &signed), start(&x[2], &unsigned));
        for i in 0..n {
            (p[i], m[i], v[i]) = exact_step(&self.0, &x[4].data, p[i], m[i], v[i], g[i]);
        }
        let floats = |a: &[f32]| F64::new(&[a.len()], a.iter().map(|v| f64::from(*v)).collect());
        let mut out = vec![floats(&p), F64::from_fn(&[n], |i| round.at(f64::from(p[i])))];
        for (moment, map) in [(m, signed), (v, unsigned)] {
            let (codes, absmax) = quantised(&moment, &map);
            out.push(F64::new(&[n], codes.iter().map(|c| f64::from(*c)).collect()));
            out.extend([floats(&absmax), floats(&values(&codes, &absmax, &map))]);
        }
        out
    }

    /// Assumes a BF16 weight.
    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: (18 * x[0].numel()) as f64, flops: 0.0 }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    [1, 37, 256, 700]
        .into_iter()
        .map(|n| {
            let mut case = Case::new(format!("n {n}"), AdamW8Step(CASE), case_inputs(rng, n));
            case.exact = true;
            case
        })
        .collect()
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let inputs = case_inputs(rng, s.hidden * s.intermediate);
    vec![Case::new("with moments quantised before", AdamW8Step(CASE), inputs)]
}
