//! PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, in and out. Floor 3.
//!
//! Invariant: a folder that is read fits the model (names, shapes, finite values) or is an error that lists all that is
//! wrong; [`write`] leaves a whole folder or the one that was there.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Adapter;
use super::config::AdapterConfig;
use crate::cx::Cx;
use crate::error::{Error, Result, nearest};
use crate::fsio::{self, AtomicDir};
use crate::model::config::ModelConfig;
use crate::model::params::ParamSet;
use crate::tensor::safetensors::{self, HostDtype, SafeFolder, TensorSpec};

pub const WEIGHTS: &str = "adapter_model.safetensors";
pub const CONFIG: &str = "adapter_config.json";

impl Adapter {
    /// Reads a PEFT folder onto a model. Errors: an adapter for another task or another base, with near names.
    pub fn load(cx: &Cx, set: u32, dir: &Path, model: &ModelConfig, base: &ParamSet) -> Result<Adapter> {
        let config = AdapterConfig::load(dir)?;
        if config.task != model.task.peft_name() {
            let message = format!(
                "is for {}, the model is {}; give the model that it was trained on",
                config.task,
                model.task.peft_name()
            );
            return Err(Error::model(dir, message));
        }
        let adapter = Adapter::zeros(cx, set, config, model).map_err(|e| Error::model(dir, e.to_string()))?;
        let file = SafeFolder::open_file(dir.join(WEIGHTS))?;
        adapter.copy_biases(model, base)?;
        adapter.read_values(&file, dir)?;
        adapter.refresh(cx, base)?;
        Ok(adapter)
    }

    fn read_values(&self, file: &SafeFolder, dir: &Path) -> Result<()> {
        let mut problems = Vec::new();
        let names: Vec<&str> = file.names().collect();
        for (spec, _) in &self.params.specs {
            match file.get(&spec.name) {
                None if spec.role.is_bias() => {} // a bias that is not trained is the base's
                None => {
                    let near = nearest(&spec.name, names.iter().copied());
                    let near = near.map(|n| format!("; the file has {n}")).unwrap_or_default();
                    problems.push(format!("missing: {} {:?}{near}", spec.name, spec.shape));
                }
                Some(view) if view.shape != spec.shape => problems
                    .push(format!("shape: {} is {:?}, for this model it is {:?}", spec.name, view.shape, spec.shape)),
                Some(_) => {}
            }
        }
        let known: Vec<&str> = self.params.specs.iter().map(|(s, _)| s.name.as_str()).collect();
        for name in names.iter().filter(|n| !known.contains(n)) {
            let near = nearest(name, known.iter().copied()).map(|n| format!("; near: {n}")).unwrap_or_default();
            problems.push(format!("unexpected: {name}{near}"));
        }
        if !problems.is_empty() {
            let more = problems.len().saturating_sub(8);
            problems.truncate(8);
            let tail = if more > 0 { format!("\n  and {more} more") } else { String::new() };
            let base = match self.config.base.as_str() {
                "" => String::new(),
                base => format!(" (its base was {base})"),
            };
            let message = format!(
                "this adapter is not for this model{base}; give the base that it was trained on\n  {}{tail}",
                problems.join("\n  ")
            );
            return Err(Error::model(dir, message));
        }
        let mut values = Vec::new();
        for (i, (spec, _)) in self.params.specs.iter().enumerate() {
            let Some(view) = file.get(&spec.name) else { continue };
            values.resize(view.len(), 0.0);
            view.to_f32_into(&mut values)?;
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::model(dir, format!("{} is NaN or infinite at value {at}", spec.name)));
            }
            self.params.store(i, &values)?;
        }
        Ok(())
    }

    /// What of the adapter goes into its file: name and index of a parameter. A bias that is not trained stays out.
    pub fn saved(&self) -> Vec<(String, usize)> {
        let specs = self.params.specs.iter().enumerate();
        let kept = specs.filter(|(i, (spec, _))| !spec.role.is_bias() || self.params.tuning(*i).trainable);
        kept.map(|(i, (spec, _))| (spec.name.clone(), i)).collect()
    }

    /// adapter_config.json as bytes.
    pub fn config_bytes(&self) -> Vec<u8> {
        format!("{:#}\n", Value::Object(self.config.to_json())).into_bytes()
    }
}

/// Writes a folder that `peft` loads, with the tokenizer's files beside it. `values` gives a parameter's values by index.
pub fn write(
    dir: &Path,
    adapter: &Adapter,
    tokenizer_files: &[PathBuf],
    values: &mut dyn FnMut(usize) -> Result<Vec<f32>>,
) -> Result<()> {
    let out = AtomicDir::create(dir)?;
    let saved = adapter.saved();
    let tensors: Vec<TensorSpec> = saved
        .iter()
        .map(|(name, i)| TensorSpec {
            name: name.clone(),
            dtype: HostDtype::F32,
            shape: adapter.params.specs[*i].0.shape.clone(),
        })
        .collect();
    safetensors::write(out.tmp().join(WEIGHTS), &tensors, &[("format", "pt")], &mut |at, _| {
        let values = values(saved[at].1)?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => {
                Err(Error::model(dir, format!("{} is NaN or infinite at value {i}; nothing was written", saved[at].0)))
            }
            None => HostDtype::F32.encode(&values),
        }
    })?;
    for file in tokenizer_files {
        let Some(name) = file.file_name() else { continue };
        fsio::atomic_write(out.tmp().join(name), &fsio::read(file)?)?;
    }
    fsio::atomic_write(out.tmp().join(CONFIG), &adapter.config_bytes())?;
    out.commit(CONFIG)
}
