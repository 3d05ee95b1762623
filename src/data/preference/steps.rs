//! Solutions as labelled steps, for process reward models. Layer 6.
//!
//! Invariant: a step's label is on the last token of the separator after the step. Steps are
//! tokenised separately, without special tokens; BOS precedes the prompt if the tokenizer has one.
//! (TRL removed its PRMTrainer before 1.16.0; this matches its last version.)

use rayon::prelude::*;
use serde_json::Value;

use super::encode::Encoder;
use super::{PreferenceOptions, PreferenceStats};
use crate::data::feed::{Encoded, RowEncoder, encode_all};
use crate::data::masked::MaskedSequence;
use crate::data::rows::{Row, RowPlace, kind};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

#[derive(Clone, Debug, PartialEq)]
pub struct StepOptions {
    pub step_separator: String,
    pub train_on_last_step_only: bool,
}

impl Default for StepOptions {
    fn default() -> Self {
        StepOptions { step_separator: "\n".to_string(), train_on_last_step_only: false }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct StepExample {
    pub input_ids: Vec<u32>,
    /// Labelled positions, ascending.
    pub labels: Vec<(usize, bool)>,
    pub row: usize,
}

/// Tokenises rows of a prompt, a list of completions (the steps) and a list of labels.
pub fn steps(
    rows: &[Row],
    tokenizer: &Tokenizer,
    vocab: usize,
    how: &StepOptions,
    options: &PreferenceOptions,
) -> Result<(Vec<StepExample>, PreferenceStats)> {
    encode_all(StepEncoder::new(tokenizer, vocab, how, options)?, rows)
}

/// Tokenises steps in a stream.
pub struct StepEncoder<'a> {
    encoder: Encoder<'a>,
    how: &'a StepOptions,
    options: &'a PreferenceOptions,
    stats: PreferenceStats,
}

impl<'a> StepEncoder<'a> {
    pub fn new(
        tokenizer: &'a Tokenizer,
        vocab: usize,
        how: &'a StepOptions,
        options: &'a PreferenceOptions,
    ) -> Result<StepEncoder<'a>> {
        let stats = PreferenceStats::new(options)?;
        let encoder = Encoder::new(tokenizer, None, vocab, options.eos_token.as_deref())?;
        if tokenizer.encode(&how.step_separator, false)?.is_empty() {
            let message = format!(
                "step_separator={:?} has no tokens, so the labels have no position; set a \
                 separator with at least one token",
                how.step_separator
            );
            return Err(Error::Config(message));
        }
        Ok(StepEncoder { encoder, how, options, stats })
    }

    /// Counts a row and truncates it. None: dropped.
    fn admit(&mut self, place: &RowPlace, mut made: StepExample) -> Result<Option<StepExample>> {
        let StepEncoder { options, stats, .. } = self;
        if !stats.admit(place, made.input_ids.len(), options, true)? {
            return Ok(None);
        }
        let limit = options.max_length.unwrap_or(usize::MAX);
        made.input_ids.truncate(limit);
        made.labels.retain(|(at, _)| *at < limit);
        if made.labels.is_empty() {
            stats.truncated -= 1;
            stats.dropped_no_target += 1;
            stats.dropped(place);
            return Ok(None);
        }
        let mut mask = vec![false; made.input_ids.len()];
        made.labels.iter().for_each(|(at, _)| mask[*at] = true);
        stats.count(&MaskedSequence { input_ids: made.input_ids.clone(), target_mask: mask });
        stats.examples += 1;
        Ok(Some(made))
    }
}

impl RowEncoder for StepEncoder<'_> {
    type Example = StepExample;
    type Stats = PreferenceStats;

    fn encode(&mut self, rows: &[Row], examples: &mut Encoded<StepExample>) -> Result<()> {
        let number = self.stats.rows;
        self.stats.read(rows, false); // steps are always plain texts
        let make = |(i, row): (usize, &Row)| one(&self.encoder, row, number + i, self.how);
        let made: Vec<Result<StepExample>> = rows.par_iter().enumerate().map(make).collect();
        for (row, made) in rows.iter().zip(made) {
            let Some(made) = self.stats.bad.admit(made)? else { continue };
            let place = row.at();
            let example = self.admit(&place, made)?;
            examples.extend(example.map(|example| (place, example)));
        }
        Ok(())
    }

    fn finish(self, _: &mut Encoded<StepExample>) -> Result<PreferenceStats> {
        self.stats.finish()
    }
}

fn one(encoder: &Encoder, row: &Row, index: usize, how: &StepOptions) -> Result<StepExample> {
    let mut ids = encoder.text(row, row.string("prompt")?, false)?;
    if let Some(bos) = encoder.renderer.tokenizer.bos_id() {
        ids.insert(0, bos);
    }
    let (steps, marks) = (list(row, "completions")?, list(row, "labels")?);
    if steps.len() != marks.len() || steps.is_empty() {
        return Err(row.error(format!(
            "has {} completions and {} labels; give each step one label, and at least one step",
            steps.len(),
            marks.len()
        )));
    }
    let separator = encoder.text(row, &how.step_separator, false)?;
    let mut labels = Vec::with_capacity(steps.len());
    for (i, (step, mark)) in steps.iter().zip(marks).enumerate() {
        let step = step
            .as_str()
            .ok_or_else(|| row.wrong(&format!("completions[{i}]"), "a string", step))?;
        ids.extend(encoder.text(row, step, false)?);
        ids.extend(&separator);
        let mark = match mark {
            Value::Bool(b) => *b,
            Value::Number(n) if n.as_f64() == Some(0.0) => false,
            Value::Number(n) if n.as_f64() == Some(1.0) => true,
            other => return Err(row.wrong(&format!("labels[{i}]"), "true or false", other)),
        };
        if !how.train_on_last_step_only || i + 1 == steps.len() {
            labels.push((ids.len() - 1, mark));
        }
    }
    Ok(StepExample { input_ids: ids, labels, row: index })
}

fn list<'a>(row: &'a Row, field: &str) -> Result<&'a [Value]> {
    match row.need(field)? {
        Value::Array(items) => Ok(items),
        other => Err(row.error(format!("field {field:?} must be a list, found {}", kind(other)))),
    }
}
