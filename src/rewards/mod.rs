//! Rewards of online RL: built-in verifiers, functions of the program, an external command, a
//! Python worker; their weighted sum. Layer 6.
//!
//! Invariant: a reward gives one number, or `None` (not applicable), for each completion, in the
//! order of the batch; a reward that cannot is an error that names the row. Aggregation and `None`
//! follow TRL 1.16.0.

pub mod model;
mod numeric;
mod schema;
mod spec;
mod text;
mod worker;

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::observer::Observer;

pub use schema::Schema;
pub use worker::Worker;

/// What a batch of completions is scored from: one entry a completion in each list.
#[derive(Clone, Debug, Default)]
pub struct RewardBatch {
    /// A string, or a list of messages.
    pub prompts: Vec<Value>,
    /// A string, or a list of messages.
    pub completions: Vec<Value>,
    pub completion_ids: Vec<Vec<u32>>,
    /// All further columns of the dataset, repeated for each generation.
    pub columns: Map<String, Value>,
}

impl RewardBatch {
    pub fn len(&self) -> usize {
        self.completions.len()
    }

    /// Adds a completion, as a string or a message like its prompt. `columns` are the row's other
    /// fields; a field that only some rows have is null in the others.
    pub fn push<'a>(
        &mut self,
        prompt: &Value,
        columns: impl Iterator<Item = (&'a String, &'a Value)>,
        text: &str,
        ids: Vec<u32>,
    ) {
        let n = self.len();
        for (name, cell) in columns {
            let column = self.columns.entry(name.clone()).or_insert_with(|| Value::Array(vec![]));
            if let Value::Array(cells) = column {
                cells.resize(n, Value::Null);
                cells.push(cell.clone());
            }
        }
        for column in self.columns.values_mut() {
            if let Value::Array(cells) = column {
                cells.resize(n + 1, Value::Null);
            }
        }
        self.completions.push(match prompt {
            Value::Array(_) => json!([{ "role": "assistant", "content": text }]),
            _ => json!(text),
        });
        self.prompts.push(prompt.clone());
        self.completion_ids.push(ids);
    }

    pub fn is_empty(&self) -> bool {
        self.completions.is_empty()
    }

    /// Every list has one entry a completion; says which one has not.
    pub fn check(&self) -> Result<()> {
        let n = self.len();
        let mut lengths = vec![("prompts".to_string(), self.prompts.len())];
        lengths.push(("completion_ids".into(), self.completion_ids.len()));
        for (name, column) in &self.columns {
            lengths.push((name.clone(), column.as_array().map_or(0, Vec::len)));
        }
        match lengths.iter().find(|(_, l)| *l != n) {
            Some((name, l)) => {
                Err(Error::Run(format!("rewards: {n} completions, but {name} has {l} entries")))
            }
            None => Ok(()),
        }
    }

    /// The cell of a column; `Null` where there is none.
    fn cell(&self, column: &str, row: usize) -> &Value {
        self.columns.get(column).and_then(|c| c.get(row)).unwrap_or(&Value::Null)
    }

    /// The text that a verifier reads: the string, or the content of the last assistant message.
    pub fn completion_text(&self, row: usize) -> String {
        text::of(&self.completions[row])
    }
}

/// One completion, as a [`RewardFunction`] sees it.
#[deny(missing_docs)]
#[derive(Clone, Copy)]
pub struct RewardRow<'a> {
    batch: &'a RewardBatch,
    row: usize,
}

#[deny(missing_docs)]
impl RewardRow<'_> {
    /// A string, or a list of messages.
    pub fn prompt(&self) -> &Value {
        &self.batch.prompts[self.row]
    }

    /// The completion's text: of a conversation, the last assistant message.
    pub fn text(&self) -> String {
        self.batch.completion_text(self.row)
    }

    /// The completion's tokens.
    pub fn ids(&self) -> &[u32] {
        &self.batch.completion_ids[self.row]
    }

    /// The row's value in another column of the data; `Null` where there is none.
    pub fn column(&self, name: &str) -> &Value {
        self.batch.cell(name, self.row)
    }
}

