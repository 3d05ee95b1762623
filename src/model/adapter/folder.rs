//! Reads and writes adapter folders: `adapter_config.json` and the weights (PEFT's
//! `adapter_model.safetensors`, adapter-hub's `adapter.safetensors`). Layer 5.
//!
//! Invariant: a folder fits the model (names, shapes, finite values), or reading it is an error
//! that lists all problems; [`fn@write`] leaves a complete new folder or the old one.

use std::path::Path;

use serde_json::Value;

use super::config::{AdapterConfig, AdapterKind};
use super::target::{EMBEDDING, HEAD};
use super::{Adapter, PREFIX, base_name, bottleneck};
use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result, nearest};
use crate::fsio::{self, AtomicDir};
use crate::model::layout::{ModelConfig, Task};
use crate::model::params::ParamSet;
use crate::model::specs::{ParamSpec, Role};
use crate::tensor::ParamSetId;
use crate::tensor::safetensors::{self, HostDtype, SafeFolder, TensorSpec};

const WEIGHTS: &str = "adapter_model.safetensors";
pub const CONFIG: &str = "adapter_config.json";

/// A tensor of an adapter's file: one parameter, or two of PiSSA's joined by rows or columns.
pub struct SavedParam {
    pub name: String,
    pub shape: Vec<usize>,
    /// Indices of the parameters, and their widths.
    pieces: Vec<(usize, usize)>,
    by_columns: bool,
    /// Whether the parameter is transposed: see [`file_shape`].
    turned: bool,
}

/// Returns a parameter's shape in the file. PEFT stores an embedding's A as [r, vocab]; here the
/// values of a token are contiguous.
fn file_shape(spec: &ParamSpec) -> Vec<usize> {
    let mut shape = spec.shape.clone();
    if spec.role == Role::EmbedA {
        shape.reverse();
    }
    shape
}

/// Transposes a row-major matrix of `cols` columns.
fn turned(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols.max(1);
    (0..values.len()).map(|i| values[i % rows * cols + i / rows]).collect()
}

impl SavedParam {
    pub fn whole(name: &str, shape: &[usize], i: usize) -> SavedParam {
        let width = shape.last().copied().unwrap_or(1);
        SavedParam {
            name: name.into(),
            shape: shape.to_vec(),
            pieces: vec![(i, width)],
            by_columns: false,
            turned: false,
        }
    }

    /// Describes a parameter of an adapter as stored in its file.
    fn of(spec: &ParamSpec, i: usize) -> SavedParam {
        SavedParam {
            turned: spec.role == Role::EmbedA,
            ..SavedParam::whole(&spec.name, &file_shape(spec), i)
        }
    }

    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn holds(&self, i: usize) -> bool {
        self.pieces.iter().any(|p| p.0 == i)
    }

    /// Builds the tensor from the values of its parameters.
    pub fn join(&self, values: &mut dyn FnMut(usize) -> Result<Vec<f32>>) -> Result<Vec<f32>> {
        let parts = self.pieces.iter().map(|(i, _)| values(*i)).collect::<Result<Vec<_>>>()?;
        if self.turned {
            return Ok(turned(&parts.concat(), self.shape[0]));
        }
        if !self.by_columns {
            return Ok(parts.concat());
        }
        let row = |r: usize| {
            parts.iter().zip(&self.pieces).flat_map(move |(v, (_, w))| &v[r * w..(r + 1) * w])
        };
        Ok((0..self.shape[0]).flat_map(row).copied().collect())
    }

    /// Splits the tensor into the values of its parameters.
    pub fn split(&self, values: &[f32]) -> Vec<(usize, Vec<f32>)> {
        let mut parts: Vec<(usize, Vec<f32>)> =
            self.pieces.iter().map(|p| (p.0, Vec::new())).collect();
        let mut rest = values;
        if self.turned {
            parts[0].1 = turned(values, self.shape[1]);
            return parts;
        }
        if !self.by_columns {
            let each = values.len() / parts.len();
            parts.iter_mut().zip(values.chunks(each)).for_each(|(p, v)| p.1.extend(v));
            return parts;
        }
        while !rest.is_empty() {
            for (part, (_, width)) in parts.iter_mut().zip(&self.pieces) {
                let (row, tail) = rest.split_at((*width).min(rest.len()));
                part.1.extend(row);
                rest = tail;
            }
        }
        parts
    }
}

