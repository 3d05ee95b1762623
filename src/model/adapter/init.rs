//! Initial values of adapters: PEFT's and adapter-hub's initialisations. Layer 5.
//!
//! Invariant: values are a function of (seed, parameter, index) and, for some methods, of the
//! base's weights.

use super::config::AdapterKind;
use super::pissa::principal;
use super::target::module_name;
use super::{Adapter, base_name};
use crate::autograd::Cx;
use crate::error::{Error, Result};
use crate::model::layout::ModelConfig;
use crate::model::params::{ParamSet, normals, uniforms};
use crate::model::specs::{BottleneckPart, Role};

impl Adapter {
    pub(super) fn initialise(
        &self,
        cx: &Cx,
        model: &ModelConfig,
        base: &ParamSet,
        seed: u64,
    ) -> Result<()> {
        if !cx.device.computes() {
            return self.refresh(cx, base);
        }
        let init = match &self.config.kind {
            AdapterKind::Lora(c) => c.init.as_str(),
            AdapterKind::Bottleneck(c) => c.init.as_str(),
            AdapterKind::Ia3(_) | AdapterKind::Prompt(_) => "true",
        };
        let scaled = |p: usize, n: usize, by: f32| {
            normals(seed, p as u32, n).into_iter().map(|v| v * by).collect()
        };
        for (p, spec) in self.params.specs.iter().enumerate() {
            let n = spec.len();
            // kaiming_uniform(a = sqrt(5)): uniform within 1 / sqrt(fan_in)
            let kaiming = || {
                let bound = (spec.shape[1] as f32).powf(-0.5);
                uniforms(seed, p as u32, n).into_iter().map(|u| (2.0 * u - 1.0) * bound).collect()
            };
            let values = match spec.role {
                Role::LoraA(_) | Role::HeadA if init != "gaussian" => kaiming(),
                Role::LoraA(_) | Role::HeadA => scaled(p, n, 1.0 / spec.shape[0] as f32),
                Role::LoraB(_) | Role::HeadB if init == "false" => kaiming(),
                Role::LoraB(_) | Role::HeadB => vec![0.0; n],
                // As torch initialises an Embedding.
                Role::EmbedA if init == "false" => normals(seed, p as u32, n),
                Role::EmbedA => vec![0.0; n],
                Role::EmbedB => normals(seed, p as u32, n),
                // PiSSA's values are set below.
                Role::InitialA(_) | Role::InitialB(_) => vec![0.0; n],
                Role::Ia3(_) => vec![1.0; n],
                // DoRA: the row norms of W + s B A, set below.
                Role::Magnitude(_) => vec![1.0; n],
                Role::Prompt => match &self.config.kind {
                    AdapterKind::Prompt(c) if !c.init_ids.is_empty() => {
                        embeddings(base, model, &c.init_ids, n)?
                    }
                    _ => normals(seed, p as u32, n), // as torch initialises an Embedding
                },
                Role::Bottleneck(_, BottleneckPart::Down) if init == "mam_adapter" => kaiming(),
                Role::Bottleneck(_, BottleneckPart::Up) if init == "mam_adapter" => vec![0.0; n],
                Role::Bottleneck(_, BottleneckPart::Down | BottleneckPart::Up) => {
                    scaled(p, n, 0.02)
                }
                Role::Bottleneck(..) => vec![0.0; n],
                Role::Score if base.by_role(None, Role::Score).is_none() => vec![0.0; n],
                _ => copied(base, &spec.name, model)?,
            };
            self.params.store(p, &values)?;
        }
        self.set_principal(model, base, seed, true)?;
        self.refresh(cx, base)?;
        self.set_magnitudes()
    }