type ScoreRow = dyn Fn(&RewardRow) -> Option<f64> + Send + Sync;

/// A reward that the program computes itself; clones share the function.
#[derive(Clone)]
pub struct RewardFunction {
    name: String,
    function: Arc<ScoreRow>,
}

#[deny(missing_docs)]
impl RewardFunction {
    /// `function` scores a completion, or gives `None` where it does not apply; metrics call it
    /// `name`.
    pub fn new(
        name: impl Into<String>,
        function: impl Fn(&RewardRow) -> Option<f64> + Send + Sync + 'static,
    ) -> RewardFunction {
        RewardFunction { name: name.into(), function: Arc::new(function) }
    }

    /// Its name in metrics.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for RewardFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RewardFunction({})", self.name)
    }
}

impl From<RewardFunction> for Reward {
    fn from(function: RewardFunction) -> Reward {
        Reward { name: function.name.clone(), weight: 1.0, kind: Kind::Function(function) }
    }
}

/// One reward, with its name in metrics and its weight in the sum.
#[derive(Debug)]
pub struct Reward {
    pub name: String,
    pub weight: f64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    ExactMatch { column: Option<String> },
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

/// Columns that hold the right answer where a verifier is not told which one does.
const ANSWER_COLUMNS: [&str; 4] = ["answer", "solution", "ground_truth", "reference"];

impl Reward {
    /// The score of each completion; `None` where this reward does not apply to the row.
    pub fn score(
        &mut self,
        batch: &RewardBatch,
        observer: &dyn Observer,
    ) -> Result<Vec<Option<f64>>> {
        batch.check()?;
        if let Kind::Worker(worker) = &mut self.kind {
            return worker.score(&self.name, batch, observer);
        }
        (0..batch.len()).map(|row| self.verify(batch, row)).collect()
    }

    fn verify(&self, batch: &RewardBatch, row: usize) -> Result<Option<f64>> {
        let truth = |yes: bool| Some(f64::from(u8::from(yes)));
        let text = || batch.completion_text(row);
        Ok(match &self.kind {
            Kind::ExactMatch { column } => {
                let answers = self.answers(batch, column.as_deref(), row)?;
                let text = text();
                if answers.is_empty() {
                    None
                } else {
                    truth(answers.iter().any(|a| a.trim() == text.trim()))
                }
            }
            Kind::NumericMatch { column } => {
                let answers = self.answers(batch, column.as_deref(), row)?;
                let gold: Vec<f64> = answers.iter().filter_map(|a| numeric::answer(a)).collect();
                match (gold.is_empty(), numeric::answer(&text())) {
                    (true, _) => None, // as TRL: a row whose truth cannot be read is skipped
                    (false, None) => truth(false),
                    (false, Some(got)) => truth(gold.iter().any(|g| numeric::same(*g, got))),
                }
            }
            Kind::Regex { pattern } => truth(pattern.is_match(&text()).map_err(|e| {
                let name = &self.name;
                Error::Run(format!(
                    "reward `{name}`, row {row}: the pattern gave up ({e}); make it simpler"
                ))
            })?),
            Kind::ThinkFormat => truth(text::has_think_format(&text())),
            Kind::JsonSchema { schema } => {
                truth(text::json(&text()).is_some_and(|v| schema.accepts(&v)))
            }
            Kind::Length { min, max } => {
                truth((*min..=*max).contains(&batch.completion_ids[row].len()))
            }
            Kind::SoftOverlong { max_completion_len, soft_punish_cache } => {
                Some(text::soft_overlong(
                    batch.completion_ids[row].len(),
                    *max_completion_len,
                    *soft_punish_cache,
                ))
            }
            Kind::Repetition { ngram_size, max_penalty } => {
                Some(text::repetition(&batch.completion_ids[row], *ngram_size, *max_penalty))
            }
            Kind::Function(reward) => (reward.function)(&RewardRow { batch, row }),
            Kind::Worker(_) => return Err(Error::Run("a worker scores whole batches".into())),
        })
    }

