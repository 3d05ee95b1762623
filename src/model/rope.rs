//! Rotary position tables: default, linear, llama3 and yarn. Layer 5.
//!
//! Invariant: the angle is made the way transformers makes it, `f32(position) * inv_freq` in f32,
//! so that the tables agree for every position and not only for small ones. Powers, cosines and
//! sines are rounded correctly (through f64); PyTorch's vector library is off by one ulp in about
//! one power of a hundred, which is the only difference.
//!
//! The decoder rotates halves: of a head `x = [a, b]`, position p gives `[a cos - b sin, b cos + a
//! sin]`.

use std::f64::consts::PI;

use serde_json::{Map, Value};

use super::fields::Fields;

const DEFAULT_THETA: f64 = 10_000.0;

#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    pub kind: RopeKind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeKind {
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a ramp between `original / low` and
    /// `original / high`.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: f64,
    },
    /// As llama3, with the ramp over dimensions, and cos and sin multiplied by `attention_factor`.
    Yarn {
        factor: f64,
        original_max_positions: f64,
        attention_factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
    },
}

impl RopeConfig {
    /// From a config.json with v4 keys (`rope_theta`, `rope_scaling`) or v5 keys
    /// (`rope_parameters`). Where both are there, a non-empty `rope_scaling` wins, as in
    /// transformers. Problems go to `problems`.
    pub fn parse(
        raw: &Map<String, Value>,
        max_positions: usize,
        problems: &mut Vec<String>,
    ) -> Self {
        let mut top = Fields::new(raw, "");
        let empty = Map::new();
        let (name, map) = parameters(&mut top).unwrap_or(("rope_parameters.", &empty));
        let mut f = Fields::new(map, name);
        let positive = "a number above 0";
        let theta = f.number("rope_theta", positive, |x| x > 0.0);
        let theta = theta
            .or_else(|| top.number("rope_theta", positive, |x| x > 0.0))
            .unwrap_or(DEFAULT_THETA);
        for partial in [
            f.number("partial_rotary_factor", positive, |_| true),
            top.number("partial_rotary_factor", positive, |_| true),
        ] {
            if partial.is_some_and(|p| p != 1.0) {
                f.problem("partial_rotary_factor: rotating a part of the head is not supported");
            }
        }
        if map.values().any(Value::is_object) {
            f.problem(format!("{name} one rope per layer type is not supported"));
        }
        let original = match top.size("original_max_position_embeddings", 1 << 40) {
            Some(n) => n,
            None => f.size("original_max_position_embeddings", 1 << 40).unwrap_or(max_positions),
        } as f64;
        let rope_type = f.string("rope_type").or_else(|| f.string("type")).unwrap_or("default");
        let kind = match rope_type {
            "default" => RopeKind::Default,
            "linear" => RopeKind::Linear { factor: required(&mut f, "factor") },
            "llama3" => llama3(&mut f, original),
            "yarn" => yarn(&mut f, original, max_positions as f64, theta),
            other => {
                f.problem(format!(
                    "{name}rope_type is \"{other}\"; supported are default, linear, llama3, yarn"
                ));
                RopeKind::Default
            }
        };
        problems.append(&mut top.problems);
        problems.append(&mut f.problems);
        RopeConfig { theta, kind }
    }

