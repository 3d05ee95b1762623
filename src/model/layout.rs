//! The layout of a decoder: its sizes and switches, and the rules of its family. Layer
//! 5.
//!
//! Invariant: a family is data. Nothing here or in the decoder asks which family a model is of.

use serde_json::{Map, Value};

use super::rope::RopeConfig;
use crate::device::DType;
use crate::ops::head::LogitMap;
use crate::ops::rmsnorm::{Norm, NormWeight};
use crate::ops::rope::NormOver;
use crate::tensor::safetensors::HostDtype;

/// The function between gate and product in the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HiddenAct {
    Silu,
    Gelu,     // with erf
    GeluTanh, // `gelu_pytorch_tanh` and `gelu_new` are one formula
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

    /// What `architectures` ends with.
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
    pub residual_scale: f32, // of what attention and the MLP add to the stream
    pub logits: LogitMap,
    /// `[num_layers]`: what brings positions together.
    pub mixers: Vec<Mixer>,
    /// `[num_layers]`. `Some(w)`: a query at position i sees keys j with i - w < j <= i, so w of
    /// them with its own.
    pub sliding_window: Vec<Option<usize>>,
    /// The rope tables that layers choose from.
    pub ropes: Vec<RopeConfig>,
    /// `[num_layers]`: which of `ropes` turns the heads of a layer; None: nothing does.
    pub layer_rope: Vec<Option<usize>>,
    pub attention_dropout: f32,
    pub initializer_range: f32,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    pub dtype: Option<HostDtype>, // of the folder, if it says
    pub raw: Map<String, Value>,  // config.json as read
}

/// What brings positions together in a layer. Attention's fields mean nothing in a layer without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixer {
    Attention,
    /// A gated convolution over a token and the `taps - 1` before it; `bias`: so have its projections.
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
    /// After each, before what it gives is added to the stream.
    After,
    Both,
}

/// What embeddings are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingScale {
    factor: f32,
    /// It is a part of the token embedding: rounded to the storage dtype, and virtual tokens are
    /// not scaled.
    of_tokens: bool,
}

impl EmbeddingScale {
    /// Of the rows of every input.
    pub fn of_inputs(factor: f32) -> EmbeddingScale {
        EmbeddingScale { factor, of_tokens: false }
    }

    pub fn of_tokens(factor: f32) -> EmbeddingScale {
        EmbeddingScale { factor, of_tokens: true }
    }

    /// The factors of a token's embedding and of every row, for a storage dtype.
    pub fn factors(self, dtype: DType) -> (f32, f32) {
        match (self.of_tokens, dtype) {
            (false, _) => (1.0, self.factor),
            (true, DType::BF16) => (half::bf16::from_f32(self.factor).to_f32(), 1.0),
            (true, _) => (self.factor, 1.0),
        }
    }
}

impl ModelConfig {
    /// The norm of rows, heads and the last hidden state.
    pub fn norm(&self) -> Norm {
        Norm { eps: self.rms_norm_eps, weight: self.norm_weight }
    }

    /// The width of the convolutions, where layers have them.
    pub fn conv_taps(&self) -> Option<usize> {
        self.mixers.iter().find_map(|mixer| match mixer {
            Mixer::ShortConv { taps, .. } => Some(*taps),
            Mixer::Attention => None,
        })
    }

    /// Values of a token that a layer keeps for those after it: k|v, or what a convolution is over.
    pub fn cached_width(&self, layer: usize) -> usize {
        match self.mixers[layer] {
            Mixer::Attention => 2 * self.num_kv_heads * self.head_dim,
            Mixer::ShortConv { .. } => self.hidden_size,
        }
    }
}

/// What sets a family apart. The defaults are those that transformers 5.17 uses for a key that
/// config.json lacks.
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
    /// Whether q is scaled by its position: `llama_4_scaling_beta` of the rope settings.
    pub query_scale: bool,
    /// The projection of attention that PEFT's IA3 scales, beside v_proj, where no targets are
    /// given.
    pub ia3_attention: &'static str,
    /// q|k|v and gate|up are one module each, `qkv_proj` and `gate_up_proj`: for the folder, for
    /// adapters, and for whatever else names projections.
    pub fused_projections: bool,
    /// Modules whose names are not Llama's: Llama's and its own.
    pub modules: &'static [(&'static str, &'static str)],
    /// Keys of config.json and an older name of each, which goes before it.
    pub old_keys: &'static [(&'static str, &'static str)],
    pub eps_key: &'static str,
    pub mlp_width: MlpWidthRule,
    pub heads_divide_hidden: bool, // required even where head_dim is given
    pub default_kv_heads: Option<usize>, // None: as many as heads
    pub default_head_dim: Option<usize>, // None: hidden_size / heads
    pub default_max_positions: usize,
    /// `original_max_position_embeddings`, where the config class has that field.
    pub default_original_positions: Option<usize>,
    pub default_theta: f64,
    pub default_eps: f64,
    pub default_tie: bool,
    pub default_bos: Option<u32>,
    pub default_eos: Option<u32>,
    pub default_pad: Option<u32>,
    /// What the names of its classifiers begin with, where it is not what the architecture begins
    /// with.
    pub classifier: Option<&'static str>,
    /// A key that must be absent, null or false: what it asks for is not done here.
    pub refused: Option<&'static str>,
}

