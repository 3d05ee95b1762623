//! Mistral 7B and similar models. Layer 5.
//!
//! Invariant: one window for all layers, or none; no biases.

use crate::model::layout::{Family, WindowRule};

pub const FAMILY: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    window: WindowRule::Every { default: Some(4096) },
    default_kv_heads: Some(8),
    default_max_positions: 131072,
    ..Family::PLAIN
};
