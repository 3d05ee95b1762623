//! The parameters of a layout: their roles, names, shapes and order. Layer 5.
//!
//! Invariant: [`expected_params`] has the order of the arenas; projections that share an input are
//! contiguous.

use super::layout::{Mixer, ModelConfig, NormPlace, Task};
use crate::ops::rope::NormOver;

/// The role of a parameter.
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
    /// The two gates and the input of a short convolution, contiguous.
    ConvIn,
    ConvInBias,
    /// [hidden, 1, taps]: one filter per channel.
    Conv,
    ConvBias,
    ConvOut,
    ConvOutBias,
    /// Norm of attention's output, before it is added to the stream.
    AttentionOutNorm,
    /// Norm of the MLP's input.
    PostNorm,
    Gate,
    Up,
    GateBias,
    UpBias,
    Down,
    DownBias,
    /// Norm of the MLP's output, before it is added to the stream.
    MlpOutNorm,
    FinalNorm,
    Head,
    /// The score of a classifier or reward model, [labels, hidden], instead of the head; a token
    /// classifier also has a bias.
    Score,
    ScoreBias,
    // Parameters of adapters (`model::adapter`), by their projection.
    LoraA(Proj),
    LoraB(Proj),
    /// PiSSA's initial pair, B negated: it subtracts the initial A and B from the base.
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
    /// Input and output projection of a short convolution.
    ConvIn,
    ConvOut,
}

impl Proj {
    /// All projections that a block may have ([`ModelConfig::projections`] returns those that it
    /// has).
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

    /// The first projection of each group that shares an input.
    pub const LEADERS: [Proj; 6] =
        [Proj::Q, Proj::O, Proj::Gate, Proj::Down, Proj::ConvIn, Proj::ConvOut];

    /// The module's name in a Llama block ([`ModelConfig::module`] returns the family's).
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

    /// The role of its weight; a fused module has the role of its first part.
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

    /// The leader of its group: q, k and v share one input, and so do gate and up.
    pub fn leader(self) -> Proj {
        match self {
            Proj::K | Proj::V | Proj::Qkv => Proj::Q,
            Proj::Up | Proj::GateUp => Proj::Gate,
            other => other,
        }
    }
}

/// The position of a bottleneck adapter in a block.
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

    /// Whether weight decay applies: as in transformers' Trainer, not to biases and norms.
    pub fn decays(self) -> bool {
        !self.is_norm() && !self.is_bias()
    }

    /// Whether it is a matrix of a layer, which Muon orthogonalises: a projection, LoRA's pair of
    /// one, or a bottleneck adapter's matrix.
    pub fn is_layer_matrix(self) -> bool {
        let part = |part| matches!(part, BottleneckPart::Down | BottleneckPart::Up);
        match self {
            Role::LoraA(_) | Role::LoraB(_) => true,
            Role::Bottleneck(_, of) => part(of),
            other => Proj::ALL.iter().any(|p| p.role() == other),
        }
    }
}

impl ModelConfig {
    /// Returns [out, in] of a projection.
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

    /// The projections of a layer, in memory order.
    pub fn projections(&self, layer: usize) -> &'static [Proj] {
        use Proj::*;
        match (self.mixers[layer], self.family.fused_projections) {
            (Mixer::Attention, true) => &[Qkv, O, GateUp, Down],
            (Mixer::Attention, false) => &[Q, K, V, O, Gate, Up, Down],
            (Mixer::ShortConv { .. }, true) => &[ConvIn, ConvOut, GateUp, Down],
            (Mixer::ShortConv { .. }, false) => &[ConvIn, ConvOut, Gate, Up, Down],
        }
    }

    /// The projections that any layer has.
    pub fn all_projections(&self) -> Vec<Proj> {
        let has = |p: &Proj| (0..self.num_layers).any(|layer| self.projections(layer).contains(p));
        Proj::ALL.into_iter().filter(has).collect()
    }

    /// The name of a projection's module in a block: `self_attn.q_proj`.
    pub fn module(&self, proj: Proj) -> &'static str {
        self.family.named(proj.module())
    }

    /// The last part of that name: `q_proj`.
    pub fn short_module(&self, proj: Proj) -> &'static str {
        let module = self.module(proj);
        module.rsplit('.').next().unwrap_or(module)
    }

    /// Returns the family's name of the projection with this last part in a Llama block, if it
    /// differs.
    pub fn renamed(&self, llama: &str) -> Option<&'static str> {
        let ends = |name: &str| name.rsplit('.').next() == Some(llama);
        let found = self.all_projections().into_iter().find(|p| ends(p.module()))?;
        let own = self.short_module(found);
        if own == llama { None } else { Some(own) }
    }

    /// The projections that share a leader's input, in memory order.
    pub fn group(&self, leader: Proj) -> impl Iterator<Item = Proj> + Clone + use<> {
        self.all_projections().into_iter().filter(move |p| p.leader() == leader)
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
    /// Whether it is a bias of the model itself, or an adapter's copy of one.
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

/// Lists every parameter, in arena order: the weights of q, k and v are contiguous, as are their
/// biases, and gate and up; in a family that fuses them they are one parameter. A tied head is not
/// a parameter: then there is no [`Role::Head`].
pub fn expected_params(config: &ModelConfig) -> Vec<ParamSpec> {
    let (hidden, mlp, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let before = config.norm_place != NormPlace::After;
    let after = config.norm_place != NormPlace::Before;
    // With a norm after attention, that norm has the name that the MLP's norm has elsewhere.
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
