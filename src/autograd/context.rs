//! The context that is passed to everything: device, memory, storage dtype, the tape if there is
//! one, the random key. Layer 3.
//!
//! Invariant: state is passed, never global. Whatever changes from step to step lies in device
//! memory (`rng`).

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

/// What a backward pass computes again instead of keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    Off,
    /// The outputs of norms and activations, which their ops make again from what those keep
    /// anyway, for about the time of a copy.
    Light,
    /// The activations inside each layer, from the layer's input.
    Layers,
}

impl Recompute {
    /// As `gradient_checkpointing` says it.
    pub fn word(self) -> &'static str {
        match self {
            Recompute::Off => "false",
            Recompute::Light => "light",
            Recompute::Layers => "true",
        }
    }
}

/// Values of operands by pattern (its number), rows and columns.
pub type ProductPatterns = Mutex<HashMap<(u32, usize, usize), Arc<[f32]>>>;

/// Forward products whose kernel is chosen once (`matmul=exact`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProductShape {
    /// Up to so many rows.
    pub rows: usize,
    /// Just so many, to which the steps of a decoder are padded.
    pub padded: bool,
    /// Columns of the result.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
    /// Of the operands.
    pub input: DType,
    /// Of the result.
    pub output: DType,
}

/// Whose kernel was fastest.
#[derive(Clone, Copy, Debug)]
pub struct ProductChoice {
    /// The number of one of the engine's own; None: the library's.
    pub own: Option<u32>,
    /// Microseconds.
    pub time: f32,
}

/// What checking the library's matrix products takes (`matmul=exact`).
#[derive(Default)]
pub struct ProductCheck {
    /// Work space, kept from check to check.
    pub pool: Mutex<Option<Arc<Pool>>>,
    /// Values of operands by their kind, columns and stride.
    pub patterns: ProductPatterns,
    /// What the clock said of products that were timed.
    pub choices: Mutex<HashMap<ProductShape, ProductChoice>>,
    /// Shapes that the library computes.
    pub library: AtomicUsize,
    /// Shapes for which its faster algorithms have other bits than the own kernel.
    pub own: AtomicUsize,
}

/// Passed to everything that computes.
pub struct Cx {
    /// Runs the kernels.
    pub device: Arc<dyn Device>,
    /// Device memory.
    pub pool: Arc<Pool>,
    /// Storage type of activations and of the weights that kernels read: F32 or BF16.
    pub dtype: DType,
    /// Which matrix products are used.
    pub matmul: MatmulChoice,
    /// What `matmul=exact` holds.
    pub product_check: ProductCheck,
    /// Which attention kernels are used.
    pub attention: AttentionChoice,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Ops are recorded while there is one.
    pub tape: Option<Tape>,
    /// Gradient buffers by parameter set.
    pub param_grads: ParamGradSets,
    /// I32 `[4]` on the device: seed low, seed high, step, micro-step. Read by every random kernel.
    pub rng: Tensor,
    /// Hears of what happens.
    pub observer: Arc<dyn Observer>,
    /// Ends what waits, as for a reward.
    pub stop: Stop,
    next_site: u32,
}

impl Cx {
    /// A context on the device that `options` name, with their dtype, matmul and attention; it
    /// tells the observer which device that is. Errors: the device is not there.
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

    /// A context with the engine's own choice of kernels.
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

    /// Sets the random key of the step; sites count from 0 again.
    pub fn set_rng(&mut self, seed: u64, step: u32, micro_step: u32) -> Result<()> {
        self.next_site = 0;
        self.rng.upload(&[seed as u32, (seed >> 32) as u32, step, micro_step])
    }

    /// A number for the next random op of this step; the node keeps it, so recomputation draws the
    /// same numbers.
    pub fn next_site(&mut self) -> u32 {
        self.next_site += 1;
        self.next_site - 1
    }

    /// New activation memory of the storage dtype.
    pub fn real(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(&self.pool, name, self.dtype, shape)
    }

    /// New F32 memory.
    pub fn float(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(&self.pool, name, DType::F32, shape)
    }

    /// I32 values on the device.
    pub fn ints(&self, name: &str, data: &[i32]) -> Result<Tensor> {
        Tensor::from_host(&self.pool, name, DType::I32, &[data.len()], data)
    }

    /// Work space that lives as long as the handle.
    pub fn scratch(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Tensor::new(&self.pool, name, dtype, shape)
    }

    /// Runs an op's forward and records it if there is a tape and some input wants a gradient.
    pub fn apply(&mut self, op: impl Op + 'static, x: &[&Tensor]) -> Result<Vec<Tensor>> {
        self.apply_dyn(Arc::new(op), x)
    }

    /// As [`Cx::apply`], for an op that is shared.
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

    /// As [`Cx::apply`], for ops with `N` outputs.
    pub fn apply_many<const N: usize>(
        &mut self,
        op: impl Op + 'static,
        x: &[&Tensor],
    ) -> Result<[Tensor; N]> {
        let name = op.name();
        let wrong = |out: Vec<Tensor>| Error::op(name, format!("gave {} outputs", out.len()));
        self.apply(op, x)?.try_into().map_err(wrong)
    }

    /// As [`Cx::apply`], for ops with one output.
    pub fn apply1(&mut self, op: impl Op + 'static, x: &[&Tensor]) -> Result<Tensor> {
        self.apply_many(op, x).map(|[y]| y)
    }

    /// Backward from the seeds through the recorded tape, which ends.
    pub fn backward(&mut self, seeds: Vec<(Tensor, Tensor)>) -> Result<()> {
        match self.tape.take() {
            Some(tape) => tape.backward(self, seeds),
            None => Err(Error::Device("backward without a tape".into())),
        }
    }
}
