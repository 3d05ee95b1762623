//! Rows to token ids and loss masks, as TRL 1.16.0's SFTTrainer makes them. Layer 6.
//!
//! Invariant: for rows that TRL takes, ids and mask are TRL's. What is cut or dropped is counted;
//! what would make the loss meaningless (no targets at all, ids beyond the vocabulary) is an error.
//!
//! The rules: a plain text or completion gets the EOS token at its end unless it ends with it; a
//! conversation gets only what its template writes. A prompt is tokenised alone (a conversation
//! with the generation prompt) and together with its completion; the completion starts where the
//! two differ.

use std::borrow::Cow;
use std::fmt;

use rayon::prelude::*;
use serde_json::Value;

use super::chat::{ChatTemplate, NO_TEMPLATE, RenderOptions};
use super::format::{Content, Example, Format, Sample};
use super::packing::PackingStrategy;
use super::rows::Row;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SftExample {
    pub input_ids: Vec<u32>,
    /// True where the token is a loss target. The first token of a sequence has nothing before it
    /// and is never one, whatever its bit: whoever builds batches leaves it out (its bit matters
    /// when `wrapped` packing moves it).
    pub target_mask: Vec<bool>,
    pub row: usize, // index of the source row
}

pub use crate::config::{OnTruncation, TruncationMode};

/// TRL's names and defaults.
#[derive(Clone, Debug)]
pub struct SftOptions {
    pub max_length: Option<usize>,
    pub truncation_mode: TruncationMode,
    pub on_truncation: OnTruncation,
    pub dataset_text_field: String,
    pub completion_only_loss: Option<bool>, // None: true for prompt-completion rows
    pub assistant_only_loss: bool,
    pub eos_token: Option<String>,        // None: the tokenizer's
    pub packing: Option<PackingStrategy>, // packing cuts by itself, and from the end only
}

impl Default for SftOptions {
    fn default() -> Self {
        SftOptions {
            max_length: Some(1024),
            truncation_mode: TruncationMode::KeepStart,
            on_truncation: OnTruncation::Truncate,
            dataset_text_field: "text".to_string(),
            completion_only_loss: None,
            assistant_only_loss: false,
            eos_token: None,
            packing: None,
        }
    }
}

/// What was done to the rows; `Display` says it in a paragraph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SftStats {
    pub rows: usize,     // read
    pub examples: usize, // kept
    pub max_length: Option<usize>,
    pub truncated: usize,        // kept, but cut at max_length
    pub dropped_too_long: usize, // by on_truncation=drop
    pub dropped_no_target: usize,
    pub kept_no_target: usize, // in packs, as TRL keeps them
    pub tokens: usize,         // of the kept examples
    pub target_tokens: usize,  // that count in the loss: never the first of a sequence
    pub longest: usize,        // before truncation
    pub eos_token: Option<String>,
    pub rows_with_eos: usize, // where EOS is a target: from these the model learns to stop
    pub prefix_mismatches: usize,
    pub mismatch: Option<String>, // the end of the first prompt that is not a prefix
}

/// Tokenises rows. `vocab` is the number of rows of the model's embedding.
pub fn prepare(
    rows: &[Row],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    vocab: usize,
    options: &SftOptions,
) -> Result<(Vec<SftExample>, SftStats)> {
    let Some(first) = rows.first() else {
        return Err(Error::Run("there are no rows to train on".to_string()));
    };
    let maker = Maker::new(first, tokenizer, template, vocab, options)?;
    let limit = if options.packing.is_none_or(|p| p == PackingStrategy::Bfd) {
        options.max_length
    } else {
        None
    };
    if options.packing.is_some() && options.max_length.is_none() {
        return Err(Error::Config("packing needs max_length, the length of a pack".to_string()));
    }
    if options.max_length == Some(0) {
        return Err(Error::Config(
            "max_length=0 leaves no tokens; give a length, or none for no limit".to_string(),
        ));
    }
    let made: Vec<Result<Tokens>> = rows.par_iter().map(|row| maker.tokens(row)).collect();

    let mut stats =
        SftStats { rows: rows.len(), max_length: options.max_length, ..SftStats::default() };
    let eos = maker.eos.and_then(|eos| tokenizer.token_to_id(eos));
    stats.eos_token = maker.eos.map(str::to_string);
    let mut examples = Vec::with_capacity(rows.len());
    for (row, tokens) in made.into_iter().enumerate() {
        let Tokens { mut ids, mut mask, mismatch } = tokens?;
        stats.longest = stats.longest.max(ids.len());
        if let Some(end) = mismatch {
            stats.prefix_mismatches += 1;
            stats.mismatch.get_or_insert(end);
        }
        if let Some(limit) = limit.filter(|limit| ids.len() > *limit) {
            match options.on_truncation {
                OnTruncation::Truncate => {}
                OnTruncation::Drop => {
                    stats.dropped_too_long += 1;
                    continue;
                }
                OnTruncation::Error => {
                    let n = ids.len();
                    let message = format!(
                        "has {n} tokens, more than max_length={limit}; raise max_length, or set on_truncation=truncate or drop"
                    );
                    return Err(rows[row].error(message));
                }
            }
            if options.truncation_mode == TruncationMode::KeepEnd && options.packing.is_none() {
                ids.drain(..ids.len() - limit);
                mask.drain(..mask.len() - limit);
            }
            ids.truncate(limit);
            mask.truncate(limit);
            stats.truncated += 1;
        }
        if !mask.contains(&true) {
            if options.packing.is_none() {
                stats.dropped_no_target += 1;
                continue;
            }
            stats.kept_no_target += 1;
        }
        stats.tokens += ids.len();
        stats.target_tokens += mask.iter().skip(1).filter(|t| **t).count();
        stats.rows_with_eos += usize::from(
            ids.iter().zip(&mask).skip(1).any(|(id, target)| *target && Some(*id) == eos),
        );
        examples.push(SftExample { input_ids: ids, target_mask: mask, row });
    }
    stats.examples = examples.len();
    if stats.target_tokens == 0 {
        return Err(Error::data(&first.file, None, nothing_left(&stats)));
    }
    Ok((examples, stats))
}

