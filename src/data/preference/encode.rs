//! What all preference rows share: texts and conversations to ids, prompts taken out of implicit
//! rows. Layer 6.
//!
//! Invariant: ids are below the model's vocabulary, and every error names the row.

use serde_json::Value;

use crate::data::chat::{ChatTemplate, NO_TEMPLATE, RenderOptions};
use crate::data::format::{Content, Example, Format, Sample};
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// What turns texts into ids: the same for all rows.
pub struct Encoder<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    /// The token that ends a completion.
    pub eos: &'a str,
    pub eos_id: u32,
    /// Rows of the model's embedding.
    pub vocab: usize,
}

impl<'a> Encoder<'a> {
    /// `eos_token` None: the tokenizer's.
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        vocab: usize,
        eos_token: Option<&'a str>,
    ) -> Result<Encoder<'a>> {
        let Some(eos) = eos_token.or(tokenizer.eos_token()) else {
            let message =
                "names no eos_token, so a model could not learn to stop; set eos_token=TOKEN";
            return Err(Error::model(tokenizer.dir().join("tokenizer_config.json"), message));
        };
        let Some(eos_id) = tokenizer.token_to_id(eos) else {
            let message = format!(
                "eos_token={eos:?} is not in the vocabulary of {}",
                tokenizer.dir().display()
            );
            return Err(Error::Config(message));
        };
        Ok(Encoder { tokenizer, template, eos, eos_id, vocab })
    }

    pub fn text(&self, row: &Row, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text, add_special)?;
        match ids.iter().find(|id| **id as usize >= self.vocab) {
            Some(id) => {
                let (token, vocab) =
                    (self.tokenizer.id_to_token(*id).unwrap_or_default(), self.vocab);
                Err(row.error(format!(
                    "token {id} ({token:?}) is beyond the model's vocabulary of {vocab}; use the tokenizer that came \
                     with the model, or resize the model's embedding"
                )))
            }
            None => Ok(ids),
        }
    }

    pub fn with_eos(&self, text: &str) -> String {
        if text.ends_with(self.eos) { text.to_string() } else { format!("{text}{}", self.eos) }
    }

    /// A conversation as its template writes it.
    pub fn rendered(
        &self,
        row: &Row,
        example: &Example,
        messages: &[Value],
        prompt: bool,
    ) -> Result<String> {
        let template =
            self.template.ok_or_else(|| Error::model(self.tokenizer.dir(), NO_TEMPLATE))?;
        let options = RenderOptions {
            tools: example.tools.as_ref(),
            add_generation_prompt: prompt,
            kwargs: Some(&example.template_kwargs),
        };
        let rendered = template.render(&Value::Array(messages.to_vec()), options);
        Ok(rendered.map_err(|e| row.error(e.to_string()))?.text)
    }

    /// The ids of a prompt alone and of the prompt with an answer: what stands before every
    /// completion.
    pub fn prompt_and_whole(
        &self,
        row: &Row,
        example: &Example,
        prompt: &Content,
        answer: &Content,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        match (prompt, answer) {
            (Content::Text(prompt), Content::Text(answer)) => {
                let whole = format!("{prompt}{}", self.with_eos(answer));
                Ok((self.text(row, prompt, true)?, self.text(row, &whole, true)?))
            }
            (Content::Chat(prompt), Content::Chat(answer)) => {
                let whole = [prompt.as_slice(), answer].concat();
                let (prompt, whole) = (
                    self.rendered(row, example, prompt, true)?,
                    self.rendered(row, example, &whole, false)?,
                );
                Ok((self.text(row, &prompt, false)?, self.text(row, &whole, false)?))
            }
            _ => Err(mixed(row)),
        }
    }

    /// How many leading tokens the prompt shares with prompt and answer, for one or both answers.
    /// Fewer than the prompt has means that the model trains on another context than it will see:
    /// counted. None at all is an error.
    pub fn shared(
        &self,
        row: &Row,
        prompt: &[u32],
        wholes: &[&[u32]],
    ) -> Result<(usize, Option<String>)> {
        let same = wholes.iter().map(|w| common(prompt, w)).min().unwrap_or(0);
        if same == 0 && !prompt.is_empty() {
            return Err(row.error(
                "the tokens of the prompt do not begin those of prompt and completion: the prompt is no prefix; check \
                 that the chat template writes the prompt the same way with and without an answer",
            ));
        }
        match same < prompt.len() {
            true => Ok((same, Some(self.tokenizer.decode(&prompt[same..], false)?))),
            false => Ok((same, None)),
        }
    }
}

pub fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

pub fn mixed(row: &Row) -> Error {
    row.error("mixes strings and lists of messages; make prompt and completions all strings or all messages")
}

/// A preference row with its prompt set apart.
pub struct Pair {
    pub example: Example,
    /// None where the row has none and nobody asked for one.
    pub prompt: Option<Content>,
    pub chosen: Content,
    pub rejected: Content,
}

/// Reads a preference row. With `extract`, a prompt that both sides begin with is taken out, as
/// TRL's `extract_prompt`.
pub fn pair(row: &Row, extract: bool) -> Result<Pair> {
    for side in ["chosen", "rejected"] {
        row.need(side)?;
    }
    let example = Format::Preference.parse(row, "text")?;
    let Sample::Preference { prompt, chosen, rejected } = &example.sample else {
        return Err(row.error("is no preference row; give \"chosen\" and \"rejected\""));
    };
    if chosen == rejected {
        return Err(
            row.error("chosen and rejected are identical, so the row prefers nothing; remove it")
        );
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

/// The common beginning of both sides, and what is left of each. A space before the difference goes
/// to the answers; of sides one of which begins the other, the shorter's last piece stays with the
/// answers.
fn extract_prompt(
    row: &Row,
    chosen: &Content,
    rejected: &Content,
) -> Result<(Content, Content, Content)> {
    let nothing = || {
        row.error(
            "has no \"prompt\", and chosen and rejected do not begin alike, so there is no prompt to take from them: \
             the prompt must be a prefix of both; add a \"prompt\" field",
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
