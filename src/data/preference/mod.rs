//! Preference rows to token ids and completion masks, as in TRL 1.16.0. Layer 6.
//!
//! Invariant: for rows that TRL accepts, ids and masks equal TRL's, per trainer ([`PairStyle`]);
//! every truncated or dropped row is counted; a row whose sides are identical, or that lacks a side
//! or a prompt, is an error with its file and line.
//!
//! | rows | function | for |
//! |---|---|---|
//! | (prompt,) chosen, rejected (, margin) | [`pairs`] | DPO, ORPO, CPO, reward models |
//! | prompt, completion, label; or pairs, unpaired | [`labelled`] | KTO, BCO |
//! | prompt, completions, labels | [`steps`] | process reward models |

mod encode;
mod labelled;
mod pairs;
mod steps;

use std::fmt;

use super::bad::{BadRows, OnBadRow};
use super::format::unused_template;
use super::masked::{MaskedSequence, check_length, no_rows, too_long, write_mismatches};
use super::rows::{Row, RowPlace};
use crate::error::{Error, Result};

pub use crate::config::{OnTruncation, TruncationMode};
pub use labelled::{CrossedEncoder, Labelled, LabelledEncoder, labelled, mismatched};
pub use pairs::{PairEncoder, PairExample, PairStyle, pairs};
pub use steps::{StepEncoder, StepExample, StepOptions, steps};

/// Options with TRL's names and defaults.
#[derive(Clone, Debug)]
pub struct PreferenceOptions {
    pub max_length: Option<usize>,
    pub truncation_mode: TruncationMode,
    pub on_truncation: OnTruncation,
    /// None: the tokenizer's.
    pub eos_token: Option<String>,
    /// In completions that are conversations, count only the assistant's turns ([`PairStyle::Dpo`]
    /// and [`labelled`]).
    pub assistant_only_loss: bool,
    pub on_bad_row: OnBadRow,
}

impl Default for PreferenceOptions {
    fn default() -> Self {
        PreferenceOptions {
            max_length: Some(1024),
            truncation_mode: TruncationMode::KeepStart,
            on_truncation: OnTruncation::Truncate,
            eos_token: None,
            assistant_only_loss: false,
            on_bad_row: OnBadRow::Error,
        }
    }
}

/// Counts of rows and tokens; `Display` writes them as a paragraph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PreferenceStats {
    pub rows: usize,
    pub examples: usize,
    pub max_length: Option<usize>,
    pub truncated: usize,         // kept, but truncated at max_length
    pub dropped_too_long: usize,  // with on_truncation=drop, and always for reward models
    pub dropped_no_target: usize, // the prompt alone fills max_length
    pub tokens: usize,            // of the kept examples
    /// None if sequences are scored whole, without a mask.
    pub target_tokens: Option<usize>,
    pub longest: usize, // longest sequence before truncation
    pub prefix_mismatches: usize,
    pub mismatch: Option<String>, // the end of the first prompt that is not a prefix
    pub bad: BadRows,
    pub first_dropped: Option<String>, // FILE:LINE of the first dropped row
    first: Option<RowPlace>,
    unused_template: Option<&'static str>,
}

impl PreferenceStats {
    fn new(options: &PreferenceOptions) -> Result<PreferenceStats> {
        check_length(options.max_length)?;
        Ok(PreferenceStats {
            max_length: options.max_length,
            target_tokens: Some(0),
            bad: BadRows::new(options.on_bad_row),
            ..PreferenceStats::default()
        })
    }

    fn mismatched(&mut self, end: Option<String>) {
        if let Some(end) = end {
            self.prefix_mismatches += 1;
            self.mismatch.get_or_insert(end);
        }
    }

    /// Counts rows that were read, for a model with or without a chat template.
    fn read(&mut self, rows: &[Row], has_template: bool) {
        self.rows += rows.len();
        if let (None, Some(first)) = (&self.first, rows.first()) {
            self.first = Some(first.at());
            self.unused_template = unused_template(first, has_template);
        }
    }

    fn dropped(&mut self, row: &RowPlace) {
        self.first_dropped.get_or_insert_with(|| row.to_string());
    }

    /// Counts a row with a sequence of `n` tokens; returns false if it is dropped. `cuts`: whether
    /// TRL would truncate it.
    fn admit(
        &mut self,
        row: &RowPlace,
        n: usize,
        options: &PreferenceOptions,
        cuts: bool,
    ) -> Result<bool> {
        self.longest = self.longest.max(n);
        let Some(limit) = options.max_length.filter(|limit| n > *limit) else { return Ok(true) };
        match options.on_truncation {
            OnTruncation::Error => Err(too_long(row, n, limit)),
            OnTruncation::Truncate if cuts => {
                self.truncated += 1;
                Ok(true)
            }
            OnTruncation::Truncate | OnTruncation::Drop => {
                self.dropped_too_long += 1;
                self.dropped(row);
                Ok(false)
            }
        }
    }

    /// Counts a sequence of an example.
    fn count(&mut self, sequence: &MaskedSequence) {
        self.tokens += sequence.input_ids.len();
        self.target_tokens = self.target_tokens.map(|n| n + sequence.targets());
    }

    /// Returns an error if nothing is left.
    fn finish(self) -> Result<PreferenceStats> {
        let Some(first) = &self.first else { return Err(no_rows()) };
        self.bad.some_left(self.examples)?;
        if self.examples > 0 {
            return Ok(self);
        }
        let limit = self.max_length.unwrap_or(0);
        let message = format!(
            "max_length={limit} excludes all {} rows; raise max_length (the longest sequence has \
             {} tokens)",
            self.rows, self.longest
        );
        Err(Error::data(&first.file, None, message))
    }
}

impl fmt::Display for PreferenceStats {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let rows = if self.rows == 1 { "row" } else { "rows" };
        write!(f, "{} {rows} read, {} examples: {} tokens", self.rows, self.examples, self.tokens)?;
        if let Some(n) = self.target_tokens {
            write!(f, ", {n} of them in completions")?;
        }
        write!(f, ". The longest sequence has {} tokens", self.longest)?;
        match self.max_length {
            Some(limit) => write!(f, "; {} rows were cut at max_length={limit}", self.truncated)?,
            None => write!(f, "; nothing is cut")?,
        }
        if self.dropped_too_long > 0 {
            write!(f, ", {} dropped as too long", self.dropped_too_long)?;
        }
        if self.dropped_no_target > 0 {
            write!(
                f,
                ", {} dropped because their prompt fills max_length",
                self.dropped_no_target
            )?;
        }
        if let Some(place) = &self.first_dropped {
            write!(f, " (the first: {place})")?;
        }
        write!(f, ".")?;
        write_mismatches(f, self.prefix_mismatches, &self.mismatch)?;
        if let Some(note) = self.unused_template {
            write!(f, " {note}")?;
        }
        self.bad.write_last(f)
    }
}
