//! Attention over packed sequences, with its gradient. Layer 4.
//!
//! Invariant: a row attends to its own sequence alone, in blocks of 64 positions from left to
//! right.

use std::sync::Arc;

use super::plan::AttnPlan;
use super::shape::AttnShape;
use super::{launch, oracle};
use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Softmax attention of each row of `qkv` [N, (H + 2K) D] real (q | k | v, rope applied) over
/// itself and the earlier rows of its sequence, as `plan` defines; [N, H D] real. Error if the
/// widths do not match or D has no kernel.
pub fn attention(
    cx: &mut Cx,
    qkv: &Tensor,
    plan: &Arc<AttnPlan>,
    shape: AttnShape,
) -> Result<Tensor> {
    cx.apply1(Attention { plan: plan.clone(), shape }, &[qkv])
}

#[derive(Debug)]
pub struct Attention {
    pub plan: Arc<AttnPlan>,
    pub shape: AttnShape,
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let (qkv, shape) = (x[0], &self.shape);
        let n = shape.numbers("attention", qkv)?;
        if qkv.row_count() != self.plan.rows {
            let message = format!("{qkv:?} and a plan of {} rows", self.plan.rows);
            return Err(Error::op("attention", message));
        }
        let out = cx.real("attention", &[self.plan.rows, shape.heads * shape.head_dim])?;
        let lse = if need.tape {
            Some(cx.float("attention lse", &[self.plan.rows, shape.heads])?)
        } else {
            None
        };
        launch::forward(cx, &n, &out, lse.as_ref(), qkv, &self.plan)?;
        let saved = lse.map_or(Vec::new(), |lse| vec![qkv.clone(), out.clone(), lse]);
        Ok(Fwd { outputs: vec![out], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dout) = &dy[0] else { return Ok(()) };
        let Some((dqkv, accumulate)) = g.slot(0)? else { return Ok(()) };
        let (qkv, out, lse) = (&node.saved[0], &node.saved[1], &node.saved[2]);
        if dqkv.stride() != qkv.stride() || !dout.is_contiguous() {
            let message = format!("a gradient {dqkv:?} of {qkv:?} that is laid out otherwise");
            return Err(Error::op("attention", message));
        }
        let n = self.shape.numbers("attention", qkv)?;
        launch::backward(cx, &n, &dqkv, dout, [qkv, out, lse], &self.plan, accumulate)
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        vec![oracle::packed(round, &self.shape, &self.plan, &x[0])]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let width = self.shape.heads * self.shape.head_dim;
        let flops = 4.0 * self.plan.pairs * width as f64;
        Cost { flops, ..Cost::memory(x, self.plan.rows * width * x[0].dtype().size()) }
    }
}
