//! SmolLM3. Layer 5.
//!
//! Invariant: a Llama in which every fourth layer (or those that `no_rope_layers` names) has no
//! rope; a window, if any, applies to the layers without rope.

use crate::model::layout::{BiasRule, Family, RopeRule, WindowRule};

pub const FAMILY: Family = Family {
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    qkv_bias: BiasRule::Key("attention_bias"),
    o_bias: BiasRule::Key("attention_bias"),
    mlp_bias: BiasRule::Key("mlp_bias"),
    window: WindowRule::WithoutRope,
    rope: RopeRule::SomeLayers { default_interval: 4 },
    default_kv_heads: Some(4),
    default_max_positions: 32768,
    default_theta: 2e6,
    default_tie: true,
    default_bos: Some(128000),
    default_eos: Some(128001),
    default_pad: Some(128004),
    ..Family::PLAIN
};