    /// The right answers of a row; none where the cell is null, which skips the row.
    fn answers(
        &self,
        batch: &RewardBatch,
        column: Option<&str>,
        row: usize,
    ) -> Result<Vec<String>> {
        let columns = &batch.columns;
        let found = match column {
            Some(name) => columns.contains_key(name).then_some(name),
            None => ANSWER_COLUMNS.into_iter().find(|c| columns.contains_key(*c)),
        };
        let Some(found) = found else {
            let wanted = column
                .map_or_else(|| format!("one of {}", ANSWER_COLUMNS.join(", ")), str::to_string);
            let has = columns.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let name = &self.name;
            return Err(Error::Config(format!(
                "reward `{name}` needs the column {wanted}; the data has [{has}]. Name it: `{name}:column=NAME`"
            )));
        };
        Ok(match batch.cell(found, row) {
            Value::Null => Vec::new(),
            Value::Array(list) => list.iter().map(text::plain).collect(),
            one => vec![text::plain(one)],
        })
    }
}

/// Several rewards and their weighted sum.
#[derive(Debug)]
pub struct Rewards {
    pub list: Vec<Reward>,
}

/// What the rewards of a batch were.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    pub names: Vec<String>,
    pub weights: Vec<f64>,
    /// By reward, then by completion.
    pub each: Vec<Vec<Option<f64>>>,
}

impl Rewards {
    /// One reward a spec (see [`Reward::parse`]); `weights` as TRL's `reward_weights`: one a
    /// reward, or none at all.
    pub fn parse(specs: &[String], weights: Option<&[f64]>) -> Result<Rewards> {
        Rewards::with_functions(specs, &[], weights)
    }

    /// As [`Rewards::parse`], and behind them functions of the program.
    pub fn with_functions(
        specs: &[String],
        functions: &[RewardFunction],
        weights: Option<&[f64]>,
    ) -> Result<Rewards> {
        let mut list = specs.iter().map(|s| Reward::parse(s)).collect::<Result<Vec<_>>>()?;
        list.extend(functions.iter().cloned().map(Reward::from));
        if list.is_empty() {
            return Err(Error::Config(format!(
                "no reward is given; known ones: {}",
                spec::known()
            )));
        }
        if let Some(weights) = weights {
            if weights.len() != list.len() {
                let (w, r) = (weights.len(), list.len());
                return Err(Error::Config(format!(
                    "reward_weights has {w} values for {r} rewards; give one each"
                )));
            }
            list.iter_mut().zip(weights).for_each(|(r, w)| r.weight = *w);
        }
        Rewards::new(list)
    }

    /// Two rewards of one name get numbers, so that metrics keep them apart.
    pub fn new(mut list: Vec<Reward>) -> Result<Rewards> {
        for i in 1..list.len() {
            let same = list[..i].iter().filter(|r| r.name == list[i].name).count();
            if same > 0 {
                list[i].name = format!("{}_{}", list[i].name, same + 1);
            }
        }
        Ok(Rewards { list })
    }

    pub fn score(&mut self, batch: &RewardBatch, observer: &dyn Observer) -> Result<Scores> {
        let mut scores = Scores::default();
        for reward in &mut self.list {
            scores.each.push(reward.score(batch, observer)?);
            scores.names.push(reward.name.clone());
            scores.weights.push(reward.weight);
        }
        Ok(scores)
    }
}

impl Scores {
    /// `sum_k w_k r_k` over the rewards that apply to a row; `None` where none does: such a
    /// completion is in no baseline and gets advantage 0.
    pub fn total(&self) -> Vec<Option<f64>> {
        let n = self.each.first().map_or(0, Vec::len);
        let row = |i: usize| {
            let mut terms =
                self.each.iter().zip(&self.weights).filter_map(|(r, w)| Some(w * r[i]?)).peekable();
            terms.peek().is_some().then(|| terms.sum())
        };
        (0..n).map(row).collect()
    }
}
