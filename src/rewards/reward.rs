//! One reward: a verifier, a function of the program, or a worker. Layer 6.
//!
//! Invariant: a score is `None` if the reward does not apply to the row.

use serde_json::Value;

use super::batch::RewardBatch;
use super::function::RewardFunction;
use super::schema::Schema;
use super::worker::Worker;
use super::{numeric, text};
use crate::error::{Error, Result};
use crate::observer::Observer;

/// A reward with its name in metrics and its weight in the sum.
#[derive(Debug)]
pub struct Reward {
    pub name: String,
    pub weight: f64,
    pub(super) kind: Verifier,
}

/// How a completion is scored.
#[derive(Debug)]
pub(super) enum Verifier {
    ExactMatch { column: Option<String>, after: Option<String>, until: Option<String> },
    NumericMatch { column: Option<String> },
    Regex { pattern: Box<fancy_regex::Regex> },
    ThinkFormat,
    JsonSchema { schema: Schema },
    Length { min: usize, max: usize },
    SoftOverlong { max_completion_len: usize, soft_punish_cache: usize },
    Repetition { ngram_size: usize, max_penalty: f64 },
    Function(RewardFunction),
    Worker(Box<Worker>),
}

/// Columns with the right answer, for verifiers without the option `column`.
const ANSWER_COLUMNS: [&str; 4] = ["answer", "solution", "ground_truth", "reference"];

impl From<RewardFunction> for Reward {
    fn from(function: RewardFunction) -> Reward {
        let name = function.name().to_string();
        Reward { name, weight: 1.0, kind: Verifier::Function(function) }
    }
}

impl Reward {
    /// The score of each completion; `None` if this reward does not apply to the row.
    pub fn score(
        &mut self,
        batch: &RewardBatch,
        observer: &dyn Observer,
    ) -> Result<Vec<Option<f64>>> {
        batch.check()?;
        if let Verifier::Worker(worker) = &mut self.kind {
            return worker.score(&self.name, batch, observer);
        }
        (0..batch.len()).map(|row| self.verify(batch, row)).collect()
    }

    fn verify(&self, batch: &RewardBatch, row: usize) -> Result<Option<f64>> {
        let truth = |yes: bool| Some(f64::from(u8::from(yes)));
        let text = || batch.completion_text(row);
        Ok(match &self.kind {
            Verifier::ExactMatch { after, until, .. } => {
                let answers = self.answers(batch, row)?;
                let whole = text();
                let said = text::between(&whole, after.as_deref(), until.as_deref());
                if answers.is_empty() {
                    None
                } else {
                    truth(said.is_some_and(|said| answers.iter().any(|a| a.trim() == said.trim())))
                }
            }
            Verifier::NumericMatch { .. } => {
                let answers = self.answers(batch, row)?;
                let gold: Vec<f64> = answers.iter().filter_map(|a| numeric::answer(a)).collect();
                match (gold.is_empty(), numeric::answer(&text())) {
                    (true, _) => None, // as in TRL: a row with an unreadable answer is skipped
                    (false, None) => truth(false),
                    (false, Some(got)) => truth(gold.iter().any(|g| numeric::same(*g, got))),
                }
            }
            Verifier::Regex { pattern } => truth(pattern.is_match(&text()).map_err(|e| {
                let name = &self.name;
                Error::Run(format!(
                    "reward `{name}`, row {row}: matching the pattern failed ({e}); simplify it"
                ))
            })?),
            Verifier::ThinkFormat => truth(text::has_think_format(&text())),
            Verifier::JsonSchema { schema } => {
                truth(text::json(&text()).is_some_and(|v| schema.accepts(&v)))
            }
            Verifier::Length { min, max } => {
                truth((*min..=*max).contains(&batch.completion_ids[row].len()))
            }
            Verifier::SoftOverlong { max_completion_len, soft_punish_cache } => {
                Some(text::soft_overlong(
                    batch.completion_ids[row].len(),
                    *max_completion_len,
                    *soft_punish_cache,
                ))
            }
            Verifier::Repetition { ngram_size, max_penalty } => {
                Some(text::repetition(&batch.completion_ids[row], *ngram_size, *max_penalty))
            }
            Verifier::Function(function) => function.score(batch, row),
            Verifier::Worker(_) => return Err(Error::Run("a worker scores whole batches".into())),
        })
    }

    /// The column with the right answers, among `columns`. None: the reward reads no such column.
    /// Error: the column is missing.
    pub(super) fn answer_column<'a>(
        &self,
        mut columns: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Option<&'a str>> {
        let (Verifier::ExactMatch { column, .. } | Verifier::NumericMatch { column }) = &self.kind
        else {
            return Ok(None);
        };
        let all = columns.clone();
        let found = match column {
            Some(name) => columns.find(|c| c == name),
            None => ANSWER_COLUMNS.iter().find_map(|name| all.clone().find(|c| c == name)),
        };
        if found.is_some() {
            return Ok(found);
        }
        let wanted = match column {
            Some(name) => name.clone(),
            None => format!("one of {}", ANSWER_COLUMNS.join(", ")),
        };
        let (name, has) = (&self.name, all.collect::<Vec<_>>().join(", "));
        Err(Error::Config(format!(
            "reward `{name}` needs the column {wanted}; the data has [{has}]. Name it: `{name}:column=NAME`"
        )))
    }

    /// The right answers of a row. Empty if the cell is null, which skips the row.
    fn answers(&self, batch: &RewardBatch, row: usize) -> Result<Vec<String>> {
        let columns = batch.columns.keys().map(String::as_str);
        Ok(match self.answer_column(columns)?.map(|found| batch.cell(found, row)) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list.iter().map(text::plain).collect(),
            Some(one) => vec![text::plain(one)],
        })
    }
}
