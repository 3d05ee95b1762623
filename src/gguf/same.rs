//! Compares the model that a GGUF file describes with the one that should have been written.
//! Layer 6.
//!
//! Invariant: every field of the layout that affects the computation is compared, and numbers in
//! the precision in which they are used.

use std::fmt::Debug;

use crate::device::DType;
use crate::model::families::gguf::GgufNames;
use crate::model::layout::ModelConfig;
use crate::model::rope::inv_freq;

/// Descriptions of all differences. Windows are compared only if files of the family store them.
pub fn differences(written: &ModelConfig, read: &ModelConfig) -> Vec<String> {
    let mut out = Vec::new();
    let mut compare = |what: &str, of: &dyn Fn(&ModelConfig) -> String| {
        let (a, b) = (of(written), of(read));
        if a != b {
            out.push(format!("{what}: {a} in the model, {b} in the file"));
        }
    };
    fn text(value: impl Debug) -> String {
        format!("{value:?}")
    }
    compare("the size", &|c| {
        text((
            [c.vocab_size, c.hidden_size, c.intermediate_size, c.num_layers],
            [c.num_heads, c.num_kv_heads, c.head_dim, c.max_position_embeddings],
        ))
    });
    compare("the attention or convolution of each layer", &|c| text(&c.mixers));
    compare("rms_norm_eps", &|c| text(c.rms_norm_eps));
    compare("the activation", &|c| text(c.hidden_act));
    compare("tie_word_embeddings", &|c| text(c.tie_word_embeddings));
    compare("which layers have biases", &|c| text([c.qkv_bias, c.o_bias, c.mlp_bias]));
    compare("the form of norms", &|c| text((c.norm_weight, c.norm_place, c.qk_norm)));
    compare("the scale of embeddings", &|c| {
        text(c.embedding_scale.map_or((1.0, 1.0), |s| s.factors(DType::F32)))
    });
    compare("the scale of q.k", &|c| text((c.attention_scale, c.attention_softcap)));
    compare("the scale of residuals", &|c| text(c.residual_scale));
    compare("the scale of logits", &|c| text(c.logits));
    compare("the rope", &|c| {
        let layers = c.layer_rope.iter().map(|layer| {
            let rope = &c.ropes[(*layer)?];
            let factor = rope.attention_factor() as f32;
            let scale = rope.query_scale.map(|s| (s.beta as f32, s.original_max_positions as f32));
            let angles = [false, true].map(|long| inv_freq(rope, c.head_dim, long));
            Some((angles, factor, scale))
        });
        let mut layers: Vec<_> = layers.enumerate().collect();
        layers.dedup_by(|a, b| a.1 == b.1); // keeps the layers where it changes
        text(layers)
    });
    if GgufNames::of_model_type(written.family.model_type).is_some_and(GgufNames::has_windows) {
        compare("the sliding window of layers", &|c| text(&c.sliding_window));
    }
    out
}
