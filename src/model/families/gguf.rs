//! What the families are called in GGUF files: architecture, tensors, metadata keys. Layer 5.
//!
//! Invariant: a family is data here too. Adding one is an entry of [`GGUF_NAMES`]: its
//! `general.architecture`; how its rope turns q and k; the modules and metadata keys whose names
//! are not the common ones. What the entry does not say is an error of the reader, never a guess.
//! A family without an entry is neither read from GGUF files nor written to them.

/// A number of config.json under its name in a GGUF file, where the architecture stands before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufKey {
    pub gguf: &'static str,
    pub config: &'static str,
    pub integer: bool,
    /// A file without it is an error; else the family's default holds.
    pub required: bool,
}

/// A family's names.
#[derive(Debug)]
pub struct GgufNames {
    pub model_type: &'static str,
    /// `general.architecture`. The first entry of an architecture is the family that reads it.
    pub architecture: &'static str,
    /// The rows of q and k stand in pairs that rope turns, (0, d/2), (1, d/2 + 1) ...: llama.cpp's
    /// form for families whose rope it runs over neighbours. Hugging Face keeps halves.
    pub neighbours: bool,
    /// The only `hidden_act` of the architecture, which a GGUF file does not name.
    pub hidden_act: &'static str,
    /// Modules of Hugging Face and of GGUF, before those of [`TENSORS`].
    pub tensors: &'static [(&'static str, &'static str)],
    /// Metadata beside [`KEYS`].
    pub keys: &'static [GgufKey],
}

pub const GGUF_NAMES: &[GgufNames] = &[
    GgufNames {
        model_type: "llama",
        architecture: "llama",
        neighbours: true,
        hidden_act: "silu",
        tensors: &[],
        keys: &[],
    },
    // Its files carry the architecture llama, which has no sliding window.
    GgufNames {
        model_type: "mistral",
        architecture: "llama",
        neighbours: true,
        hidden_act: "silu",
        tensors: &[],
        keys: &[],
    },
    GgufNames {
        model_type: "qwen2",
        architecture: "qwen2",
        neighbours: false,
        hidden_act: "silu",
        tensors: &[],
        keys: &[],
    },
    GgufNames {
        model_type: "qwen3",
        architecture: "qwen3",
        neighbours: false,
        hidden_act: "silu",
        tensors: &[],
        keys: &[],
    },
];

/// Modules: of the whole model, then of a layer (`model.layers.N.` here, `blk.N.` there).
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
    GgufKey { gguf, config, integer: true, required }
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
    GgufKey {
        gguf: "attention.layer_norm_rms_epsilon",
        config: "rms_norm_eps",
        integer: false,
        required: true,
    },
];

impl GgufNames {
    /// The family that reads an architecture.
    pub fn reading(architecture: &str) -> Option<&'static GgufNames> {
        GGUF_NAMES.iter().find(|n| n.architecture == architecture)
    }

    pub fn of_model_type(model_type: &str) -> Option<&'static GgufNames> {
        GGUF_NAMES.iter().find(|n| n.model_type == model_type)
    }

    /// `llama (llama, mistral), ...`: architectures and the families that they hold.
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

    /// The name of a tensor of Hugging Face's in a GGUF file; None: it has none.
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

    /// All keys of the family.
    pub fn all_keys(&self) -> impl Iterator<Item = &GgufKey> {
        KEYS.iter().chain(self.keys)
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
        assert_eq!(GgufNames::reading("llama").unwrap().model_type, "llama");
        assert!(GgufNames::supported().starts_with("llama (llama, mistral), qwen2"));
    }

    #[test]
    fn names_of_tensors_are_those_of_llama_cpp() {
        let llama = GgufNames::reading("llama").unwrap();
        let name = |n: &str| llama.tensor(n).unwrap();
        assert_eq!(name("model.layers.11.self_attn.o_proj.weight"), "blk.11.attn_output.weight");
        assert_eq!(name("model.layers.0.self_attn.q_proj.bias"), "blk.0.attn_q.bias");
        assert_eq!(name("lm_head.weight"), "output.weight");
        assert_eq!(llama.tensor("score.weight"), None);
    }
}
