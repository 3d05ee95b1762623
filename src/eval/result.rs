//! The results of an evaluation. Layer 6.
//!
//! Invariant: a metric says how many rows it covers; there is one result per row, in the order of
//! the rows.

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

/// A number. If it is a mean over rows, it has a standard error.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalMetric {
    pub name: String,
    pub value: f64,
    pub stderr: Option<f64>,
    /// Number of rows that it covers.
    pub rows: usize,
}

/// Rows to which a reward did not apply; its metrics cover the others.
#[derive(Clone, Debug, PartialEq)]
pub struct SkippedRows {
    pub reward: String,
    pub rows: usize,
}

/// The result of a row.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum EvalRow {
    /// The completions of a prompt (a string or messages), and the score of each by reward.
    Answers { prompt: Value, completions: Vec<String>, rewards: Map<String, Value> },
    /// The negative log-likelihood, in nats, of this many tokens.
    Likelihood { nll: f64, tokens: usize },
    /// A reward model's scores of a pair.
    Preference { chosen: f32, rejected: f32 },
    /// The log-prob of each choice, and the indices of the right choice, of the highest and of the
    /// highest per byte.
    Choices { logps: Vec<f64>, answer: usize, chosen: usize, chosen_norm: usize },
}

impl EvalMetric {
    /// The mean over rows, with its standard error (for at least two rows).
    pub fn mean(name: impl Into<String>, values: &[f64]) -> EvalMetric {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let stderr = (values.len() > 1).then(|| (variance / n).sqrt());
        EvalMetric { name: name.into(), value: mean, stderr, rows: values.len() }
    }

    /// The quotient of two sums over rows, such as nats over tokens. Its standard error (for at
    /// least two rows) is that of the rows' residuals divided by the mean of the second.
    pub fn ratio(name: impl Into<String>, over: &[f64], under: &[f64]) -> EvalMetric {
        let (n, total) = (over.len() as f64, under.iter().sum::<f64>());
        let value = over.iter().sum::<f64>() / total;
        let residuals = over.iter().zip(under).map(|(x, y)| (x - value * y).powi(2)).sum::<f64>();
        let stderr = (over.len() > 1).then(|| (residuals * n / (n - 1.0)).sqrt() / total);
        EvalMetric { name: name.into(), value, stderr, rows: over.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_ratio_is_that_of_the_mean_where_all_rows_weigh_the_same() {
        let values = [1.0, 4.0, 2.5, 0.5];
        let (mean, ratio) =
            (EvalMetric::mean("x", &values), EvalMetric::ratio("x", &values, &[1.0; 4]));
        assert!((mean.value - ratio.value).abs() < 1e-15);
        assert!((mean.stderr.unwrap() - ratio.stderr.unwrap()).abs() < 1e-15);
        assert_eq!(EvalMetric::ratio("x", &[3.0], &[2.0]).stderr, None);
    }

    #[test]
    fn the_error_of_a_ratio_is_about_that_of_many_samples() {
        // Rows of 1 to 8 tokens with different nats per token; compares with the spread of 400
        // samples of 200 rows.
        let draw = |sample: u32, row: u32| {
            let bits = crate::rng::philox([7, 0], [row, sample, 0, 0]);
            let (a, b) = (crate::rng::uniform(bits[0]), crate::rng::uniform(bits[1]));
            let tokens = (1.0 + 8.0 * f64::from(a)).floor();
            (tokens * (1.0 + f64::from(b)), tokens)
        };
        let of = |sample: u32| -> EvalMetric {
            let (over, under): (Vec<f64>, Vec<f64>) = (0..200).map(|row| draw(sample, row)).unzip();
            EvalMetric::ratio("loss", &over, &under)
        };
        let all: Vec<EvalMetric> = (0..400).map(of).collect();
        let spread = EvalMetric::mean("", &all.iter().map(|m| m.value).collect::<Vec<_>>());
        let spread = spread.stderr.unwrap() * 400f64.sqrt();
        let said = all.iter().map(|m| m.stderr.unwrap()).sum::<f64>() / 400.0;
        // The spread of 400 samples is itself uncertain by 4%.
        assert!((said / spread - 1.0).abs() < 0.1, "{said} {spread}");
    }
}
