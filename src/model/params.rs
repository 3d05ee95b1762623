//! A set of parameters in one arena. Layer 5.
//!
//! Invariant: the arena holds first the parameters with weight decay, then biases and norms, so an
//! optimizer step of a whole model is two launches. Frozen parameters have no gradient and no
//! moments. q|k|v and gate|up are contiguous: a *fused parameter* is what one kernel reads as one
//! matrix, and is the unit of the tape and the gradient arena; parameters with Hugging Face's names
//! are views of the same memory. The fused projections of a quantised base are not in the arena:
//! they are held as [`QuantWeight`]s only, and are frozen.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;

use crate::autograd::{Cx, ParamGrads};
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::specs::{ParamSpec, Proj, Role};
use crate::ops::quant::{QuantWeight, Scheme};
use crate::rng::{philox, tag, uniform};
use crate::tensor::{Id, ParamSetId, Tensor};

/// Alignment of fused parameters in elements: 256 bytes of bf16, so that every row start is 128-bit
/// aligned.
const ALIGN: usize = 128;
/// Number of initial values that the host generates at a time.
const INITIAL_PART: usize = 1 << 22;

#[derive(Clone)]
pub struct ParamSet {
    pub set: ParamSetId,
    /// Hugging Face's parameters, in arena order.
    pub specs: Vec<ParamSpec>,
    /// One per parameter.
    slots: Vec<ParamSlot>,
    fused: Vec<FusedParam>,
    by_key: HashMap<(Option<usize>, Role), usize>,
    /// The weights that kernels read, `[len]` in the storage dtype.
    pub weights: Tensor,
    /// Number of elements of the weights' arena.
    pub len: usize,
    /// Number of elements of each state arena (gradients, moments, master): the fused parameters
    /// with anything trainable, in the order of the weights.
    pub state_len: usize,
    quantised: Option<Quantised>,
}

/// The quantised part of a base.
#[derive(Clone)]
struct Quantised {
    scheme: Scheme,
    /// Hugging Face's parameters outside the arena, q, k, v in that order.
    specs: Vec<ParamSpec>,
    fused: HashMap<(Option<usize>, Role), Arc<QuantWeight>>,
}

/// Position and tuning of a parameter.
#[derive(Clone)]
struct ParamSlot {
    /// Offset in the weights' arena, in elements.
    offset: usize,
    /// Index of the fused parameter that contains it.
    fused: usize,
    tuning: Tuning,
}

/// Parameters that one kernel reads as one matrix.
#[derive(Clone)]
struct FusedParam {
    offset: usize,
    shape: Vec<usize>,
    /// Offset in a state arena; None if no part of it is trained.
    state: Option<usize>,
}

/// How a parameter is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuning {
    pub trainable: bool,
    /// Multiplier of the run's learning rate.
    pub lr_scale: f32,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning { trainable: true, lr_scale: 1.0 }
    }
}

/// A range of parameters that one optimizer launch updates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainRange {
    /// First element in the weights' arena and in the state arenas.
    pub weight: usize,
    pub state: usize,
    pub len: usize,
    pub decays: bool,
    pub lr_scale: f32,
}

impl ParamSet {
    /// Lays out and allocates the parameters; contents are zero until loaded.
    pub fn new(cx: &Cx, set: ParamSetId, specs: Vec<ParamSpec>) -> Result<ParamSet> {
        ParamSet::stored(cx, set, specs, None)
    }

