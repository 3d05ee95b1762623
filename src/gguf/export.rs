//! Exports a model as a GGUF file. Layer 6.
//!
//! Invariant: the file describes the model completely, or it is not written. Matrices are stored in
//! the requested type, norms and biases in f32.

use std::path::Path;

use super::blocks::GgufType;
use super::entries;
use super::tokens;
use super::values::{file_shape, to_file};
use super::write::{GgufSpec, MetaEntry, write};
use crate::autograd::Cx;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::adapter::merge::{mergeable, merged_config, merged_values};
use crate::model::decoder::Decoder;
use crate::model::specs::{Role, expected_params};
use crate::rollout::stop::stop_ids;

/// The `general.file_type` of the file.
fn file_type(dtype: GgufType) -> u32 {
    match dtype {
        GgufType::F32 => 0,
        GgufType::F16 => 1,
        GgufType::Q4_0 => 2,
        GgufType::Q8_0 => 7,
        _ => 32, // mostly bf16
    }
}

/// Writes `model`, with its adapter merged, to `path`. Returns notes about what the file cannot
/// represent, or not as requested. The context must be f32.
pub fn export(
    cx: &Cx,
    model: &Decoder,
    tokenizer: &Tokenizer,
    path: &Path,
    dtype: GgufType,
) -> Result<Vec<String>> {
    if let Some(adapter) = &model.adapter {
        mergeable(adapter)?;
    }
    let mut notes = Vec::new();
    let config = merged_config(model);
    let dir = tokenizer.model_dir();
    let (names, mut meta, factors) = entries::entries_of(dir, &config, &mut notes)?;
    let name = std::fs::canonicalize(dir).ok();
    let name = name.as_ref().and_then(|d| d.file_name()?.to_str());
    meta.insert(1, ("general.type".into(), MetaEntry::Text("model".into())));
    meta.insert(2, ("general.name".into(), MetaEntry::Text(name.unwrap_or("model").into())));
    meta.push(("general.file_type".into(), MetaEntry::U32(file_type(dtype))));
    meta.push(("general.quantization_version".into(), MetaEntry::U32(2)));
    let ends = stop_ids(tokenizer, &config, &[])?;
    meta.extend(tokens::entries_of(tokenizer, &config, &ends, &mut notes)?);

    let params = expected_params(&config);
    let mut specs = Vec::new();
    let mut other = 0;
    for spec in &params {
        let Some(name) = names.tensor(&spec.name) else {
            let message = format!("{} has no name in GGUF files", spec.name);
            return Err(Error::model(dir, message));
        };
        let row = spec.shape.last().copied().unwrap_or(1);
        let stored = match spec.shape.len() {
            1 => GgufType::F32,
            // The only type that llama.cpp's convolution takes.
            _ if spec.role == Role::Conv => GgufType::F32,
            _ if row.is_multiple_of(dtype.block()) => dtype,
            _ => {
                other += 1;
                GgufType::F16
            }
        };
        specs.push(GgufSpec { name, dtype: stored, shape: file_shape(spec) });
    }
    if other > 0 {
        let (of, block) = (dtype.name(), dtype.block());
        notes.push(format!(
            "{other} matrices are stored as F16: their rows are not a multiple of the {block} values of a block of {of}"
        ));
    }
    for (name, values) in &factors {
        let shape = vec![values.len()];
        specs.push(GgufSpec { name: name.to_string(), dtype: GgufType::F32, shape });
    }
    write(path, &meta, &specs, &mut |i| {
        let Some(spec) = params.get(i) else { return Ok(factors[i - params.len()].1.clone()) };
        let values = if model.adapter.is_some() {
            merged_values(cx, model, spec)?
        } else {
            let at = model.params.by_name(&spec.name);
            let at = at.ok_or_else(|| {
                Error::op("gguf", format!("{} has no location in the model's weights", spec.name))
            })?;
            model.params.weight_view(at)?.to_f32()?
        };
        Ok(to_file(names, &config, spec, values))
    })?;
    Ok(notes)
}