impl Adapter {
    /// Reads an adapter folder for a model. Errors, with similar names: an adapter for another task
    /// or another base.
    pub fn load(cx: &Cx, dir: &Path, model: &ModelConfig, base: &ParamSet) -> Result<Adapter> {
        let config = AdapterConfig::load(dir)?;
        if config.task != model.task.peft_name() {
            let message = format!(
                "is for {}, but the model is {}; give the model that it was trained on",
                config.task,
                model.task.peft_name()
            );
            return Err(Error::model(dir, message));
        }
        let file = SafeFolder::open_file(dir.join(config.weights_file()))?;
        has_score(&file, dir, model)?;
        let adapter = Adapter::zeros(cx, ParamSetId::Adapter, config, model)
            .map_err(|e| Error::model(dir, e.to_string()))?;
        adapter.copy_biases(model, base)?;
        adapter.set_principal(model, base, 0, false)?;
        adapter.read_values(&file, dir, base)?;
        adapter.refresh(cx, base)?;
        Ok(adapter)
    }

    fn read_values(&self, file: &SafeFolder, dir: &Path, base: &ParamSet) -> Result<()> {
        let mut problems = Vec::new();
        let names: Vec<&str> = file.names().collect();
        let in_file =
            |spec: &&ParamSpec| !matches!(spec.role, Role::InitialA(_) | Role::InitialB(_));
        for spec in self.params.specs.iter().filter(in_file) {
            match file.get(&spec.name) {
                None if spec.is_base_bias() => {} // an untrained bias is the base's
                None => {
                    let near = nearest(&spec.name, names.iter().copied());
                    let near = near.map(|n| format!("; the file has {n}")).unwrap_or_default();
                    problems.push(format!("missing: {} {:?}{near}", spec.name, spec.shape));
                }
                Some(view) if view.shape != file_shape(spec) => problems.push(format!(
                    "shape: {} is {:?}, for this model it is {:?}",
                    spec.name,
                    view.shape,
                    file_shape(spec)
                )),
                Some(_) => {}
            }
        }
        let known: Vec<&str> = self.params.specs.iter().map(|s| s.name.as_str()).collect();
        for name in names.iter().filter(|n| !known.contains(n)) {
            if self.ties_head() && *name == tied_head() {
                let embedding = file.get(&format!("{PREFIX}{EMBEDDING}.weight"));
                if embedding.map(|view| view.bytes) != file.get(name).map(|view| view.bytes) {
                    problems.push(format!("other: {name} is not the embedding that it is tied to"));
                }
                continue;
            }
            if self.holds_base(name) {
                problems.extend(self.other_base(file, name, base)?);
                continue;
            }
            let near = nearest(name, known.iter().copied())
                .map(|n| format!("; near: {n}"))
                .unwrap_or_default();
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
        for (i, spec) in self.params.specs.iter().enumerate() {
            let Some(view) = file.get(&spec.name) else { continue };
            values.resize(view.len(), 0.0);
            view.to_f32_into(&mut values)?;
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::model(
                    dir,
                    format!("{} is NaN or infinite at value {at}", spec.name),
                ));
            }
            match SavedParam::of(spec, i) {
                saved if saved.turned => self.params.store(i, &turned(&values, saved.shape[1]))?,
                _ => self.params.store(i, &values)?,
            }
        }
        Ok(())
    }

    /// Whether a tensor is the base's weight of an adapted module: PEFT saves the embedding and
    /// head with their LoRA pair.
    fn holds_base(&self, name: &str) -> bool {
        let module = |on: bool, module| on.then(|| format!("{PREFIX}{module}.base_layer.weight"));
        let embedding = module(self.embedding.is_some(), EMBEDDING);
        [embedding, module(self.head.is_some(), HEAD)].iter().flatten().any(|n| n == name)
    }

    /// Describes how such a tensor differs from the base's. It must be equal, since it is not
    /// loaded.
    fn other_base(&self, file: &SafeFolder, name: &str, base: &ParamSet) -> Result<Option<String>> {
        let own = base_name(name);
        // A tied head uses the embedding's weight.
        let at = base.by_name(&own).or_else(|| base.by_name(&format!("{EMBEDDING}.weight")));
        let (Some(at), Some(view)) = (at, file.get(name)) else { return Ok(None) };
        let weight = base.weight_view(at)?;
        let mut values = vec![0.0; view.len()];
        view.to_f32_into(&mut values)?;
        let same = view.shape == weight.shape() && {
            let rounded = |v: &f32| match weight.dtype() {
                DType::BF16 => half::bf16::from_f32(*v).to_f32(),
                _ => *v,
            };
            values.iter().map(rounded).eq(weight.to_f32()?)
        };
        let message = || {
            format!("other: {name} differs from {own} of this model; the model's values are used")
        };
        Ok((!same).then(message))
    }

    /// Lists the tensors to save. Untrained biases are left out; PiSSA's pairs are joined into a
    /// plain LoRA on the unchanged base.
    pub fn saved(&self) -> Vec<SavedParam> {
        let mut all: Vec<SavedParam> = Vec::new();
        for (i, spec) in self.params.specs.iter().enumerate() {
            let (first, by_columns) = match spec.role {
                Role::InitialA(p) => (Role::LoraA(p), false),
                Role::InitialB(p) => (Role::LoraB(p), true),
                _ if spec.role.is_bias() && !self.params.tuning(i).trainable => continue,
                _ => {
                    all.push(SavedParam::of(spec, i));
                    continue;
                }
            };
            let j = self.params.by_role(spec.layer, first);
            if let Some(saved) = all.iter_mut().find(|s| j.is_some_and(|j| s.holds(j))) {
                saved.pieces.push((i, spec.shape[1]));
                saved.by_columns = by_columns;
                saved.shape[usize::from(by_columns)] += spec.shape[usize::from(by_columns)];
            }
        }
        // PEFT writes both tied tensors.
        if let (true, Some(i)) = (self.ties_head(), self.params.by_role(None, Role::Embed)) {
            all.push(SavedParam::whole(&tied_head(), &self.params.specs[i].shape, i));
        }
        all
    }

    pub fn weights_file(&self) -> &'static str {
        self.config.weights_file()
    }

    /// adapter_config.json as bytes.
    pub fn config_bytes(&self) -> Vec<u8> {
        format!("{:#}\n", Value::Object(self.config.to_json())).into_bytes()
    }
}

