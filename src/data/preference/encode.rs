//! Common encoding of preference rows: texts and conversations to ids, prompt extraction. Layer 6.
//!
//! Invariant: ids are below the model's vocabulary, and every error names the row.

use serde_json::Value;

use crate::data::chat::ChatTemplate;
use crate::data::format::{Content, Format, ParsedRow, RowContent};
use crate::data::masked::{MaskedSequence, common};
use crate::data::render::{EosToken, Renderer, mixed};
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::data::turns::assistant_mask;
use crate::error::Result;

/// Converts texts to ids, with the same settings for all rows.
pub struct Encoder<'a> {
    pub renderer: Renderer<'a>,
    /// The token that ends a completion.
    pub eos: EosToken<'a>,
}

impl<'a> Encoder<'a> {
    /// Uses the tokenizer's EOS if `eos_token` is None.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        vocab: usize,
        eos_token: Option<&'a str>,
    ) -> Result<Encoder<'a>> {
        let eos = EosToken::of(tokenizer, eos_token)?;
        let eos = eos.ok_or_else(|| EosToken::missing(tokenizer))?;
        Ok(Encoder { renderer: Renderer::new(tokenizer, template, vocab), eos })
    }

    pub fn text(&self, row: &Row, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.renderer.encode(row, text, add_special)
    }

    /// Returns the ids of the prompt alone and of the prompt with an answer.
    pub fn prompt_and_whole(
        &self,
        row: &Row,
        example: &ParsedRow,
        prompt: &Content,
        answer: &Content,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let whole = self.renderer.whole(row, example, prompt, answer, Some(self.eos))?;
        Ok((self.renderer.prompt_ids(row, example, prompt)?, whole))
    }

    /// Returns prompt and answer as one sequence. Its first `prompt` tokens are not targets; the
    /// rest are, or with `assistant_only` those in the assistant's turns.
    pub fn completion(
        &self,
        row: &Row,
        example: &ParsedRow,
        content: (&Content, &Content),
        whole: &[u32],
        prompt: usize,
        assistant_only: bool,
    ) -> Result<MaskedSequence> {
        let mut sequence = MaskedSequence::new(&whole[..prompt], &whole[prompt..]);
        if !assistant_only {
            return Ok(sequence);
        }
        let (Content::Chat(before), Content::Chat(answer)) = content else {
            return Err(row.error(
                "assistant_only_loss=true needs conversations, and this row is plain text; unset it",
            ));
        };
        let messages = [before.as_slice(), answer].concat();
        let rendered = self.renderer.render(row, example, &messages, false)?;
        let said = assistant_mask(&self.renderer, row, example, &messages, rendered)?;
        for (target, said) in sequence.target_mask.iter_mut().zip(&said.target_mask) {
            *target &= *said;
        }
        match sequence.target_mask.contains(&true) {
            true => Ok(sequence),
            false => Err(row.error(
                "assistant_only_loss=true, but a completion has no text by the assistant; remove \
                 the row",
            )),
        }
    }

    /// Returns how many leading tokens the prompt shares with prompt and answer, for one or both
    /// answers. If fewer than the whole prompt, the model would train on another context than it
    /// sees later; then also returns the text of the prompt's remaining tokens. None at all is an
    /// error.
    pub fn shared(
        &self,
        row: &Row,
        prompt: &[u32],
        wholes: &[&[u32]],
    ) -> Result<(usize, Option<String>)> {
        let same = wholes.iter().map(|w| common(prompt, w)).min().unwrap_or(0);
        if same == 0 && !prompt.is_empty() {
            return Err(row.error(
                "the tokens of the prompt are not a prefix of the tokens of prompt and \
                 completion; check that the chat template writes the prompt the same way with \
                 and without an answer",
            ));
        }
        match same < prompt.len() {
            true => Ok((same, Some(self.renderer.tokenizer.decode(&prompt[same..], false)?))),
            false => Ok((same, None)),
        }
    }
}

/// A preference row split into prompt and answers.
pub struct Pair {
    pub example: ParsedRow,
    /// None if the row has no prompt and none was extracted.
    pub prompt: Option<Content>,
    pub chosen: Content,
    pub rejected: Content,
}

/// Reads a preference row. With `extract` and no prompt in the row, extracts the common beginning
/// of both sides, like TRL's `extract_prompt`.
pub fn pair(row: &Row, extract: bool) -> Result<Pair> {
    for side in ["chosen", "rejected"] {
        row.need(side)?;
    }
    let example = Format::Preference.parse(row, "text")?;
    let RowContent::Preference { prompt, chosen, rejected } = &example.content else {
        return Err(row.error("is not a preference row; give \"chosen\" and \"rejected\""));
    };
    if chosen == rejected {
        return Err(row.error(
            "chosen and rejected are identical, so the row expresses no preference; remove it",
        ));
    }
    let (prompt, chosen, rejected) = match prompt {
        Some(prompt) => (Some(prompt.clone()), chosen.clone(), rejected.clone()),
        None if extract => {
            let (prompt, chosen, rejected) = extract_prompt(row, chosen, rejected)?;
            (Some(prompt), chosen, rejected)
        }
        None => (None, chosen.clone(), rejected.clone()),
    };
    Ok(Pair { example, prompt, chosen, rejected })
}

/// Returns the common beginning of both sides and the rest of each. A space before the first
/// difference goes to the answers; if one side is a prefix of the other, the last piece of the
/// shorter side goes to the answers too.
fn extract_prompt(
    row: &Row,
    chosen: &Content,
    rejected: &Content,
) -> Result<(Content, Content, Content)> {
    let nothing = || {
        row.error(
            "has no \"prompt\", and chosen and rejected have no common prefix to use as the \
             prompt; add a \"prompt\" field",
        )
    };
    match (chosen, rejected) {
        (Content::Text(a), Content::Text(b)) => {
            let (x, y): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
            let same = common(&x, &y);
            let mut at = same.min(x.len().min(y.len()).saturating_sub(1));
            if at == same && at > 0 && x[at - 1] == ' ' {
                at -= 1;
            }
            if at == 0 {
                return Err(nothing());
            }
            let text = |c: &[char]| Content::Text(c.iter().collect());
            Ok((text(&x[..at]), text(&x[at..]), text(&y[at..])))
        }
        (Content::Chat(a), Content::Chat(b)) => {
            let at = common(a, b).min(a.len().min(b.len()).saturating_sub(1));
            if at == 0 {
                return Err(nothing());
            }
            let chat = |c: &[Value]| Content::Chat(c.to_vec());
            Ok((chat(&a[..at]), chat(&a[at..]), chat(&b[at..])))
        }
        _ => Err(mixed(row)),
    }
}
