//! Granite 3.x, dense models. Layer 5.
//!
//! Invariant: a Llama with four multipliers: for embeddings, for attention scores, for branches
//! added to the stream, and (as a divisor) for logits.

use crate::model::layout::{AttentionScaleRule, BiasRule, EmbeddingRule, Family};

pub const FAMILY: Family = Family {
    model_type: "granite",
    architecture: "GraniteForCausalLM",
    qkv_bias: BiasRule::Key("attention_bias"),
    o_bias: BiasRule::Key("attention_bias"),
    mlp_bias: BiasRule::Key("mlp_bias"),
    embedding_scale: EmbeddingRule::Key("embedding_multiplier"),
    attention_scale: AttentionScaleRule::Key("attention_multiplier"),
    residual_scale: Some("residual_multiplier"),
    logits_divisor: Some("logits_scaling"),
    ..Family::PLAIN
};
