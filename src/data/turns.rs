//! Finds the assistant's turns in a rendered conversation, for templates without
//! `{% generation %}`. Layer 6.
//!
//! Invariant: a turn begins where the generation prompt ends (the model's input when it starts to
//! speak) and ends where the template begins the next message, as in TRL's templates with tags. A
//! turn whose position is uncertain is an error that shows it.
//!
//! Positions come from prefixes: the messages before the turn with the generation prompt, and the
//! messages up to the turn. Templates that render earlier turns differently from the last (Qwen3
//! and gpt-oss drop their reasoning) do not give such prefixes. Then the turn is rendered again
//! with another text: the common beginning and end of both renderings are not part of the turn.

use std::ops::Range;

use serde_json::{Value, json};

use super::chat::Rendered;
use super::format::ParsedRow;
use super::masked::{MaskedSequence, common};
use super::render::Renderer;
use super::rows::Row;
use crate::error::{Error, Result};

/// A text that does not occur in turns and that templates leave unchanged.
const PROBE: &str = "\u{E0F3}probe\u{E0F4}";

/// A conversation of a row.
struct Talk<'a> {
    renderer: &'a Renderer<'a>,
    row: &'a Row,
    example: &'a ParsedRow,
    messages: &'a [Value],
    whole: &'a str,
}

/// Tokenises a rendered conversation. The targets are the assistant's text: the spans that the
/// template marks, else the assistant's turns.
pub fn assistant_mask(
    renderer: &Renderer,
    row: &Row,
    example: &ParsedRow,
    messages: &[Value],
    rendered: Rendered,
) -> Result<MaskedSequence> {
    let (ids, spans) = renderer.tokenizer.encode_offsets(&rendered.text, false)?;
    renderer.check(row, &ids)?;
    let mut mask = vec![false; ids.len()];
    let marked = renderer.marks_turns(example);
    let said = match marked {
        true => rendered.generation_spans,
        false => assistant_spans(renderer, row, example, messages, &rendered.text)?,
    };
    // Mark every token that overlaps a span, as in transformers since 5.24. (5.17 marked only the
    // first token of a span's last character, so no model learned to finish an emoji.)
    for span in said {
        let shares = |(start, end): &(usize, usize)| *start < span.end && *end > span.start;
        for (target, _) in mask.iter_mut().zip(&spans).filter(|(_, token)| shares(token)) {
            *target = true;
        }
    }
    if mask.contains(&true) {
        return Ok(MaskedSequence { input_ids: ids, target_mask: mask });
    }
    Err(row.error(match marked {
        true => {
            "assistant_only_loss=true, but the row has no text by the assistant; remove the row"
        }
        false => {
            "assistant_only_loss=true, but the chat template marks no text by the assistant in \
             this row; remove the row, or put {% generation %} and {% endgeneration %} around \
             the assistant's text in the template (chat_template_path)"
        }
    }))
}

/// Returns the spans of the assistant's turns, in characters of `whole`.
pub fn assistant_spans(
    renderer: &Renderer,
    row: &Row,
    example: &ParsedRow,
    messages: &[Value],
    whole: &str,
) -> Result<Vec<Range<usize>>> {
    let talk = Talk { renderer, row, example, messages, whole };
    let mut spans = Vec::new();
    let (mut bytes, mut chars) = (0, 0);
    for i in (0..messages.len()).filter(|i| messages[*i]["role"] == "assistant") {
        let span = talk.span(i)?;
        if span.start < bytes {
            return Err(talk.unclear(i));
        }
        let mut at = |to: usize| {
            chars += whole[bytes..to].chars().count();
            bytes = to;
            chars
        };
        spans.push(at(span.start)..at(span.end));
    }
    Ok(spans)
}

