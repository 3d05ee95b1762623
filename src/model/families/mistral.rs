//! Mistral 7B and its kin. Layer 5.
//!
//! Invariant: one window for all layers, or none; no biases.

use crate::model::layout::{BiasRule, Family, WindowRule};

pub const FAMILY: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    qkv_bias: BiasRule::Never,
    o_bias: BiasRule::Never,
    mlp_bias: BiasRule::Never,
    window: WindowRule::Every { default: 4096 },
    ia3_attention: "k_proj",
    heads_divide_hidden: false,
    default_kv_heads: Some(8),
    default_head_dim: None,
    default_max_positions: 131072,
    default_bos: Some(1),
    default_eos: Some(2),
    ..Family::PLAIN
};
