//! Prompts that a training run completes at every evaluation. Layer 1.
//!
//! Invariant: they change no number of the run.

use serde_json::Value as Json;
use toml::Value as Toml;

use super::value::{Given, Value};
use super::{Report, section};

/// Prompts, and files of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplePrompts(pub Vec<String>);

/// A single text on the command line is one prompt, even if it contains commas.
impl Value for SamplePrompts {
    fn kind() -> String {
        "list of text or path".into()
    }

    fn read(given: &Given) -> Result<Self, String> {
        let expected = || "a prompt, a file of prompts, or a list of them".to_string();
        match given {
            _ if given.is_none() => Ok(SamplePrompts::default()),
            Given::Text(text) if text.trim().is_empty() => Ok(SamplePrompts::default()),
            Given::Text(text) if text.trim_start().starts_with('[') => {
                match serde_json::from_str(text) {
                    Ok(Json::Array(items)) => items
                        .iter()
                        .map(|item| item.as_str().map(String::from))
                        .collect::<Option<_>>()
                        .map(SamplePrompts)
                        .ok_or_else(expected),
                    _ => Ok(SamplePrompts(vec![text.clone()])),
                }
            }
            Given::Text(text) | Given::File(Toml::String(text)) => {
                Ok(SamplePrompts(vec![text.clone()]))
            }
            Given::File(Toml::Array(items)) => items
                .iter()
                .map(|item| item.as_str().map(String::from))
                .collect::<Option<_>>()
                .map(SamplePrompts)
                .ok_or_else(expected),
            Given::File(_) => Err(expected()),
        }
    }

    fn written(&self) -> Toml {
        Toml::Array(self.0.iter().cloned().map(Toml::String).collect())
    }
}

section! {
    /// Completions of a run's own prompts.
    pub struct SampleOptions = "samples" {
        /// Ours. Prompts that the model completes greedily at every evaluation: texts, or a file of
        /// rows with prompt. If the training rows are conversations, a text becomes a user's
        /// message. The completions are printed and written to completions.jsonl. Not for
        /// reward and prm.
        pub sample_prompts: SamplePrompts = SamplePrompts::default(),
        /// Ours. Longest completion of sample_prompts in tokens.
        pub sample_max_new_tokens: usize = 64,
    }
}

impl SampleOptions {
    fn rules(&self, report: &mut Report) {
        report.at_least("sample_max_new_tokens", self.sample_max_new_tokens, 1);
        if self.sample_prompts.0.is_empty() {
            report.idle("sample_max_new_tokens", "sample_prompts", "sample_prompts is empty");
        }
    }
}
