//! When a completion ends. Layer 6.
//!
//! Invariant: a completion's end depends on its own tokens alone; the token that ends it is its
//! last.

use std::sync::Arc;

use crate::data::tokenizer::Tokenizer;
use crate::error::Result;

/// Texts that end a completion, as soon as its decoded text has one.
#[derive(Clone)]
pub struct StopStrings {
    strings: Vec<String>,
    tokenizer: Arc<Tokenizer>,
    window: usize,
}

impl StopStrings {
    /// None if there are no strings (empty ones say nothing).
    pub fn new(strings: &[String], tokenizer: &Arc<Tokenizer>) -> Option<StopStrings> {
        let strings: Vec<String> = strings.iter().filter(|s| !s.is_empty()).cloned().collect();
        // A token is a byte or more; a few may be halves of a character, or special and show
        // nothing.
        let window = strings.iter().map(String::len).max()? + 4;
        Some(StopStrings { strings, tokenizer: tokenizer.clone(), window })
    }

    /// Whether the text of `ids` has come to hold one of the strings with its last token: only its
    /// end is decoded.
    pub fn reached(&self, ids: &[u32]) -> Result<bool> {
        let end = &ids[ids.len().saturating_sub(self.window)..];
        let text = self.tokenizer.decode(end, true)?;
        Ok(self.strings.iter().any(|s| text.contains(s.as_str())))
    }
}
