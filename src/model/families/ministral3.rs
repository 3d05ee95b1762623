//! Ministral 3 language models. Layer 5.
//!
//! Invariant: Mistral with yarn, and queries scaled by the logarithm of their position
//! (`llama_4_scaling_beta`).

use crate::model::layout::{Family, WindowRule};

pub const FAMILY: Family = Family {
    model_type: "ministral3",
    architecture: "Ministral3ForCausalLM",
    window: WindowRule::Every { default: None },
    query_scale: true,
    default_kv_heads: Some(8),
    default_head_dim: Some(128),
    default_max_positions: 262144,
    default_eps: 1e-5,
    default_pad: Some(11),
    ..Family::PLAIN
};
