//! What the server knows of a model under a name, on the side that does not compute. Layer 9.
//!
//! Invariant: prompts are rendered by the one renderer of all commands.

use crate::data::render::ModelText;

/// A name that requests can ask for.
pub struct Served {
    pub name: String,
    /// What the command line called it.
    pub alias: Option<String>,
    pub text: ModelText,
    /// Tokens that end a text.
    pub stop: Vec<u32>,
    pub vocab: usize,
    /// Most tokens of a prompt and its completion.
    pub longest: usize,
}

impl Served {
    pub fn is(&self, name: &str) -> bool {
        self.name == name || self.alias.as_deref() == Some(name)
    }
}
