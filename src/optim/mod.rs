//! The optimizer's state over a parameter arena, and learning-rate schedules. Layer 6.
//!
//! Invariant: moments, master weights and gradients share the layout of the trained parameters, so
//! an AdamW step is one launch for each range with one weight decay and learning rate. It depends
//! on host data only through one small upload.

pub mod schedule;
pub mod state;

use state::{MomentKind, Moments, Target};

use crate::autograd::Cx;
use crate::config::{MuonAdjust, Optim, TrainingConfig};
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::params::ParamSet;
use crate::model::specs::ParamSpec;
use crate::ops::adamw::{AdamW, hyper, norm_and_clip};
use crate::ops::muon::{Muon, MuonSlice, muon};
use crate::tensor::Tensor;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub weight_decay: f32,
    /// Clip the gradient to this global L2 norm; 0: no clipping.
    pub max_grad_norm: f32,
    /// bf16 only: no float master weights, stochastic rounding.
    pub stochastic: bool,
    pub moments: MomentKind,
    /// How the matrices of the layers are trained; None: by AdamW like all other parameters.
    pub muon: Option<MuonConfig>,
}

/// Muon's constants, which all matrices share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonConfig {
    pub momentum: f32,
    pub nesterov: bool,
    pub ns_steps: usize,
    pub adjust: MuonAdjust,
    /// The learning rate of the matrices divided by that of the other parameters.
    pub lr_ratio: f32,
}

impl MuonConfig {
    fn of(keys: &TrainingConfig) -> MuonConfig {
        let muon = &keys.muon;
        let ratio = muon.muon_learning_rate.map_or(1.0, |rate| rate / keys.learning_rate);
        MuonConfig {
            momentum: muon.muon_momentum as f32,
            nesterov: muon.muon_nesterov,
            ns_steps: muon.muon_ns_steps,
            adjust: muon.muon_adjust_lr_fn,
            lr_ratio: ratio as f32,
        }
    }

    /// The factor on a matrix's learning rate.
    fn adjustment(&self, shape: &[usize]) -> f32 {
        let (rows, cols) = (shape[0] as f64, shape[1] as f64);
        let factor = match self.adjust {
            MuonAdjust::Original => (rows / cols).max(1.0).sqrt(),
            MuonAdjust::MatchRmsAdamw => 0.2 * rows.max(cols).sqrt(),
        };
        factor as f32
    }
}

impl AdamWConfig {
    /// The configuration from the options of a run.
    pub fn of(keys: &TrainingConfig) -> AdamWConfig {
        AdamWConfig {
            beta1: keys.adam_beta1 as f32,
            beta2: keys.adam_beta2 as f32,
            eps: keys.adam_epsilon as f32,
            weight_decay: keys.weight_decay as f32,
            max_grad_norm: keys.max_grad_norm as f32,
            stochastic: matches!(keys.optim, Optim::AdamwBf16 | Optim::AdamwBf16Moments),
            moments: match keys.optim {
                Optim::Adamw | Optim::AdamwBf16 => MomentKind::F32,
                Optim::AdamwBf16Moments => MomentKind::Bf16,
                Optim::Adamw8bit => MomentKind::Blockwise8,
                Optim::Muon => MomentKind::Muon,
            },
            muon: (keys.optim == Optim::Muon).then(|| MuonConfig::of(keys)),
        }
    }

    /// Whether AdamW trains the parameter.
    fn by_adamw(&self, spec: &ParamSpec) -> bool {
        self.muon.is_none() || !spec.role.is_layer_matrix() || spec.shape.len() != 2
    }
}

pub struct Optimizer {
    pub config: AdamWConfig,
    /// F32 `[state_len]` beside bf16 weights. None: the weights are f32, or rounded stochastically.
    pub master: Option<Tensor>,
    pub moments: Moments,
    pub grad: Tensor,
    hyper: Tensor,
}

impl Optimizer {
    /// Zero moments; the master weights start with the current weights. Registers the gradient
    /// arena in `cx` as that of the set `params.set`.
    pub fn new(cx: &mut Cx, params: &ParamSet, config: AdamWConfig) -> Result<Optimizer> {
        let (grad, slots) = params.gradients(cx)?;
        cx.param_grads[params.set] = slots;
        let master = if cx.dtype == DType::BF16 && !config.stochastic {
            let master = Tensor::new(&cx.pool, "master weights", DType::F32, &[params.state_len])?;
            master.zero()?;
            for r in params.ranges() {
                let (to, from) = (
                    master.rows(r.state, r.state + r.len)?,
                    params.weights.rows(r.weight, r.weight + r.len)?,
                );
                crate::autograd::add_into(cx, &to, &from, false)?;
            }
            Some(master)
        } else {
            None
        };
        let ranges = params.ranges_of(|spec| config.by_adamw(spec));
        let ranges: Vec<(usize, usize)> =
            ranges.iter().map(|r| (r.state, r.state + r.len)).collect();
        let moments = Moments::new(cx, params.state_len, &ranges, config.moments)?;
        Ok(Optimizer { config, master, moments, grad, hyper: hyper(cx)? })
    }

