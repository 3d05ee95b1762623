//! Ops: one file each here, one `.cu` in `kernels/`, one line in [`registry`]. Floor 2.
//!
//! Invariant: forward and backward are born together, with a naive f64 reference. Tests, `temper check`, benches and the
//! docs are loops over the registry. Ops are the only callers of kernels.

pub mod activation;
pub mod adamw;
pub mod adamw8;
pub mod add;
pub mod attention;
pub mod distill;
pub mod dropout;
pub mod embedding;
pub mod head;
pub mod lora;
pub mod lora_kernels;
pub mod matmul;
pub mod policy;
pub mod preference;
pub mod prompt;
pub mod quant;
pub mod rmsnorm;
pub mod rope;
pub mod sample;
pub mod scale;

use std::fmt::Debug;
use std::sync::Arc;

use crate::cx::{AttentionChoice, Cx, MatmulChoice};
use crate::device::DType;
use crate::error::{Error, Result};
use crate::tape::{Grads, Node};
use crate::tensor::Tensor;

/// Whether there is a tape, and which inputs want gradients.
pub struct Need {
    pub tape: bool,
    pub inputs: Vec<bool>,
}

/// What a forward gives: its outputs, and what its backward will need.
pub struct Fwd {
    pub outputs: Vec<Tensor>,
    pub saved: Vec<Tensor>,
}

pub trait Op: Debug + Send + Sync {
    fn name(&self) -> &'static str;

    /// Checks shapes, runs the kernels. `saved` may be empty unless `need.tape`.
    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd>;

    /// Writes the gradients of the inputs that want one into `g`, from the upstream gradients `dy` (None: zero).
    fn backward(&self, _cx: &mut Cx, _node: &Node, _dy: &[Option<Tensor>], _g: &mut Grads) -> Result<()> {
        Err(Error::op(self.name(), "is a state writer and has no backward"))
    }

    /// The definition, in naive f64; `round` stands wherever the kernel's Numerics says that a value is stored.
    fn reference(&self, round: Round, x: &[F64]) -> Vec<F64>;

    /// Bytes moved and flops done by a forward on these inputs: for rooflines.
    fn cost(&self, x: &[&Tensor]) -> Cost;
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    pub bytes: f64,
    pub flops: f64,
}

impl Cost {
    /// Each input read once and `written` bytes written: the roofline of a memory-bound op.
    pub fn memory(x: &[&Tensor], written: usize) -> Cost {
        Cost { bytes: (x.iter().map(|t| t.bytes()).sum::<usize>() + written) as f64, flops: 0.0 }
    }
}

/// How a reference stores a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Round {
    /// Not at all: the oracle.
    None,
    F32,
    Bf16,
}

impl Round {
    pub fn at(self, v: f64) -> f64 {
        match self {
            Round::None => v,
            Round::F32 => v as f32 as f64,
            Round::Bf16 => half::bf16::from_f32(v as f32).to_f64(),
        }
    }
}

/// A host array of a reference: indices are stored as f64 too.
#[derive(Clone, Debug, PartialEq)]
pub struct F64 {
    pub data: Vec<f64>,
    pub shape: Vec<usize>,
}

impl F64 {
    pub fn new(shape: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "a reference array of shape {shape:?}");
        F64 { data, shape: shape.to_vec() }
    }

    pub fn zeros(shape: &[usize]) -> Self {
        F64 { data: vec![0.0; shape.iter().product()], shape: shape.to_vec() }
    }

    pub fn from_fn(shape: &[usize], f: impl FnMut(usize) -> f64) -> Self {
        F64 { data: (0..shape.iter().product()).map(f).collect(), shape: shape.to_vec() }
    }

    pub fn cols(&self) -> usize {
        *self.shape.last().unwrap_or(&1)
    }

    pub fn row_count(&self) -> usize {
        self.data.len() / self.cols().max(1)
    }

    pub fn row(&self, r: usize) -> &[f64] {
        &self.data[r * self.cols()..(r + 1) * self.cols()]
    }

    pub fn row_mut(&mut self, r: usize) -> &mut [f64] {
        let cols = self.cols();
        &mut self.data[r * cols..(r + 1) * cols]
    }

    pub fn index(&self, i: usize) -> usize {
        self.data[i] as usize
    }
}

/// How a case's input lies on the device.
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
    /// Its gradient is checked.
    pub grad: bool,
    /// It is a parameter: its gradient is f32 and adds up in an arena.
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

    pub fn ints(values: &[i32]) -> Arg {
        let value = F64::new(&[values.len()], values.iter().map(|v| f64::from(*v)).collect());
        Arg { value, kind: Kind::Int, grad: false, param: false }
    }

    pub fn no_grad(mut self) -> Arg {
        self.grad = false;
        self
    }
}

