//! Reads the weights of a model folder and writes model folders. Layer 5.
//!
//! Invariant: [`load_weights`] passes on every expected parameter once, with the shape of its spec
//! and finite values, or returns an error that lists all problems; [`write_folder`] leaves a
//! complete new folder or the old one.

use std::path::Path;

use serde_json::{Map, Value};

use super::layout::{ModelConfig, Task};
use super::specs::{ParamSpec, Role, expected_params};
use crate::error::{Error, Result};
use crate::fsio::{self, AtomicDir};
use crate::tensor::safetensors::{self, HostDtype, SafeFolder, TensorSpec, TensorView};

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Files of a folder besides weights and config: names and contents.
pub type NamedFiles = Vec<(String, Vec<u8>)>;

/// Files of tokenizers, old and new.
const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Reads config.json and checks tying against the weights: if the config ties the head but the
/// folder holds a head that differs from the embedding, they are separate parameters (as in
/// transformers). For training use this, not [`ModelConfig::load`].
pub fn load_config(dir: impl AsRef<Path>) -> Result<ModelConfig> {
    let mut config = ModelConfig::load(&dir)?;
    if config.tie_word_embeddings && config.task == Task::CausalLm {
        let weights = SafeFolder::open(&dir)?;
        if let (Some(embed), Some(head)) = (weights.get(EMBED), weights.get(HEAD)) {
            config.tie_word_embeddings = same(&embed, &head);
        }
    }
    Ok(config)
}

/// Reads config.json as [`load_config`] does. If the folder has no weights, the config alone says
/// whether the head is tied.
pub fn inspect_config(dir: &Path) -> Result<ModelConfig> {
    if SafeFolder::exists(dir) { load_config(dir) } else { ModelConfig::load(dir) }
}

/// Passes each expected parameter to `sink`, in arena order, directly from the mapped file; the
/// sink copies it to its destination. If `config` was given another task than the folder's, the
/// score is missing and the caller initialises it. Names, shapes and dtypes are all checked before
/// the first call; NaN and infinities are checked tensor by tensor. Ignores leftover
/// `rotary_emb.inv_freq` tensors and a head equal to the embedding it is tied to.
pub fn load_weights(
    dir: impl AsRef<Path>,
    config: &ModelConfig,
    sink: &mut dyn FnMut(&ParamSpec, &TensorView) -> Result<()>,
) -> Result<()> {
    let dir = dir.as_ref();
    let weights = SafeFolder::open(dir)?;
    let specs = expected_params(config);
    let problems = compare(&weights, config, &specs);
    if !problems.is_empty() {
        let message = format!(
            "holds weights that do not fit its config.json; use the config.json that belongs to \
             them\n  {}",
            problems.join("\n  ")
        );
        return Err(Error::model(dir, message));
    }
    for spec in &specs {
        let Some(view) = find(&weights, config, spec) else {
            if is_new(config, spec) {
                continue;
            }
            return Err(Error::model(dir, format!("{} is missing", spec.name)));
        };
        check_finite(
            view.path,
            spec,
            view.dtype,
            view.bytes,
            "download the folder again, or use an earlier checkpoint",
        )?;
        sink(spec, &view)?;
    }
    Ok(())
}

/// Writes a folder that transformers can load: model.safetensors in `dtype`, config.json
/// ([`ModelConfig::to_json`]), generation_config.json if given, and the tokenizer files byte for
/// byte. `bytes_of` returns each expected parameter's values, row-major little-endian in `dtype`
/// ([`HostDtype::encode`]); one tensor is held at a time. Everything is written to a temporary
/// sibling folder and moved into place at the end: see [`AtomicDir::commit`]. Errors: NaN or
/// infinities, wrong lengths, IO; then the old contents of `dir` stay.
pub fn write_folder(
    dir: impl AsRef<Path>,
    config: &ModelConfig,
    tokenizer_files: &[(String, Vec<u8>)],
    generation_config: Option<Map<String, Value>>,
    dtype: HostDtype,
    bytes_of: &mut dyn FnMut(&ParamSpec) -> Result<Vec<u8>>,
) -> Result<()> {
    let out = AtomicDir::create(&dir)?;
    let specs = expected_params(config);
    let tensors: Vec<TensorSpec> = specs
        .iter()
        .map(|s| TensorSpec { name: s.name.clone(), dtype, shape: s.shape.clone() })
        .collect();
    safetensors::write(
        out.tmp().join("model.safetensors"),
        &tensors,
        &[("format", "pt")],
        &mut |i, _| {
            let Some(spec) = specs.get(i) else { return Ok(Vec::new()) };
            let bytes = bytes_of(spec)?;
            check_finite(dir.as_ref(), spec, dtype, &bytes, "nothing was written")?;
            Ok(bytes)
        },
    )?;
    for (name, bytes) in tokenizer_files {
        fsio::atomic_write(out.tmp().join(name), bytes)?;
    }
    if let Some(map) = generation_config {
        fsio::atomic_write(out.tmp().join("generation_config.json"), &pretty(map))?;
    }
    fsio::atomic_write(out.tmp().join("config.json"), &pretty(config.to_json(dtype)))?;
    out.commit("config.json")
}