    /// Like [`ParamSet::new`]; with a scheme, projections get no memory here: [`ParamSet::put`]
    /// stores the quantised form of each.
    pub fn stored(
        cx: &Cx,
        set: ParamSetId,
        specs: Vec<ParamSpec>,
        scheme: Option<Scheme>,
    ) -> Result<ParamSet> {
        let linear = |s: &ParamSpec| Proj::ALL.iter().any(|p| p.role() == s.role);
        let (outside, specs): (Vec<_>, Vec<_>) =
            specs.into_iter().partition(|s| scheme.is_some() && linear(s));
        let quantised =
            scheme.map(|scheme| Quantised { scheme, specs: outside, fused: HashMap::new() });
        let (first, second): (Vec<_>, Vec<_>) = specs.into_iter().partition(|s| s.role.decays());
        let boundary = first.len();
        let specs: Vec<ParamSpec> = first.into_iter().chain(second).collect();
        let mut slots = Vec::new();
        let mut fused: Vec<FusedParam> = Vec::new();
        let mut by_key = HashMap::new();
        let mut end = 0usize;
        for (i, spec) in specs.iter().enumerate() {
            let key = (spec.layer, fused_role(spec.role));
            if i == boundary {
                end = end.next_multiple_of(ALIGN);
            }
            let index = match by_key.get(&key) {
                Some(&index) => {
                    let whole: &mut FusedParam = &mut fused[index];
                    if whole.offset + whole.shape.iter().product::<usize>() != end {
                        let message =
                            format!("{} does not lie beside what it is fused with", spec.name);
                        return Err(Error::op("params", message));
                    }
                    whole.shape[0] += spec.shape[0];
                    index
                }
                None => {
                    end = end.next_multiple_of(ALIGN);
                    by_key.insert(key, fused.len());
                    fused.push(FusedParam { offset: end, shape: spec.shape.clone(), state: None });
                    fused.len() - 1
                }
            };
            slots.push(ParamSlot { offset: end, fused: index, tuning: Tuning::default() });
            end += spec.len();
        }
        let len = end.next_multiple_of(ALIGN);
        let weights = Tensor::new(&cx.pool, arena_name(set), cx.dtype, &[len])?;
        weights.zero()?;
        let mut params =
            ParamSet { set, specs, slots, fused, by_key, weights, len, state_len: 0, quantised };
        params.tune(|_| Tuning::default());
        Ok(params)
    }

    /// Sets how each parameter is trained, and lays out the state arenas accordingly.
    pub fn tune(&mut self, how: impl Fn(&ParamSpec) -> Tuning) {
        let mut trained = vec![false; self.fused.len()];
        for (slot, spec) in self.slots.iter_mut().zip(&self.specs) {
            slot.tuning = how(spec);
            trained[slot.fused] |= slot.tuning.trainable;
        }
        let mut end = 0usize;
        for (fused, trained) in self.fused.iter_mut().zip(trained) {
            fused.state = trained.then(|| end.next_multiple_of(ALIGN));
            if let Some(start) = fused.state {
                end = start + fused.shape.iter().product::<usize>();
            }
        }
        self.state_len = end.next_multiple_of(ALIGN);
    }

    /// Finds the index in `specs` of a parameter by Hugging Face's name.
    pub fn by_name(&self, name: &str) -> Option<usize> {
        self.specs.iter().position(|s| s.name == name)
    }

    /// Finds the index in `specs` of a parameter by layer and role.
    pub fn by_role(&self, layer: Option<usize>, role: Role) -> Option<usize> {
        self.specs.iter().position(|s| (s.layer, s.role) == (layer, role))
    }

    /// How parameter `i` of `specs` is trained.
    pub fn tuning(&self, i: usize) -> Tuning {
        self.slots[i].tuning
    }

    /// Returns the ranges that the optimizer updates, as few as weight decay and learning rates
    /// allow.
    pub fn ranges(&self) -> Vec<TrainRange> {
        self.ranges_of(|_| true)
    }

