//! Adapter folders: `adapter_config.json` and the weights (PEFT's `adapter_model.safetensors`,
//! adapter-hub's `adapter.safetensors`), in and out. Layer 5.
//!
//! Invariant: a folder that is read fits the model (names, shapes, finite values) or is an error
//! that lists all that is wrong; [`fn@write`] leaves a whole folder or the one that was there.

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

/// A tensor of an adapter's file: one parameter, or PiSSA's two joined, by rows or by columns.
pub struct SavedParam {
    pub name: String,
    pub shape: Vec<usize>,
    /// Parameters and their widths.
    pieces: Vec<(usize, usize)>,
    by_columns: bool,
    /// The parameter lies turned: see [`file_shape`].
    turned: bool,
}

/// A parameter's shape in the file. PEFT has an embedding's A as [r, vocab]; here a token's values
/// lie side by side.
fn file_shape(spec: &ParamSpec) -> Vec<usize> {
    let mut shape = spec.shape.clone();
    if spec.role == Role::EmbedA {
        shape.reverse();
    }
    shape
}

/// The transpose of a matrix of this many columns.
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

    /// A parameter of an adapter as its file has it.
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

    /// The tensor, from its parameters' values.
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

    /// The parameters' values, from the tensor's.
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
    /// Reads a PEFT folder onto a model. Errors: an adapter for another task or another base, with
    /// near names.
    pub fn load(cx: &Cx, dir: &Path, model: &ModelConfig, base: &ParamSet) -> Result<Adapter> {
        let config = AdapterConfig::load(dir)?;
        if config.task != model.task.peft_name() {
            let message = format!(
                "is for {}, the model is {}; give the model that it was trained on",
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
                None if spec.is_base_bias() => {} // a bias that is not trained is the base's
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

    /// Whether a tensor is the base's weight below a pair: PEFT saves an embedding and a head that
    /// have LoRA with their adapter.
    fn holds_base(&self, name: &str) -> bool {
        let module = |on: bool, module| on.then(|| format!("{PREFIX}{module}.base_layer.weight"));
        let embedding = module(self.embedding.is_some(), EMBEDDING);
        [embedding, module(self.head.is_some(), HEAD)].iter().flatten().any(|n| n == name)
    }

    /// What is wrong with such a tensor: it must be what the base has, since it is not read.
    fn other_base(&self, file: &SafeFolder, name: &str, base: &ParamSet) -> Result<Option<String>> {
        let own = base_name(name);
        // A tied head is the embedding.
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
            format!("other: {name} holds other values than {own} of this model, whose own are used")
        };
        Ok((!same).then(message))
    }

    /// What of the adapter goes into its file. A bias that is not trained stays out; PiSSA's pairs
    /// are joined, which makes them a plain LoRA on the base as it is.
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
        // PEFT writes both of what is tied.
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

/// What PEFT's file calls a head that is tied to the embedding.
fn tied_head() -> String {
    format!("{PREFIX}{HEAD}.weight")
}

/// A classifier on a language model has its score from the adapter alone: without it, it would be
/// a random one.
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

/// Writes a folder that `peft` loads, with the tokenizer's files beside it. `values` gives a
/// parameter's values by index.
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
