//! Names of the families in GGUF files: architectures, tensors, metadata keys. Layer 5.
//!
//! Invariant: a family is data here too. Adding one is an entry of [`GGUF_NAMES`]: its
//! `general.architecture`, how its rope rotates q and k, and the modules and metadata keys with
//! names of their own. Anything that the entry lacks is an error of the reader, never a guess.
//! Facts that follow from the family (ropes by layer type, norms of 1 + w, layers with windows at a
//! period) are not repeated. A family without an entry is neither read nor written.

/// A number of config.json and its name in a GGUF file, without the architecture's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufKey {
    pub gguf: &'static str,
    pub config: &'static str,
    pub kind: GgufKind,
    /// Whether a file without the key is an error; otherwise the family's default applies.
    pub required: bool,
}

/// How a key is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufKind {
    Size,
    /// 0 means null.
    SizeOrNull,
    /// A list with a number for each layer: 0 without attention, else the size.
    SizeOfAttention,
    Number,
}

/// The names of a family.
#[derive(Debug)]
pub struct GgufNames {
    pub model_type: &'static str,
    /// `general.architecture`. If several families share it, the first whose `marker` is in the
    /// file reads it.
    pub architecture: &'static str,
    /// A key that only files of this family have, among families of the same architecture.
    pub marker: Option<&'static str>,
    /// Whether the rows of q and k are interleaved, (0, d/2), (1, d/2 + 1) and so on, because
    /// llama.cpp rotates adjacent pairs for this family. Hugging Face stores halves.
    pub neighbours: bool,
    /// The only `hidden_act` of the architecture, which a GGUF file does not name.
    pub hidden_act: &'static str,
    /// Modules of Hugging Face and of GGUF, which override those of [`TENSORS`].
    pub tensors: &'static [(&'static str, &'static str)],
    /// Metadata besides [`KEYS`], or replacing those with the same name.
    pub keys: &'static [GgufKey],
    /// Flags that must be true if present.
    pub true_flags: &'static [&'static str],
    /// Whether the head is the embedding, if the architecture fixes it.
    pub tied: Option<bool>,
    /// Number of layers of the model whose attention scale is (hidden_size / heads)^-0.5; all
    /// others use head_dim^-0.5. For families whose config has this number, which GGUF files lack.
    pub wide_scale_layers: Option<usize>,
    /// Whether only part of a head may be rotated, and two tensors may hold longrope's factors.
    pub long_rope: bool,
}

/// The names of Llama.
const PLAIN: GgufNames = GgufNames {
    model_type: "llama",
    architecture: "llama",
    marker: None,
    neighbours: true,
    hidden_act: "silu",
    tensors: &[],
    keys: &[],
    true_flags: &[],
    tied: None,
    wide_scale_layers: None,
    long_rope: false,
};

const GEMMA2: GgufNames = GgufNames {
    model_type: "gemma2",
    architecture: "gemma2",
    neighbours: false,
    hidden_act: "gelu_pytorch_tanh",
    tensors: &[
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ],
    keys: &[
        size("attention.sliding_window", "sliding_window", false),
        number("attn_logit_softcapping", "attn_logit_softcapping", true),
        number("final_logit_softcapping", "final_logit_softcapping", true),
    ],
    tied: Some(true),
    wide_scale_layers: Some(46), // 27B
    ..PLAIN
};

pub const GGUF_NAMES: &[GgufNames] = &[
    PLAIN,
    // Files of these families have the architecture llama, which has no sliding window.
    GgufNames { model_type: "mistral", ..PLAIN },
    GgufNames { model_type: "ministral", ..PLAIN },
    GgufNames { model_type: "qwen2", architecture: "qwen2", neighbours: false, ..PLAIN },
    GgufNames { model_type: "qwen3", architecture: "qwen3", neighbours: false, ..PLAIN },
    GgufNames {
        model_type: "ministral3",
        architecture: "mistral3",
        marker: Some("attention.temperature_scale"),
        ..PLAIN
    },
    GgufNames { model_type: "mistral", architecture: "mistral3", ..PLAIN },
    GgufNames { model_type: "smollm3", architecture: "smollm3", ..PLAIN },
    GgufNames {
        model_type: "granite",
        architecture: "granite",
        keys: &[
            number("attention.scale", "attention_multiplier", true),
            number("embedding_scale", "embedding_multiplier", false),
            number("residual_scale", "residual_multiplier", false),
            number("logit_scale", "logits_scaling", true),
        ],
        true_flags: &["rope.scaling.finetuned"], // switches rope on in this architecture
        ..PLAIN
    },
    GgufNames {
        model_type: "olmo2",
        architecture: "olmo2",
        neighbours: false,
        tensors: &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
        tied: Some(false),
        ..PLAIN
    },
    GEMMA2,
    GgufNames {
        model_type: "gemma3_text",
        architecture: "gemma3",
        keys: &[
            size("attention.sliding_window", "sliding_window", true),
            number("final_logit_softcapping", "final_logit_softcapping", false),
        ],
        tied: None,
        wide_scale_layers: Some(62), // 27B
        ..GEMMA2
    },
    GgufNames {
        model_type: "phi3",
        architecture: "phi3",
        neighbours: false,
        tensors: &[("self_attn.qkv_proj", "attn_qkv"), ("mlp.gate_up_proj", "ffn_up")],
        keys: &[
            GgufKey {
                kind: GgufKind::SizeOrNull,
                ..size("attention.sliding_window", "sliding_window", false)
            },
            size("rope.scaling.original_context_length", "original_max_position_embeddings", false),
        ],
        long_rope: true,
        ..PLAIN
    },
    GgufNames {
        model_type: "lfm2",
        architecture: "lfm2",
        neighbours: false,
        tensors: &[
            ("model.embedding_norm", "token_embd_norm"),
            ("operator_norm", "attn_norm"),
            ("ffn_norm", "ffn_norm"),
            ("self_attn.q_layernorm", "attn_q_norm"),
            ("self_attn.k_layernorm", "attn_k_norm"),
            ("self_attn.out_proj", "attn_output"),
            ("conv.conv", "shortconv.conv"),
            ("conv.in_proj", "shortconv.in_proj"),
            ("conv.out_proj", "shortconv.out_proj"),
            ("feed_forward.w1", "ffn_gate"),
            ("feed_forward.w3", "ffn_up"),
            ("feed_forward.w2", "ffn_down"),
        ],
        keys: &[
            GgufKey {
                kind: GgufKind::SizeOfAttention,
                ..size("attention.head_count_kv", "num_key_value_heads", true)
            },
            number("attention.layer_norm_rms_epsilon", "norm_eps", true),
            size("shortconv.l_cache", "conv_L_cache", true),
        ],
        ..PLAIN
    },
];

