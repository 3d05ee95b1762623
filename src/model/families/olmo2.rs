//! OLMo 2. Layer 5.
//!
//! Invariant: a block's norms follow attention and the MLP, before the addition to the stream; q
//! and k are normalised over all heads together.

use crate::model::layout::{BiasRule, Family, NormPlace};
use crate::ops::rmsnorm::NormWeight;
use crate::ops::rope::NormOver;

pub const FAMILY: Family = Family {
    model_type: "olmo2",
    architecture: "Olmo2ForCausalLM",
    qkv_bias: BiasRule::Key("attention_bias"),
    o_bias: BiasRule::Key("attention_bias"),
    norm_weight: NormWeight::Once,
    norm_place: NormPlace::After,
    qk_norm: Some(NormOver::Heads),
    default_bos: None,
    default_eos: Some(50279),
    default_pad: Some(1),
    default_eps: 1e-5,
    ..Family::PLAIN
};
