//! The layout of a decoder: its sizes and switches, and the parameters that follow from them. Layer
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

    /// [out, in] of a projection.
    pub fn proj_shape(&self, proj: Proj) -> (usize, usize) {
        let (hidden, mlp) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        match proj {
            Proj::Q => (q, hidden),
            Proj::K | Proj::V => (kv, hidden),
            Proj::Qkv => (q + 2 * kv, hidden),
            Proj::O => (hidden, q),
            Proj::Gate | Proj::Up => (mlp, hidden),
            Proj::GateUp => (2 * mlp, hidden),
            Proj::Down => (hidden, mlp),
            Proj::ConvIn => (3 * hidden, hidden),
            Proj::ConvOut => (hidden, hidden),
        }
    }

    /// The projections of a layer, in the order in which they lie.
    pub fn projections(&self, layer: usize) -> &'static [Proj] {
        use Proj::*;
        match (self.mixers[layer], self.family.fused_projections) {
            (Mixer::Attention, true) => &[Qkv, O, GateUp, Down],
            (Mixer::Attention, false) => &[Q, K, V, O, Gate, Up, Down],
            (Mixer::ShortConv { .. }, true) => &[ConvIn, ConvOut, GateUp, Down],
            (Mixer::ShortConv { .. }, false) => &[ConvIn, ConvOut, Gate, Up, Down],
        }
    }

    /// The projections that some layer has.
    pub fn all_projections(&self) -> Vec<Proj> {
        let has = |p: &Proj| (0..self.num_layers).any(|layer| self.projections(layer).contains(p));
        Proj::ALL.into_iter().filter(has).collect()
    }

    /// The name of a projection's module in a block: `self_attn.q_proj`.
    pub fn module(&self, proj: Proj) -> &'static str {
        self.family.named(proj.module())
    }

    /// What that name ends with: `q_proj`.
    pub fn short_module(&self, proj: Proj) -> &'static str {
        let module = self.module(proj);
        module.rsplit('.').next().unwrap_or(module)
    }

    /// What the family calls the projection whose module ends so in a Llama, where it is another
    /// name.
    pub fn renamed(&self, llama: &str) -> Option<&'static str> {
        let ends = |name: &str| name.rsplit('.').next() == Some(llama);
        let found = self.all_projections().into_iter().find(|p| ends(p.module()))?;
        let own = self.short_module(found);
        if own == llama { None } else { Some(own) }
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

    /// The projections that share a leader's input, in the order in which they lie side by side.
    pub fn group(&self, leader: Proj) -> impl Iterator<Item = Proj> + Clone + use<> {
        self.all_projections().into_iter().filter(move |p| p.leader() == leader)
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

/// What a parameter does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Embed,
    InputNorm,
    Q,
    K,
    V,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    O,
    OBias,
    /// Gate, gate and input of a short convolution, side by side.
    ConvIn,
    ConvInBias,
    /// [hidden, 1, taps]: a filter for each channel.
    Conv,
    ConvBias,
    ConvOut,
    ConvOutBias,
    /// Of what attention gives, before it is added to the stream.
    AttentionOutNorm,
    /// Of the MLP's input.
    PostNorm,
    Gate,
    Up,
    GateBias,
    UpBias,
    Down,
    DownBias,
    /// Of what the MLP gives, before it is added to the stream.
    MlpOutNorm,
    FinalNorm,
    Head,
    /// The score of a reward model, [labels, hidden], in the place of the head; of a token
    /// classifier, with a bias.
    Score,
    ScoreBias,
    // What adapters add (`model::adapter`), by the projection that they belong to.
    LoraA(Proj),
    LoraB(Proj),
    /// PiSSA: the pair as it started, B negated. It takes out of the base what A and B start as.
    InitialA(Proj),
    InitialB(Proj),
    /// LoRA on the token embedding: A as [vocab, r], whose rows are looked up, and B.
    EmbedA,
    EmbedB,
    /// LoRA on the head.
    HeadA,
    HeadB,
    Magnitude(Proj),
    Ia3(Proj),
    Prompt,
    Bottleneck(BottleneckSite, BottleneckPart),
}

/// The projections of a block, by Hugging Face's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proj {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
    /// q, k and v as one module.
    Qkv,
    /// gate and up as one module.
    GateUp,
    /// Of a short convolution.
    ConvIn,
    ConvOut,
}

impl Proj {
    /// Those that a block may have ([`ModelConfig::projections`] says which it has).
    pub const ALL: [Proj; 11] = [
        Proj::Q,
        Proj::K,
        Proj::V,
        Proj::Qkv,
        Proj::O,
        Proj::ConvIn,
        Proj::ConvOut,
        Proj::Gate,
        Proj::Up,
        Proj::GateUp,
        Proj::Down,
    ];