impl Family {
    /// What most families have: a decoder without switches. A family names only what it has of its
    /// own, `..Family::PLAIN`.
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

    /// A module by the family's name; `llama`: Llama's.
    pub fn named(&self, llama: &'static str) -> &'static str {
        self.modules.iter().find(|m| m.0 == llama).map_or(llama, |m| m.1)
    }

    /// The older name of a key, if it has one.
    pub fn old_key(&self, key: &str) -> Option<&'static str> {
        self.old_keys.iter().find(|k| k.0 == key).map(|k| k.1)
    }

    /// The class in `architectures` for a task.
    pub fn class(&self, task: Task) -> String {
        let base = self.architecture.trim_end_matches("ForCausalLM");
        match task {
            Task::CausalLm => self.architecture.into(),
            _ => format!("{}{}", self.classifier.unwrap_or(base), task.suffix()),
        }
    }
}

/// Two configs are of one family if they point to one entry.
impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

/// Whether some layers have a bias.
#[derive(Clone, Copy, Debug)]
pub enum BiasRule {
    Never,
    Always,
    Key(&'static str), // a boolean in config.json, false where absent
}

/// Where the activation stands in config.json.
#[derive(Clone, Copy, Debug)]
pub struct ActRule {
    pub key: &'static str,
    pub default: HiddenAct,
}

/// What embeddings are multiplied by.
#[derive(Clone, Copy, Debug)]
pub enum EmbeddingRule {
    None,
    /// The root of hidden_size, as a part of the token embedding.
    SqrtHidden,
    Key(&'static str), // 1 where absent
}

/// The factor of q.k.
#[derive(Clone, Copy, Debug)]
pub enum AttentionScaleRule {
    /// head_dim^-0.5
    HeadDim,
    /// The number's ^-0.5.
    InverseSqrt {
        key: &'static str,
        default: f64,
    },
    Key(&'static str), // 1 where absent
}

/// Whether there is a softcap, and where it stands in config.json: null is none.
#[derive(Clone, Copy, Debug)]
pub enum SoftcapRule {
    Never,
    Key { key: &'static str, default: Option<f32> },
}

/// Which layers look back only `sliding_window` positions.
#[derive(Clone, Copy, Debug)]
pub enum WindowRule {
    /// None; the key, if there, is ignored.
    Ignored,
    /// Every layer, unless the key is null; absent means this many positions, or no window.
    Every { default: Option<usize> },
    /// The layers that `layer_types` calls sliding, or without that key every layer, as `Every`.
    Typed { default: usize },
    /// Only with `use_sliding_window`: the layers that `layer_types` calls sliding, or without that
    /// key those from `max_window_layers` on.
    Listed { default: usize, default_full_layers: usize },
    /// All layers but every `period`th (`key`, where the family has one), or what `layer_types`
    /// says.
    Pattern { default: usize, period: usize, key: Option<&'static str> },
    /// Only with `use_sliding_window`: the layers that `layer_types` calls sliding, or without that
    /// key those without rope.
    WithoutRope,
}

/// What brings positions together in which layers.
#[derive(Clone, Copy, Debug)]
pub enum MixerRule {
    /// Attention in every layer.
    Attention,
    /// Attention or a short convolution, as `layer_types` says (`full_attention`, `conv`); without
    /// it, attention in the layers of `full_attn_idxs`; without both in all. `conv_L_cache` is the
    /// width of the convolutions, `conv_bias` gives them biases.
    AttentionOrConv { default_taps: usize },
}

/// The width of the MLP.
#[derive(Clone, Copy, Debug)]
pub enum MlpWidthRule {
    /// `intermediate_size`.
    Given,
    /// Two thirds of that, times `block_ffn_dim_multiplier`, rounded up to a multiple of
    /// `block_multiple_of`, unless `block_auto_adjust_ff_dim` is false.
    TwoThirds { default_multiple: usize },
}

/// Which layers have which rope.
#[derive(Clone, Copy, Debug)]
pub enum RopeRule {
    /// One rope for all layers.
    Every,
    /// One rope; `no_rope_layers` has a 0 for a layer without it. Where the key is absent, each
    /// `no_rope_layer_interval`th layer is without.
    SomeLayers { default_interval: usize },
    /// Full attention has `rope_theta` and `rope_scaling`, sliding attention has
    /// `rope_local_base_freq` alone; or each has its `rope_parameters`.
    ByLayerType { default_sliding_theta: f64 },
}

impl RopeRule {
    /// Which layers have rope where config.json does not say.
    pub fn layers(self, layers: usize) -> Vec<bool> {
        let interval = match self {
            RopeRule::SomeLayers { default_interval } => default_interval,
            RopeRule::Every | RopeRule::ByLayerType { .. } => usize::MAX,
        };
        (0..layers).map(|i| !(i + 1).is_multiple_of(interval)).collect()
    }
}
