//! The rope settings of a GGUF file, read and written: metadata, and factors in tensors. Layer 6.
//!
//! Invariant: the written settings read back as the same table of angles, or writing fails.

use serde_json::{Map, Value, json};

use super::read::GgufFile;
use super::write::MetaEntry;
use crate::error::{Error, Result};
use crate::model::families::gguf::GgufNames;
use crate::model::layout::{Family, ModelConfig, RopeRule};
use crate::model::rope::{RopeConfig, RopeKind, inv_freq};

/// The divisors of the frequencies of a llama3 rope.
const FREQS: &str = "rope_freqs.weight";
/// The factors of longrope: beyond the original length, and up to it.
const LONG: &str = "rope_factors_long.weight";
const SHORT: &str = "rope_factors_short.weight";

/// Tensors with rope factors, which belong to no parameter.
pub const FACTORS: [&str; 3] = [FREQS, LONG, SHORT];

/// The theta of layers with a window, if they have their own.
pub const THETA_SLIDING: &str = "rope.freq_base_swa";
const TEMPERATURE: &str = "attention.temperature_scale";
const LOG_MULTIPLIER: &str = "rope.scaling.yarn_log_multiplier";

const SCALING: &[&str] = &[
    "type",
    "factor",
    "original_context_length",
    "attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
];

/// Whether this module reads `key` of the architecture.
pub fn reads(key: &str, family: &Family) -> bool {
    ["rope.freq_base", "rope.scale_linear"].contains(&key)
        || key.strip_prefix("rope.scaling.").is_some_and(|key| SCALING.contains(&key))
        || family.query_scale && [TEMPERATURE, LOG_MULTIPLIER].contains(&key)
}

fn bad(file: &GgufFile, message: impl Into<String>) -> Error {
    Error::model(file.path(), message)
}

/// The `rope_parameters` of a file. `raw`: the config.json entries that were read before.
pub fn parameters(
    file: &GgufFile,
    names: &GgufNames,
    family: &Family,
    raw: &Map<String, Value>,
) -> Result<Value> {
    let key = |name: &str| format!("{}.{name}", names.architecture);
    let head_dim = raw["head_dim"].as_u64().unwrap_or(0);
    let theta = file.number(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    let mut out = one(file, names, theta, head_dim as usize, raw)?;
    if let (true, Some(turned)) = (names.long_rope, file.unsigned(&key("rope.dimension_count"))?)
        && turned != head_dim
    {
        out["partial_rotary_factor"] = json!(turned as f64 / head_dim.max(1) as f64);
    }
    if family.query_scale {
        let Some(beta) = file.number(&key(TEMPERATURE))? else {
            return Err(bad(file, format!("has no {}", key(TEMPERATURE))));
        };
        out["llama_4_scaling_beta"] = json!(beta);
        if let Some(all) = file.number(&key(LOG_MULTIPLIER))?.filter(|all| *all != 0.0) {
            out["mscale"] = json!(1.0);
            out["mscale_all_dim"] = json!(all);
        }
    }
    if let RopeRule::ByLayerType { default_sliding_theta } = family.rope {
        let theta = file.number(&key(THETA_SLIDING))?.unwrap_or(default_sliding_theta);
        out = json!({
            "full_attention": out,
            "sliding_attention": { "rope_theta": theta, "rope_type": "default" },
        });
    }
    Ok(out)
}

/// The rope of all layers, or of those without a window.
fn one(
    file: &GgufFile,
    names: &GgufNames,
    theta: f64,
    head_dim: usize,
    raw: &Map<String, Value>,
) -> Result<Value> {
    let key = |name: &str| format!("{}.rope.{name}", names.architecture);
    let mut out = json!({ "rope_theta": theta, "rope_type": "default" });
    if let Some(factors) = file.tensor(FREQS) {
        return llama3(theta, head_dim, &file.values(factors)?).ok_or_else(|| {
            bad(
                file,
                format!(
                    "{FREQS} is not the rope of Llama 3 (low_freq_factor 1, high_freq_factor 4), \
                     the only one supported as factors"
                ),
            )
        });
    }
    if let (true, Some(long)) = (names.long_rope, file.tensor(LONG)) {
        let Some(short) = file.tensor(SHORT) else {
            return Err(bad(file, format!("has {LONG}, but no {SHORT}")));
        };
        out["rope_type"] = json!("longrope");
        out["long_factor"] = json!(decimals(&file.values(long)?));
        out["short_factor"] = json!(decimals(&file.values(short)?));
        let number = |key: &str| raw.get(key).and_then(Value::as_f64);
        let most = number("max_position_embeddings").unwrap_or(1.0);
        let Some(original) = number("original_max_position_embeddings") else {
            return Err(bad(file, format!("has no {}", key("scaling.original_context_length"))));
        };
        if let Some(scale) = file.number(&key("scaling.attn_factor"))?
            && scale as f32 != usual_long_factor(most, original) as f32
        {
            out["attention_factor"] = json!(scale);
        }
        return Ok(out);
    }
    let factor = file.number(&key("scaling.factor"))?;
    // Old files have only the linear factor.
    let old = file.number(&key("scale_linear"))?.filter(|f| *f != 1.0);
    let kind = file.text(&key("scaling.type"))?.unwrap_or("none");
    let need = |factor: Option<f64>| {
        factor.ok_or_else(|| bad(file, format!("has no {}", key("scaling.factor"))))
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
            // In the file this multiplies the value derived from the factor; in config.json it
            // replaces that value.
            if let Some(scale) = file.number(&key("scaling.attn_factor"))?.filter(|s| *s != 1.0) {
                let usual = growth(need(factor)?, 1.0);
                out["attention_factor"] = json!(scale * usual);
            }
        }
        other => {
            return Err(bad(
                file,
                format!("{} is {other:?}; supported: none, linear, yarn", key("scaling.type")),
            ));
        }
    }
    Ok(out)
}

