//! The text of a completion while its tokens arrive: what can be shown, and the offset of each
//! token. Layer 9.
//!
//! Invariant: the shown pieces together are the decoded text of all tokens up to the first stop
//! text. Text that may still become a stop text is not shown.

use crate::data::tokenizer::{DecodeState, Tokenizer};
use crate::error::Result;

pub(super) struct ChoiceText {
    visible: DecodeState,
    /// Includes special tokens.
    whole: DecodeState,
    stops: Vec<String>,
    held: String,
    stopped: bool,
    /// Number of characters so far, including those held back.
    chars: usize,
}

impl ChoiceText {
    /// An empty text that follows `chars` characters of other text.
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

    /// Adds a token and returns the text that can be shown now.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> Result<String> {
        let new = self.visible.push(tokenizer, token)?;
        self.chars += new.chars().count();
        Ok(self.show(&new))
    }

    /// Adds all tokens at once instead of one by one with [`ChoiceText::push`]; returns the whole
    /// shown text.
    pub fn whole(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> Result<String> {
        let text = self.show(&tokenizer.decode(ids, true)?);
        Ok(if self.stopped { text } else { text + &std::mem::take(&mut self.held) })
    }

    /// The remaining text at the end.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let new = self.visible.finish(tokenizer)?;
        let mut text = self.show(&new);
        if !self.stopped {
            text += &std::mem::take(&mut self.held);
        }
        Ok(text)
    }

    /// The text of a token, special or not, and the number of characters before it. Call it before
    /// pushing the token. A character that consists of several tokens is in the piece of the last
    /// one.
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
