//! Llama 2 and 3.x, SmolLM2, and the many folders that call themselves `llama`. Layer 5.
//!
//! Invariant: this is the decoder without switches; biases come only where config.json asks for
//! them.

use crate::model::layout::{BiasRule, Family, WindowRule};

pub const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    qkv_bias: BiasRule::Key("attention_bias"),
    o_bias: BiasRule::Key("attention_bias"),
    mlp_bias: BiasRule::Key("mlp_bias"),
    window: WindowRule::Ignored,
    ia3_attention: "k_proj",
    heads_divide_hidden: true,
    default_kv_heads: None,
    default_head_dim: None,
    default_max_positions: 2048,
    default_bos: Some(1),
    default_eos: Some(2),
    ..Family::PLAIN
};
