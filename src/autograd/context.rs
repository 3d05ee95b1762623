//! The context that every computation receives: device, memory, storage dtype, tape (if one is
//! recorded) and random key. Layer 3.
//!
//! Invariant: state is passed, never global. Values that change from step to step are in device
//! memory (`rng`), so that a recorded step can be replayed.

#![deny(missing_docs)]

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use super::op::{Need, Op};
use super::tape::{ParamGradSets, Tape};
use crate::config::{AttentionChoice, Dtype, MatmulChoice, TrainingConfig};
use crate::device::{self, DType, Device, Pool};
use crate::error::{Error, Result};
use crate::observer::{Observer, Terminal};
use crate::signals::Stop;
use crate::tensor::{Id, Tensor};

/// What the backward pass recomputes instead of keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    Off,
    /// The outputs of norms and activations. Their ops recompute them from tensors that are kept
    /// anyway, in about the time of a copy.
    Light,
    /// All activations inside a layer, from the input of the layer.
    Layers,
}

impl Recompute {
    /// The value of the option `gradient_checkpointing`.
    pub fn word(self) -> &'static str {
        match self {
            Recompute::Off => "false",
            Recompute::Light => "light",
            Recompute::Layers => "true",
        }
    }
}

/// Values of test operands by pattern number, columns and stride.
pub type ProductPatterns = Mutex<HashMap<(u32, usize, usize), Arc<[f32]>>>;

/// A class of forward products that share one choice of kernel (`matmul=exact`, and few rows).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProductShape {
    /// Upper bound of the number of rows.
    pub rows: usize,
    /// `rows` is the exact number, a size to which decode steps are padded.
    pub padded: bool,
    /// Columns of the result.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
    /// Dtype of the operands.
    pub input: DType,
    /// Dtype of the result.
    pub output: DType,
    /// What the kernel computes beside the product.
    pub beside: Beside,
}

/// What a kernel computes beside a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Beside {
    /// Nothing.
    Nothing,
    /// An activation follows, so only the kernels of few rows compete.
    Gate,
    /// A norm precedes: one kernel for both competes with two.
    Norm,
    /// A norm precedes and an activation follows.
    NormAndGate,
}

/// The fastest kernel for a [`ProductShape`].
#[derive(Clone, Copy, Debug)]
pub struct ProductChoice {
    /// Number of the engine's own kernel. None: the library's kernel is the fastest, or with a norm
    /// two kernels are.
    pub own: Option<u32>,
    /// Median time in microseconds.
    pub time: f32,
}

/// State for verifying the library's matrix products (`matmul=exact`).
#[derive(Default)]
pub struct ProductCheck {
    /// Work space that is reused by the next check.
    pub pool: Mutex<Option<Arc<Pool>>>,
    /// Values of the operands, by pattern, columns and stride.
    pub patterns: ProductPatterns,
    /// Choices made by timing.
    pub choices: Mutex<HashMap<ProductShape, ProductChoice>>,
    /// Number of shapes that the library computes.
    pub library: AtomicUsize,
    /// Number of shapes that the library may not compute: its faster algorithms have other bits
    /// than the engine's own kernel.
    pub own: AtomicUsize,
}

/// Passed to everything that computes.
pub struct Cx {
    /// Runs the kernels.
    pub device: Arc<dyn Device>,
    /// The allocator of device memory.
    pub pool: Arc<Pool>,
    /// Storage type of activations and of the weights that kernels read: F32 or BF16.
    pub dtype: DType,
    /// Which implementation computes matrix products.
    pub matmul: MatmulChoice,
    /// State of the checks for `matmul=exact`.
    pub product_check: ProductCheck,
    /// Which attention kernels run.
    pub attention: AttentionChoice,
    /// What the backward pass recomputes.
    pub recompute: Recompute,
    /// Ops are recorded while this is Some.
    pub tape: Option<Tape>,
    /// Gradient buffers by parameter set.
    pub param_grads: ParamGradSets,
    /// I32 `[4]` on the device: seed low, seed high, step, micro-step. Read by every random kernel.
    pub rng: Tensor,
    /// Receives the messages of a run.
    pub observer: Arc<dyn Observer>,
    /// Ends long waits, such as the wait for a reward.
    pub stop: Stop,
    next_site: u32,
}

impl Cx {
    /// A context on the device that `options` name, with their dtype, matmul and attention. Reports
    /// the device to the observer. Error: the device cannot be opened.
    pub fn open(options: &TrainingConfig, observer: Arc<dyn Observer>) -> Result<Cx> {
        let mut cx = Cx::on(device::open(options.device)?, options)?;
        observer.info(&format!("device: {}, {}", cx.device.name(), cx.dtype.name()));
        cx.observer = observer;
        Ok(cx)
    }