/// What a row becomes before truncation.
struct Tokens {
    ids: Vec<u32>,
    mask: Vec<bool>,
    mismatch: Option<String>,
}

/// Everything that is the same for all rows.
struct Maker<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    format: Format,
    text_field: &'a str,
    eos: Option<&'a str>,
    completion_only: bool,
    assistant_only: bool,
    vocab: usize,
}

impl<'a> Maker<'a> {
    fn new(
        first: &Row,
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        vocab: usize,
        options: &'a SftOptions,
    ) -> Result<Maker<'a>> {
        let text_field = options.dataset_text_field.as_str();
        // SFT learns from every completion, good or bad: a label beside it is not asked for
        let format = match Format::detect(first, text_field)? {
            Format::Unpaired => Format::PromptCompletion,
            other => other,
        };
        if let Some(eos) = &options.eos_token
            && tokenizer.token_to_id(eos).is_none()
        {
            let message = format!(
                "eos_token={eos:?} is not in the vocabulary of {}",
                tokenizer.dir().display()
            );
            return Err(Error::Config(message));
        }
        if options.assistant_only_loss {
            let plain = match format.parse(first, text_field)?.sample {
                Sample::Text(_) => true,
                Sample::PromptCompletion { prompt, .. } => !prompt.is_chat(),
                _ => false,
            };
            if plain {
                return Err(
                    first.error("assistant_only_loss=true needs conversations, and this row is plain text; unset it")
                );
            }
            if template.is_some_and(|t| !t.has_generation()) {
                let message = "its chat template does not mark what the assistant says, which assistant_only_loss=true \
                               needs; put {% generation %} and {% endgeneration %} around the assistant's content and \
                               end-of-turn token in chat_template.jinja, or use prompt and completion rows";
                return Err(Error::model(tokenizer.dir(), message));
            }
        }
        Ok(Maker {
            tokenizer,
            template,
            format,
            text_field,
            eos: options.eos_token.as_deref().or(tokenizer.eos_token()),
            completion_only: options.completion_only_loss.unwrap_or(true),
            assistant_only: options.assistant_only_loss,
            vocab,
        })
    }

    fn tokens(&self, row: &Row) -> Result<Tokens> {
        let example = self.format.parse(row, self.text_field)?;
        let tokens = match &example.sample {
            Sample::Text(text) => {
                let ids = self.tokenizer.encode(&self.with_eos(text)?, true)?;
                Tokens { mask: vec![true; ids.len()], ids, mismatch: None }
            }
            Sample::Messages(messages) => {
                let (ids, mask) = self.chat(row, &example, messages.clone(), false)?;
                Tokens { ids, mask, mismatch: None }
            }
            Sample::PromptCompletion {
                prompt: Content::Text(prompt),
                completion: Content::Text(completion),
            } => {
                let start = self.tokenizer.encode(prompt, true)?;
                let ids = self
                    .tokenizer
                    .encode(&format!("{prompt}{}", self.with_eos(completion)?), true)?;
                self.after(start, vec![true; ids.len()], ids)?
            }
            Sample::PromptCompletion {
                prompt: Content::Chat(prompt),
                completion: Content::Chat(completion),
            } => {
                let (start, _) = self.chat(row, &example, prompt.clone(), true)?;
                let whole = prompt.iter().chain(completion).cloned().collect();
                let (ids, mask) = self.chat(row, &example, whole, false)?;
                self.after(start, mask, ids)?
            }
            _ => {
                return Err(row.error(
                    "these rows are not for SFT; give \"text\", \"messages\", or \"prompt\" and \"completion\"",
                ));
            }
        };
        match tokens.ids.iter().find(|id| **id as usize >= self.vocab) {
            Some(id) => {
                let token = self.tokenizer.id_to_token(*id).unwrap_or_default();
                let vocab = self.vocab;
                Err(row.error(format!(
                    "token {id} ({token:?}) is beyond the model's vocabulary of {vocab}; use the tokenizer that came \
                     with the model, or resize the model's embedding"
                )))
            }
            None => Ok(tokens),
        }
    }

    /// The mask of a completion: it starts where the prompt alone and the whole first differ.
    fn after(&self, prompt: Vec<u32>, mut mask: Vec<bool>, ids: Vec<u32>) -> Result<Tokens> {
        let same = prompt.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        if self.completion_only {
            mask[..same].fill(false);
        }
        let mismatch = match same < prompt.len() {
            true => Some(self.tokenizer.decode(&prompt[same..], false)?),
            false => None,
        };
        Ok(Tokens { ids, mask, mismatch })
    }

    fn with_eos<'t>(&self, text: &'t str) -> Result<Cow<'t, str>> {
        match self.eos {
            Some(eos) if text.ends_with(eos) => Ok(text.into()),
            Some(eos) => Ok(format!("{text}{eos}").into()),
            None => {
                let message =
                    "names no eos_token, so a model could not learn to stop; set eos_token=TOKEN";
                Err(Error::model(self.tokenizer.dir().join("tokenizer_config.json"), message))
            }
        }
    }

    /// A conversation and the mask of its targets: all of it, or what the assistant says.
    fn chat(
        &self,
        row: &Row,
        example: &Example,
        messages: Vec<Value>,
        prompt: bool,
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        let template =
            self.template.ok_or_else(|| Error::model(self.tokenizer.dir(), NO_TEMPLATE))?;
        let options = RenderOptions {
            tools: example.tools.as_ref(),
            add_generation_prompt: prompt,
            kwargs: Some(&example.template_kwargs),
        };
        let rendered = template
            .render(&Value::Array(messages), options)
            .map_err(|e| row.error(e.to_string()))?;
        if !self.assistant_only || prompt {
            let ids = self.tokenizer.encode(&rendered.text, false)?;
            let mask = vec![true; ids.len()];
            return Ok((ids, mask));
        }
        let (ids, spans) = self.tokenizer.encode_offsets(&rendered.text, false)?;
        let mut mask = vec![false; ids.len()];
        let token_at = |c: usize| spans.iter().position(|(start, end)| (*start..*end).contains(&c));
        for span in rendered.generation_spans {
            // as transformers: the first token that holds a character; no last token means up to
            // the end
            let Some(start) = token_at(span.start) else { break };
            let end = match span.end.checked_sub(1).and_then(token_at) {
                None | Some(0) => ids.len(),
                Some(last) => last + 1,
            };
            if start < end {
                mask[start..end].fill(true);
            }
        }
        if !mask.contains(&true) {
            let message =
                "assistant_only_loss=true, and the assistant says nothing here; remove the row";
            return Err(row.error(message));
        }
        Ok((ids, mask))
    }
}

