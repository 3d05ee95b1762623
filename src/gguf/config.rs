//! config.json from the metadata of a GGUF file, and back. Layer 6.
//!
//! Invariant: metadata of the architecture that is not understood is an error: it may change what
//! the model computes.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::read::GgufFile;
use super::write::MetaEntry;
use crate::error::{Error, Result};
use crate::model::families;
use crate::model::families::gguf::GgufNames;
use crate::model::layout::{BiasRule, HiddenAct, ModelConfig, Task};
use crate::model::rope::{RopeConfig, RopeKind, inv_freq};

/// Frequencies of a llama3 rope, as divisors of the plain ones.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

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
        return Err(model(file, format!("has no general.architecture; supported are {supported}")));
    };
    GgufNames::reading(architecture).ok_or_else(|| {
        model(file, format!("is of the architecture {architecture:?}; supported are {supported}"))
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
    raw.insert("hidden_act".into(), json!(names.hidden_act));
    for key in names.all_keys() {
        let name = format!("{arch}.{}", key.gguf);
        let value = match key.integer {
            true => file.unsigned(&name)?.map(|n| json!(n)),
            false => file.number(&name)?.map(|x| json!(x)),
        };
        match value {
            Some(value) => drop(raw.insert(key.config.into(), value)),
            None if key.required => return Err(model(file, format!("has no {name}"))),
            None => {}
        }
    }
    let Some(embed) = file.tensor("token_embd.weight") else {
        return Err(model(file, "has no token_embd.weight"));
    };
    raw.insert("vocab_size".into(), json!(embed.shape[0]));
    raw.insert("tie_word_embeddings".into(), json!(file.tensor("output.weight").is_none()));
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
    let rope = rope(file, arch, &raw)?;
    raw.insert("rope_parameters".into(), rope);
    let config = ModelConfig::from_json(file.path(), raw)?;
    understood(file, names, &config)?;
    Ok(config)
}

/// `rope_parameters`.
fn rope(file: &GgufFile, arch: &str, raw: &Map<String, Value>) -> Result<Value> {
    let key = |name: &str| format!("{arch}.rope.{name}");
    let theta = file.number(&key("freq_base"))?.unwrap_or(10_000.0);
    let mut out = json!({ "rope_theta": theta, "rope_type": "default" });
    if let Some(factors) = file.tensor(ROPE_FACTORS) {
        let head_dim = raw["head_dim"].as_u64().unwrap_or(0) as usize;
        let found = llama3(theta, head_dim, &file.values(factors)?).ok_or_else(|| {
            model(
                file,
                format!(
                    "{ROPE_FACTORS} is not the rope of Llama 3 (low_freq_factor 1, high_freq_factor 4), the only one \
                     that is read from factors"
                ),
            )
        })?;
        return Ok(found);
    }
    let factor = file.number(&key("scaling.factor"))?;
    // Old files have the linear factor alone.
    let old = file.number(&key("scale_linear"))?.filter(|f| *f != 1.0);
    let kind = file.text(&key("scaling.type"))?.unwrap_or("none");
    let need = |factor: Option<f64>| {
        factor.ok_or_else(|| model(file, format!("has no {}", key("scaling.factor"))))
    };
    match kind {
        "none" if old.is_none() => {}
        "none" | "linear" => {
            out["rope_type"] = json!("linear");
            out["factor"] = json!(need(factor.or(old))?);
        }
        "yarn" => {
            out["rope_type"] = json!("yarn");
            out["factor"] = json!(need(factor)?);
            for (config, gguf) in [
                ("original_max_position_embeddings", "scaling.original_context_length"),
                ("beta_fast", "scaling.yarn_beta_fast"),
                ("beta_slow", "scaling.yarn_beta_slow"),
            ] {
                match file.get(&key(gguf)) {
                    None => {}
                    Some(_) if config.starts_with("orig") => {
                        out[config] = json!(file.unsigned(&key(gguf))?);
                    }
                    Some(_) => out[config] = json!(file.number(&key(gguf))?),
                }
            }
            // There it multiplies what the factor gives; here it stands for it.
            if let Some(scale) = file.number(&key("scaling.attn_factor"))?.filter(|s| *s != 1.0) {
                let usual = usual_attention_factor(need(factor)?);
                out["attention_factor"] = json!(scale * usual);
            }
        }
        other => {
            return Err(model(
                file,
                format!("{} is {other:?}; none, linear and yarn are read", key("scaling.type")),
            ));
        }
    }
    Ok(out)
}

/// What yarn multiplies cos and sin by where nothing else is said.
fn usual_attention_factor(factor: f64) -> f64 {
    if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 }
}