    /// One of each group that shares an input.
    pub const LEADERS: [Proj; 6] =
        [Proj::Q, Proj::O, Proj::Gate, Proj::Down, Proj::ConvIn, Proj::ConvOut];

    /// The module's name in a Llama's block ([`ModelConfig::module`] has the family's).
    fn module(self) -> &'static str {
        match self {
            Proj::Q => "self_attn.q_proj",
            Proj::K => "self_attn.k_proj",
            Proj::V => "self_attn.v_proj",
            Proj::O => "self_attn.o_proj",
            Proj::Gate => "mlp.gate_proj",
            Proj::Up => "mlp.up_proj",
            Proj::Down => "mlp.down_proj",
            Proj::Qkv => "self_attn.qkv_proj",
            Proj::GateUp => "mlp.gate_up_proj",
            Proj::ConvIn => "conv.in_proj",
            Proj::ConvOut => "conv.out_proj",
        }
    }

    /// The role of its weight; a fused module has that of its first part.
    pub fn role(self) -> Role {
        match self {
            Proj::Q | Proj::Qkv => Role::Q,
            Proj::K => Role::K,
            Proj::V => Role::V,
            Proj::O => Role::O,
            Proj::Gate | Proj::GateUp => Role::Gate,
            Proj::Up => Role::Up,
            Proj::Down => Role::Down,
            Proj::ConvIn => Role::ConvIn,
            Proj::ConvOut => Role::ConvOut,
        }
    }

    /// Whose input it shares: q, k and v read one input, so do gate and up.
    pub fn leader(self) -> Proj {
        match self {
            Proj::K | Proj::V | Proj::Qkv => Proj::Q,
            Proj::Up | Proj::GateUp => Proj::Gate,
            other => other,
        }
    }
}

/// Where a bottleneck adapter sits in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BottleneckSite {
    Attention,
    Mlp,
}

/// The parameters of a bottleneck adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BottleneckPart {
    Down,
    DownBias,
    Up,
    UpBias,
}

impl Role {
    pub fn is_norm(self) -> bool {
        use Role::*;
        matches!(self, InputNorm | QNorm | KNorm | PostNorm | FinalNorm)
            || matches!(self, AttentionOutNorm | MlpOutNorm)
    }

    pub fn is_bias(self) -> bool {
        use Role::*;
        matches!(self, QBias | KBias | VBias | OBias | GateBias | UpBias | DownBias | ScoreBias)
            || matches!(self, ConvInBias | ConvBias | ConvOutBias)
            || matches!(self, Bottleneck(_, BottleneckPart::DownBias | BottleneckPart::UpBias))
    }

    /// Whether weight decay applies: transformers' Trainer spares biases and norms.
    pub fn decays(self) -> bool {
        !self.is_norm() && !self.is_bias()
    }

    /// Whether it is a matrix of a layer, which Muon orthogonalises: a projection, or what an
    /// adapter adds to one or puts behind a block.
    pub fn is_layer_matrix(self) -> bool {
        let part = |part| matches!(part, BottleneckPart::Down | BottleneckPart::Up);
        match self {
            Role::LoraA(_) | Role::LoraB(_) => true,
            Role::Bottleneck(_, of) => part(of),
            other => Proj::ALL.iter().any(|p| p.role() == other),
        }
    }
}

/// One parameter of a decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    pub name: String,      // as in the folder
    pub shape: Vec<usize>, // row-major [out, in] for matrices
    pub role: Role,
    pub layer: Option<usize>,
}

