//! Ministral 8B: Mistral with full and sliding layers. Layer 5.
//!
//! Invariant: `layer_types` says which layers have the window; without it all layers have it.

use crate::model::layout::{Family, WindowRule};

pub const FAMILY: Family = Family {
    model_type: "ministral",
    architecture: "MinistralForCausalLM",
    window: WindowRule::Typed { default: 4096 },
    default_kv_heads: Some(8),
    default_max_positions: 131072,
    ..Family::PLAIN
};