impl AdapterConfig {
    fn weights_file(&self) -> &'static str {
        match self.kind {
            AdapterKind::Bottleneck(_) => bottleneck::WEIGHTS,
            _ => WEIGHTS,
        }
    }
}

/// PEFT's name for a head that is tied to the embedding.
fn tied_head() -> String {
    format!("{PREFIX}{HEAD}.weight")
}

/// Checks that a classifier on a language model gets its score from the adapter; otherwise the
/// score would be random.
fn has_score(file: &SafeFolder, dir: &Path, model: &ModelConfig) -> Result<()> {
    let own = ModelConfig::from_json("config.json", model.raw.clone()).map(|own| own.task);
    let from_base = own.is_ok_and(|own| own == model.task);
    let from_file = file.names().any(|name| name.ends_with("score.weight"));
    if model.task == Task::CausalLm || from_base || from_file {
        return Ok(());
    }
    let message = "holds no score.weight, and the base is a language model, which has none; save the adapter \
                   with modules_to_save=[\"score\"], or give a base with a trained score";
    Err(Error::model(dir, message))
}

/// Writes a folder that `peft` loads, together with the tokenizer's files. `values` returns the
/// values of a parameter by index.
pub fn write(
    dir: &Path,
    adapter: &Adapter,
    tokenizer_files: &[(String, Vec<u8>)],
    values: &mut dyn FnMut(usize) -> Result<Vec<f32>>,
) -> Result<()> {
    let out = AtomicDir::create(dir)?;
    let saved = adapter.saved();
    let tensors: Vec<TensorSpec> = saved
        .iter()
        .map(|s| TensorSpec { name: s.name.clone(), dtype: HostDtype::F32, shape: s.shape.clone() })
        .collect();
    safetensors::write(
        out.tmp().join(adapter.weights_file()),
        &tensors,
        &[("format", "pt")],
        &mut |at, _| {
            let values = saved[at].join(values)?;
            match values.iter().position(|v| !v.is_finite()) {
                Some(i) => Err(Error::model(
                    dir,
                    format!(
                        "{} is NaN or infinite at value {i}; nothing was written",
                        saved[at].name
                    ),
                )),
                None => HostDtype::F32.encode(&values),
            }
        },
    )?;
    for (name, bytes) in tokenizer_files {
        fsio::atomic_write(out.tmp().join(name), bytes)?;
    }
    fsio::atomic_write(out.tmp().join(CONFIG), &adapter.config_bytes())?;
    out.commit(CONFIG)
}
