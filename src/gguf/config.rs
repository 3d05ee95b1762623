//! config.json from the metadata of a GGUF file. Layer 6.
//!
//! Invariant: metadata of the architecture that is not understood is an error: it may change what
//! the model computes.

use serde_json::{Map, Value, json};

use super::read::GgufFile;
use super::rope;
use crate::error::{Error, Result};
use crate::model::families;
use crate::model::families::gguf::{GgufKind, GgufNames};
use crate::model::layout::{
    AttentionScaleRule, BiasRule, Family, MlpWidthRule, ModelConfig, RopeRule, WindowRule,
};

/// Keys that say nothing that the tensors do not say, and their only values where others would
/// matter.
const HARMLESS: &[&str] = &[
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "attention.value_length",
    "rope.dimension_count",
    "expert_count",
    "expert_used_count",
    "attention.causal",
];

/// At which period layers have no window, where it is not the family's.
pub const PATTERN: &str = "attention.sliding_window_pattern";

fn model(file: &GgufFile, message: impl Into<String>) -> Error {
    Error::model(file.path(), message)
}

/// The family that a file's `general.architecture` names.
pub fn names(file: &GgufFile) -> Result<&'static GgufNames> {
    let parts = file.unsigned("split.count")?.unwrap_or(1);
    if parts > 1 {
        return Err(model(
            file,
            format!(
                "is one of {parts} parts of a model; join them first (llama-gguf-split --merge)"
            ),
        ));
    }
    let supported = GgufNames::supported();
    let Some(architecture) = file.text("general.architecture")? else {
        return Err(model(file, format!("has no general.architecture; supported: {supported}")));
    };
    GgufNames::reading(architecture, |key| file.get(key).is_some()).ok_or_else(|| {
        model(
            file,
            format!("has the unsupported architecture {architecture:?}; supported: {supported}"),
        )
    })
}

/// The config of the model in `file`, checked as a folder's is.
pub fn config_of(file: &GgufFile, names: &GgufNames) -> Result<ModelConfig> {
    let Some(family) = families::find(names.model_type) else {
        return Err(model(file, format!("{} is not a supported family", names.model_type)));
    };
    let arch = names.architecture;
    let mut raw = Map::new();
    raw.insert("architectures".into(), json!([family.architecture]));
    raw.insert("model_type".into(), json!(names.model_type));
    raw.insert(family.hidden_act.key.into(), json!(names.hidden_act));
    for key in names.all_keys() {
        let name = format!("{arch}.{}", key.gguf);
        let value = match key.kind {
            GgufKind::Size => file.unsigned(&name)?.map(|n| json!(n)),
            GgufKind::SizeOrNull => {
                file.unsigned(&name)?.map(|n| if n == 0 { Value::Null } else { json!(n) })
            }
            GgufKind::SizeOfAttention => size_of_attention(file, &name, &mut raw)?,
            GgufKind::Number => file.number(&name)?.map(|x| json!(x)),
        };
        match value {
            Some(value) => drop(raw.insert(key.config.into(), value)),
            None if key.required => return Err(model(file, format!("has no {name}"))),
            None => {}
        }
    }
    if matches!(family.mlp_width, MlpWidthRule::TwoThirds { .. }) {
        raw.insert("block_auto_adjust_ff_dim".into(), json!(false)); // files say the width itself
    }
    let Some(embed) = file.tensor("token_embd.weight") else {
        return Err(model(file, "has no token_embd.weight"));
    };
    raw.insert("vocab_size".into(), json!(embed.shape[0]));
    let tied = names.tied.unwrap_or(file.tensor("output.weight").is_none());
    raw.insert("tie_word_embeddings".into(), json!(tied));
    for (rule, tensor) in [
        (family.qkv_bias, "blk.0.attn_q.bias"),
        (family.o_bias, "blk.0.attn_output.bias"),
        (family.mlp_bias, "blk.0.ffn_gate.bias"),
    ] {
        if let BiasRule::Key(key) = rule {
            let there = file.tensor(tensor).is_some();
            let before = raw.get(key).and_then(Value::as_bool).unwrap_or(false);
            raw.insert(key.into(), json!(before || there));
        }
    }
    for (key, id) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")]
    {
        let id = file.unsigned(&format!("tokenizer.ggml.{id}_token_id"))?;
        raw.insert(key.into(), json!(id));
    }
    // Absent keys have defaults of their own in the form that newer files are read in.
    if !raw.contains_key("num_key_value_heads") {
        raw.insert("num_key_value_heads".into(), raw["num_attention_heads"].clone());
    }
    if !raw.contains_key("head_dim") {
        let number = |key: &str| raw[key].as_u64().unwrap_or(0);
        let dim = number("hidden_size") / number("num_attention_heads").max(1);
        raw.insert("head_dim".into(), json!(dim));
    }
    let number = |key: &str| raw.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
    let (layers, head_dim) = (number("num_hidden_layers"), number("head_dim"));
    let usual =
        usual_scalar(names, layers, number("hidden_size"), number("num_attention_heads"), head_dim);
    if let (Some(scalar), AttentionScaleRule::InverseSqrt { key, .. }) =
        (usual, family.attention_scale)
    {
        raw.insert(key.into(), json!(scalar));
    }
    if let Some(period) = file.unsigned(&format!("{arch}.{PATTERN}"))? {
        raw.insert("layer_types".into(), layer_types(layers, period as usize));
    }
    let rope = rope::parameters(file, names, family, &raw)?;
    raw.insert("rope_parameters".into(), rope);
    let config = ModelConfig::from_json(file.path(), raw)?;
    understood(file, names, &config)?;
    Ok(config)
}