/// Modules of the whole model, then of a layer (`model.layers.N.` here, `blk.N.` in GGUF).
pub const TENSORS: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

const fn size(gguf: &'static str, config: &'static str, required: bool) -> GgufKey {
    GgufKey { gguf, config, kind: GgufKind::Size, required }
}

const fn number(gguf: &'static str, config: &'static str, required: bool) -> GgufKey {
    GgufKey { gguf, config, kind: GgufKind::Number, required }
}

/// Metadata of every family.
pub const KEYS: &[GgufKey] = &[
    size("block_count", "num_hidden_layers", true),
    size("context_length", "max_position_embeddings", true),
    size("embedding_length", "hidden_size", true),
    size("feed_forward_length", "intermediate_size", true),
    size("attention.head_count", "num_attention_heads", true),
    size("attention.head_count_kv", "num_key_value_heads", false),
    size("attention.key_length", "head_dim", false),
    number("attention.layer_norm_rms_epsilon", "rms_norm_eps", true),
];

impl GgufNames {
    /// Returns the family that reads a file of this architecture; `has` says whether the file has a
    /// key.
    pub fn reading(architecture: &str, has: impl Fn(&str) -> bool) -> Option<&'static GgufNames> {
        let marked =
            |n: &GgufNames| n.marker.is_none_or(|key| has(&format!("{architecture}.{key}")));
        GGUF_NAMES.iter().find(|n| n.architecture == architecture && marked(n))
    }

    /// Returns the names for writing a family.
    pub fn of_model_type(model_type: &str) -> Option<&'static GgufNames> {
        GGUF_NAMES.iter().find(|n| n.model_type == model_type)
    }

    /// Lists the architectures and their families, such as `llama (llama, mistral)`.
    pub fn supported() -> String {
        let mut out: Vec<(&str, Vec<&str>)> = Vec::new();
        for names in GGUF_NAMES {
            match out.iter_mut().find(|o| o.0 == names.architecture) {
                Some(known) => known.1.push(names.model_type),
                None => out.push((names.architecture, vec![names.model_type])),
            }
        }
        let shown = out.iter().map(|(architecture, families)| match families.as_slice() {
            [one] if one == architecture => architecture.to_string(),
            _ => format!("{architecture} ({})", families.join(", ")),
        });
        shown.collect::<Vec<_>>().join(", ")
    }

    /// Returns the GGUF name of a Hugging Face tensor; None if it has none.
    pub fn tensor(&self, name: &str) -> Option<String> {
        let (module, kind) = name.rsplit_once('.')?;
        let (layer, module) = match module.strip_prefix("model.layers.") {
            Some(rest) => {
                let (layer, module) = rest.split_once('.')?;
                (format!("blk.{layer}."), module)
            }
            None => (String::new(), module),
        };
        let found = self.tensors.iter().chain(TENSORS).find(|t| t.0 == module)?;
        Some(format!("{layer}{}.{kind}", found.1))
    }

    /// Whether files say which layers have a window.
    pub fn has_windows(&self) -> bool {
        self.all_keys().any(|key| key.config == "sliding_window")
    }

    /// All keys of the family.
    pub fn all_keys(&self) -> impl Iterator<Item = &GgufKey> {
        let common = |key: &&GgufKey| self.keys.iter().all(|own| own.gguf != key.gguf);
        KEYS.iter().filter(common).chain(self.keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families::FAMILIES;

    #[test]
    fn every_entry_names_a_family() {
        for names in GGUF_NAMES {
            assert!(FAMILIES.iter().any(|f| f.model_type == names.model_type), "{names:?}");
        }
        let reading = |arch: &str, has: bool| GgufNames::reading(arch, |_| has).unwrap().model_type;
        assert_eq!(reading("llama", false), "llama");
        assert_eq!(
            [reading("mistral3", true), reading("mistral3", false)],
            ["ministral3", "mistral"]
        );
        assert_eq!(GgufNames::of_model_type("mistral").unwrap().architecture, "llama");
        assert!(GgufNames::supported().starts_with("llama (llama, mistral, ministral), qwen2"));
    }

    #[test]
    fn names_of_tensors_are_those_of_llama_cpp() {
        let llama = &PLAIN;
        let name = |n: &str| llama.tensor(n).unwrap();
        assert_eq!(name("model.layers.11.self_attn.o_proj.weight"), "blk.11.attn_output.weight");
        assert_eq!(name("model.layers.0.self_attn.q_proj.bias"), "blk.0.attn_q.bias");
        assert_eq!(name("lm_head.weight"), "output.weight");
        assert_eq!(llama.tensor("score.weight"), None);
    }
}
