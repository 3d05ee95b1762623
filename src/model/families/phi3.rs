//! Phi-3, Phi-3.5 and Phi-4-mini. Layer 5.
//!
//! Invariant: q|k|v and gate|up are one tensor each, in the folder, in the arena and for adapters;
//! rope may rotate only part of a head, with longrope's factors.

use crate::model::layout::{Family, WindowRule};

pub const FAMILY: Family = Family {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    window: WindowRule::Every { default: None },
    fused_projections: true,
    default_max_positions: 4096,
    default_original_positions: Some(4096),
    default_eps: 1e-5,
    default_eos: Some(32000),
    default_pad: Some(32000),
    ..Family::PLAIN
};