    /// Sets PiSSA's values: the pair that is subtracted from each weight (B negated) and, for a new
    /// adapter, the trained pair with the same A and B.
    pub(super) fn set_principal(
        &self,
        model: &ModelConfig,
        base: &ParamSet,
        seed: u64,
        trained: bool,
    ) -> Result<()> {
        let AdapterKind::Lora(config) = &self.config.kind else { return Ok(()) };
        let Some(rounds) = config.pissa() else { return Ok(()) };
        let index_of = |layer, role| {
            let found = self.params.by_role(layer, role);
            found.ok_or_else(|| Error::op("pissa", format!("no {role:?} in layer {layer:?}")))
        };
        for (p, spec) in self.params.specs.iter().enumerate() {
            let (Role::InitialA(proj), Some(layer)) = (spec.role, spec.layer) else { continue };
            let weight = base.by_role(spec.layer, proj.role());
            let weight =
                weight.ok_or_else(|| Error::op("pissa", format!("the model has no {proj:?}")))?;
            let view = base.weight_view(weight)?;
            let (shape, rank) = ((view.row_count(), view.cols()), spec.shape[0]);
            let scale = super::scale(config, &module_name(model, (layer, proj)), rank)?;
            let (a, mut b) =
                principal(&view.to_f32()?, shape, rank, scale, rounds, (seed, p as u32))?;
            self.params.store(p, &a)?;
            self.params.store(index_of(spec.layer, Role::InitialB(proj))?, &b)?;
            if trained {
                b.iter_mut().for_each(|v| *v = -*v);
                self.params.store(index_of(spec.layer, Role::LoraA(proj))?, &a)?;
                self.params.store(index_of(spec.layer, Role::LoraB(proj))?, &b)?;
            }
        }
        Ok(())
    }

    /// Copies the base's biases: no file holds untrained ones that are fused with trained ones.
    pub(super) fn copy_biases(&self, model: &ModelConfig, base: &ParamSet) -> Result<()> {
        for (p, spec) in self.params.specs.iter().enumerate().filter(|(_, s)| s.is_base_bias()) {
            self.params.store(p, &copied(base, &spec.name, model)?)?;
        }
        Ok(())
    }

    /// Initialises DoRA's magnitudes to the norms of the weights that they scale.
    fn set_magnitudes(&self) -> Result<()> {
        for (p, spec) in self.params.specs.iter().enumerate() {
            let (Role::Magnitude(proj), Some(layer)) = (spec.role, spec.layer) else { continue };
            let site = self.site(layer, proj.leader());
            let segment = site.and_then(|s| {
                let at = s.output_scales.iter().position(|(_, v)| {
                    Some(v.address()) == self.params.weight_view(p).ok().map(|t| t.address())
                })?;
                Some((s.norm.as_ref()?, s.output_scales[at].0))
            });
            let Some((norm, from)) = segment else {
                return Err(Error::op("adapter", format!("{} has no place", spec.name)));
            };
            let values = norm.rows(from, from + spec.len())?.to_f32()?;
            self.params.store(p, &values)?;
        }
        Ok(())
    }
}

/// Returns the base's values of a module that the adapter trains in full.
fn copied(base: &ParamSet, name: &str, model: &ModelConfig) -> Result<Vec<f32>> {
    let name = base_name(name);
    let tied = name == "lm_head.weight" && model.tie_word_embeddings;
    let stored = if tied { "model.embed_tokens.weight" } else { name.as_str() };
    let found = base.by_name(stored);
    let i = found.ok_or_else(|| Error::op("adapter", format!("the model has no {stored}")))?;
    base.weight_view(i)?.to_f32()
}

/// Returns `n` values: the embeddings of `ids`, scaled like the model's own and repeated as needed.
fn embeddings(base: &ParamSet, model: &ModelConfig, ids: &[u32], n: usize) -> Result<Vec<f32>> {
    let table = base.required(None, Role::Embed)?;
    let scale = model.embedding_scale.map_or(1.0, |s| s.factors(table.dtype()).0);
    let mut values = Vec::with_capacity(n);
    for id in ids.iter().cycle().take(n / table.cols()) {
        let row = table.rows(*id as usize, *id as usize + 1)?.to_f32()?;
        values.extend(row.into_iter().map(|v| v * scale));
    }
    Ok(values)
}
