//! Rows to token ids and loss masks, as in TRL 1.16.0's SFTTrainer. Layer 6.
//!
//! Invariant: for rows that TRL accepts, ids and mask equal TRL's. Truncated and dropped rows are
//! counted; anything that would make the loss meaningless (no targets at all, ids beyond the
//! vocabulary) is an error.
//!
//! The rules: a plain text or completion gets an EOS token at its end unless it has one; a
//! conversation gets only what its template writes. A prompt is tokenised alone (a conversation
//! with the generation prompt) and together with its completion; the completion starts at the first
//! token that differs.

use std::fmt;

use rayon::prelude::*;
use serde_json::Value;

use super::bad::{BadRows, OnBadRow};
use super::chat::ChatTemplate;
use super::feed::{Encoded, RowEncoder, encode_all};
use super::format::{Content, Format, ParsedRow, RowContent, unused_template};
use super::masked::{MaskedSequence, check_length, common, no_rows, too_long, write_mismatches};
use super::packing::PackingStrategy;
use super::render::{EosToken, Renderer};
use super::rows::{Row, RowPlace};
use super::tokenizer::Tokenizer;
use super::turns::assistant_mask;
use crate::error::{Error, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SftExample {
    pub input_ids: Vec<u32>,
    /// True where the token is a loss target. The first token of a sequence has no preceding token
    /// and is never a target, even if its bit is set: batching ignores the bit (it matters when
    /// `wrapped` packing moves the token).
    pub target_mask: Vec<bool>,
    pub row: usize, // index of the source row
}

pub use crate::config::{OnTruncation, TruncationMode};

/// Options with TRL's names and defaults.
#[derive(Clone, Debug)]
pub struct SftOptions {
    pub max_length: Option<usize>,
    pub truncation_mode: TruncationMode,
    pub on_truncation: OnTruncation,
    pub dataset_text_field: String,
    pub completion_only_loss: Option<bool>, // None: true for prompt-completion rows
    pub assistant_only_loss: bool,
    pub eos_token: Option<String>,        // None: the tokenizer's
    pub packing: Option<PackingStrategy>, // packing truncates by itself, always at the end
    pub on_bad_row: OnBadRow,
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
            on_bad_row: OnBadRow::Error,
        }
    }
}

/// Counts of rows and tokens; `Display` writes them as a paragraph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SftStats {
    pub rows: usize,     // read
    pub examples: usize, // kept
    pub max_length: Option<usize>,
    pub truncated: usize,        // kept, but truncated at max_length
    pub dropped_too_long: usize, // with on_truncation=drop
    pub dropped_no_target: usize,
    pub dropped_empty: usize, // empty text rows
    pub bad: BadRows,
    pub kept_no_target: usize, // in packs, as in TRL
    pub tokens: usize,         // of the kept examples
    pub target_tokens: usize,  // counted in the loss; never the first of a sequence
    pub longest: usize,        // before truncation
    pub eos_token: Option<String>,
    pub rows_with_eos: usize, // where EOS is a target, so the model learns to stop
    /// Rows that begin with two BOS tokens: one in their text, one added by the tokenizer.
    pub doubled_bos: usize,
    pub prefix_mismatches: usize,
    pub mismatch: Option<String>, // the end of the first prompt that is not a prefix
    /// See [`unused_template`].
    pub unused_template: Option<&'static str>,
}

/// Tokenises rows. `vocab` is the number of rows of the model's embedding.
pub fn prepare(
    rows: &[Row],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    vocab: usize,
    options: &SftOptions,
) -> Result<(Vec<SftExample>, SftStats)> {
    encode_all(SftEncoder::new(tokenizer, template, vocab, options)?, rows)
}

/// Tokenises rows in a stream.
pub struct SftEncoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    vocab: usize,
    options: &'a SftOptions,
    /// None: no row so far has a known type.
    maker: Option<Maker<'a>>,
    /// The rows before the first one with a known type.
    waiting: Vec<Row>,
    first: Option<RowPlace>,
    stats: SftStats,
}