    /// What cos and sin are multiplied by: 1 except for yarn.
    pub fn attention_factor(&self) -> f64 {
        match self.kind {
            RopeKind::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }
}

/// Angle per position of each pair of dimensions: [head_dim / 2].
pub fn inv_freq(config: &RopeConfig, head_dim: usize) -> Vec<f32> {
    let dim = head_dim as f32;
    let base = f64::from(config.theta as f32);
    let powers: Vec<f32> =
        (0..head_dim / 2).map(|i| base.powf(f64::from((2 * i) as f32 / dim)) as f32).collect();
    let plain = powers.iter().map(|p| 1.0 / p);
    match config.kind {
        RopeKind::Default => plain.collect(),
        RopeKind::Linear { factor } => plain.map(|f| f / factor as f32).collect(),
        RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let (factor, low) = (factor as f32, low_freq_factor as f32);
            let longest = (original_max_positions / low_freq_factor) as f32;
            let shortest = (original_max_positions / high_freq_factor) as f32;
            let width = (high_freq_factor - low_freq_factor) as f32;
            plain
                .map(|f| {
                    let wavelength = (1.0 / f) * (2.0 * PI) as f32;
                    if wavelength > longest {
                        f / factor
                    } else if wavelength < shortest {
                        f
                    } else {
                        let smooth =
                            ((1.0 / wavelength) * original_max_positions as f32 - low) / width;
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect()
        }
        RopeKind::Yarn {
            factor, original_max_positions, beta_fast, beta_slow, truncate, ..
        } => {
            let (low, high) = yarn_range(
                head_dim,
                config.theta,
                original_max_positions,
                beta_fast,
                beta_slow,
                truncate,
            );
            let (start, width) = (low as f32, (high - low) as f32);
            let ramp = (0..head_dim / 2).map(|i| ((i as f32 - start) / width).clamp(0.0, 1.0));
            powers
                .iter()
                .zip(ramp)
                .map(|(p, ramp)| {
                    let kept = 1.0 - ramp;
                    (1.0 / (factor as f32 * p)) * (1.0 - kept) + (1.0 / p) * kept
                })
                .collect()
        }
    }
}

/// (cos, sin), each row-major [positions, head_dim / 2], with yarn's attention factor multiplied
/// in.
pub fn rope_table(config: &RopeConfig, head_dim: usize, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let inv_freq = inv_freq(config, head_dim);
    let factor = config.attention_factor() as f32;
    let n = positions * inv_freq.len();
    let (mut cos, mut sin) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for position in 0..positions {
        for f in &inv_freq {
            let (s, c) = f64::from(position as f32 * f).sin_cos();
            cos.push(c as f32 * factor);
            sin.push(s as f32 * factor);
        }
    }
    (cos, sin)
}

/// The object that holds the rope settings, and its name in messages.
fn parameters<'a>(top: &mut Fields<'a>) -> Option<(&'static str, &'a Map<String, Value>)> {
    let old = top.object("rope_scaling").filter(|m| !m.is_empty());
    let new = top.object("rope_parameters");
    old.map(|m| ("rope_scaling.", m)).or(new.map(|m| ("rope_parameters.", m)))
}

fn required(f: &mut Fields, key: &str) -> f64 {
    if f.value(key).is_none() {
        f.problem(format!("rope: {key} is missing, and this rope_type needs it"));
    }
    f.number(key, "a number above 0", |x| x > 0.0).unwrap_or(1.0)
}

fn llama3(f: &mut Fields, original_max_positions: f64) -> RopeKind {
    let factor = required(f, "factor");
    let (low_freq_factor, high_freq_factor) =
        (required(f, "low_freq_factor"), required(f, "high_freq_factor"));
    if f.problems.is_empty() && high_freq_factor <= low_freq_factor {
        f.problem(format!("rope: high_freq_factor {high_freq_factor} must be above low_freq_factor {low_freq_factor}"));
    }
    RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions }
}

fn yarn(f: &mut Fields, original_max_positions: f64, max_positions: f64, theta: f64) -> RopeKind {
    let positive = "a number above 0";
    let factor =
        f.number("factor", positive, |x| x > 0.0).unwrap_or(max_positions / original_max_positions);
    let number = |f: &mut Fields, key: &str| f.number(key, "a number of at least 0", |x| x >= 0.0);
    let truthy = |x: Option<f64>| x.filter(|x| *x != 0.0);
    let mscale = truthy(number(f, "mscale")).zip(truthy(number(f, "mscale_all_dim")));
    let growth = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let attention_factor = number(f, "attention_factor").unwrap_or_else(|| match mscale {
        Some((one, all)) => growth(one) / growth(all),
        None => growth(1.0),
    });
    let beta_fast = truthy(number(f, "beta_fast")).unwrap_or(32.0);
    let beta_slow = truthy(number(f, "beta_slow")).unwrap_or(1.0);
    let truncate = f.boolean("truncate").unwrap_or(true);
    if theta <= 1.0 {
        f.problem(format!("rope_theta is {theta}; yarn needs more than 1"));
    }
    RopeKind::Yarn {
        factor,
        original_max_positions,
        attention_factor,
        beta_fast,
        beta_slow,
        truncate,
    }
}

/// The dimensions between which yarn's ramp runs: those that turn `fast` and `slow` times over the
/// original length.
fn yarn_range(
    head_dim: usize,
    theta: f64,
    original: f64,
    fast: f64,
    slow: f64,
    truncate: bool,
) -> (f64, f64) {
    let dim = head_dim as f64;
    let turning = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (turning(fast), turning(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(dim - 1.0));
    (low, if low == high { high + 0.001 } else { high })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        head_dim: usize,
        rope_parameters: Map<String, Value>,
        positions: Vec<usize>,
        inv_freq: Vec<f32>,
        cos: Vec<f32>,
        sin: Vec<f32>,
    }

    fn parse(json: Value) -> (RopeConfig, Vec<String>) {
        let mut problems = Vec::new();
        let raw = json.as_object().cloned().unwrap_or_default();
        (RopeConfig::parse(&raw, 128, &mut problems), problems)
    }

    #[test]
    fn tables_equal_those_of_transformers() {
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../tests/fixtures/rope.json")).unwrap();
        assert_eq!(cases.len(), 14);
        for case in cases {
            let (config, problems) =
                parse(serde_json::json!({ "rope_parameters": case.rope_parameters }));
            assert!(problems.is_empty(), "{problems:?}");
            let got = inv_freq(&config, case.head_dim);
            let half = case.head_dim / 2;
            let (cos, sin) = rope_table(&config, case.head_dim, 128);
            let mut off = 0;
            for i in 0..half {
                let (got, want) = (got[i], case.inv_freq[i]);
                let ulps = got.to_bits().abs_diff(want.to_bits());
                off += usize::from(ulps != 0);
                assert!(ulps <= 1, "{config:?}: inv_freq[{i}] {got} {want}");
                for (row, position) in case.positions.iter().enumerate() {
                    // 1e-6, and where the frequency itself is an ulp off, what that does to the
                    // angle
                    let slack =
                        1e-6 + if ulps != 0 { 1.2e-7 * *position as f32 * want } else { 0.0 };
                    let (at, wanted) = (position * half + i, row * half + i);
                    assert!(
                        (cos[at] - case.cos[wanted]).abs() <= slack,
                        "{config:?}: cos at {position}, {i}"
                    );
                    assert!(
                        (sin[at] - case.sin[wanted]).abs() <= slack,
                        "{config:?}: sin at {position}, {i}"
                    );
                }
            }
            assert!(
                off * 30 <= half,
                "{config:?}: {off} of {half} frequencies differ in the last bit"
            );
        }
    }

    #[test]
    fn old_and_new_keys_mean_the_same() {
        let scaling = serde_json::json!({ "type": "linear", "factor": 2.0 });
        let (old, _) = parse(serde_json::json!({ "rope_theta": 5e5, "rope_scaling": scaling }));
        assert_eq!(old, RopeConfig { theta: 5e5, kind: RopeKind::Linear { factor: 2.0 } });
        let new = serde_json::json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5 });
        assert_eq!(parse(serde_json::json!({ "rope_parameters": new })).0, old);
        let both =
            serde_json::json!({ "rope_theta": 1.0, "rope_scaling": null, "rope_parameters": new });
        assert_eq!(parse(both).0, old);
        assert_eq!(
            parse(serde_json::json!({})).0,
            RopeConfig { theta: 1e4, kind: RopeKind::Default }
        );
    }

    #[test]
    fn bad_settings_are_all_reported() {
        let bad = serde_json::json!({ "rope_parameters": { "rope_type": "dynamic", "rope_theta": -1, "partial_rotary_factor": 0.5 } });
        let (_, problems) = parse(bad);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(
            problems
                .iter()
                .any(|p| p.contains("\"dynamic\"; supported are default, linear, llama3, yarn"))
        );
        let (_, problems) =
            parse(serde_json::json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8 } }));
        assert_eq!(problems.len(), 2, "{problems:?}");
    }
}