impl Talk<'_> {
    fn render(&self, messages: &[Value], prompt: bool) -> Result<String> {
        Ok(self.renderer.render(self.row, self.example, messages, prompt)?.text)
    }

    /// Returns the byte range of turn `i` in the whole text.
    fn span(&self, i: usize) -> Result<Range<usize>> {
        let before = self.render(&self.messages[..i], false);
        let begun = self.render(&self.messages[..i], true);
        let last = i + 1 == self.messages.len();
        let ended =
            if last { Ok(self.whole.into()) } else { self.render(&self.messages[..=i], false) };
        // A generation prompt that occurs here completely gives the start. One that only begins
        // here (`<think>` after the header, but the turn does not think) may match the turn's text
        // by chance.
        let (start, certain) = match (&before, &begun) {
            (Ok(before), Ok(begun)) => {
                let same = shared(begun, self.whole);
                let whole = begun.len() == same;
                ((same > before.len() || whole).then_some(same), whole)
            }
            _ => (None, false),
        };
        let end = ended.ok().filter(|e| self.whole.starts_with(e.as_str())).map(|e| e.len());
        match (start, end) {
            (Some(start), Some(end)) if certain && start <= end => Ok(start..end),
            _ => self.probed(i, start, end).ok_or_else(|| self.unclear(i)),
        }
    }

    /// Finds the turn by a probe if prefixes do not give its start or its end.
    fn probed(&self, i: usize, start: Option<usize>, end: Option<usize>) -> Option<Range<usize>> {
        let probe = |messages: &[Value]| {
            let mut other = messages.to_vec();
            other[i] = json!({ "role": "assistant", "content": PROBE });
            self.render(&other, false).ok()
        };
        let other = probe(self.messages)?;
        let body = shared(&other, self.whole);
        let tail = shared_end(&other[body..], &self.whole[body..]);
        let body_end = self.whole.len() - tail;
        let start = match start {
            Some(start) => start.min(body),
            None => {
                let prompt = self.generation_prompt(i)?;
                self.whole[..body].rfind(&prompt)? + prompt.len()
            }
        };
        let end = match end.filter(|e| *e >= body_end) {
            Some(end) => end,
            None => {
                let alone = self.render(&self.messages[..=i], false).ok()?;
                let other = probe(&self.messages[..=i])?;
                let closing = &alone[alone.len() - shared_end(&alone, &other)..];
                let rest = &self.whole[body_end..];
                match [closing, closing.trim_end()].iter().find(|c| rest.starts_with(**c)) {
                    Some(closing) => body_end + closing.len(),
                    None => body_end + self.renderer.tokenizer.special_prefix(rest)?,
                }
            }
        };
        (start <= end).then_some(start..end)
    }

    /// The text that the template writes before the assistant speaks.
    fn generation_prompt(&self, i: usize) -> Option<String> {
        let user = [json!({ "role": "user", "content": PROBE })];
        [&self.messages[..i], &user[..]].into_iter().find_map(|messages| {
            let (without, with) =
                (self.render(messages, false).ok()?, self.render(messages, true).ok()?);
            let prompt = with.strip_prefix(&without)?;
            (!prompt.trim().is_empty()).then(|| prompt.to_string())
        })
    }

    fn unclear(&self, i: usize) -> Error {
        let content = &self.messages[i]["content"];
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_string);
        let shown: String = text.chars().take(60).collect();
        self.row.error(format!(
            "assistant_only_loss=true, but the chat template writes the assistant's turn \
             messages[{i}] ({shown:?}) differently when more messages follow, so its tokens \
             cannot be found; put {{% generation %}} and {{% endgeneration %}} around the \
             assistant's text in the template (chat_template_path), or use prompt and completion \
             rows"
        ))
    }
}

/// Length in bytes of the common prefix, in whole characters.
fn shared(a: &str, b: &str) -> usize {
    let mut same = common(a.as_bytes(), b.as_bytes());
    while !a.is_char_boundary(same) {
        same -= 1;
    }
    same
}

/// Length in bytes of the common suffix, in whole characters.
fn shared_end(a: &str, b: &str) -> usize {
    let pairs = a.chars().rev().zip(b.chars().rev());
    pairs.take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum()
}