    /// Like [`ParamSet::ranges`], for the parameters that `chosen` selects.
    pub fn ranges_of(&self, chosen: impl Fn(&ParamSpec) -> bool) -> Vec<TrainRange> {
        let taken: Vec<bool> = (self.slots.iter().zip(&self.specs))
            .map(|(slot, spec)| slot.tuning.trainable && chosen(spec))
            .collect();
        let mut ranges: Vec<TrainRange> = Vec::new();
        for (i, spec) in self.specs.iter().enumerate() {
            let offset = self.slots[i].offset;
            let (Some(state), true) = (self.state_offset(i), taken[i]) else {
                continue;
            };
            let (decays, lr_scale) = (spec.role.decays(), self.slots[i].tuning.lr_scale);
            if let Some(last) = ranges.last_mut()
                && (last.decays, last.lr_scale) == (decays, lr_scale)
                && offset - last.weight == state - last.state
                && self.slots[..i]
                    .iter()
                    .zip(&taken)
                    .all(|(slot, taken)| slot.offset < last.weight || *taken)
            {
                // The alignment gap between them is zero in every arena and stays so.
                last.len = offset + spec.len() - last.weight;
                continue;
            }
            ranges.push(TrainRange { weight: offset, state, len: spec.len(), decays, lr_scale });
        }
        ranges
    }

    /// Returns the offset of parameter `i` in a state arena; None if nothing in its fused parameter
    /// is trained.
    fn state_offset(&self, i: usize) -> Option<usize> {
        let slot = &self.slots[i];
        let fused = &self.fused[slot.fused];
        fused.state.map(|state| state + slot.offset - fused.offset)
    }

    /// Returns the view of a state arena (gradients, moments, master) for parameter `i`; None if
    /// nothing in its fused parameter is trained.
    pub fn state_view(&self, arena: &Tensor, i: usize) -> Result<Option<Tensor>> {
        let Some(offset) = self.state_offset(i) else { return Ok(None) };
        let size = arena.dtype().size();
        arena.view(offset * size, arena.dtype(), &self.specs[i].shape).map(Some)
    }

    /// Returns the view of the weights for parameter `i`.
    pub fn weight_view(&self, i: usize) -> Result<Tensor> {
        let size = self.weights.dtype().size();
        self.weights.view(self.slots[i].offset * size, self.weights.dtype(), &self.specs[i].shape)
    }