/// One input set of an op, small enough for a naive reference; ragged sizes included.
pub struct Case {
    pub label: String,
    pub op: Arc<dyn Op>,
    pub inputs: Vec<Arg>,
    /// A move or a gather: compared bit for bit.
    pub exact: bool,
    /// Outputs to leave out of the comparison (argmax among near ties, say): indices.
    pub skip: Vec<usize>,
    /// Upstream gradient of each output: a constant where the op asks for one, else random. Empty: all random.
    pub upstream: Vec<Option<f64>>,
    /// bf16 rounding points on the longest path from an input to a gradient: scales the gradient tolerance.
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

/// A way of running an op that is checked of its own: which kernels are chosen.
#[derive(Clone, Copy)]
pub struct Variant {
    pub name: &'static str,
    pub dtypes: &'static [DType],
    pub matmul: MatmulChoice,
    pub attention: AttentionChoice,
}

pub const DEFAULT: Variant = Variant {
    name: "",
    dtypes: &[DType::F32, DType::BF16],
    matmul: MatmulChoice::Auto,
    attention: AttentionChoice::Auto,
};
/// For ops that know float only.
const ONE_DTYPE: Variant = Variant { dtypes: &[DType::F32], ..DEFAULT };
const OWN_MATMUL: Variant = Variant { name: "own kernel", matmul: MatmulChoice::Own, ..DEFAULT };
const LIGHT: Variant = Variant { name: "light", attention: AttentionChoice::Light, ..DEFAULT };
const TENSOR_CORE: Variant =
    Variant { name: "tensor core", dtypes: &[DType::BF16], attention: AttentionChoice::TensorCore, ..DEFAULT };

pub struct Entry {
    pub name: &'static str,
    /// The `.cu` files it uses.
    pub kernels: &'static [&'static str],
    pub cases: fn(&mut Rng) -> Vec<Case>,
    pub variants: &'static [Variant],
}

/// Every op of the engine.
pub fn registry() -> Vec<Entry> {
    let entry = |name, kernels, cases, variants| Entry { name, kernels, cases, variants };
    vec![
        entry("activation", &["activation"], activation::plain_cases, &[DEFAULT]),
        entry("adamw", &["adamw"], adamw::cases, &[DEFAULT]),
        entry("adamw8", &["adamw8", "quant"], adamw8::cases, &[DEFAULT]),
        entry("add", &["add"], add::cases, &[DEFAULT]),
        entry("distill", &["distill", "matmul", "preference"], distill::cases, &[DEFAULT, OWN_MATMUL]),
        entry("dropout", &["dropout"], dropout::cases, &[DEFAULT]),
        entry("embedding", &["embedding"], embedding::cases, &[DEFAULT]),
        entry("gather_rows", &["embedding"], embedding::gather_cases, &[DEFAULT]),
        entry("glu", &["activation"], activation::cases, &[DEFAULT]),
        entry("head", &["head", "matmul"], head::cases, &[DEFAULT, OWN_MATMUL]),
        entry("linear", &["matmul", "reduce"], matmul::cases, &[DEFAULT, OWN_MATMUL]),
        entry("lora_linear", &["lora", "matmul", "scale", "reduce"], lora::cases, &[DEFAULT, OWN_MATMUL]),
        entry("preference", &["preference"], preference::cases, &[DEFAULT]),
        entry("segment_sums", &["preference"], preference::segment_cases, &[DEFAULT]),
        entry("policy", &["policy"], policy::cases, &[ONE_DTYPE]),
        entry("prompt_embedding", &["prompt", "embedding"], prompt::cases, &[DEFAULT]),
        entry("quantise", &["quant"], quant::cases, &[DEFAULT]),
        entry("quant_linear", &["quant", "matmul", "reduce"], quant::linear_cases, &[DEFAULT, OWN_MATMUL]),
        entry("rmsnorm", &["rmsnorm", "reduce"], rmsnorm::cases, &[DEFAULT]),
        entry("rope", &["rope", "reduce"], rope::cases, &[DEFAULT]),
        entry("scale_columns", &["scale", "reduce"], scale::cases, &[DEFAULT]),
        entry("sample", &["sample"], sample::cases, &[DEFAULT]),
        entry("to_float", &["add"], add::to_float_cases, &[DEFAULT]),
        entry("attention", &["attention", "attention_mma"], attention::cases, &[LIGHT, TENSOR_CORE]),
        entry("attention_paged", &["attention", "attention_mma"], attention::paged_cases, &[LIGHT, TENSOR_CORE]),
        entry("kv_append", &["attention"], attention::append_cases, &[DEFAULT]),
    ]
}

/// Test data: a small counter-based generator, the same everywhere.
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

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let r = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        r * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub fn array(&mut self, shape: &[usize], scale: f64) -> F64 {
        F64::from_fn(shape, |_| scale * self.normal())
    }
}

/// Checks that `t` is a matrix (or batch of rows) with `cols` columns.
pub(crate) fn expect_cols(op: &'static str, what: &str, t: &Tensor, cols: usize, hint: &str) -> Result<()> {
    if t.cols() == cols {
        return Ok(());
    }
    Err(Error::op(op, format!("{what} has {} columns, expected {cols}; {hint}", t.cols())))
}

/// First-stage buffer of a two-stage sum over rows: one partial row for each 64 rows.
pub(crate) fn partials(cx: &Cx, rows: usize, cols: usize) -> Result<Tensor> {
    cx.scratch("partial sums", DType::F32, &[rows.div_ceil(64).max(1), cols])
}
