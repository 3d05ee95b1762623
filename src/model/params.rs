//! A set of parameters in one arena. Floor 3.
//!
//! Invariant: the arena holds the parameters that weight decay applies to first, then biases and norms, so an optimizer
//! step is two launches. q|k|v and gate|up lie side by side: a *unit* is what one kernel reads as one matrix, and it is
//! what the tape and the gradient arena know; Hugging Face's names are views of the same memory.

use std::collections::HashMap;

use crate::cx::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::families::{ParamSpec, Role};
use crate::rng::{philox, uniform};
use crate::tape::ParamGrads;
use crate::tensor::{Id, Tensor};

/// Elements between the starts of units: 256 bytes of bf16, so that every row start is 128-bit aligned.
const ALIGN: usize = 128;

pub struct ParamSet {
    /// Which set of the tape this is.
    pub set: u32,
    /// Hugging Face's parameters, in arena order, with their offsets in elements.
    pub specs: Vec<(ParamSpec, usize)>,
    units: Vec<Unit>,
    by_key: HashMap<(Option<usize>, Role), usize>,
    /// The weights that kernels read, [len] of the storage dtype.
    pub weights: Tensor,
    /// Elements of the arena, and how many of them, at its start, weight decay applies to.
    pub len: usize,
    pub decayed: usize,
}

struct Unit {
    offset: usize,
    shape: Vec<usize>,
}

impl ParamSet {
    /// Lays out and allocates; contents are zero until loaded.
    pub fn new(cx: &Cx, set: u32, specs: Vec<ParamSpec>) -> Result<ParamSet> {
        let (first, second): (Vec<_>, Vec<_>) = specs.into_iter().partition(|s| s.role.decays());
        let boundary = first.len();
        let mut placed: Vec<(ParamSpec, usize)> = Vec::new();
        let mut units: Vec<Unit> = Vec::new();
        let mut by_key = HashMap::new();
        let (mut end, mut decayed) = (0usize, 0);
        for (i, spec) in first.into_iter().chain(second).enumerate() {
            let key = (spec.layer, unit_role(spec.role));
            if i == boundary {
                end = end.next_multiple_of(ALIGN);
                decayed = end;
            }
            match by_key.get(&key) {
                Some(&u) => {
                    let unit: &mut Unit = &mut units[u];
                    if unit.offset + unit.shape.iter().product::<usize>() != end {
                        return Err(Error::op("params", format!("{} does not lie beside its unit", spec.name)));
                    }
                    unit.shape[0] += spec.shape[0];
                }
                None => {
                    end = end.next_multiple_of(ALIGN);
                    by_key.insert(key, units.len());
                    units.push(Unit { offset: end, shape: spec.shape.clone() });
                }
            }
            let offset = end;
            end += spec.len();
            placed.push((spec, offset));
        }
        let len = end.next_multiple_of(ALIGN);
        if placed.len() == boundary {
            decayed = len;
        }
        let weights = Tensor::new(&cx.pool, "weights", cx.dtype, &[len])?;
        weights.zero()?;
        Ok(ParamSet { set, specs: placed, units, by_key, weights, len, decayed })
    }

    /// The unit that holds a role, as the tape knows it; None if this model has none.
    pub fn unit(&self, layer: Option<usize>, role: Role) -> Result<Option<Tensor>> {
        let Some(&index) = self.by_key.get(&(layer, unit_role(role))) else { return Ok(None) };
        let unit = &self.units[index];
        let view = self.weights.view(unit.offset * self.weights.dtype().size(), self.weights.dtype(), &unit.shape)?;
        Ok(Some(view.with_id(Id::Param { set: self.set, index: index as u32 })))
    }

    /// As [`ParamSet::unit`], for roles that every decoder has.
    pub fn required(&self, layer: Option<usize>, role: Role) -> Result<Tensor> {
        self.unit(layer, role)?.ok_or_else(|| Error::op("params", format!("no {role:?} in layer {layer:?}")))
    }

    /// A view of an arena of this layout (weights, master, moments, gradients) for one Hugging Face parameter.
    pub fn view_of(&self, arena: &Tensor, spec: &ParamSpec, offset: usize) -> Result<Tensor> {
        arena.view(offset * arena.dtype().size(), arena.dtype(), &spec.shape)
    }

    /// An f32 gradient arena of this layout (zeroed: the gaps between units stay zero) and its slots by unit.
    pub fn gradients(&self, cx: &Cx) -> Result<(Tensor, ParamGrads)> {
        let arena = Tensor::new(&cx.pool, "parameter gradients", DType::F32, &[self.len])?;
        arena.zero()?;
        let slot = |u: &Unit| arena.view(u.offset * 4, DType::F32, &u.shape).map(Some);
        let slots = self.units.iter().map(slot).collect::<Result<Vec<_>>>()?;
        Ok((arena, ParamGrads::new(slots)))
    }

    pub fn count(&self) -> usize {
        self.specs.iter().map(|(s, _)| s.len()).sum()
    }

    /// transformers' initialisation: normal(0, `std`) for matrices, ones for norms, zeros for biases. Values are a
    /// function of (seed, parameter, index).
    pub fn initialise(&self, std: f32, seed: u64) -> Result<()> {
        for (p, (spec, offset)) in self.specs.iter().enumerate() {
            let values: Vec<f32> = if spec.role.is_norm() {
                vec![1.0; spec.len()]
            } else if spec.role.is_bias() {
                vec![0.0; spec.len()]
            } else {
                normals(seed, p as u32, spec.len()).into_iter().map(|v| v * std).collect()
            };
            self.store(spec, *offset, &values)?;
        }
        Ok(())
    }

    /// Writes one parameter's values, rounded to the storage dtype.
    pub fn store(&self, spec: &ParamSpec, offset: usize, values: &[f32]) -> Result<()> {
        let view = self.view_of(&self.weights, spec, offset)?;
        match self.weights.dtype() {
            DType::BF16 => {
                let half: Vec<half::bf16> = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
                view.upload(&half)
            }
            _ => view.upload(values),
        }
    }
}

fn unit_role(role: Role) -> Role {
    match role {
        Role::K | Role::V => Role::Q,
        Role::KBias | Role::VBias => Role::QBias,
        Role::Up => Role::Gate,
        Role::UpBias => Role::GateBias,
        other => other,
    }
}

/// Standard normals from Philox by Box and Muller.
fn normals(seed: u64, stream: u32, n: usize) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    let mut out = Vec::with_capacity(n + 3);
    for i in 0..n.div_ceil(4) {
        let u = philox(key, [i as u32, (i >> 32) as u32, stream, 0x0300_0000]).map(|b| f64::from(uniform(b)));
        for (a, b) in [(u[0], u[1]), (u[2], u[3])] {
            let (r, angle) = ((-2.0 * a.ln()).sqrt(), std::f64::consts::TAU * b);
            out.extend([(r * angle.cos()) as f32, (r * angle.sin()) as f32]);
        }
    }
    out.truncate(n);
    out
}