impl<'a> SftEncoder<'a> {
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        vocab: usize,
        options: &'a SftOptions,
    ) -> Result<SftEncoder<'a>> {
        check_length(options.max_length)?;
        if options.packing.is_some() && options.max_length.is_none() {
            return Err(Error::Config(
                "packing needs max_length, the length of a pack".to_string(),
            ));
        }
        let stats = SftStats {
            max_length: options.max_length,
            bad: BadRows::new(options.on_bad_row),
            ..SftStats::default()
        };
        let (maker, waiting, first) = (None, Vec::new(), None);
        Ok(SftEncoder { tokenizer, template, vocab, options, maker, waiting, first, stats })
    }

    /// Returns the row that determines the type of all rows: the first, or if bad rows are dropped
    /// the first valid one.
    fn first_known<'r>(&self, rows: &'r [Row]) -> Option<&'r Row> {
        let field = &self.options.dataset_text_field;
        let known = |row: &&Row| {
            self.options.on_bad_row == OnBadRow::Error
                || Format::detect(row, field).is_ok_and(|f| f.parse(row, field).is_ok())
        };
        rows.iter().find(known)
    }

    /// Sets the type of all rows from `row`.
    fn decide(&mut self, row: &Row) -> Result<()> {
        let maker = Maker::new(row, self.tokenizer, self.template, self.vocab, self.options)?;
        self.stats.eos_token = maker.eos.map(|eos| eos.text.to_string());
        self.maker = Some(maker);
        Ok(())
    }

    fn make(&mut self, rows: &[Row], examples: &mut Encoded<SftExample>) -> Result<()> {
        let Some(maker) = &self.maker else { return Ok(()) };
        for part in rows.chunks(PART) {
            let made: Vec<Result<Tokens>> = part.par_iter().map(|row| maker.tokens(row)).collect();
            for (row, tokens) in part.iter().zip(made) {
                let number = self.stats.rows;
                self.stats.rows += 1;
                let eos = maker.eos.map(|eos| eos.id);
                let bos = self.tokenizer.bos_id();
                let made = self.stats.admit(row, tokens, self.options, eos, bos)?;
                let example = |made: MaskedSequence| {
                    let MaskedSequence { input_ids, target_mask } = made;
                    (row.at(), SftExample { input_ids, target_mask, row: number })
                };
                examples.extend(made.map(example));
            }
        }
        Ok(())
    }
}

impl RowEncoder for SftEncoder<'_> {
    type Example = SftExample;
    type Stats = SftStats;

    fn encode(&mut self, rows: &[Row], examples: &mut Encoded<SftExample>) -> Result<()> {
        if let (None, Some(first)) = (&self.first, rows.first()) {
            self.first = Some(first.at());
            self.stats.unused_template = unused_template(first, self.template.is_some());
        }
        if self.maker.is_none() {
            let Some(known) = self.first_known(rows) else {
                self.waiting.extend_from_slice(rows);
                return Ok(());
            };
            self.decide(known)?;
            let waiting = std::mem::take(&mut self.waiting);
            self.make(&waiting, examples)?;
        }
        self.make(rows, examples)
    }

    fn finish(mut self, examples: &mut Encoded<SftExample>) -> Result<SftStats> {
        let waiting = std::mem::take(&mut self.waiting);
        if let Some(first) = waiting.first() {
            self.decide(first)?;
            self.make(&waiting, examples)?;
        }
        let Some(first) = self.first else { return Err(no_rows()) };
        self.stats.bad.some_left(self.stats.examples)?;
        if self.stats.target_tokens == 0 {
            return Err(Error::data(&first.file, None, nothing_left(&self.stats)));
        }
        Ok(self.stats)
    }
}

impl SftStats {
    /// Counts a row and truncates it. None: dropped.
    fn admit(
        &mut self,
        row: &Row,
        tokens: Result<Tokens>,
        options: &SftOptions,
        eos: Option<u32>,
        bos: Option<u32>,
    ) -> Result<Option<MaskedSequence>> {
        let Some(Tokens { mut sequence, mismatch, empty }) = self.bad.admit(tokens)? else {
            return Ok(None);
        };
        if empty {
            self.dropped_empty += 1;
            return Ok(None);
        }
        let n = sequence.input_ids.len();
        self.longest = self.longest.max(n);
        self.doubled_bos +=
            usize::from(bos.is_some_and(|bos| sequence.input_ids.starts_with(&[bos, bos])));
        if let Some(end) = mismatch {
            self.prefix_mismatches += 1;
            self.mismatch.get_or_insert(end);
        }
        // The other packing strategies cut sequences themselves.
        let cuts = options.packing.is_none_or(|p| p == PackingStrategy::Bfd);
        if let Some(limit) = options.max_length.filter(|limit| cuts && n > *limit) {
            match options.on_truncation {
                OnTruncation::Truncate => {}
                OnTruncation::Drop => {
                    self.dropped_too_long += 1;
                    return Ok(None);
                }
                OnTruncation::Error => return Err(too_long(&row.at(), n, limit)),
            }
            // packing truncates only at the end
            let mode = match options.packing {
                Some(_) => TruncationMode::KeepStart,
                None => options.truncation_mode,
            };
            sequence.cut(limit, mode);
            self.truncated += 1;
        }
        if !sequence.target_mask.contains(&true) {
            if options.packing.is_none() {
                self.dropped_no_target += 1;
                return Ok(None);
            }
            self.kept_no_target += 1;
        }
        self.examples += 1;
        self.tokens += sequence.input_ids.len();
        self.target_tokens += sequence.targets();
        let mut targets = sequence.input_ids.iter().zip(&sequence.target_mask).skip(1);
        self.rows_with_eos += usize::from(targets.any(|(id, target)| *target && Some(*id) == eos));
        Ok(Some(sequence))
    }
}

/// Number of rows tokenised at a time.
const PART: usize = 16384;

