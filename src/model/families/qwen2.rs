//! Qwen2 and Qwen2.5. Layer 5.
//!
//! Invariant: q, k and v always have a bias, o never has one.

use crate::model::layout::{BiasRule, Family, WindowRule};

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    qkv_bias: BiasRule::Always,
    window: WindowRule::Listed { default: 4096, default_full_layers: 28 },
    ia3_attention: "q_proj",
    default_kv_heads: Some(32),
    default_max_positions: 32768,
    default_bos: None,
    default_eos: None,
    ..Family::PLAIN
};
