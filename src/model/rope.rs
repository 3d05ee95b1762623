//! Rotary position tables: default, linear, llama3, yarn and longrope. Layer 5.
//!
//! Invariant: the angle is computed as in transformers, `f32(position) * inv_freq` in f32, so that
//! the tables agree for all positions, not only for small ones. Powers, cosines and sines are
//! correctly rounded (through f64); PyTorch's vector library is off by one ulp in about one power
//! in a hundred, which is the only difference.
//!
//! The decoder rotates halves: for a head `x = [a, b]`, position p gives
//! `[a cos - b sin, b cos + a sin]`.

use std::f64::consts::PI;

#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    pub kind: RopeKind,
    /// The fraction of a head that is rotated, from its first value on.
    pub partial: f64,
    pub query_scale: Option<QueryScale>,
}

/// q at position p is multiplied by `1 + beta ln(1 + floor(p / original_max_positions))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScale {
    pub beta: f64,
    pub original_max_positions: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RopeKind {
    Default,
    /// All frequencies are divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Long wavelengths are divided by `factor`, short ones kept, with a ramp between
    /// `original / low` and `original / high`.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: f64,
    },
    /// Like llama3, with the ramp over dimensions, and cos and sin multiplied by
    /// `attention_factor`.
    Yarn {
        factor: f64,
        original_max_positions: f64,
        attention_factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
    },
    /// Each frequency is divided by its own factor, and cos and sin are multiplied by
    /// `attention_factor`. There are two lists of factors, `[turned / 2]`: the long one is used in
    /// runs with sequences longer than the original length ([`RopeConfig::is_long`]).
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        original_max_positions: f64,
        attention_factor: f64,
    },
}

impl RopeConfig {
    /// A rope with this theta and no scaling.
    pub fn plain(theta: f64) -> RopeConfig {
        RopeConfig { theta, kind: RopeKind::Default, partial: 1.0, query_scale: None }
    }

    /// Number of values of a head that are rotated, from its first on.
    pub fn turned(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.partial) as usize
    }

    /// The factor of cos and sin: 1 except for yarn and longrope.
    pub fn attention_factor(&self) -> f64 {
        match self.kind {
            RopeKind::Yarn { attention_factor, .. }
            | RopeKind::LongRope { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Whether a run whose longest sequence has `longest` tokens uses longrope's long factors.
    pub fn is_long(&self, longest: usize) -> bool {
        match self.kind {
            RopeKind::LongRope { original_max_positions, .. } => {
                longest as f64 > original_max_positions
            }
            _ => false,
        }
    }

    /// Returns the factor of q at each position, if q is scaled: transformers'
    /// `get_llama_4_attn_scale`.
    pub fn query_scales(&self, positions: usize) -> Option<Vec<f32>> {
        let QueryScale { beta, original_max_positions } = self.query_scale?;
        let scale = |p: usize| {
            let steps = (p as f32 / original_max_positions as f32).floor();
            1.0 + beta as f32 * f64::from(1.0 + steps).ln() as f32
        };
        Some((0..positions).map(scale).collect())
    }
}

/// Returns the angle per position of each rotated pair of dimensions: [turned / 2]. `long` selects
/// longrope's long factors.
pub fn inv_freq(config: &RopeConfig, head_dim: usize, long: bool) -> Vec<f32> {
    let turned = config.turned(head_dim);
    let dim = turned as f32;
    let base = f64::from(config.theta as f32);
    let powers: Vec<f32> =
        (0..turned / 2).map(|i| base.powf(f64::from((2 * i) as f32 / dim)) as f32).collect();
    let plain = powers.iter().map(|p| 1.0 / p);
    match config.kind {
        RopeKind::LongRope { short: ref factors, .. } if !long => scaled(&powers, factors),
        RopeKind::LongRope { long: ref factors, .. } => scaled(&powers, factors),
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
                turned,
                config.theta,
                original_max_positions,
                beta_fast,
                beta_slow,
                truncate,
            );
            let (start, width) = (low as f32, (high - low) as f32);
            let ramp = (0..turned / 2).map(|i| ((i as f32 - start) / width).clamp(0.0, 1.0));
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

fn scaled(powers: &[f32], factors: &[f64]) -> Vec<f32> {
    powers.iter().zip(factors).map(|(power, factor)| 1.0 / (*factor as f32 * power)).collect()
}

/// Returns (cos, sin), each row-major [positions, turned / 2], with the attention factor of yarn
/// and longrope included.
pub fn rope_table(
    config: &RopeConfig,
    head_dim: usize,
    positions: usize,
    long: bool,
) -> (Vec<f32>, Vec<f32>) {
    let inv_freq = inv_freq(config, head_dim, long);
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

/// Returns the dimensions between which yarn's ramp runs: those that make `fast` and `slow`
/// rotations over the original length.
fn yarn_range(
    dim: usize,
    theta: f64,
    original: f64,
    fast: f64,
    slow: f64,
    truncate: bool,
) -> (f64, f64) {
    let dim = dim as f64;
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
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::model::rope_config::{RopeFacts, one_rope};

    #[derive(serde::Deserialize)]
    struct Case {
        head_dim: usize,
        rope_parameters: Map<String, Value>,
        positions: Vec<usize>,
        inv_freq: Vec<f32>,
        cos: Vec<f32>,
        sin: Vec<f32>,
        long: Option<bool>,
        q_scale: Option<Vec<f32>>,
    }

    #[test]
    fn tables_equal_those_of_transformers() {
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../tests/fixtures/rope.json")).unwrap();
        assert_eq!(cases.len(), 19);
        for case in cases {
            let mut problems = Vec::new();
            let raw = json!({ "rope_parameters": case.rope_parameters });
            let facts = RopeFacts {
                head_dim: case.head_dim,
                query_scale: case.q_scale.is_some(),
                ..RopeFacts::SMALL
            };
            let config = one_rope(raw.as_object().unwrap(), &facts, &mut problems);
            assert!(problems.is_empty(), "{problems:?}");
            let long = case.long.unwrap_or(false);
            let got = inv_freq(&config, case.head_dim, long);
            let half = config.turned(case.head_dim) / 2;
            assert_eq!(half, case.inv_freq.len());
            let (cos, sin) = rope_table(&config, case.head_dim, 128, long);
            let scales = config.query_scales(128);
            for (position, want) in case.positions.iter().zip(case.q_scale.iter().flatten()) {
                // The logarithm is rounded once here, and differently in PyTorch.
                let got = scales.as_ref().unwrap()[*position];
                assert!((got - want).abs() <= 1.2e-7, "{config:?}: q at {position}");
            }
            assert_eq!(scales.is_some(), case.q_scale.is_some(), "{config:?}");
            let mut off = 0;
            for i in 0..half {
                let (got, want) = (got[i], case.inv_freq[i]);
                let ulps = got.to_bits().abs_diff(want.to_bits());
                off += usize::from(ulps != 0);
                assert!(ulps <= 1, "{config:?}: inv_freq[{i}] {got} {want}");
                for (row, position) in case.positions.iter().enumerate() {
                    // 1e-6, plus the effect on the angle if the frequency itself is an ulp off
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
}