    /// Indices of the trained parameters.
    pub fn trained(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.specs.len()).filter(|i| self.slots[*i].tuning.trainable)
    }

    /// Number of trained values: PEFT's "trainable params".
    pub fn trained_count(&self) -> usize {
        self.trained().map(|i| self.specs[i].len()).sum()
    }

    /// Returns the fused parameter that contains a role, with its id for the tape; None if this
    /// model has none.
    pub fn fused(&self, layer: Option<usize>, role: Role) -> Result<Option<Tensor>> {
        let Some(&index) = self.by_key.get(&(layer, fused_role(role))) else { return Ok(None) };
        let (fused, dtype) = (&self.fused[index], self.weights.dtype());
        let view = self.weights.view(fused.offset * dtype.size(), dtype, &fused.shape)?;
        Ok(Some(view.with_id(Id::Param { set: self.set, index: index as u32 })))
    }

    /// Like [`ParamSet::fused`], for roles that every decoder has.
    pub fn required(&self, layer: Option<usize>, role: Role) -> Result<Tensor> {
        self.fused(layer, role)?
            .ok_or_else(|| Error::op("params", format!("no {role:?} in layer {layer:?}")))
    }

    /// Allocates an f32 gradient arena (zeroed: the gaps between parameters stay zero); returns it
    /// with its slots by fused parameter.
    pub fn gradients(&self, cx: &Cx) -> Result<(Tensor, ParamGrads)> {
        let arena = Tensor::new(&cx.pool, "parameter gradients", DType::F32, &[self.state_len])?;
        arena.zero()?;
        let slot = |f: &FusedParam| {
            f.state.map(|state| arena.view(state * 4, DType::F32, &f.shape)).transpose()
        };
        let slots = self.fused.iter().map(slot).collect::<Result<Vec<_>>>()?;
        Ok((arena, ParamGrads::new(slots)))
    }

    /// Zeros the gradients of frozen parameters that are fused with trained ones, so that norms do
    /// not include them.
    pub fn clear_frozen(&self, arena: &Tensor) -> Result<()> {
        for (i, slot) in self.slots.iter().enumerate() {
            if let (false, Some(view)) = (slot.tuning.trainable, self.state_view(arena, i)?) {
                view.zero()?;
            }
        }
        Ok(())
    }

    /// Returns a frozen copy with its own weights, as the parameter set of the reference.
    pub fn reference(&self, cx: &Cx) -> Result<ParamSet> {
        let set = ParamSetId::Reference;
        let weights = Tensor::new(&cx.pool, arena_name(set), self.weights.dtype(), &[self.len])?;
        weights.copy_from(&self.weights)?;
        Ok(ParamSet { set, weights, ..self.clone() })
    }

    /// Number of all values, quantised ones included.
    pub fn count(&self) -> usize {
        let outside = self.quantised.iter().flat_map(|q| &q.specs);
        self.specs.iter().chain(outside).map(ParamSpec::len).sum()
    }

    /// Returns the fused projection that contains a role, if it is quantised.
    pub fn quantised(&self, layer: Option<usize>, role: Role) -> Option<&Arc<QuantWeight>> {
        self.quantised.as_ref()?.fused.get(&(layer, fused_role(role)))
    }

    /// Returns the values of a parameter by name, whether quantised or not. None: there is no such
    /// parameter.
    pub fn values(&self, cx: &Cx, name: &str) -> Result<Option<Vec<f32>>> {
        if let Some(i) = self.by_name(name) {
            return self.weight_view(i)?.to_f32().map(Some);
        }
        let outside = || self.quantised.iter().flat_map(|q| &q.specs);
        let Some(spec) = outside().find(|s| s.name == name) else { return Ok(None) };
        let whole = self.dense(cx, spec.layer, spec.role)?;
        let beside =
            |s: &&ParamSpec| (s.layer, fused_role(s.role)) == (spec.layer, fused_role(spec.role));
        let from: usize =
            outside().filter(beside).take_while(|s| s.name != name).map(|s| s.shape[0]).sum();
        whole.rows(from, from + spec.shape[0])?.to_f32().map(Some)
    }

    /// Returns the values of a fused projection: the arena's own memory, or a dequantised copy.
    pub fn dense(&self, cx: &Cx, layer: Option<usize>, role: Role) -> Result<Tensor> {
        let Some(weight) = self.quantised(layer, role) else { return self.required(layer, role) };
        let w = cx.real("dequantised weight", &weight.shape)?;
        weight.dequantise_into(cx, &w)?;
        Ok(w)
    }

    /// Writes the values of a parameter by name: rounded to the storage dtype, then quantised if it
    /// is held so. The parts of a fused projection must come in order.
    pub fn put(&mut self, cx: &Cx, name: &str, values: &[f32]) -> Result<()> {
        if let Some(i) = self.by_name(name) {
            return self.store(i, values);
        }
        let outside =
            self.quantised.iter().flat_map(|q| &q.specs).find(|s| s.name == name).cloned();
        let spec = outside.ok_or_else(|| Error::op("params", format!("{name} has no place")))?;
        let dense =
            Tensor::from_f32(&cx.pool, "weight to quantise", cx.dtype, &spec.shape, values)?;
        self.quantise(cx, &spec, &dense)
    }

    fn quantise(&mut self, cx: &Cx, spec: &ParamSpec, dense: &Tensor) -> Result<()> {
        let Some(q) = &mut self.quantised else { return Ok(()) };
        let part = QuantWeight::from_tensor(cx, dense, &[spec.shape[0]], q.scheme)?;
        let key = (spec.layer, fused_role(spec.role));
        let whole = match q.fused.remove(&key) {
            Some(before) => QuantWeight::beside(&before, part)?,
            None => part,
        };
        q.fused.insert(key, Arc::new(whole));
        Ok(())
    }

    /// Sets every quantised projection to zero.
    pub fn zero_quantised(&mut self, cx: &Cx) -> Result<()> {
        let specs = self.quantised.iter().flat_map(|q| q.specs.clone()).collect::<Vec<_>>();
        for spec in &specs {
            let dense = cx.real("weight to quantise", &spec.shape)?;
            dense.zero()?;
            self.quantise(cx, spec, &dense)?;
        }
        Ok(())
    }

    /// Sets every quantised projection to transformers' initial values, as [`ParamSet::initialise`]
    /// does for the arena.
    pub fn initialise_quantised(&mut self, cx: &Cx, std: f32, seed: u64) -> Result<()> {
        let specs = self.quantised.iter().flat_map(|q| q.specs.clone()).collect::<Vec<_>>();
        for (i, spec) in specs.iter().enumerate() {
            self.put(cx, &spec.name, &initial(spec, self.specs.len() + i, std, seed))?;
        }
        Ok(())
    }

    /// Applies transformers' initialisation: normal(0, `std`) for matrices, ones for norms, zeros
    /// for biases. Values are a function of (seed, parameter, index), regardless of device and
    /// number of threads.
    pub fn initialise(&self, std: f32, seed: u64) -> Result<()> {
        for (p, spec) in self.specs.iter().enumerate() {
            // One part at a time: an embedding in f32 may be larger than the model.
            for from in (0..spec.len()).step_by(INITIAL_PART) {
                let n = INITIAL_PART.min(spec.len() - from);
                self.store_part(p, from, &initial_part(spec, p, std, seed, from, n))?;
            }
        }
        Ok(())
    }

    /// Writes the values of parameter `i`, rounded to the storage dtype.
    pub fn store(&self, i: usize, values: &[f32]) -> Result<()> {
        if values.len() != self.specs[i].len() {
            let (name, n) = (&self.specs[i].name, values.len());
            return Err(Error::op("params", format!("{n} values for {name}")));
        }
        self.store_part(i, 0, values)
    }

    /// Writes values of parameter `i`, starting at element `from`.
    fn store_part(&self, i: usize, from: usize, values: &[f32]) -> Result<()> {
        let dtype = self.weights.dtype();
        let view = self.weight_view(i)?.view(from * dtype.size(), dtype, &[values.len()])?;
        match dtype {
            DType::BF16 => {
                let half: Vec<half::bf16> = values
                    .par_iter()
                    .with_min_len(1 << 14)
                    .map(|v| half::bf16::from_f32(*v))
                    .collect();
                view.upload(&half)
            }
            _ => view.upload(values),
        }
    }

    /// Writes the stored bytes of parameter `name`, little-endian in the storage dtype; returns
    /// false if it is not in the arena.
    pub fn put_stored(&self, name: &str, bytes: &[u8]) -> Result<bool> {
        let Some(i) = self.by_name(name) else { return Ok(false) };
        self.weight_view(i)?.upload(bytes)?;
        Ok(true)
    }
}

