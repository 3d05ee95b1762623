//! Qwen3, dense models. Layer 5.
//!
//! Invariant: q and k are RMS-normalised per head, over head_dim, before rope; head_dim need not be
//! hidden_size / heads.

use crate::model::layout::{BiasRule, Family, WindowRule};
use crate::ops::rope::NormOver;

pub const FAMILY: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    qkv_bias: BiasRule::Key("attention_bias"),
    o_bias: BiasRule::Key("attention_bias"),
    qk_norm: Some(NormOver::Head),
    window: WindowRule::Listed { default: 4096, default_full_layers: 28 },
    ia3_attention: "q_proj",
    default_kv_heads: Some(32),
    default_head_dim: Some(128),
    default_max_positions: 32768,
    default_bos: None,
    default_eos: None,
    ..Family::PLAIN
};