/// Each value as its shortest decimal.
fn decimals(values: &[f32]) -> Vec<f64> {
    values.iter().filter_map(|x| x.to_string().parse().ok()).collect()
}

/// The default factor of yarn on cos and sin.
fn growth(factor: f64, scale: f64) -> f64 {
    if factor > 1.0 { 0.1 * scale * factor.ln() + 1.0 } else { 1.0 }
}

/// The default factor of longrope on cos and sin.
fn usual_long_factor(most: f64, original: f64) -> f64 {
    match most <= original {
        true => 1.0,
        false => (1.0 + (most / original).ln() / original.ln()).sqrt(),
    }
}

/// The llama3 parameters that give these factors. The factors determine the parameter `factor` and,
/// with the ramp that all such models have (1 to 4), the original context, which is a power of two.
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
        // Allows for the rounding of the f32 steps in which two programs compute a factor.
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

/// The divisors of a rope relative to the plain frequencies.
fn divisors(rope: &RopeConfig, head_dim: usize) -> Vec<f32> {
    let of = |rope: &RopeConfig| inv_freq(rope, head_dim, false);
    of(&RopeConfig::plain(rope.theta)).iter().zip(of(rope)).map(|(p, f)| p / f).collect()
}

/// Rope factors by the name of their tensor.
pub type Factors = Vec<(&'static str, Vec<f32>)>;

/// Adds the ropes of `config` to `out` and returns the factors that are stored as tensors. The
/// error describes what the file cannot hold.
pub fn entries(
    names: &GgufNames,
    config: &ModelConfig,
    out: &mut Vec<(String, MetaEntry)>,
) -> std::result::Result<Factors, String> {
    let arch = names.architecture;
    let mut put = |key: &str, entry| out.push((format!("{arch}.{key}"), entry));
    let rope = match (&config.ropes[..], config.family.rope) {
        ([rope, sliding], RopeRule::ByLayerType { .. }) => {
            if sliding.kind != RopeKind::Default || sliding.partial != 1.0 {
                return Err("the rope of layers with a window is scaled".into());
            }
            put(THETA_SLIDING, MetaEntry::F32(sliding.theta as f32));
            rope
        }
        ([rope], _) => rope,
        _ => return Err("it has several ropes".into()),
    };
    if rope.partial != 1.0 && !names.long_rope {
        return Err("its rope turns a part of each head only".into());
    }
    let turned = rope.turned(config.head_dim);
    put("rope.dimension_count", MetaEntry::U32(turned as u32));
    put("rope.freq_base", MetaEntry::F32(rope.theta as f32));
    if let Some(scale) = rope.query_scale {
        put(TEMPERATURE, MetaEntry::F32(scale.beta as f32));
    }
    let mut scaling = |key: &str, entry| put(&format!("rope.scaling.{key}"), entry);
    match &rope.kind {
        // llama.cpp takes the step length of the scale of q from yarn's settings.
        RopeKind::Default | RopeKind::Linear { .. } | RopeKind::Llama3 { .. }
            if rope.query_scale.is_some() =>
        {
            Err("q is scaled by its position, and the rope is not yarn".into())
        }
        RopeKind::Default => Ok(vec![]),
        RopeKind::Linear { factor } => {
            scaling("type", MetaEntry::Text("linear".into()));
            scaling("factor", MetaEntry::F32(*factor as f32));
            Ok(vec![])
        }
        RopeKind::Llama3 { .. } => {
            let found = divisors(rope, config.head_dim);
            match llama3(rope.theta, config.head_dim, &found) {
                Some(_) => Ok(vec![(FREQS, found)]),
                None => Err(format!("its rope is {:?}", rope.kind)),
            }
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
                return Err("its yarn has truncate=false".into());
            }
            scaling("type", MetaEntry::Text("yarn".into()));
            scaling("factor", MetaEntry::F32(*factor as f32));
            scaling("original_context_length", MetaEntry::U32(*original_max_positions as u32));
            scaling("yarn_beta_fast", MetaEntry::F32(*beta_fast as f32));
            scaling("yarn_beta_slow", MetaEntry::F32(*beta_slow as f32));
            let usual = growth(*factor, 1.0);
            if (attention_factor / usual - 1.0).abs() <= 1e-6 {
                return Ok(vec![]);
            }
            if rope.query_scale.is_some() && *factor > 1.0 && *attention_factor > 0.0 {
                // The multiplier whose growth divides the growth of 1.
                let all = (usual / attention_factor - 1.0) / (0.1 * factor.ln());
                scaling("yarn_log_multiplier", MetaEntry::F32(all as f32));
            } else {
                scaling("attn_factor", MetaEntry::F32((attention_factor / usual) as f32));
            }
            Ok(vec![])
        }
        RopeKind::LongRope { short, long, attention_factor, .. } if names.long_rope => {
            scaling("attn_factor", MetaEntry::F32(*attention_factor as f32));
            let narrow = |list: &[f64]| list.iter().map(|x| *x as f32).collect();
            Ok(vec![(LONG, narrow(long)), (SHORT, narrow(short))])
        }
        RopeKind::LongRope { .. } => Err("its rope is longrope".into()),
    }
}