    /// A context on `device` with the dtype, matmul and attention of `options`.
    pub fn on(device: Arc<dyn Device>, options: &TrainingConfig) -> Result<Cx> {
        let dtype = match options.dtype {
            Dtype::Auto => device.capabilities().dtype,
            Dtype::Float32 => DType::F32,
            Dtype::Bfloat16 => DType::BF16,
        };
        let mut cx = Cx::new(device, dtype)?;
        (cx.matmul, cx.attention) = (options.matmul, options.attention);
        Ok(cx)
    }

    /// A context that lets the engine choose the kernels. `dtype`: F32 or BF16.
    pub fn new(device: Arc<dyn Device>, dtype: DType) -> Result<Cx> {
        let pool = Pool::new(device.clone());
        let rng = Tensor::from_host(&pool, "rng key", DType::I32, &[4], &[0u32; 4])?;
        Ok(Cx {
            device,
            pool,
            dtype,
            matmul: MatmulChoice::Auto,
            product_check: ProductCheck::default(),
            attention: AttentionChoice::Auto,
            recompute: Recompute::Off,
            tape: None,
            param_grads: ParamGradSets::default(),
            rng,
            observer: Arc::new(Terminal::default()),
            stop: Stop::default(),
            next_site: 0,
        })
    }

    /// Sets the random key of the step and restarts the count of random ops at 0.
    pub fn set_rng(&mut self, seed: u64, step: u32, micro_step: u32) -> Result<()> {
        self.next_site = 0;
        self.rng.upload(&[seed as u32, (seed >> 32) as u32, step, micro_step])
    }

    /// A number for the next random op of this step. The node stores it, so recomputation draws the
    /// same random numbers.
    pub fn next_site(&mut self) -> u32 {
        self.next_site += 1;
        self.next_site - 1
    }

    /// A new tensor of the storage dtype; contents undefined.
    pub fn real(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(&self.pool, name, self.dtype, shape)
    }

    /// A new F32 tensor; contents undefined.
    pub fn float(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(&self.pool, name, DType::F32, shape)
    }

    /// A new I32 vector on the device.
    pub fn ints(&self, name: &str, data: &[i32]) -> Result<Tensor> {
        Tensor::from_host(&self.pool, name, DType::I32, &[data.len()], data)
    }

    /// Work space. The memory is freed when the tensor is dropped.
    pub fn scratch(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(&self.pool, name, dtype, shape)
    }

    /// Runs the forward of an op, and records it if a tape is present and some input needs a
    /// gradient.
    pub fn apply(&mut self, op: impl Op + 'static, x: &[&Tensor]) -> Result<Vec<Tensor>> {
        self.apply_dyn(Arc::new(op), x)
    }

    /// [`Cx::apply`] for a shared op.
    pub fn apply_dyn(&mut self, op: Arc<dyn Op>, x: &[&Tensor]) -> Result<Vec<Tensor>> {
        let wants = |t: &&Tensor| match t.id() {
            Id::Constant => false,
            Id::Value(_) => true,
            Id::Param { set, index } => {
                self.param_grads[set].slots.get(index as usize).is_some_and(Option::is_some)
            }
        };
        let inputs: Vec<bool> = x.iter().map(|t| self.tape.is_some() && wants(t)).collect();
        let need = Need { tape: inputs.contains(&true), inputs };
        let mut fwd = op.forward(self, x, &need)?;
        if need.tape
            && let Some(tape) = self.tape.as_mut()
        {
            let light = self.recompute == Recompute::Light;
            tape.push(op, x, &need, &mut fwd.outputs, fwd.saved, light);
        }
        Ok(fwd.outputs)
    }

    /// [`Cx::apply`] for an op with `N` outputs.
    pub fn apply_many<const N: usize>(
        &mut self,
        op: impl Op + 'static,
        x: &[&Tensor],
    ) -> Result<[Tensor; N]> {
        let name = op.name();
        let wrong = |out: Vec<Tensor>| Error::op(name, format!("gave {} outputs", out.len()));
        self.apply(op, x)?.try_into().map_err(wrong)
    }

    /// [`Cx::apply`] for an op with one output.
    pub fn apply1(&mut self, op: impl Op + 'static, x: &[&Tensor]) -> Result<Tensor> {
        self.apply_many(op, x).map(|[y]| y)
    }

    /// Runs the backward pass from the seeds (values and their gradients) and consumes the tape.
    pub fn backward(&mut self, seeds: Vec<(Tensor, Tensor)>) -> Result<()> {
        match self.tape.take() {
            Some(tape) => tape.backward(self, seeds),
            None => Err(Error::Device("backward without a tape".into())),
        }
    }
}
