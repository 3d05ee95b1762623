//! Gemma 3 text models. Layer 5.
//!
//! Invariant: like Gemma 2, with norms of each head of q and k instead of softcaps; five of six
//! layers have a window and a separate rope.

use crate::model::layout::{
    ActRule, AttentionScaleRule, BiasRule, EmbeddingRule, Family, HiddenAct, NormPlace, RopeRule,
    SoftcapRule, WindowRule,
};
use crate::ops::rmsnorm::NormWeight;
use crate::ops::rope::NormOver;

pub const FAMILY: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    qkv_bias: BiasRule::Key("attention_bias"),
    o_bias: BiasRule::Key("attention_bias"),
    hidden_act: ActRule { key: "hidden_activation", default: HiddenAct::GeluTanh },
    norm_weight: NormWeight::PlusOne,
    norm_place: NormPlace::Both,
    qk_norm: Some(NormOver::Head),
    embedding_scale: EmbeddingRule::SqrtHidden,
    attention_scale: AttentionScaleRule::InverseSqrt {
        key: "query_pre_attn_scalar",
        default: 256.0,
    },
    logits_softcap: SoftcapRule::Key { key: "final_logit_softcapping", default: None },
    window: WindowRule::Pattern { default: 4096, period: 6, key: Some("sliding_window_pattern") },
    rope: RopeRule::ByLayerType { default_sliding_theta: 1e4 },
    ia3_attention: "q_proj",
    heads_divide_hidden: true,
    default_kv_heads: Some(4),
    default_head_dim: Some(256),
    default_max_positions: 131072,
    default_theta: 1e6,
    default_bos: Some(2),
    default_eos: Some(1),
    default_pad: Some(0),
    default_tie: true,
    classifier: Some("Gemma3Text"),
    refused: Some("use_bidirectional_attention"),
    ..Family::PLAIN
};
