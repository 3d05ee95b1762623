//! Gemma 2. Layer 5.
//!
//! Invariant: norms with 1 + w, before and after attention and the MLP; embeddings scaled by
//! sqrt(hidden_size); softcaps on attention scores and logits; every second layer has a window.

use crate::model::layout::{
    ActRule, AttentionScaleRule, BiasRule, EmbeddingRule, Family, HiddenAct, NormPlace,
    SoftcapRule, WindowRule,
};
use crate::ops::rmsnorm::NormWeight;

pub const FAMILY: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    qkv_bias: BiasRule::Key("attention_bias"),
    o_bias: BiasRule::Key("attention_bias"),
    hidden_act: ActRule { key: "hidden_activation", default: HiddenAct::GeluTanh },
    norm_weight: NormWeight::PlusOne,
    norm_place: NormPlace::Both,
    embedding_scale: EmbeddingRule::SqrtHidden,
    attention_scale: AttentionScaleRule::InverseSqrt {
        key: "query_pre_attn_scalar",
        default: 256.0,
    },
    attention_softcap: SoftcapRule::Key { key: "attn_logit_softcapping", default: Some(50.0) },
    logits_softcap: SoftcapRule::Key { key: "final_logit_softcapping", default: Some(30.0) },
    window: WindowRule::Pattern { default: 4096, period: 2, key: None },
    ia3_attention: "q_proj",
    heads_divide_hidden: true,
    default_kv_heads: Some(4),
    default_head_dim: Some(256),
    default_max_positions: 8192,
    default_bos: Some(2),
    default_eos: Some(1),
    default_pad: Some(0),
    default_tie: true,
    refused: Some("use_bidirectional_attention"),
    ..Family::PLAIN
};
