//! The metadata of a model's config in a GGUF file. Layer 6.
//!
//! Invariant: a property that would change the model and cannot be stored is an error; one that
//! changes only long texts is a note.

use std::path::Path;

use serde_json::{Value, json};

use super::config::{PATTERN, usual_scalar};
use super::rope::{self, Factors};
use super::write::MetaEntry;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::families::gguf::{GgufKind, GgufNames};
use crate::model::layout::{
    AttentionScaleRule, EmbeddingRule, EmbeddingScale, HiddenAct, Mixer, MixerRule, ModelConfig,
    SoftcapRule, Task, WindowRule,
};
use crate::model::rope::RopeKind;
use crate::tensor::safetensors::HostDtype;

/// The names of a family, the metadata, and the rope factors that are stored as tensors.
pub type GgufEntries = (&'static GgufNames, Vec<(String, MetaEntry)>, Factors);

/// A config as metadata of a GGUF file. Adds to `notes` what the file cannot represent. Error: a
/// property that would change the model cannot be stored.
pub fn entries_of(
    dir: &Path,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<GgufEntries> {
    let bad = |message: String| Err(Error::model(dir, message));
    if config.task != Task::CausalLm {
        return bad(format!(
            "is not a language model ({}), but a GGUF file holds one; give a language model",
            config.task.suffix()
        ));
    }
    let model_type = config.family.model_type;
    let Some(names) = GgufNames::of_model_type(model_type) else {
        let supported = GgufNames::supported();
        return bad(format!(
            "GGUF files of {model_type} are not supported; supported: {supported}"
        ));
    };
    if let Some(why) = unlike(names, config) {
        let arch = names.architecture;
        return bad(format!("cannot be expressed in a GGUF file of architecture {arch}: {why}"));
    }
    windows(names, config, notes);
    let arch = names.architecture;
    let mut out = vec![("general.architecture".to_string(), MetaEntry::Text(arch.into()))];
    for key in names.all_keys() {
        let value = value_of(config, key.config);
        let entry = match key.kind {
            GgufKind::SizeOrNull if value.is_null() => Some(MetaEntry::U32(0)),
            GgufKind::Size | GgufKind::SizeOrNull => {
                value.as_u64().and_then(|n| u32::try_from(n).ok()).map(MetaEntry::U32)
            }
            GgufKind::SizeOfAttention => size_of_attention(config, &value),
            GgufKind::Number => value.as_f64().map(|x| MetaEntry::F32(x as f32)),
        };
        match entry {
            Some(entry) => out.push((format!("{arch}.{}", key.gguf), entry)),
            None if key.required => return bad(format!("{} is {value}", key.config)),
            None => {}
        }
    }
    let mut put = |key: &str, entry| out.push((format!("{arch}.{key}"), entry));
    put("vocab_size", MetaEntry::U32(config.vocab_size as u32));
    put("attention.value_length", MetaEntry::U32(config.head_dim as u32));
    match period(config) {
        Ok(None) => {}
        Ok(Some(period)) => put(PATTERN, MetaEntry::U32(period as u32)),
        Err(why) => return bad(why),
    }
    match rope::entries(names, config, &mut out) {
        Ok(factors) => Ok((names, out, factors)),
        Err(why) => {
            bad(format!("cannot be expressed in a GGUF file of architecture {arch}: {why}"))
        }
    }
}

/// A size for each layer: 0 where it has no attention. None: no layer has.
fn size_of_attention(config: &ModelConfig, size: &Value) -> Option<MetaEntry> {
    let size = size.as_i64().and_then(|n| i32::try_from(n).ok())?;
    let of = |mixer: &Mixer| if *mixer == Mixer::Attention { size } else { 0 };
    let list: Vec<i32> = config.mixers.iter().map(of).collect();
    list.iter().any(|n| *n > 0).then_some(MetaEntry::Ints(list))
}

/// Describes a property of the model that differs from the fixed one of the architecture.
fn unlike(names: &GgufNames, config: &ModelConfig) -> Option<String> {
    let act = match config.hidden_act {
        HiddenAct::Silu => "silu",
        HiddenAct::Gelu => "gelu",
        HiddenAct::GeluTanh => "gelu_pytorch_tanh",
    };
    if act != names.hidden_act {
        let key = config.family.hidden_act.key;
        return Some(format!("{key} is {act}, but there it is {}", names.hidden_act));
    }
    if config.mixers.iter().any(|m| matches!(m, Mixer::ShortConv { bias: true, .. })) {
        return Some("conv_bias is true, but there it is false".into());
    }
    if !config.mixers.contains(&Mixer::Attention) {
        return Some("no layer has attention, but there some layers have it".into());
    }
    if let Some(tied) = names.tied.filter(|tied| *tied != config.tie_word_embeddings) {
        return Some(format!("tie_word_embeddings is {}, but there it is {tied}", !tied));
    }
    let (layers, hidden, heads) = (config.num_layers, config.hidden_size, config.num_heads);
    let usual = usual_scalar(names, layers, hidden, heads, config.head_dim);
    if let (Some(usual), AttentionScaleRule::InverseSqrt { key, .. }) =
        (usual, config.family.attention_scale)
        && config.attention_scale != (usual as f64).powf(-0.5) as f32
    {
        let given = config.raw.get(key).unwrap_or(&Value::Null);
        return Some(format!("{key} is {given}, but there it is {usual}"));
    }
    // A layer without rope is at a position where the architecture has rope.
    let attends = config.mixers.iter().map(|m| *m == Mixer::Attention);
    let default: Vec<bool> =
        config.family.rope.layers(layers).into_iter().zip(attends).map(|(a, b)| a && b).collect();
    let turns: Vec<bool> = config.layer_rope.iter().map(Option::is_some).collect();
    (turns != default).then(|| {
        let list = |turns: &[bool]| turns.iter().map(|on| u8::from(*on)).collect::<Vec<_>>();
        format!(
            "the layers with rope are {:?}, but there they are {:?}",
            list(&turns),
            list(&default)
        )
    })
}

/// Adds a note about windows that the readers of the file do not apply.
fn windows(names: &GgufNames, config: &ModelConfig, notes: &mut Vec<String>) {
    let arch = names.architecture;
    let Some(window) = config.sliding_window.iter().flatten().min() else { return };
    if !names.has_windows() {
        notes.push(format!(
            "a GGUF file of architecture {arch} has no sliding window: texts of more than \
             {window} tokens will give different results"
        ));
    } else if names.long_rope {
        notes.push(format!(
            "llama.cpp reads files of architecture {arch} without their sliding window of {window} tokens"
        ));
    }
}

/// The period of layers without a window, if it is not the family's.
fn period(config: &ModelConfig) -> std::result::Result<Option<usize>, String> {
    let WindowRule::Pattern { period: usual, .. } = config.family.window else { return Ok(None) };
    let slides: Vec<bool> = config.sliding_window.iter().map(Option::is_some).collect();
    let at = |period: usize| {
        slides.iter().enumerate().all(|(i, s)| *s != (i + 1).is_multiple_of(period))
    };
    if at(usual) {
        return Ok(None);
    }
    let found = (1..=slides.len() + 1).find(|p| at(*p));
    found.map(Some).ok_or_else(|| {
        "has layers without a window at no fixed period, which a GGUF file cannot express".into()
    })
}

/// The value of a key of config.json, or its default.
fn value_of(config: &ModelConfig, key: &str) -> Value {
    let family = config.family;
    let named = |rule: Option<&str>| rule == Some(key);
    let cap = |rule: SoftcapRule| match rule {
        SoftcapRule::Never => None,
        SoftcapRule::Key { key, .. } => Some(key),
    };
    // As the decimal of the stored 32-bit number.
    let number = |x: f32| json!(x.to_string().parse::<f64>().ok());
    match key {
        "num_key_value_heads" => json!(config.num_kv_heads),
        "head_dim" => json!(config.head_dim),
        "max_position_embeddings" => json!(config.max_position_embeddings),
        "intermediate_size" => json!(config.intermediate_size),
        "conv_L_cache" => match family.mixers {
            MixerRule::AttentionOrConv { default_taps } => {
                json!(config.conv_taps().unwrap_or(default_taps))
            }
            MixerRule::Attention => Value::Null,
        },
        _ if key == family.eps_key => number(config.rms_norm_eps),
        "sliding_window" => json!(config.sliding_window.iter().flatten().next()),
        "original_max_position_embeddings" => match config.ropes.first().map(|r| &r.kind) {
            Some(RopeKind::LongRope { original_max_positions, .. }) => {
                json!(*original_max_positions as u64)
            }
            _ => config.raw.get(key).cloned().unwrap_or(json!(family.default_original_positions)),
        },
        _ if matches!(family.attention_scale, AttentionScaleRule::Key(k) if k == key) => {
            number(config.attention_scale)
        }
        _ if matches!(family.embedding_scale, EmbeddingRule::Key(k) if k == key) => {
            let of = |scale: EmbeddingScale| scale.factors(DType::F32).1;
            number(config.embedding_scale.map_or(1.0, of))
        }
        _ if named(family.residual_scale) => number(config.residual_scale),
        _ if named(family.logits_divisor) => number(config.logits.divisor),
        _ if named(cap(family.attention_softcap)) => {
            config.attention_softcap.map_or(Value::Null, number)
        }
        _ if named(cap(family.logits_softcap)) => config.logits.softcap.map_or(Value::Null, number),
        _ => config.to_json(HostDtype::F32).get(key).cloned().unwrap_or(Value::Null),
    }
}
