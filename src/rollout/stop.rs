//! The end of a completion. Layer 6.
//!
//! Invariant: the end of a completion depends only on its own tokens, and the token that ends it is
//! its last. The stop tokens of a model are the same wherever it generates.

use std::sync::Arc;

use serde_json::Value;

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::folder;
use crate::model::layout::ModelConfig;

/// The stop tokens of a model, ascending: `eos_token` of the tokenizer, `eos_token_id` of
/// config.json (`model`) and of generation_config.json in the tokenizer's folder, and the special
/// tokens in `stop` (decoded text never shows them, so [`StopStrings`] cannot find them). Error: an
/// `eos_token_id` is not a token id.
pub fn stop_ids(tokenizer: &Tokenizer, model: &ModelConfig, stop: &[String]) -> Result<Vec<u32>> {
    let mut ids = model.eos.clone();
    ids.extend(tokenizer.eos_id());
    if let Some(map) = folder::generation_config(tokenizer.model_dir())? {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| {
                let message = format!(
                    "eos_token_id is {value}; it must be a token id or a list of them; correct \
                     it, or copy the file again from the model's repository"
                );
                Error::model(tokenizer.model_dir().join("generation_config.json"), message)
            })
        };
        match map.get("eos_token_id") {
            None | Some(Value::Null) => {}
            Some(Value::Array(values)) => {
                for value in values {
                    ids.push(id(value)?);
                }
            }
            Some(value) => ids.push(id(value)?),
        }
    }
    ids.extend(special_ids(tokenizer, stop)?);
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The ids of the special tokens in `stop`.
pub fn special_ids(tokenizer: &Tokenizer, stop: &[String]) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for text in stop.iter().filter(|text| !text.is_empty()) {
        if let Some(id) = tokenizer.token_to_id(text)
            && tokenizer.decode(&[id], true)?.is_empty()
        {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Strings that end a completion as soon as its decoded text contains one.
#[derive(Clone)]
pub struct StopStrings {
    strings: Vec<String>,
    tokenizer: Arc<Tokenizer>,
    window: usize,
}

impl StopStrings {
    /// None if there are no strings; empty strings are ignored.
    pub fn new(strings: &[String], tokenizer: &Arc<Tokenizer>) -> Option<StopStrings> {
        let strings: Vec<String> = strings.iter().filter(|s| !s.is_empty()).cloned().collect();
        // Each token has at least one byte; the few extra tokens may be parts of a character, or
        // special tokens without text.
        let window = strings.iter().map(String::len).max()? + 4;
        Some(StopStrings { strings, tokenizer: tokenizer.clone(), window })
    }

    /// Whether the last token completes one of the strings. Decodes only the end of `ids`.
    pub fn reached(&self, ids: &[u32]) -> Result<bool> {
        let end = &ids[ids.len().saturating_sub(self.window)..];
        let text = self.tokenizer.decode(end, true)?;
        Ok(self.strings.iter().any(|s| text.contains(s.as_str())))
    }
}
