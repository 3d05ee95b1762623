//! The layout of a decoder: sizes and switches, and the rules of its family. Layer 5.
//!
//! Invariant: a family is data. Nothing here or in the decoder asks for a model's family.

use serde_json::{Map, Value};

use super::rope::RopeConfig;
use crate::device::DType;
use crate::ops::logit_map::LogitMap;
use crate::ops::rmsnorm::{Norm, NormWeight};
use crate::ops::rope::NormOver;
use crate::tensor::safetensors::HostDtype;

/// The activation of the gate in the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HiddenAct {
    Silu,
    Gelu,     // with erf
    GeluTanh, // `gelu_pytorch_tanh` and `gelu_new` are the same formula
}

/// The output layer over the last hidden state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A distribution over the vocabulary.
    CausalLm,
    /// `labels` scores of a whole sequence, read at its last token: a reward model has one.
    SequenceClassification { labels: usize },
    /// `labels` scores of each token, with a bias: a process reward model has two.
    TokenClassification { labels: usize },
}

impl Task {
    /// PEFT's task_type.
    pub fn peft_name(self) -> &'static str {
        match self {
            Task::CausalLm => "CAUSAL_LM",
            Task::SequenceClassification { .. } => "SEQ_CLS",
            Task::TokenClassification { .. } => "TOKEN_CLS",
        }
    }

    /// The suffix of `architectures`.
    pub fn suffix(self) -> &'static str {
        match self {
            Task::CausalLm => "ForCausalLM",
            Task::SequenceClassification { .. } => "ForSequenceClassification",
            Task::TokenClassification { .. } => "ForTokenClassification",
        }
    }

    pub fn labels(self) -> Option<usize> {
        match self {
            Task::CausalLm => None,
            Task::SequenceClassification { labels } | Task::TokenClassification { labels } => {
                Some(labels)
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: &'static Family,
    pub task: Task,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize, // q is [num_heads * head_dim], which need not be hidden_size
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub hidden_act: HiddenAct,
    pub tie_word_embeddings: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub norm_weight: NormWeight,
    pub norm_place: NormPlace,
    pub qk_norm: Option<NormOver>,
    pub embedding_scale: Option<EmbeddingScale>,
    pub attention_scale: f32, // of q.k
    pub attention_softcap: Option<f32>,
    pub residual_scale: f32, // of the branches added to the stream
    pub logits: LogitMap,
    /// `[num_layers]`: the token mixer of each layer.
    pub mixers: Vec<Mixer>,
    /// `[num_layers]`. `Some(w)`: a query at position i attends to keys j with i - w < j <= i: w
    /// keys, its own included.
    pub sliding_window: Vec<Option<usize>>,
    /// The rope settings that layers choose from.
    pub ropes: Vec<RopeConfig>,
    /// `[num_layers]`: index into `ropes` of each layer's rope; None: no rope.
    pub layer_rope: Vec<Option<usize>>,
    pub attention_dropout: f32,
    pub initializer_range: f32,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    pub dtype: Option<HostDtype>, // of the folder, if given
    pub raw: Map<String, Value>,  // config.json as read
}

/// The token mixer of a layer. Attention's fields have no meaning in a layer without attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixer {
    Attention,
    /// A gated convolution over a token and the `taps - 1` before it; `bias`: its projections have
    /// biases too.
    ShortConv {
        taps: usize,
        bias: bool,
    },
}

/// Where a block has norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlace {
    /// Before attention and before the MLP.
    Before,
    /// After each, before its output is added to the stream.
    After,
    Both,
}

/// The factor of embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingScale {
    factor: f32,
    /// Whether the factor belongs to the token embedding: then it is rounded to the storage dtype,
    /// and virtual tokens are not scaled.
    of_tokens: bool,
}

impl EmbeddingScale {
    /// Scales the rows of every input.
    pub fn of_inputs(factor: f32) -> EmbeddingScale {
        EmbeddingScale { factor, of_tokens: false }
    }

    pub fn of_tokens(factor: f32) -> EmbeddingScale {
        EmbeddingScale { factor, of_tokens: true }
    }

    /// Returns the factors of token embeddings and of all rows, for a storage dtype.
    pub fn factors(self, dtype: DType) -> (f32, f32) {
        match (self.of_tokens, dtype) {
            (false, _) => (1.0, self.factor),
            (true, DType::BF16) => (half::bf16::from_f32(self.factor).to_f32(), 1.0),
            (true, _) => (self.factor, 1.0),
        }
    }
}

impl ModelConfig {
    /// The norm settings of rows, heads and the last hidden state.
    pub fn norm(&self) -> Norm {
        Norm { eps: self.rms_norm_eps, weight: self.norm_weight }
    }

