//! Test and performance cases of ops, and the variants of running an op that are checked. Layer 4.
//!
//! Invariant: a case is small enough for a naive oracle; ragged sizes are included.

use std::sync::Arc;

use crate::autograd::{F64, Op};
use crate::config::{AttentionChoice, MatmulChoice};
use crate::device::{DType, Device};

/// The storage of a case's input on the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// The storage dtype under test.
    Real,
    /// Always f32.
    Float,
    Int,
}

/// One input of a case.
#[derive(Clone, Debug)]
pub struct Arg {
    pub value: F64,
    pub kind: Kind,
    /// Whether its gradient is checked.
    pub grad: bool,
    /// Whether it is a parameter: its gradient is f32 and accumulates in an arena.
    pub param: bool,
}

impl Arg {
    pub fn real(value: F64) -> Arg {
        Arg { value, kind: Kind::Real, grad: true, param: false }
    }

    pub fn param(value: F64) -> Arg {
        Arg { value, kind: Kind::Real, grad: true, param: true }
    }

    pub fn float(value: F64) -> Arg {
        Arg { value, kind: Kind::Float, grad: false, param: false }
    }

    /// F32 with a checked gradient.
    pub fn watched(value: F64) -> Arg {
        Arg { grad: true, ..Arg::float(value) }
    }

    pub fn ints(values: &[i32]) -> Arg {
        let value = F64::new(&[values.len()], values.iter().map(|v| f64::from(*v)).collect());
        Arg { value, kind: Kind::Int, grad: false, param: false }
    }

    pub fn no_grad(mut self) -> Arg {
        self.grad = false;
        self
    }
}

/// One set of inputs of an op.
pub struct Case {
    pub label: String,
    pub op: Arc<dyn Op>,
    pub inputs: Vec<Arg>,
    /// Compare bit for bit: a copy or a gather.
    pub exact: bool,
    /// Indices of outputs to leave out of the comparison, such as an argmax among near ties.
    pub skip: Vec<usize>,
    /// Upstream gradient of each output: a constant where the op needs one, else None for a random
    /// one. Empty: all random.
    pub upstream: Vec<Option<f64>>,
    /// Number of bf16 roundings on the longest path from an input to a gradient; scales the
    /// gradient tolerance.
    pub roundings: f64,
}

impl Case {
    pub fn new(label: impl Into<String>, op: impl Op + 'static, inputs: Vec<Arg>) -> Case {
        Case {
            label: label.into(),
            op: Arc::new(op),
            inputs,
            exact: false,
            skip: Vec::new(),
            upstream: Vec::new(),
            roundings: 4.0,
        }
    }
}

/// A choice of kernels under which an op is checked separately.
#[derive(Clone, Copy)]
pub struct Variant {
    pub name: &'static str,
    pub dtypes: &'static [DType],
    pub matmul: MatmulChoice,
    pub attention: AttentionChoice,
}

impl Variant {
    /// Whether the device supports the variant. A CPU supports all.
    pub fn runs_on(&self, device: &dyn Device) -> bool {
        let device = device.capabilities();
        self.attention != AttentionChoice::Wgmma || device.wgmma || !device.tensor_cores
    }
}

pub const DEFAULT: Variant = Variant {
    name: "",
    dtypes: &[DType::F32, DType::BF16],
    matmul: MatmulChoice::Auto,
    attention: AttentionChoice::Auto,
};
/// For ops that exist in float only.
pub const ONE_DTYPE: Variant = Variant { dtypes: &[DType::F32], ..DEFAULT };
pub const OWN_MATMUL: Variant =
    Variant { name: "own kernel", matmul: MatmulChoice::Own, ..DEFAULT };
pub const SIMT: Variant = Variant { name: "simt", attention: AttentionChoice::Simt, ..DEFAULT };
pub const TENSOR_CORE: Variant = Variant {
    name: "tensor core",
    dtypes: &[DType::BF16],
    attention: AttentionChoice::TensorCore,
    ..DEFAULT
};

/// `TENSOR_CORE` with the Hopper kernels for the head sizes that have them.
pub const WGMMA: Variant =
    Variant { name: "wgmma", attention: AttentionChoice::Wgmma, ..TENSOR_CORE };

/// The sizes of performance cases: a batch of a model.
#[derive(Clone, Copy, Debug)]
pub struct PerfShape {
    pub sequences: usize,
    /// Tokens of each sequence.
    pub length: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
}

impl PerfShape {
    pub fn tokens(&self) -> usize {
        self.sequences * self.length
    }

    /// Columns of q | k | v.
    pub fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Generator of test data: small and counter-based, with the same numbers on every machine.
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let r = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        r * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Normal numbers; beyond 2^20 values, in performance cases, the same block repeats.
    pub fn array(&mut self, shape: &[usize], scale: f64) -> F64 {
        let numel: usize = shape.iter().product();
        let block: Vec<f64> = (0..numel.min(1 << 20)).map(|_| scale * self.normal()).collect();
        F64::new(shape, block.iter().copied().cycle().take(numel).collect())
    }
}
