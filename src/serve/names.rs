//! A served model, as the threads that do not compute know it. Layer 9.
//!
//! Invariant: all commands render prompts with the same renderer.

use crate::data::render::ModelText;

/// A model with the name under which requests select it.
pub struct Served {
    pub name: String,
    /// Its name on the command line.
    pub alias: Option<String>,
    pub text: ModelText,
    /// Tokens that end a completion.
    pub stop: Vec<u32>,
    pub vocab: usize,
    /// Most tokens of a prompt and its completion together.
    pub longest: usize,
}

impl Served {
    pub fn is(&self, name: &str) -> bool {
        self.name == name || self.alias.as_deref() == Some(name)
    }
}