/// The size that a list gives layers of attention; puts which those are into `raw`.
fn size_of_attention(
    file: &GgufFile,
    name: &str,
    raw: &mut Map<String, Value>,
) -> Result<Option<Value>> {
    let Some(list) = file.ints(name)? else { return Ok(None) };
    let layers = raw.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0);
    if list.len() as u64 != layers {
        let message =
            format!("{name} has {} entries, but the model has {layers} layers", list.len());
        return Err(model(file, message));
    }
    let mut sizes = list.iter().filter(|n| **n != 0);
    let Some(size) = sizes.next() else {
        return Err(model(file, format!("{name} is 0 in every layer: no layer has attention")));
    };
    if let Some(other) = sizes.find(|n| *n != size) {
        return Err(model(file, format!("{name} is {size} in one layer and {other} in another")));
    }
    let kind = |n: &i32| if *n == 0 { "conv" } else { "full_attention" };
    let kinds: Vec<&str> = list.iter().map(kind).collect();
    raw.insert("layer_types".into(), json!(kinds));
    Ok(Some(json!(size)))
}

/// The number whose root q.k is divided by, for a family whose files do not say it.
pub fn usual_scalar(
    names: &GgufNames,
    layers: usize,
    hidden: usize,
    heads: usize,
    head_dim: usize,
) -> Option<usize> {
    let wide = names.wide_scale_layers?;
    Some(if layers == wide { hidden / heads.max(1) } else { head_dim })
}

/// Full attention in each `period`th layer.
fn layer_types(layers: usize, period: usize) -> Value {
    let kind = |i: usize| match period > 0 && (i + 1).is_multiple_of(period) {
        true => "full_attention",
        false => "sliding_attention",
    };
    json!((0..layers).map(kind).collect::<Vec<_>>())
}

/// Every key of the architecture is one that was read, or one that changes nothing.
fn understood(file: &GgufFile, names: &GgufNames, config: &ModelConfig) -> Result<()> {
    let prefix = format!("{}.", names.architecture);
    let turned = config.ropes.first().map_or(0, |r| r.turned(config.head_dim));
    let mut problems = Vec::new();
    for key in file.keys().filter_map(|k| k.strip_prefix(&prefix)) {
        let full = format!("{prefix}{key}");
        let known = names.all_keys().any(|k| k.gguf == key) || also_read(key, config.family);
        let fine = match key {
            _ if names.true_flags.contains(&key) => file.flag(&full)? == Some(true),
            _ if known => true,
            "attention.value_length" => file.unsigned(&full)? == Some(config.head_dim as u64),
            "rope.dimension_count" => file.unsigned(&full)? == Some(turned as u64),
            "expert_count" | "expert_used_count" => file.unsigned(&full)? == Some(0),
            "attention.causal" => file.flag(&full)? == Some(true),
            _ => HARMLESS.contains(&key),
        };
        if !fine {
            problems.push(format!("{full} = {:?}", file.get(&full)));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(model(
        file,
        format!(
            "has metadata that may change what the model computes and that is not supported:\n  {}",
            problems.join("\n  ")
        ),
    ))
}

/// Keys that are read for a family beside its table.
fn also_read(key: &str, family: &Family) -> bool {
    rope::reads(key, family)
        || key == PATTERN && matches!(family.window, WindowRule::Pattern { .. })
        || key == rope::THETA_SLIDING && matches!(family.rope, RopeRule::ByLayerType { .. })
}