    /// The trained values of parameter `i`: from the float master weights if present, else from the
    /// weights.
    pub fn values(&self, params: &ParamSet, i: usize) -> Result<Vec<f32>> {
        match &self.master {
            Some(master) => match params.state_view(master, i)? {
                Some(view) if params.tuning(i).trainable => view.to_f32(),
                _ => params.weight_view(i)?.to_f32(),
            },
            None => params.weight_view(i)?.to_f32(),
        }
    }

    /// The state of these parameters that a resumed run needs, in a fixed order: for models that a
    /// method trains besides the model of the run.
    pub fn dump(&self, params: &ParamSet) -> Result<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        for i in params.trained() {
            all.push(bytemuck::cast_slice(&self.values(params, i)?).to_vec());
        }
        for (_, moment) in self.moments.named_tensors() {
            all.push(moment.to_bytes()?);
        }
        Ok(all)
    }

    /// Restores the state from [`Optimizer::dump`]; `next` returns its parts in order. None: a part
    /// is missing.
    pub fn restore<'a>(
        &self,
        params: &ParamSet,
        next: &mut dyn FnMut() -> Option<&'a [u8]>,
    ) -> Result<Option<()>> {
        for i in params.trained() {
            let Some(bytes) = next() else { return Ok(None) };
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(bytes);
            if let Some(master) = &self.master
                && let Some(view) = params.state_view(master, i)?
            {
                view.upload(&values)?;
            }
            params.store(i, &values)?;
        }
        for (_, moment) in self.moments.named_tensors() {
            let Some(bytes) = next() else { return Ok(None) };
            moment.upload(bytes)?;
        }
        Ok(Some(()))
    }

    /// Computes on the device the gradient norm of step `t` (from 1), its clip factor and the
    /// scalars of the step. Returns the norm before clipping. Nothing is applied yet, so that a
    /// step with a non-finite norm can be refused.
    pub fn measure(
        &self,
        cx: &mut Cx,
        params: &ParamSet,
        learning_rate: f64,
        t: u64,
    ) -> Result<f32> {
        cx.param_grads[params.set].finish()?;
        params.clear_frozen(&self.grad)?;
        let power = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
        let (c1, c2) = (power(self.config.beta1), power(self.config.beta2).sqrt());
        self.hyper.upload(&[
            learning_rate as f32,
            c1 as f32,
            c2 as f32,
            0.0,
            1.0,
            0.0,
            0.0,
            0.0,
        ])?;
        norm_and_clip(cx, &self.hyper, &self.grad, self.config.max_grad_norm)?;
        Ok(self.hyper.to_f32()?[3])
    }

    /// Applies the measured step.
    pub fn apply(&self, cx: &Cx, params: &ParamSet) -> Result<()> {
        let ranges = params.ranges_of(|spec| self.config.by_adamw(spec));
        for (group, r) in ranges.into_iter().enumerate() {
            let weight = params.weights.rows(r.weight, r.weight + r.len)?;
            let state = |arena: &Tensor| arena.rows(r.state, r.state + r.len);
            let master = match (&self.master, self.config.stochastic && cx.dtype == DType::BF16) {
                (Some(master), _) => Some(state(master)?),
                (None, false) => Some(weight.clone()),
                (None, true) => None,
            };
            let grad = state(&self.grad)?;
            let target = Target { master: master.as_ref(), weight: &weight, grad: &grad };
            let c = &self.config;
            let weight_decay = if r.decays { c.weight_decay } else { 0.0 };
            let constants = AdamW {
                beta1: c.beta1,
                beta2: c.beta2,
                eps: c.eps,
                weight_decay,
                lr_scale: r.lr_scale,
                group: group as i32,
            };
            self.moments.step(cx, &constants, (r.state, r.state + r.len), &target, &self.hyper)?;
        }
        match (&self.config.muon, &self.moments) {
            (Some(config), Moments::Muon(moments)) => {
                self.apply_muon(cx, params, config, &moments.m)
            }
            _ => Ok(()),
        }
    }

    /// Applies the step to the matrices that Muon trains, one after the other.
    fn apply_muon(
        &self,
        cx: &Cx,
        params: &ParamSet,
        config: &MuonConfig,
        means: &Tensor,
    ) -> Result<()> {
        for i in params.trained().filter(|i| !self.config.by_adamw(&params.specs[*i])) {
            let state = |arena: &Tensor| {
                let view = params.state_view(arena, i)?;
                let name = &params.specs[i].name;
                view.ok_or_else(|| Error::op("muon", format!("{name} has no state")))
            };
            let (weight, m, grad) = (params.weight_view(i)?, state(means)?, state(&self.grad)?);
            let master = self.master.as_ref().map(state).transpose()?;
            let constants = Muon {
                momentum: config.momentum,
                nesterov: config.nesterov,
                ns_steps: config.ns_steps,
                weight_decay: self.config.weight_decay,
                lr_scale: params.tuning(i).lr_scale * config.lr_ratio,
                adjust: config.adjustment(weight.shape()),
            };
            let master = master.as_ref().unwrap_or(&weight);
            let slice = MuonSlice { master, weight: &weight, m: &m, grad: &grad };
            muon(cx, &constants, &slice, &self.hyper)?;
        }
        Ok(())
    }
}
