//! The text of a completion as its tokens come: what can be shown, and where each token stands.
//! Layer 9.
//!
//! Invariant: the pieces that are shown are, together, the decoded text of all tokens up to the first
//! stop text; nothing that may yet become a stop text is shown.

use crate::data::tokenizer::{DecodeState, Tokenizer};
use crate::error::Result;

pub(super) struct ChoiceText {
    visible: DecodeState,
    /// Special tokens included.
    whole: DecodeState,
    stops: Vec<String>,
    held: String,
    stopped: bool,
    /// Characters so far, those that are held back included.
    chars: usize,
}

impl ChoiceText {
    /// Begins behind `chars` characters of other text.
    pub fn new(stops: &[String], chars: usize) -> ChoiceText {
        ChoiceText {
            visible: DecodeState::new(true),
            whole: DecodeState::new(false),
            stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(),
            held: String::new(),
            stopped: false,
            chars,
        }
    }

    /// Adds a token; returns the text that it lets be shown.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> Result<String> {
        let new = self.visible.push(tokenizer, token)?;
        self.chars += new.chars().count();
        Ok(self.show(&new))
    }

    /// All tokens at once, in place of each [`ChoiceText::push`]; returns all that can be shown.
    pub fn whole(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> Result<String> {
        let text = self.show(&tokenizer.decode(ids, true)?);
        Ok(if self.stopped { text } else { text + &std::mem::take(&mut self.held) })
    }

    /// What is left at the end.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let new = self.visible.finish(tokenizer)?;
        let mut text = self.show(&new);
        if !self.stopped {
            text += &std::mem::take(&mut self.held);
        }
        Ok(text)
    }

    /// The text of a token, special or not, and the characters before it. To be asked before it is
    /// pushed. A character of several tokens is in the piece of its last one.
    pub fn piece(&mut self, tokenizer: &Tokenizer, token: u32) -> Result<(String, usize)> {
        Ok((self.whole.push(tokenizer, token)?, self.chars))
    }

    fn show(&mut self, new: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held += new;
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let may_stop = |at: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[*at..]));
        let boundaries = self.held.char_indices().map(|(at, _)| at);
        let kept = boundaries.clone().find(may_stop).unwrap_or(self.held.len());
        let rest = self.held.split_off(kept);
        std::mem::replace(&mut self.held, rest)
    }
}
