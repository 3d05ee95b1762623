//! The best evaluation of a run so far, and early stopping. Layer 8.
//!
//! Invariant: the rules are those of transformers 5.17: an evaluation is compared with the best
//! earlier one, and a NaN is never better. A checkpoint keeps the exact bits of the compared
//! values.

use serde_json::{Value, json};

use crate::config::BestModelOptions;
use crate::error::{Error, Result};
use crate::methods::Metric;

/// The state of the comparison of evaluations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BestModel {
    /// The metric of the best evaluation; None before the first.
    metric: Option<f64>,
    /// The step of the best evaluation; 0 if none was better than the initial value.
    step: u64,
    /// The step of the best checkpoint that was saved.
    saved: Option<u64>,
    /// Consecutive evaluations without an improvement.
    misses: u64,
}

impl BestModel {
    /// Records an evaluation at step `step`; metric names lack the prefix `eval_`. Error: the
    /// metric is not among them.
    pub fn take(
        &mut self,
        options: &BestModelOptions,
        step: u64,
        metrics: &[Metric],
    ) -> Result<()> {
        if !options.compares() {
            return Ok(());
        }
        let name = options.metric();
        let Some(value) = metrics.iter().find(|m| name == format!("eval_{}", m.0)) else {
            let known: Vec<String> = metrics.iter().map(|m| format!("eval_{}", m.0)).collect();
            return Err(Error::Config(format!(
                "metric_for_best_model = {name}: an evaluation of this run has no such metric; give one of {}",
                known.join(", ")
            )));
        };
        let (value, greater) = (value.1, options.greater());
        let better = |best: f64| if greater { value > best } else { value < best };
        let improves =
            |best: f64| better(best) && (value - best).abs() > options.early_stopping_threshold;
        self.misses = if self.metric.is_none_or(improves) { 0 } else { self.misses + 1 };
        let worst = if greater { f64::NEG_INFINITY } else { f64::INFINITY };
        let best = self.metric.unwrap_or(worst);
        self.metric = Some(best);
        if better(best) {
            (self.metric, self.step) = (Some(value), step);
        }
        Ok(())
    }

    /// The step of the checkpoint that must be kept.
    pub fn kept(&self, options: &BestModelOptions) -> Option<u64> {
        self.saved.filter(|_| options.load_best_model_at_end)
    }

    /// Notes that `checkpoint-STEP` is being written: it is the best one if its evaluation was.
    pub fn saving(&mut self, step: u64) {
        if self.step == step && step > 0 {
            self.saved = Some(step);
        }
    }

    /// Whether early stopping ends the run.
    pub fn ends(&self, options: &BestModelOptions) -> bool {
        options.early_stopping_patience.is_some_and(|patience| self.misses >= patience as u64)
    }

    /// The step of the best checkpoint.
    pub fn saved(&self) -> Option<u64> {
        self.saved
    }

    /// The best metric and its step as text for a message.
    pub fn told(&self, options: &BestModelOptions) -> String {
        format!(
            "{} was {} at step {}",
            options.metric(),
            self.metric.unwrap_or(f64::NAN),
            self.step
        )
    }

    /// The number of consecutive evaluations without an improvement.
    pub fn misses(&self) -> u64 {
        self.misses
    }

    /// The best metric and its step, for trainer_state.json.
    pub fn shown(&self) -> (Value, Value) {
        let metric = self.metric.filter(|v| v.is_finite());
        (json!(metric), if self.step > 0 { json!(self.step) } else { Value::Null })
    }

    /// The state for a checkpoint.
    pub fn state(&self) -> Value {
        json!({ "metric": self.metric.map(f64::to_bits), "step": self.step, "saved": self.saved, "misses": self.misses })
    }

    /// The state from [`BestModel::state`]; the initial state if the checkpoint has none.
    pub fn from_state(state: &Value) -> BestModel {
        let number = |key: &str| state[key].as_u64();
        BestModel {
            metric: number("metric").map(f64::from_bits),
            step: number("step").unwrap_or(0),
            saved: number("saved"),
            misses: number("misses").unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(patience: usize, threshold: f64, metric: &str) -> BestModelOptions {
        BestModelOptions {
            early_stopping_patience: Some(patience),
            early_stopping_threshold: threshold,
            metric_for_best_model: Some(metric.into()),
            ..Default::default()
        }
    }

    /// The best step after each evaluation, and the evaluation that ends the run.
    fn run(options: &BestModelOptions, values: &[f64]) -> (Vec<u64>, Option<usize>) {
        let (mut best, mut steps) = (BestModel::default(), Vec::new());
        for (i, value) in values.iter().enumerate() {
            best.take(options, i as u64 + 1, &[("score".into(), 0.0), ("loss".into(), *value)])
                .unwrap();
            best = BestModel::from_state(&serde_json::from_str(&best.state().to_string()).unwrap());
            steps.push(best.step);
            if best.ends(options) {
                return (steps, Some(i));
            }
        }
        (steps, None)
    }

    #[test]
    fn evaluations_are_compared_as_transformers_compares_them() {
        // Values and ends from transformers 5.17's EarlyStoppingCallback.
        let falling = [3.0, 2.0, 2.5, 1.9, 1.95, 1.92, 1.0];
        assert_eq!(run(&options(2, 0.0, "loss"), &falling), (vec![1, 2, 2, 4, 4, 4], Some(5)));
        // 1.9 is better than 2.0, but not by more than the threshold: the best moves, but the count
        // goes on.
        assert_eq!(run(&options(2, 0.2, "eval_loss"), &falling), (vec![1, 2, 2, 4], Some(3)));
        let nan = [f64::NAN, 2.0, f64::NAN, 1.0];
        assert_eq!(run(&options(2, 0.0, "loss"), &nan), (vec![0, 2, 2, 4], None));
        let greater = BestModelOptions { greater_is_better: Some(true), ..options(3, 0.0, "loss") };
        assert_eq!(run(&greater, &falling), (vec![1, 1, 1, 1], Some(3)));
        assert!(options(1, 0.0, "accuracy").greater() && !options(1, 0.0, "eval_loss").greater());
        let e = BestModel::default().take(&options(1, 0.0, "f1"), 1, &[("loss".into(), 1.0)]);
        assert!(e.unwrap_err().to_string().contains("give one of eval_loss"));
    }
}
