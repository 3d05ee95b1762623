//! The values an adapter starts from: PEFT's initialisations. Floor 3.
//!
//! Invariant: values are a function of (seed, parameter, index) and, where a method asks for it, of the base's weights.

use super::config::Kind;
use super::{Adapter, base_name};
use crate::cx::Cx;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::families::Role;
use crate::model::params::{ParamSet, normals, uniforms};

impl Adapter {
    pub(super) fn initialise(&self, cx: &Cx, model: &ModelConfig, base: &ParamSet, seed: u64) -> Result<()> {
        let init = match &self.config.kind {
            Kind::Lora(c) => c.init.as_str(),
            Kind::Ia3(_) => "true",
        };
        if !["true", "false", "gaussian"].contains(&init) {
            return Err(Error::Config(format!("init_lora_weights = {init}: true, false or gaussian")));
        }
        for (p, (spec, _)) in self.params.specs.iter().enumerate() {
            let n = spec.len();
            let values = match spec.role {
                // kaiming_uniform(a = sqrt(5)): uniform within 1 / sqrt(fan_in)
                Role::LoraA(_) if init != "gaussian" => {
                    let bound = (spec.shape[1] as f32).powf(-0.5);
                    uniforms(seed, p as u32, n).into_iter().map(|u| (2.0 * u - 1.0) * bound).collect()
                }
                Role::LoraA(_) => {
                    let std = 1.0 / spec.shape[0] as f32;
                    normals(seed, p as u32, n).into_iter().map(|v| v * std).collect()
                }
                Role::LoraB(_) if init == "false" => {
                    let bound = (spec.shape[1] as f32).powf(-0.5);
                    uniforms(seed, p as u32, n).into_iter().map(|u| (2.0 * u - 1.0) * bound).collect()
                }
                Role::LoraB(_) => vec![0.0; n],
                Role::Ia3(_) => vec![1.0; n],
                // DoRA: the rows' lengths of W + s B A, set below.
                Role::Magnitude(_) => vec![1.0; n],
                _ => copied(base, &spec.name, model)?,
            };
            self.params.store(p, &values)?;
        }
        self.refresh(cx, base)?;
        self.set_magnitudes()
    }

    /// Biases that are not trained, but lie in a unit with some that are, are the base's: no file holds them.
    pub(super) fn copy_biases(&self, model: &ModelConfig, base: &ParamSet) -> Result<()> {
        for (p, (spec, _)) in self.params.specs.iter().enumerate().filter(|(_, (s, _))| s.role.is_bias()) {
            self.params.store(p, &copied(base, &spec.name, model)?)?;
        }
        Ok(())
    }

    /// DoRA starts with the magnitude of what it decomposes.
    fn set_magnitudes(&self) -> Result<()> {
        for (p, (spec, _)) in self.params.specs.iter().enumerate() {
            let (Role::Magnitude(proj), Some(layer)) = (spec.role, spec.layer) else { continue };
            let site = self.site(layer, proj.leader());
            let segment = site.and_then(|s| {
                let at = s
                    .output_scales
                    .iter()
                    .position(|(_, v)| Some(v.address()) == self.params.weight_view(p).ok().map(|t| t.address()))?;
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

/// The base's values of a module that the adapter trains whole.
fn copied(base: &ParamSet, name: &str, model: &ModelConfig) -> Result<Vec<f32>> {
    let name = base_name(name);
    let tied = name == "lm_head.weight" && model.tie_word_embeddings;
    let stored = if tied { "model.embed_tokens.weight" } else { name.as_str() };
    let found = base.specs.iter().position(|(s, _)| s.name == stored);
    let i = found.ok_or_else(|| Error::op("adapter", format!("the model has no {stored}")))?;
    base.weight_view(i)?.to_f32()
}