    /// The width of the convolutions, if any layer has them.
    pub fn conv_taps(&self) -> Option<usize> {
        self.mixers.iter().find_map(|mixer| match mixer {
            Mixer::ShortConv { taps, .. } => Some(*taps),
            Mixer::Attention => None,
        })
    }

    /// Number of values per token that a layer caches for later tokens: k|v, or the input of a
    /// convolution.
    pub fn cached_width(&self, layer: usize) -> usize {
        match self.mixers[layer] {
            Mixer::Attention => 2 * self.num_kv_heads * self.head_dim,
            Mixer::ShortConv { .. } => self.hidden_size,
        }
    }
}

/// The properties of a family. The defaults are those of transformers 5.17 for absent keys of
/// config.json.
#[derive(Debug)]
pub struct Family {
    pub model_type: &'static str,
    pub architecture: &'static str,
    pub qkv_bias: BiasRule,
    pub o_bias: BiasRule,
    pub mlp_bias: BiasRule,
    pub hidden_act: ActRule,
    pub norm_weight: NormWeight,
    pub norm_place: NormPlace,
    pub qk_norm: Option<NormOver>,
    pub embedding_scale: EmbeddingRule,
    pub attention_scale: AttentionScaleRule,
    pub attention_softcap: SoftcapRule,
    pub residual_scale: Option<&'static str>, // its key; 1 where absent
    pub logits_divisor: Option<&'static str>, // its key; 1 where absent
    pub logits_softcap: SoftcapRule,
    pub window: WindowRule,
    pub mixers: MixerRule,
    pub rope: RopeRule,
    /// Whether q is scaled by its position: `llama_4_scaling_beta` in the rope settings.
    pub query_scale: bool,
    /// The attention projection that PEFT's IA3 scales by default, besides v_proj.
    pub ia3_attention: &'static str,
    /// Whether q|k|v and gate|up are one module each, `qkv_proj` and `gate_up_proj`: in the folder,
    /// for adapters, and wherever projections are named.
    pub fused_projections: bool,
    /// Modules with names other than Llama's: (Llama's name, own name).
    pub modules: &'static [(&'static str, &'static str)],
    /// Keys of config.json, each with an older name that takes precedence.
    pub old_keys: &'static [(&'static str, &'static str)],
    pub eps_key: &'static str,
    pub mlp_width: MlpWidthRule,
    pub heads_divide_hidden: bool, // required even if head_dim is given
    pub default_kv_heads: Option<usize>, // None: as many as heads
    pub default_head_dim: Option<usize>, // None: hidden_size / heads
    pub default_max_positions: usize,
    /// Default of `original_max_position_embeddings`, if the config class has that field.
    pub default_original_positions: Option<usize>,
    pub default_theta: f64,
    pub default_eps: f64,
    pub default_tie: bool,
    pub default_bos: Option<u32>,
    pub default_eos: Option<u32>,
    pub default_pad: Option<u32>,
    /// Prefix of the names of its classifiers, if it differs from the architecture's.
    pub classifier: Option<&'static str>,
    /// A key that must be absent, null or false, because its feature is not supported.
    pub refused: Option<&'static str>,
}

impl Family {
    /// The defaults: a decoder without switches. A family lists only its differences, then
    /// `..Family::PLAIN`.
    pub const PLAIN: Family = Family {
        model_type: "",
        architecture: "",
        qkv_bias: BiasRule::Never,
        o_bias: BiasRule::Never,
        mlp_bias: BiasRule::Never,
        hidden_act: ActRule { key: "hidden_act", default: HiddenAct::Silu },
        norm_weight: NormWeight::Rounded,
        norm_place: NormPlace::Before,
        qk_norm: None,
        embedding_scale: EmbeddingRule::None,
        attention_scale: AttentionScaleRule::HeadDim,
        attention_softcap: SoftcapRule::Never,
        residual_scale: None,
        logits_divisor: None,
        logits_softcap: SoftcapRule::Never,
        window: WindowRule::Ignored,
        mixers: MixerRule::Attention,
        ia3_attention: "k_proj",
        rope: RopeRule::Every,
        query_scale: false,
        fused_projections: false,
        modules: &[],
        old_keys: &[],
        eps_key: "rms_norm_eps",
        mlp_width: MlpWidthRule::Given,
        heads_divide_hidden: false,
        default_kv_heads: None,
        default_head_dim: None,
        default_max_positions: 2048,
        default_original_positions: None,
        default_theta: 1e4,
        default_eps: 1e-6,
        default_tie: false,
        default_bos: Some(1),
        default_eos: Some(2),
        default_pad: None,
        classifier: None,
        refused: None,
    };

