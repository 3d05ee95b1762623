//! LFM2, dense models. Layer 5.
//!
//! Invariant: most layers have a short convolution instead of attention; q and k are normalised per
//! head; modules and some config keys have their own names.

use crate::model::layout::{Family, MixerRule, MlpWidthRule};
use crate::ops::rope::NormOver;

pub const FAMILY: Family = Family {
    model_type: "lfm2",
    architecture: "Lfm2ForCausalLM",
    qk_norm: Some(NormOver::Head),
    mixers: MixerRule::AttentionOrConv { default_taps: 3 },
    modules: &[
        ("model.norm", "model.embedding_norm"),
        ("input_layernorm", "operator_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_norm", "self_attn.q_layernorm"),
        ("self_attn.k_norm", "self_attn.k_layernorm"),
        ("self_attn.o_proj", "self_attn.out_proj"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
    ],
    old_keys: &[("intermediate_size", "block_ff_dim"), ("tie_word_embeddings", "tie_embedding")],
    eps_key: "norm_eps",
    mlp_width: MlpWidthRule::TwoThirds { default_multiple: 256 },
    default_kv_heads: Some(8),
    default_max_positions: 128_000,
    default_theta: 1e6,
    default_eps: 1e-5,
    default_tie: true,
    default_pad: Some(0),
    ..Family::PLAIN
};
