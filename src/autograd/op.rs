//! What an op is: forward, backward, an f64 oracle and a cost. Layer 3.
//!
//! Invariant: forward and backward are written together, and the oracle is their definition.

use std::fmt::Debug;

use super::context::Cx;
use super::oracle::{F64, Round};
use super::tape::{Grads, Node};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Whether a tape records, and which inputs need gradients.
pub struct Need {
    pub tape: bool,
    pub inputs: Vec<bool>,
}

/// The result of a forward: its outputs, and the tensors that its backward needs.
pub struct Fwd {
    pub outputs: Vec<Tensor>,
    pub saved: Vec<Tensor>,
}

/// The gradients of a node's outputs. None: zero.
pub type Upstream = [Option<Tensor>];

pub trait Op: Debug + Send + Sync {
    fn name(&self) -> &'static str;

    /// Checks shapes and runs the kernels. `saved` may be empty unless `need.tape`.
    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd>;

    /// Writes the gradients of the inputs that need one into `g`, from the gradients `dy` of the
    /// outputs (None: zero).
    fn backward(&self, _cx: &mut Cx, _node: &Node, _dy: &Upstream, _g: &mut Grads) -> Result<()> {
        Err(Error::op(self.name(), "is a state writer and has no backward"))
    }

    /// Whether [`Op::recompute_output`] can recompute output `k` in about the time of a copy.
    fn recomputes_output(&self, _k: usize) -> bool {
        false
    }

    /// Recomputes output `k`, bit for bit, from what the forward saved in `node`.
    fn recompute_output(&self, _cx: &mut Cx, _node: &Node, k: usize) -> Result<Tensor> {
        Err(Error::op(self.name(), format!("does not recompute output {k}")))
    }

    /// The definition, in naive f64. `round` is applied wherever the kernel's Numerics section says
    /// that a value is stored.
    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64>;

    /// Bytes moved and flops of a forward without a tape on these inputs, for rooflines.
    fn cost(&self, x: &[&Tensor]) -> Cost;
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    pub bytes: f64,
    pub flops: f64,
}

impl Cost {
    /// Cost of a memory-bound op: each input is read once and `written` bytes are written.
    pub fn memory(x: &[&Tensor], written: usize) -> Cost {
        Cost { bytes: (x.iter().map(|t| t.bytes()).sum::<usize>() + written) as f64, flops: 0.0 }
    }
}