/// The llama3 parameters that give these factors. They fix the factor and, for the ramp that all
/// such models have (1 to 4), the original context, which is a power of two.
fn llama3(theta: f64, head_dim: usize, factors: &[f32]) -> Option<Value> {
    let factor = f64::from(factors.iter().copied().fold(1f32, f32::max));
    (4..=24).map(|power| 1u64 << power).find_map(|original| {
        let kind = RopeKind::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions: original as f64,
        };
        let found = divisors(&RopeConfig { kind, ..RopeConfig::plain(theta) }, head_dim);
        // Rounding of the f32 steps by which the two programs come to a factor.
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs();
        let same = found.len() == factors.len() && found.iter().zip(factors).all(near);
        same.then(|| {
            json!({
                "rope_theta": theta, "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": original,
            })
        })
    })
}

/// What a rope divides the plain frequencies by.
fn divisors(rope: &RopeConfig, head_dim: usize) -> Vec<f32> {
    let of = |rope: &RopeConfig| inv_freq(rope, head_dim, false);
    of(&RopeConfig::plain(rope.theta)).iter().zip(of(rope)).map(|(p, f)| p / f).collect()
}

/// Every key of the architecture is one that was read, or one that changes nothing.
fn understood(file: &GgufFile, names: &GgufNames, config: &ModelConfig) -> Result<()> {
    let prefix = format!("{}.", names.architecture);
    let head_dim = config.head_dim as u64;
    let mut problems = Vec::new();
    for key in file.keys().filter_map(|k| k.strip_prefix(&prefix)) {
        let full = format!("{prefix}{key}");
        let known = names.all_keys().any(|k| k.gguf == key)
            || ["rope.freq_base", "rope.scale_linear"].contains(&key)
            || (key.starts_with("rope.scaling.") && ROPE_SCALING.contains(&&key[13..]));
        let fine = match key {
            _ if known => true,
            "attention.value_length" | "rope.dimension_count" => {
                file.unsigned(&full)? == Some(head_dim)
            }
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

const ROPE_SCALING: &[&str] = &[
    "type",
    "factor",
    "original_context_length",
    "attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
];

/// The names of a family, its metadata, and factors of the rope that a tensor holds.
pub type GgufEntries = (&'static GgufNames, Vec<(String, MetaEntry)>, Option<Vec<f32>>);

/// What a config is in a GGUF file: metadata, and the rope's factors where a tensor holds them.
/// `notes` gets what the file cannot say. Errors: what would change the model and has no place.
pub fn entries_of(
    dir: &Path,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<GgufEntries> {
    let bad = |message: String| Err(Error::model(dir, message));
    if config.task != Task::CausalLm {
        return bad(format!(
            "is not a language model ({}); a GGUF file holds one",
            config.task.suffix()
        ));
    }
    let model_type = config.family.model_type;
    let Some(names) = GgufNames::of_model_type(model_type) else {
        let supported = GgufNames::supported();
        return bad(format!(
            "GGUF files of {model_type} are not supported; supported are {supported}"
        ));
    };
    let act = match config.hidden_act {
        HiddenAct::Silu => "silu",
        HiddenAct::Gelu => "gelu",
        HiddenAct::GeluTanh => "gelu_pytorch_tanh",
    };
    if act != names.hidden_act {
        let arch = names.architecture;
        return bad(format!(
            "hidden_act is {act}; a GGUF file of architecture {arch} means {}",
            names.hidden_act
        ));
    }
    if let Some(window) = config.sliding_window.iter().flatten().min() {
        notes.push(format!(
            "a GGUF file of architecture {} has no sliding window: texts of more than {window} tokens would be read differently",
            names.architecture
        ));
    }
    let arch = names.architecture;
    let mut out = vec![("general.architecture".to_string(), MetaEntry::Text(arch.into()))];
    let full = config.to_json(crate::tensor::safetensors::HostDtype::F32);
    let of_config = |key: &str| match key {
        "num_key_value_heads" => json!(config.num_kv_heads),
        "head_dim" => json!(config.head_dim),
        "max_position_embeddings" => json!(config.max_position_embeddings),
        "rms_norm_eps" => json!(config.rms_norm_eps),
        _ => full.get(key).cloned().unwrap_or(Value::Null),
    };
    for key in names.all_keys() {
        let value = of_config(key.config);
        let entry = match (key.integer, value.as_u64(), value.as_f64()) {
            (true, Some(n), _) => u32::try_from(n).ok().map(MetaEntry::U32),
            (false, _, Some(x)) => Some(MetaEntry::F32(x as f32)),
            _ => None,
        };
        match entry {
            Some(entry) => out.push((format!("{arch}.{}", key.gguf), entry)),
            None if key.required => return bad(format!("{} is {value}", key.config)),
            None => {}
        }
    }
    let [rope] = &config.ropes[..] else {
        return bad("has several ropes, which a GGUF file of its architecture cannot hold".into());
    };
    let whole = rope.partial == 1.0 && rope.query_scale.is_none();
    if !whole || config.layer_rope.iter().any(|layer| *layer != Some(0)) {
        return bad("turns a part of its heads or layers only, which a GGUF file of its architecture cannot hold".into());
    }
    let mut put = |key: &str, entry| out.push((format!("{arch}.{key}"), entry));
    put("vocab_size", MetaEntry::U32(config.vocab_size as u32));
    put("attention.value_length", MetaEntry::U32(config.head_dim as u32));
    put("rope.dimension_count", MetaEntry::U32(config.head_dim as u32));
    put("rope.freq_base", MetaEntry::F32(rope.theta as f32));
    let mut factors = None;
    let mut scaling = |key: &str, entry| put(&format!("rope.scaling.{key}"), entry);
    match rope.kind {
        RopeKind::Default => {}
        RopeKind::Linear { factor } => {
            scaling("type", MetaEntry::Text("linear".into()));
            scaling("factor", MetaEntry::F32(factor as f32));
        }
        RopeKind::Llama3 { .. } => {
            let found = divisors(rope, config.head_dim);
            if llama3(rope.theta, config.head_dim, &found).is_none() {
                return bad(format!("{:?} is not a rope that a GGUF file can hold", rope.kind));
            }
            factors = Some(found);
        }
        RopeKind::Yarn {
            factor,
            original_max_positions,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
        } => {
            if !truncate {
                return bad("yarn with truncate=false has no place in a GGUF file".into());
            }
            scaling("type", MetaEntry::Text("yarn".into()));
            scaling("factor", MetaEntry::F32(factor as f32));
            scaling("original_context_length", MetaEntry::U32(original_max_positions as u32));
            scaling("yarn_beta_fast", MetaEntry::F32(beta_fast as f32));
            scaling("yarn_beta_slow", MetaEntry::F32(beta_slow as f32));
            let usual = usual_attention_factor(factor);
            if (attention_factor / usual - 1.0).abs() > 1e-6 {
                scaling("attn_factor", MetaEntry::F32((attention_factor / usual) as f32));
            }
        }
        RopeKind::LongRope { .. } => {
            return bad("longrope is not supported in GGUF files".into());
        }
    }
    Ok((names, out, factors))
}
