//! The layout of a decoder: its sizes and switches, and the parameters that follow from them. Layer
//! 5.
//!
//! Invariant: a family is data. Nothing here or in the decoder asks which family a model is of.

use serde_json::{Map, Value};

use super::rope::RopeConfig;
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
    pub qk_norm: bool,
    /// `[num_layers]`. `Some(w)`: a query at position i sees keys j with i - w < j <= i, so w of
    /// them with its own.
    pub sliding_window: Vec<Option<usize>>,
    pub rope: RopeConfig,
    pub attention_dropout: f32,
    pub initializer_range: f32,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    pub dtype: Option<HostDtype>, // of the folder, if it says
    pub raw: Map<String, Value>,  // config.json as read
}

impl ModelConfig {
    /// [out, in] of a projection.
    pub fn proj_shape(&self, proj: Proj) -> (usize, usize) {
        let (hidden, mlp) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        match proj {
            Proj::Q => (q, hidden),
            Proj::K | Proj::V => (kv, hidden),
            Proj::O => (hidden, q),
            Proj::Gate | Proj::Up => (mlp, hidden),
            Proj::Down => (hidden, mlp),
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
    pub qk_norm: bool,
    pub window: WindowRule,
    /// The projection of attention that PEFT's IA3 scales, beside v_proj, where no targets are
    /// given.
    pub ia3_attention: &'static str,
    pub heads_divide_hidden: bool, // required even where head_dim is given
    pub default_kv_heads: Option<usize>, // None: as many as heads
    pub default_head_dim: Option<usize>, // None: hidden_size / heads
    pub default_max_positions: usize,
    pub default_bos: Option<u32>,
    pub default_eos: Option<u32>,
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

/// Which layers look back only `sliding_window` positions.
#[derive(Clone, Copy, Debug)]
pub enum WindowRule {
    /// None; the key, if there, is ignored.
    Ignored,
    /// Every layer, unless the key is null; absent means this many positions.
    Every { default: usize },
    /// Only with `use_sliding_window`: the layers that `layer_types` calls sliding, or without that
    /// key those from `max_window_layers` on.
    Listed { default: usize, default_full_layers: usize },
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
    PostNorm,
    Gate,
    Up,
    GateBias,
    UpBias,
    Down,
    DownBias,
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
}

impl Proj {
    pub const ALL: [Proj; 7] =
        [Proj::Q, Proj::K, Proj::V, Proj::O, Proj::Gate, Proj::Up, Proj::Down];

    /// One of each group that shares an input.
    pub const LEADERS: [Proj; 4] = [Proj::Q, Proj::O, Proj::Gate, Proj::Down];

    /// The projections that share a leader's input, in the order in which they lie side by side.
    pub fn group(self) -> &'static [Proj] {
        match self {
            Proj::Q => &[Proj::Q, Proj::K, Proj::V],
            Proj::Gate => &[Proj::Gate, Proj::Up],
            Proj::O => &[Proj::O],
            _ => &[Proj::Down],
        }
    }

    /// The module's name in a block.
    pub fn module(self) -> &'static str {
        match self {
            Proj::Q => "self_attn.q_proj",
            Proj::K => "self_attn.k_proj",
            Proj::V => "self_attn.v_proj",
            Proj::O => "self_attn.o_proj",
            Proj::Gate => "mlp.gate_proj",
            Proj::Up => "mlp.up_proj",
            Proj::Down => "mlp.down_proj",
        }
    }

    pub fn role(self) -> Role {
        match self {
            Proj::Q => Role::Q,
            Proj::K => Role::K,
            Proj::V => Role::V,
            Proj::O => Role::O,
            Proj::Gate => Role::Gate,
            Proj::Up => Role::Up,
            Proj::Down => Role::Down,
        }
    }

    /// Whose input it shares: q, k and v read one input, so do gate and up.
    pub fn leader(self) -> Proj {
        match self {
            Proj::K | Proj::V => Proj::Q,
            Proj::Up => Proj::Gate,
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
    }

    pub fn is_bias(self) -> bool {
        use Role::*;
        matches!(self, QBias | KBias | VBias | OBias | GateBias | UpBias | DownBias | ScoreBias)
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
/// gate and up. A tied head is not a parameter: there is no [`Role::Head`] then.
pub fn expected_params(config: &ModelConfig) -> Vec<ParamSpec> {
    let (hidden, mlp, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let mut specs = Vec::new();
    let mut push = |layer: Option<usize>, role: Role, name: &str, shape: &[usize]| {
        let name = layer.map_or(name.to_string(), |i| format!("model.layers.{i}.{name}"));
        specs.push(ParamSpec { name, shape: shape.to_vec(), role, layer });
    };
    push(None, Role::Embed, "model.embed_tokens.weight", &[vocab, hidden]);
    for i in 0..config.num_layers {
        let mut layer = |on: bool, role: Role, name: &str, shape: &[usize]| {
            if on {
                push(Some(i), role, name, shape);
            }
        };
        layer(true, Role::InputNorm, "input_layernorm.weight", &[hidden]);
        layer(true, Role::Q, "self_attn.q_proj.weight", &[q, hidden]);
        layer(true, Role::K, "self_attn.k_proj.weight", &[kv, hidden]);
        layer(true, Role::V, "self_attn.v_proj.weight", &[kv, hidden]);
        layer(config.qkv_bias, Role::QBias, "self_attn.q_proj.bias", &[q]);
        layer(config.qkv_bias, Role::KBias, "self_attn.k_proj.bias", &[kv]);
        layer(config.qkv_bias, Role::VBias, "self_attn.v_proj.bias", &[kv]);
        layer(config.qk_norm, Role::QNorm, "self_attn.q_norm.weight", &[config.head_dim]);
        layer(config.qk_norm, Role::KNorm, "self_attn.k_norm.weight", &[config.head_dim]);
        layer(true, Role::O, "self_attn.o_proj.weight", &[hidden, q]);
        layer(config.o_bias, Role::OBias, "self_attn.o_proj.bias", &[hidden]);
        layer(true, Role::PostNorm, "post_attention_layernorm.weight", &[hidden]);
        layer(true, Role::Gate, "mlp.gate_proj.weight", &[mlp, hidden]);
        layer(true, Role::Up, "mlp.up_proj.weight", &[mlp, hidden]);
        layer(config.mlp_bias, Role::GateBias, "mlp.gate_proj.bias", &[mlp]);
        layer(config.mlp_bias, Role::UpBias, "mlp.up_proj.bias", &[mlp]);
        layer(true, Role::Down, "mlp.down_proj.weight", &[hidden, mlp]);
        layer(config.mlp_bias, Role::DownBias, "mlp.down_proj.bias", &[hidden]);
    }
    push(None, Role::FinalNorm, "model.norm.weight", &[hidden]);
    match config.task {
        Task::CausalLm if config.tie_word_embeddings => {}
        Task::CausalLm => push(None, Role::Head, "lm_head.weight", &[vocab, hidden]),
        Task::SequenceClassification { labels } => {
            push(None, Role::Score, "score.weight", &[labels, hidden])
        }
        Task::TokenClassification { labels } => {
            push(None, Role::Score, "score.weight", &[labels, hidden]);
            push(None, Role::ScoreBias, "score.bias", &[labels]);
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
        (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) =
            (true, true, true, true);
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