/// Reads the tokenizer files of `dir`, for [`write_folder`].
pub fn tokenizer_files(dir: impl AsRef<Path>) -> Result<NamedFiles> {
    let dir = dir.as_ref();
    let there = TOKENIZER_FILES.iter().filter(|name| dir.join(name).is_file());
    there.map(|name| Ok((name.to_string(), fsio::read(dir.join(name))?))).collect()
}

/// Reads generation_config.json of `dir`, if present.
pub fn generation_config(dir: impl AsRef<Path>) -> Result<Option<Map<String, Value>>> {
    let path = dir.as_ref().join("generation_config.json");
    if !path.exists() {
        return Ok(None);
    }
    let map = serde_json::from_slice(&fsio::read(&path)?);
    map.map(Some).map_err(|e| Error::model(path, format!("is not a JSON object: {e}")))
}

/// Finds the stored tensor of a parameter. A tied embedding may be stored under the head's name
/// only.
fn find<'a>(
    weights: &'a SafeFolder,
    config: &ModelConfig,
    spec: &ParamSpec,
) -> Option<TensorView<'a>> {
    let tied = spec.role == Role::Embed && config.tie_word_embeddings;
    weights.get(&spec.name).or_else(|| weights.get(HEAD).filter(|_| tied))
}

fn compare(weights: &SafeFolder, config: &ModelConfig, specs: &[ParamSpec]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut expected: std::collections::BTreeSet<&str> =
        specs.iter().map(|s| s.name.as_str()).collect();
    for spec in specs {
        let Some(view) = find(weights, config, spec) else {
            if is_new(config, spec) {
                continue;
            }
            let hint = if spec.role == Role::Head { " (tie_word_embeddings is false)" } else { "" };
            problems.push(format!("missing: {} {:?}{hint}", spec.name, spec.shape));
            continue;
        };
        if view.shape != spec.shape {
            problems.push(format!(
                "shape: {} is {:?}, but config.json gives {:?}",
                spec.name, view.shape, spec.shape
            ));
        }
        if let HostDtype::Other(_) = view.dtype {
            problems.push(format!(
                "dtype: {} is {}; supported: F32, F16, BF16",
                spec.name,
                view.dtype.name()
            ));
        }
    }
    if config.task != Task::CausalLm {
        expected.insert(HEAD);
    } else if config.tie_word_embeddings {
        expected.insert(HEAD);
        if let (Some(embed), Some(head)) = (weights.get(EMBED), weights.get(HEAD))
            && !same(&embed, &head)
        {
            problems.push(format!(
                "tied: {HEAD} differs from {EMBED}; set tie_word_embeddings to false"
            ));
        }
    }
    let unexpected =
        weights.names().filter(|n| !expected.contains(n) && !n.ends_with("rotary_emb.inv_freq"));
    problems.extend(unexpected.map(|name| format!("unexpected: {name}")));
    problems
}

/// Whether a parameter is a new score: the folder has another task.
fn is_new(config: &ModelConfig, spec: &ParamSpec) -> bool {
    let own = ModelConfig::from_json("config.json", config.raw.clone()).map(|c| c.task);
    matches!(spec.role, Role::Score | Role::ScoreBias) && own.is_ok_and(|t| t != config.task)
}

fn same(a: &TensorView, b: &TensorView) -> bool {
    a.dtype == b.dtype && a.shape == b.shape && a.bytes == b.bytes
}

fn check_finite(
    path: &Path,
    spec: &ParamSpec,
    dtype: HostDtype,
    bytes: &[u8],
    next: &str,
) -> Result<()> {
    let Some(i) = safetensors::first_non_finite(dtype, bytes) else { return Ok(()) };
    let row = spec.shape.last().copied().unwrap_or(1).max(1);
    let at = if spec.shape.len() == 2 {
        format!("[{}, {}]", i / row, i % row)
    } else {
        format!("[{i}]")
    };
    Err(Error::model(path, format!("{} is NaN or infinite at {at} (value {i}); {next}", spec.name)))
}

fn pretty(map: Map<String, Value>) -> Vec<u8> {
    let mut text = format!("{:#}", Value::Object(map)).into_bytes();
    text.push(b'\n');
    text
}
