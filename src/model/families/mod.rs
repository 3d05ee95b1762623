//! The supported families: name maps and switches over one decoder. Layer 5.
//!
//! Invariant: a family is data. It says which keys of config.json it has, their defaults, and which
//! tensors the decoder then has; no other code asks for the family. Adding one is a file here and a
//! line in [`FAMILIES`].

mod gemma2;
mod gemma3;
pub mod gguf;
mod granite;
mod lfm2;
mod llama;
mod ministral;
mod ministral3;
mod mistral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod smollm3;

use crate::model::layout::Family;

/// All families, in the order in which errors list them.
pub const FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &mistral::FAMILY,
    &granite::FAMILY,
    &olmo2::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &ministral::FAMILY,
    &ministral3::FAMILY,
    &smollm3::FAMILY,
    &phi3::FAMILY,
    &lfm2::FAMILY,
];

/// Finds a family by `model_type` (`llama`) or architecture (`LlamaForCausalLM`).
pub fn find(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|f| f.model_type == name || f.architecture == name)
}

/// Lists the families for messages, such as `llama (LlamaForCausalLM)`.
pub fn supported() -> String {
    FAMILIES
        .iter()
        .map(|f| format!("{} ({})", f.model_type, f.architecture))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_found_by_either_name() {
        for family in FAMILIES {
            assert_eq!(find(family.model_type), Some(*family));
            assert_eq!(find(family.architecture), Some(*family));
        }
        assert_eq!(find("gpt2"), None);
    }
}
