//! The tokens between a sampled turn and the next one: what the chat template writes after the
//! turn's end token. Layer 6.
//!
//! Invariant: sampled tokens are never re-encoded from their text. Only the text that the template
//! adds after them is tokenised, and only if the template renders a longer conversation as a
//! continuation of its beginning; otherwise the error shows the turn.

use serde_json::{Value, json};

use super::format::ParsedRow;
use super::render::{CONTINUE, Renderer};
use super::rows::Row;
use crate::error::{Error, Result};

/// A text that does not occur in turns and that templates leave unchanged.
const PROBE: &str = "\u{E0F3}probe\u{E0F4}";

/// The state of a row's conversation.
pub struct Talk<'a> {
    pub renderer: Renderer<'a>,
    pub row: &'a Row,
    pub example: &'a ParsedRow,
    /// The messages of the prompt and all later ones; the last is the model's.
    pub messages: &'a [Value],
    /// The token that ended the model's turn.
    pub stop: u32,
}

impl Talk<'_> {
    /// Returns the tokens from after the turn's end token up to where the model's next turn starts,
    /// with `reply` between.
    pub fn continuation(&self, reply: &[Value]) -> Result<Vec<u32>> {
        if self.renderer.continues(self.example) {
            return Err(self.row.error(format!(
                "{CONTINUE}=true does not work with an environment: a prompt that ends inside a \
                 message has no second turn; leave {CONTINUE} out"
            )));
        }
        let so_far = self.render(self.messages, false)?;
        let all = self.render(&[self.messages, reply].concat(), true)?;
        let Some(added) = all.strip_prefix(&so_far) else { return Err(self.unclear()) };
        let Some((_, before)) = self.messages.split_last() else { return Err(self.unclear()) };
        let probe = [before, &[json!({ "role": "assistant", "content": PROBE })]].concat();
        let probe = self.render(&probe, false)?;
        // The text that the template writes after an assistant's content.
        let closing = match probe.rsplit_once(PROBE) {
            Some((_, closing)) if so_far.ends_with(closing) => closing,
            _ => return Err(self.unclear()),
        };
        // The model may have sampled the template's end token itself, or another one.
        let ids = self.renderer.tokenizer.encode(closing, false)?;
        let rest = match ids.first() == Some(&self.stop) {
            true => closing.strip_prefix(self.stop_text()?.as_str()).unwrap_or(closing),
            false => closing,
        };
        self.behind_stop(&format!("{rest}{added}"))
    }

    /// Tokenises a text that follows the turn's end token.
    pub fn behind_stop(&self, text: &str) -> Result<Vec<u32>> {
        // Encode after the end token, so that no tokenizer treats the text as the start of a
        // document.
        let stop = self.stop_text()?;
        let ids = self.renderer.encode(self.row, &format!("{stop}{text}"), false)?;
        match ids.split_first() {
            Some((first, rest)) if *first == self.stop => Ok(rest.to_vec()),
            _ => Err(self.row.error(format!(
                "the end token {} ({stop:?}) does not encode to one token, so no turn can follow \
                 it; use a model whose end token is a special token",
                self.stop
            ))),
        }
    }

    fn stop_text(&self) -> Result<String> {
        self.renderer.tokenizer.decode(&[self.stop], false)
    }

    fn render(&self, messages: &[Value], prompt: bool) -> Result<String> {
        Ok(self.renderer.render(self.row, self.example, messages, prompt)?.text)
    }

    fn unclear(&self) -> Error {
        let at = self.messages.len().saturating_sub(1);
        let content = self.messages.last().map_or(&Value::Null, |m| &m["content"]);
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_string);
        let shown: String = text.chars().take(60).collect();
        self.row.error(format!(
            "the chat template writes the assistant's turn messages[{at}] ({shown:?}) \
             differently when more messages follow, so the model would read a conversation that \
             differs from the one it generated; make the environment answer with messages of \
             role \"tool\", or set chat_template_path to a template that leaves earlier turns \
             unchanged"
        ))
    }
}