fn nothing_left(stats: &SftStats) -> String {
    let SftStats { rows, truncated, dropped_too_long, longest, .. } = stats;
    match stats.max_length {
        Some(limit) if truncated + dropped_too_long > 0 || stats.longest > limit => format!(
            "truncation to max_length={limit} removed every loss target of all {rows} rows; raise max_length (the longest \
             row has {longest} tokens)"
        ),
        _ => {
            format!("none of the {rows} rows has a token to learn from; are the completions empty?")
        }
    }
}

impl fmt::Display for SftStats {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let percent = 100.0 * self.target_tokens as f64 / self.tokens.max(1) as f64;
        let rows = if self.rows == 1 { "row" } else { "rows" };
        write!(f, "{} {rows} read, {} kept: {} tokens, ", self.rows, self.examples, self.tokens)?;
        write!(
            f,
            "{} of them loss targets ({percent:.1}%). The longest row has {} tokens",
            self.target_tokens, self.longest
        )?;
        match self.max_length {
            Some(limit) => write!(f, "; {} were cut at max_length={limit}", self.truncated)?,
            None => write!(f, "; nothing is cut")?,
        }
        if self.dropped_too_long > 0 {
            write!(f, ", {} dropped as too long", self.dropped_too_long)?;
        }
        if self.dropped_no_target > 0 {
            write!(f, ", {} dropped because no target was left", self.dropped_no_target)?;
        }
        if self.kept_no_target > 0 {
            write!(f, ", {} kept without a target (packing does)", self.kept_no_target)?;
        }
        write!(f, ".")?;
        if let (Some(eos), 0) = (&self.eos_token, self.rows_with_eos) {
            write!(
                f,
                " No loss target is the EOS token {eos:?}, so the model does not learn to stop: end the assistant's turn \
                 with it in the chat template (inside the generation block), or set eos_token to the token that ends a turn."
            )?;
        }
        if let Some(end) = &self.mismatch {
            let n = self.prefix_mismatches;
            write!(
                f,
                " In {n} rows the tokens of the prompt alone do not begin the tokens of prompt and completion, so the model \
                 trains on another context than it will see; the first such prompt ends in {end:?}. End prompts where a \
                 token ends, or use a template that renders a prompt the same way with and without an answer."
            )?;
        }
        Ok(())
    }
}
