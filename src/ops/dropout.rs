//! Dropout with counter-based random numbers. Layer 4.
//!
//! Invariant: the mask is a function of (seed, step, micro-step, site, index): the backward and a
//! recomputation generate it again, nothing is saved. Kernel: `kernels/dropout.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Launch;
use crate::error::Result;
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::rng::{DROPOUT_TAG, philox, uniform};
use crate::tensor::Tensor;

/// `x / (1 - p)` where kept, 0 where dropped with probability `p` in [0, 1); p = 0 is the identity.
pub fn dropout(cx: &mut Cx, x: &Tensor, p: f32) -> Result<Tensor> {
    if p == 0.0 {
        return Ok(x.clone());
    }
    let site = cx.next_site();
    let key = cx.rng.clone();
    cx.apply1(Dropout { p, site }, &[x, &key])
}

#[derive(Debug)]
pub struct Dropout {
    pub p: f32,
    pub site: u32,
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let y = cx.real("dropout", x[0].shape())?;
        self.run(cx, &y, x[0], x[1], false)?;
        Ok(Fwd { outputs: vec![y], saved: vec![x[1].clone()] })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let (Some(dy), Some((dx, accumulate))) = (&dy[0], g.slot(0)?) else { return Ok(()) };
        self.run(cx, &dx, dy, &node.saved[0], accumulate)
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let key = [0, 1, 2, 3].map(|i| x[1].data[i] as i32 as u32);
        let scale = f64::from(1.0 / (1.0 - self.p));
        vec![F64::from_fn(&x[0].shape, |i| {
            let drawn =
                philox([key[0], key[1]], [(i / 4) as u32, key[2], key[3], self.site | DROPOUT_TAG]);
            if uniform(drawn[i % 4]) >= self.p { round.at(x[0].data[i] * scale) } else { 0.0 }
        })]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(&x[..1], x[0].bytes())
    }
}

impl Dropout {
    fn run(&self, cx: &Cx, y: &Tensor, x: &Tensor, key: &Tensor, accumulate: bool) -> Result<()> {
        let n = x.numel();
        let args = kernels::DropoutArgs {
            y: y.out(),
            x,
            key,
            site: self.site as i32,
            p: self.p,
            n: n as i64,
            accumulate: i32::from(accumulate),
        };
        kernels::dropout(&*cx.device, Launch::flat(n.div_ceil(kernels::DROPOUT_PACK)), args)
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    [(5, 0.1f32), (1000, 0.5)]
        .into_iter()
        .map(|(n, p)| {
            let inputs = vec![Arg::real(rng.array(&[n], 1.0)), Arg::ints(&[12345, -7, 3, 0])];
            Case::new(format!("n {n} p {p}"), Dropout { p, site: 5 }, inputs)
        })
        .collect()
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let x = Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0));
    vec![Case::new("p 0.1", Dropout { p: 0.1, site: 0 }, vec![x, Arg::ints(&[1, 2, 3, 0])])]
}