/// The tokens of a row before truncation.
struct Tokens {
    sequence: MaskedSequence,
    mismatch: Option<String>,
    empty: bool, // an empty text
}

/// Settings that all rows share.
struct Maker<'a> {
    renderer: Renderer<'a>,
    format: Format,
    text_field: &'a str,
    eos: Option<EosToken<'a>>,
    completion_only: bool,
    assistant_only: bool,
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
        // SFT trains on every completion, good or bad, so it ignores a label
        let format = match Format::detect(first, text_field)? {
            Format::Unpaired => Format::PromptCompletion,
            other => other,
        };
        let eos = EosToken::of(tokenizer, options.eos_token.as_deref())?;
        if options.assistant_only_loss {
            let plain = match format.parse(first, text_field)?.content {
                RowContent::Text(_) => true,
                RowContent::PromptCompletion { prompt, .. } => !prompt.is_chat(),
                _ => false,
            };
            if plain {
                return Err(
                    first.error("assistant_only_loss=true needs conversations, and this row is plain text; unset it")
                );
            }
        }
        Ok(Maker {
            renderer: Renderer::new(tokenizer, template, vocab),
            format,
            text_field,
            eos,
            completion_only: options.completion_only_loss.unwrap_or(true),
            assistant_only: options.assistant_only_loss,
        })
    }

    fn tokens(&self, row: &Row) -> Result<Tokens> {
        let example = self.format.parse(row, self.text_field)?;
        match &example.content {
            RowContent::Text(text) => {
                let ids = self.renderer.encode(row, &self.eos()?.end(text), true)?;
                let sequence = MaskedSequence::new(&[], &ids);
                Ok(Tokens { sequence, mismatch: None, empty: text.is_empty() })
            }
            RowContent::Messages(messages) => {
                let sequence = self.chat(row, &example, messages)?;
                Ok(Tokens { sequence, mismatch: None, empty: false })
            }
            RowContent::PromptCompletion { prompt, completion } => {
                let start = self.renderer.prompt_ids(row, &example, prompt)?;
                let sequence = match (prompt, completion) {
                    (Content::Chat(prompt), Content::Chat(completion)) => {
                        self.chat(row, &example, &[prompt.as_slice(), completion].concat())?
                    }
                    _ => {
                        let eos = Some(self.eos()?);
                        let ids = self.renderer.whole(row, &example, prompt, completion, eos)?;
                        MaskedSequence::new(&[], &ids)
                    }
                };
                self.after(start, sequence)
            }
            _ => Err(row.error(
                "these rows are not for SFT; give \"text\", \"messages\", or \"prompt\" and \"completion\"",
            )),
        }
    }

    /// Sets the mask of a completion, which starts at the first token where the prompt alone and
    /// the whole differ.
    fn after(&self, prompt: Vec<u32>, mut sequence: MaskedSequence) -> Result<Tokens> {
        let same = common(&prompt, &sequence.input_ids);
        if self.completion_only {
            sequence.target_mask[..same].fill(false);
        }
        let mismatch = match same < prompt.len() {
            true => Some(self.renderer.tokenizer.decode(&prompt[same..], false)?),
            false => None,
        };
        Ok(Tokens { sequence, mismatch, empty: false })
    }

    fn eos(&self) -> Result<EosToken<'a>> {
        self.eos.ok_or_else(|| EosToken::missing(self.renderer.tokenizer))
    }

    /// Returns a conversation with its targets: all tokens, or only the assistant's.
    fn chat(&self, row: &Row, example: &ParsedRow, messages: &[Value]) -> Result<MaskedSequence> {
        let rendered = self.renderer.render(row, example, messages, false)?;
        if !self.assistant_only {
            let ids = self.renderer.encode(row, &rendered.text, false)?;
            return Ok(MaskedSequence::new(&[], &ids));
        }
        assistant_mask(&self.renderer, row, example, messages, rendered)
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
            format!(
                "none of the {rows} rows has a loss target; check that the completions are not \
                 empty"
            )
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
        if self.dropped_empty > 0 {
            write!(f, ", {} dropped because their text is empty", self.dropped_empty)?;
        }
        if self.kept_no_target > 0 {
            write!(f, ", {} kept without a target (by packing)", self.kept_no_target)?;
        }
        write!(f, ".")?;
        if let (Some(eos), 0) = (&self.eos_token, self.rows_with_eos) {
            write!(
                f,
                " No loss target is the EOS token {eos:?}, so the model does not learn to stop: end the assistant's turn \
                 with it in the chat template (inside the generation block), or set eos_token to the token that ends a turn."
            )?;
        }
        if self.doubled_bos > 0 {
            write!(
                f,
                " Rows that begin with two BOS tokens: {}. Their text has one and the tokenizer adds another; \
                 remove it from the rows or from the chat template.",
                self.doubled_bos
            )?;
        }
        write_mismatches(f, self.prefix_mismatches, &self.mismatch)?;
        if let Some(note) = self.unused_template {
            write!(f, " {note}")?;
        }
        self.bad.write_last(f)
    }
}
