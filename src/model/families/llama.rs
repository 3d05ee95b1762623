//! Llama 2 and 3.x, SmolLM2, and the many folders with model type `llama`. Layer 5.
//!
//! Invariant: this is the decoder without switches; biases exist only if config.json asks for them.

use crate::model::layout::{BiasRule, Family};

pub const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    qkv_bias: BiasRule::Key("attention_bias"),
    o_bias: BiasRule::Key("attention_bias"),
    mlp_bias: BiasRule::Key("mlp_bias"),
    heads_divide_hidden: true,
    ..Family::PLAIN
};
