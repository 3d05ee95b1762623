//! What an evaluation found. Layer 6.
//!
//! Invariant: a metric says how many rows it is of; one result a row, in the order of the rows.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::data::bad::BadRows;

/// Metrics, and a result for each row.
#[derive(Clone, Debug, Default)]
pub struct Evaluation {
    pub metrics: Vec<EvalMetric>,
    pub rows: Vec<EvalRow>,
    pub skipped: Vec<SkippedRows>,
    /// Rows that were dropped.
    pub bad: BadRows,
}

/// A number, with the standard error of its mean over the rows where it is a mean.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalMetric {
    pub name: String,
    pub value: f64,
    pub stderr: Option<f64>,
    /// Rows that it is of.
    pub rows: usize,
}

/// Rows that a reward did not apply to: its metrics are of the others.
#[derive(Clone, Debug, PartialEq)]
pub struct SkippedRows {
    pub reward: String,
    pub rows: usize,
}

/// What a row gave.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum EvalRow {
    /// Completions of a prompt (a string or messages), and by reward the score of each.
    Answers { prompt: Value, completions: Vec<String>, rewards: Map<String, Value> },
    /// Negative log-likelihood, in nats, of so many tokens.
    Likelihood { nll: f64, tokens: usize },
    /// A reward model's scores of a pair.
    Preference { chosen: f32, rejected: f32 },
}

impl EvalMetric {
    /// The mean over rows, with its standard error (of at least two rows).
    pub fn mean(name: impl Into<String>, values: &[f64]) -> EvalMetric {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let stderr = (values.len() > 1).then(|| (variance / n).sqrt());
        EvalMetric { name: name.into(), value: mean, stderr, rows: values.len() }
    }
}