impl ParamSpec {
    /// A bias of the model's own, or an adapter's copy of one.
    pub fn is_base_bias(&self) -> bool {
        self.role.is_bias() && !matches!(self.role, Role::Bottleneck(..))
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Every parameter, in arena order: q, k, v weights side by side, so are their biases, and so are
/// gate and up; in a family that fuses them they are one parameter. A tied head is not a parameter: there is no [`Role::Head`] then.
pub fn expected_params(config: &ModelConfig) -> Vec<ParamSpec> {
    let (hidden, mlp, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let before = config.norm_place != NormPlace::After;
    let after = config.norm_place != NormPlace::Before;
    // With a norm after attention, the name that the MLP's norm has elsewhere is that one's.
    let mlp_norm = if after { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
    let (q_norm, k_norm) = match config.qk_norm {
        None => (0, 0),
        Some(NormOver::Head) => (config.head_dim, config.head_dim),
        Some(NormOver::Heads) => (q, kv),
    };
    let family = config.family;
    let fused = family.fused_projections;
    let mut specs = Vec::new();
    let mut push = |layer: Option<usize>, role: Role, module: &'static str, shape: &[usize]| {
        let kind = if role.is_bias() { "bias" } else { "weight" };
        let name = format!("{}.{kind}", family.named(module));
        let name = layer.map_or(name.clone(), |i| format!("model.layers.{i}.{name}"));
        specs.push(ParamSpec { name, shape: shape.to_vec(), role, layer });
    };
    push(None, Role::Embed, "model.embed_tokens", &[vocab, hidden]);
    for (i, mixer) in config.mixers.iter().enumerate() {
        let mut layer = |on: bool, role: Role, module: &'static str, shape: &[usize]| {
            if on {
                push(Some(i), role, module, shape);
            }
        };
        layer(before, Role::InputNorm, "input_layernorm", &[hidden]);
        match *mixer {
            Mixer::Attention => {
                layer(fused, Role::Q, "self_attn.qkv_proj", &[q + 2 * kv, hidden]);
                layer(!fused, Role::Q, "self_attn.q_proj", &[q, hidden]);
                layer(!fused, Role::K, "self_attn.k_proj", &[kv, hidden]);
                layer(!fused, Role::V, "self_attn.v_proj", &[kv, hidden]);
                layer(config.qkv_bias, Role::QBias, "self_attn.q_proj", &[q]);
                layer(config.qkv_bias, Role::KBias, "self_attn.k_proj", &[kv]);
                layer(config.qkv_bias, Role::VBias, "self_attn.v_proj", &[kv]);
                layer(q_norm > 0, Role::QNorm, "self_attn.q_norm", &[q_norm]);
                layer(k_norm > 0, Role::KNorm, "self_attn.k_norm", &[k_norm]);
                layer(true, Role::O, "self_attn.o_proj", &[hidden, q]);
                layer(config.o_bias, Role::OBias, "self_attn.o_proj", &[hidden]);
            }
            Mixer::ShortConv { taps, bias } => {
                layer(true, Role::ConvIn, "conv.in_proj", &[3 * hidden, hidden]);
                layer(bias, Role::ConvInBias, "conv.in_proj", &[3 * hidden]);
                layer(true, Role::Conv, "conv.conv", &[hidden, 1, taps]);
                layer(bias, Role::ConvBias, "conv.conv", &[hidden]);
                layer(true, Role::ConvOut, "conv.out_proj", &[hidden, hidden]);
                layer(bias, Role::ConvOutBias, "conv.out_proj", &[hidden]);
            }
        }
        layer(after, Role::AttentionOutNorm, "post_attention_layernorm", &[hidden]);
        layer(before, Role::PostNorm, mlp_norm, &[hidden]);
        layer(fused, Role::Gate, "mlp.gate_up_proj", &[2 * mlp, hidden]);
        layer(!fused, Role::Gate, "mlp.gate_proj", &[mlp, hidden]);
        layer(!fused, Role::Up, "mlp.up_proj", &[mlp, hidden]);
        layer(config.mlp_bias, Role::GateBias, "mlp.gate_proj", &[mlp]);
        layer(config.mlp_bias, Role::UpBias, "mlp.up_proj", &[mlp]);
        layer(true, Role::Down, "mlp.down_proj", &[hidden, mlp]);
        layer(config.mlp_bias, Role::DownBias, "mlp.down_proj", &[hidden]);
        layer(after, Role::MlpOutNorm, "post_feedforward_layernorm", &[hidden]);
    }
    push(None, Role::FinalNorm, "model.norm", &[hidden]);
    match config.task {
        Task::CausalLm if config.tie_word_embeddings => {}
        Task::CausalLm => push(None, Role::Head, "lm_head", &[vocab, hidden]),
        Task::SequenceClassification { labels } => {
            push(None, Role::Score, "score", &[labels, hidden])
        }
        Task::TokenClassification { labels } => {
            push(None, Role::Score, "score", &[labels, hidden]);
            push(None, Role::ScoreBias, "score", &[labels]);
        }
    }
    specs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_k_v_and_gate_up_lie_side_by_side() {
        let mut config = ModelConfig::llama(96, 32, 48, 2, 4, 2, 128, false);
        (config.qkv_bias, config.o_bias, config.mlp_bias) = (true, true, true);
        config.qk_norm = Some(NormOver::Head);
        let specs = expected_params(&config);
        assert_eq!(specs.len(), 1 + 2 * 18 + 2);
        let roles: Vec<Role> =
            specs.iter().filter(|s| s.layer == Some(1)).map(|s| s.role).collect();
        use Role::*;
        assert!(
            roles.windows(3).any(|w| w == [Q, K, V])
                && roles.windows(3).any(|w| w == [QBias, KBias, VBias])
        );
        assert!(
            roles.windows(2).any(|w| w == [Gate, Up])
                && roles.windows(2).any(|w| w == [GateBias, UpBias])
        );
        let no_decay: Vec<Role> = roles.into_iter().filter(|r| !r.decays()).collect();
        assert_eq!(
            no_decay,
            [
                InputNorm, QBias, KBias, VBias, QNorm, KNorm, OBias, PostNorm, GateBias, UpBias,
                DownBias
            ]
        );
    }
}