/// Name of a set's weights in the memory plan and the pool.
fn arena_name(set: ParamSetId) -> &'static str {
    match set {
        ParamSetId::Model => "weights",
        ParamSetId::Adapter => "adapter weights",
        ParamSetId::Reference => "reference weights",
        ParamSetId::Value => "value model weights",
        ParamSetId::Reward => "reward model weights",
    }
}

/// Returns transformers' initial values of one parameter, the `p`th of its set.
pub fn initial(spec: &ParamSpec, p: usize, std: f32, seed: u64) -> Vec<f32> {
    initial_part(spec, p, std, seed, 0, spec.len())
}

/// Returns `n` of the values of [`initial`], starting at `from`, a multiple of four.
fn initial_part(
    spec: &ParamSpec,
    p: usize,
    std: f32,
    seed: u64,
    from: usize,
    n: usize,
) -> Vec<f32> {
    if spec.role.is_norm() {
        vec![1.0; n]
    } else if spec.role.is_bias() {
        vec![0.0; n]
    } else {
        let mut values = normals_from(seed, p as u32, from, n);
        values.par_iter_mut().with_min_len(1 << 14).for_each(|v| *v *= std);
        values
    }
}

/// Returns the first of the roles that are fused with this one.
pub fn fused_role(role: Role) -> Role {
    match role {
        Role::K | Role::V => Role::Q,
        Role::KBias | Role::VBias => Role::QBias,
        Role::Up => Role::Gate,
        Role::UpBias => Role::GateBias,
        Role::LoraA(p) | Role::InitialA(p) => Role::LoraA(p.leader()),
        other => other,
    }
}

