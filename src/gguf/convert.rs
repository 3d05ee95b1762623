//! Converts a GGUF file to a Hugging Face folder. Layer 6.
//!
//! Invariant: every tensor of the file belongs to a parameter of the model, and every parameter has
//! a tensor. The folder appears completely or not at all.

use std::collections::BTreeSet;
use std::path::Path;

use super::blocks::GgufType;
use super::config::{config_of, names};
use super::read::{GgufFile, GgufTensor};
use super::rope;
use super::tokenizer::tokenizer_of;
use super::values::{file_shape, from_file};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::fsio::{self, AtomicDir};
use crate::model::families::gguf::GgufNames;
use crate::model::folder::write_folder;
use crate::model::layout::ModelConfig;
use crate::model::specs::{ParamSpec, expected_params};
use crate::tensor::safetensors::HostDtype;

/// The result of a conversion.
pub struct Converted {
    pub config: ModelConfig,
    pub dtype: HostDtype,
    /// Whether every value of the file was kept exactly.
    pub exact: bool,
    /// Number of tensors of each type in the file.
    pub types: Vec<(&'static str, usize)>,
}

/// Writes the model in the file at `path` to `dir`. The weights are in `dtype`, or else in the
/// narrowest dtype that keeps every value: f16 or bf16 if the file has only this type and f32, else
/// f32.
pub fn convert(path: &Path, dir: &Path, dtype: Option<HostDtype>) -> Result<Converted> {
    let file = GgufFile::open(path)?;
    let names = names(&file)?;
    let config = config_of(&file, names)?;
    let specs = expected_params(&config);
    let tensors = matched(&file, names, &config, &specs)?;
    let tokenizer = tokenizer_of(&file, config.vocab_size)?;
    check_tokenizer(&file, dir, &tokenizer.files)?;
    let stored = |spec: &ParamSpec, tensor: &GgufTensor| {
        file.values(tensor).map(|values| from_file(names, &config, spec, values))
    };
    let kept = kept_by(&specs, &tensors, &stored)?;
    let dtype = dtype.unwrap_or(kept[0]);
    let values = &mut |spec: &ParamSpec| {
        let place = specs.iter().position(|s| s.name == spec.name);
        let tensor = place.and_then(|i| tensors.get(i));
        let tensor =
            tensor.ok_or_else(|| Error::model(path, format!("{} is missing", spec.name)))?;
        dtype.encode(&stored(spec, tensor)?)
    };
    let generation = Some(tokenizer.generation_config).filter(|map| !map.is_empty());
    write_folder(dir, &config, &tokenizer.files, generation, dtype, values)?;
    let mut types: Vec<(&'static str, usize)> = Vec::new();
    for tensor in file.tensors() {
        match types.iter_mut().find(|t| t.0 == tensor.dtype.name()) {
            Some(found) => found.1 += 1,
            None => types.push((tensor.dtype.name(), 1)),
        }
    }
    Ok(Converted { config, dtype, exact: kept.contains(&dtype), types })
}

/// The tensor of each parameter, in the order of `specs`. The error names everything that does not
/// fit.
fn matched<'a>(
    file: &'a GgufFile,
    names: &GgufNames,
    config: &ModelConfig,
    specs: &[ParamSpec],
) -> Result<Vec<&'a GgufTensor>> {
    let mut problems = Vec::new();
    let mut expected = BTreeSet::from(rope::FACTORS.map(String::from));
    let mut found = Vec::new();
    for spec in specs {
        let Some(name) = names.tensor(&spec.name) else {
            problems.push(format!("no name: {} has no name in GGUF files", spec.name));
            continue;
        };
        match file.tensor(&name) {
            None => problems.push(format!("missing: {name} {:?}", file_shape(spec))),
            Some(tensor) if tensor.shape != file_shape(spec) => problems.push(format!(
                "shape: {name} is {:?}, but the metadata give {:?}",
                tensor.shape,
                file_shape(spec)
            )),
            Some(tensor) => found.push(tensor),
        }
        expected.insert(name);
    }
    let strange = file.tensors().iter().filter(|t| !expected.contains(&t.name));
    problems.extend(strange.map(|t| format!("unexpected: {} {:?}", t.name, t.shape)));
    if problems.is_empty() {
        return Ok(found);
    }
    let more = problems.len().saturating_sub(20);
    problems.truncate(20);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    let message = format!(
        "holds tensors that differ from those of {}:\n  {}",
        config.family.architecture,
        problems.join("\n  ")
    );
    Err(Error::model(file.path(), message))
}

/// Tests the tokenizer before anything is written.
fn check_tokenizer(file: &GgufFile, dir: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
    let staged = AtomicDir::create(dir)?;
    for (name, bytes) in files {
        fsio::atomic_write(staged.tmp().join(name), bytes)?;
    }
    let tokenizer = Tokenizer::load(staged.tmp());
    let bad = |e: &dyn std::fmt::Display| {
        Error::model(file.path(), format!("its metadata do not describe a tokenizer: {e}"))
    };
    tokenizer.map_err(|e| bad(&e))?.encode("a", true).map_err(|e| bad(&e))?;
    Ok(())
}

/// The dtypes that keep every value, narrowest first; f32 always does.
fn kept_by(
    specs: &[ParamSpec],
    tensors: &[&GgufTensor],
    stored: &dyn Fn(&ParamSpec, &GgufTensor) -> Result<Vec<f32>>,
) -> Result<Vec<HostDtype>> {
    use GgufType::{BF16, F16, F32};
    let has = |dtype| tensors.iter().any(|t| t.dtype == dtype);
    let narrow = match (has(F16), has(BF16)) {
        (true, false) => (F16, HostDtype::F16),
        (false, true) => (BF16, HostDtype::BF16),
        _ => return Ok(vec![HostDtype::F32]),
    };
    if tensors.iter().any(|t| ![narrow.0, F32].contains(&t.dtype)) {
        return Ok(vec![HostDtype::F32]);
    }
    for (spec, tensor) in specs.iter().zip(tensors).filter(|(_, t)| t.dtype == F32) {
        let values = stored(spec, tensor)?;
        let mut back = vec![0f32; values.len()];
        narrow.0.widen(&narrow.0.narrow(&values).unwrap_or_default(), &mut back);
        if values.iter().zip(&back).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return Ok(vec![HostDtype::F32]);
        }
    }
    Ok(vec![narrow.1, HostDtype::F32])
}
