//! The representation of a parameter's values in a GGUF file. Layer 6.
//!
//! Invariant: `from_file` undoes `to_file`: rows keep their bits, and a norm that is stored as 1 +
//! w keeps w to within half of the last bit of 1 + w.

use crate::model::families::gguf::GgufNames;
use crate::model::layout::ModelConfig;
use crate::model::specs::{ParamSpec, Role};
use crate::ops::rmsnorm::NormWeight;

/// The shape of a parameter in the file: a filter for each channel is a row.
pub fn file_shape(spec: &ParamSpec) -> Vec<usize> {
    match spec.role {
        Role::Conv => vec![spec.shape[0], spec.shape[2]],
        _ => spec.shape.clone(),
    }
}

/// Converts the values of a parameter to the file's representation.
pub fn to_file(
    names: &GgufNames,
    config: &ModelConfig,
    spec: &ParamSpec,
    values: Vec<f32>,
) -> Vec<f32> {
    if adds_one(config, spec) {
        return values.into_iter().map(|w| w + 1.0).collect();
    }
    match rope_heads(names, config, spec) {
        Some(heads) => to_neighbours(&values, heads, config.head_dim),
        None => values,
    }
}

/// Converts the values of a parameter from the file's representation.
pub fn from_file(
    names: &GgufNames,
    config: &ModelConfig,
    spec: &ParamSpec,
    values: Vec<f32>,
) -> Vec<f32> {
    if adds_one(config, spec) {
        return values.into_iter().map(|w| w - 1.0).collect();
    }
    match rope_heads(names, config, spec) {
        Some(heads) => to_halves(&values, heads, config.head_dim),
        None => values,
    }
}

/// Whether the norm computes with 1 + w: the file stores the whole factor.
fn adds_one(config: &ModelConfig, spec: &ParamSpec) -> bool {
    config.norm_weight == NormWeight::PlusOne && spec.role.is_norm()
}

/// The number of heads of a parameter whose rows are in the order of llama.cpp's rope.
fn rope_heads(names: &GgufNames, config: &ModelConfig, spec: &ParamSpec) -> Option<usize> {
    match spec.role {
        _ if !names.neighbours => None,
        Role::Q | Role::QBias => Some(config.num_heads),
        Role::K | Role::KBias => Some(config.num_kv_heads),
        _ => None,
    }
}

/// Reorders the rows of each head from pairs, (0, d/2), (1, d/2 + 1) ..., to halves.
fn to_halves(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    moved(values, heads, head_dim, |row| row % half * 2 + row / half)
}

/// Reorders the rows of each head from halves to pairs.
fn to_neighbours(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    moved(values, heads, head_dim, |row| row % 2 * half + row / 2)
}

/// Moves row `from(r)` of each head to row `r`.
fn moved(values: &[f32], heads: usize, head_dim: usize, from: impl Fn(usize) -> usize) -> Vec<f32> {
    let width = values.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(values.len());
    for row in 0..heads * head_dim {
        let at = (row / head_dim * head_dim + from(row % head_dim)) * width;
        out.extend_from_slice(&values[at..at + width]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_rope_go_to_halves_and_back() {
        // Two heads of 4 rows with 1 value: the pairs are (0, 2), (1, 3) in Hugging Face's order.
        let neighbours = [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0];
        let halves = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0];
        assert_eq!(to_halves(&neighbours, 2, 4), halves);
        assert_eq!(to_neighbours(&halves, 2, 4), neighbours);
        let wide: Vec<f32> = (0..48).map(|i| i as f32).collect();
        assert_eq!(to_halves(&to_neighbours(&wide, 2, 8), 2, 8), wide);
    }
}