/// Returns uniforms in (0, 1) from Philox.
pub(crate) fn uniforms(seed: u64, stream: u32, n: usize) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    let four = |i: usize| {
        philox(key, [i as u32, (i >> 32) as u32, stream, tag::INIT_UNIFORM]).map(uniform)
    };
    let mut out: Vec<f32> = (0..n.div_ceil(4)).flat_map(four).collect();
    out.truncate(n);
    out
}

/// Returns standard normals from Philox by the Box-Muller transform.
pub(crate) fn normals(seed: u64, stream: u32, n: usize) -> Vec<f32> {
    normals_from(seed, stream, 0, n)
}

/// Returns `n` of the numbers of [`normals`], starting at `from`, a multiple of four. Each group of
/// four is a function of its counter, so the values do not depend on how threads share the work.
fn normals_from(seed: u64, stream: u32, from: usize, n: usize) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    let mut out = vec![0f32; n];
    out.par_chunks_mut(1 << 14).enumerate().for_each(|(chunk, values)| {
        let first = from / 4 + chunk * ((1 << 14) / 4);
        for (i, four) in (first..).zip(values.chunks_mut(4)) {
            let u = philox(key, [i as u32, (i >> 32) as u32, stream, tag::INIT_NORMAL])
                .map(|b| f64::from(uniform(b)));
            let pair = |a: f64, b: f64| {
                let (r, angle) = ((-2.0 * a.ln()).sqrt(), std::f64::consts::TAU * b);
                [(r * angle.cos()) as f32, (r * angle.sin()) as f32]
            };
            let ([a, b], [c, d]) = (pair(u[0], u[1]), pair(u[2], u[3]));
            four.copy_from_slice(&[a, b, c, d][..four.len()]);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, one value at a time.
    fn one_by_one(seed: u64, stream: u32, n: usize) -> Vec<f32> {
        let key = [seed as u32, (seed >> 32) as u32];
        let mut out = Vec::new();
        for i in 0..n.div_ceil(4) {
            let u = philox(key, [i as u32, (i >> 32) as u32, stream, tag::INIT_NORMAL])
                .map(|b| f64::from(uniform(b)));
            for (a, b) in [(u[0], u[1]), (u[2], u[3])] {
                let (r, angle) = ((-2.0 * a.ln()).sqrt(), std::f64::consts::TAU * b);
                out.extend([(r * angle.cos()) as f32, (r * angle.sin()) as f32]);
            }
        }
        out.truncate(n);
        out
    }

    #[test]
    fn normals_of_many_threads_are_those_of_one() {
        for n in [0, 1, 6, 70_001] {
            assert_eq!(normals(77, 3, n), one_by_one(77, 3, n), "{n}");
        }
        assert_eq!(normals_from(77, 3, 40_000, 30_001), one_by_one(77, 3, 70_001)[40_000..]);
    }

    #[test]
    fn initial_values_known_from_before_stay() {
        // Runs and the quickstart's figures in README.md start from these values.
        let bits: Vec<u32> = normals(1, 0, 5).iter().map(|v| v.to_bits()).collect();
        assert_eq!(bits, [0xbf073603, 0xbe95dbe5, 0x3f160064, 0x3f9c73d7, 0x3e4204cc]);
    }
}