    /// Returns the family's name of a module; `llama`: Llama's name.
    pub fn named(&self, llama: &'static str) -> &'static str {
        self.modules.iter().find(|m| m.0 == llama).map_or(llama, |m| m.1)
    }

    /// Returns the older name of a key, if any.
    pub fn old_key(&self, key: &str) -> Option<&'static str> {
        self.old_keys.iter().find(|k| k.0 == key).map(|k| k.1)
    }

    /// Returns the class in `architectures` for a task.
    pub fn class(&self, task: Task) -> String {
        let base = self.architecture.trim_end_matches("ForCausalLM");
        match task {
            Task::CausalLm => self.architecture.into(),
            _ => format!("{}{}", self.classifier.unwrap_or(base), task.suffix()),
        }
    }
}

/// Two families are equal if their model types are.
impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

/// Whether the layers have biases.
#[derive(Clone, Copy, Debug)]
pub enum BiasRule {
    Never,
    Always,
    Key(&'static str), // a boolean in config.json, false where absent
}

/// The activation's key in config.json.
#[derive(Clone, Copy, Debug)]
pub struct ActRule {
    pub key: &'static str,
    pub default: HiddenAct,
}

/// How the factor of embeddings is determined.
#[derive(Clone, Copy, Debug)]
pub enum EmbeddingRule {
    None,
    /// sqrt(hidden_size), as part of the token embedding.
    SqrtHidden,
    Key(&'static str), // 1 where absent
}

/// The scale of attention scores q.k.
#[derive(Clone, Copy, Debug)]
pub enum AttentionScaleRule {
    /// head_dim^-0.5
    HeadDim,
    /// The value of `key`, to the power -0.5.
    InverseSqrt {
        key: &'static str,
        default: f64,
    },
    Key(&'static str), // 1 where absent
}

/// Whether there is a softcap, and its key in config.json; null means none.
#[derive(Clone, Copy, Debug)]
pub enum SoftcapRule {
    Never,
    Key { key: &'static str, default: Option<f32> },
}

/// Which layers attend only to the last `sliding_window` positions.
#[derive(Clone, Copy, Debug)]
pub enum WindowRule {
    /// None; the key is ignored.
    Ignored,
    /// Every layer, unless the key is null; if absent, this default (None: no window).
    Every { default: Option<usize> },
    /// The layers that `layer_types` calls sliding, or without that key every layer, as in `Every`.
    Typed { default: usize },
    /// Only with `use_sliding_window`: the layers that `layer_types` calls sliding, or without that
    /// key those from `max_window_layers` on.
    Listed { default: usize, default_full_layers: usize },
    /// All layers except every `period`th (`key`, if the family has one), or as `layer_types` says.
    Pattern { default: usize, period: usize, key: Option<&'static str> },
    /// Only with `use_sliding_window`: the layers that `layer_types` calls sliding, or without that
    /// key those without rope.
    WithoutRope,
}

/// Which token mixer each layer has.
#[derive(Clone, Copy, Debug)]
pub enum MixerRule {
    /// Attention in every layer.
    Attention,
    /// Attention or a short convolution, as `layer_types` says (`full_attention`, `conv`); without
    /// it, attention in the layers of `full_attn_idxs`; without both, in all layers. `conv_L_cache`
    /// is the width of the convolutions, `conv_bias` whether they have biases.
    AttentionOrConv { default_taps: usize },
}

/// The width of the MLP.
#[derive(Clone, Copy, Debug)]
pub enum MlpWidthRule {
    /// `intermediate_size`.
    Given,
    /// Two thirds of `intermediate_size`, times `block_ffn_dim_multiplier`, rounded up to a
    /// multiple of `block_multiple_of`, unless `block_auto_adjust_ff_dim` is false.
    TwoThirds { default_multiple: usize },
}

/// Which layers have which rope.
#[derive(Clone, Copy, Debug)]
pub enum RopeRule {
    /// One rope for all layers.
    Every,
    /// One rope; `no_rope_layers` has a 0 for each layer without it. If the key is absent, every
    /// `no_rope_layer_interval`th layer has none.
    SomeLayers { default_interval: usize },
    /// Full attention has `rope_theta` and `rope_scaling`, sliding attention only
    /// `rope_local_base_freq`; or each has its own `rope_parameters`.
    ByLayerType { default_sliding_theta: f64 },
}

impl RopeRule {
    /// Returns which layers have rope if config.json does not say.
    pub fn layers(self, layers: usize) -> Vec<bool> {
        let interval = match self {
            RopeRule::SomeLayers { default_interval } => default_interval,
            RopeRule::Every | RopeRule::ByLayerType { .. } => usize::MAX,
        };
        (0..layers).map(|i| !(i + 1).is_multiple_of(interval)).collect()
    }
}
