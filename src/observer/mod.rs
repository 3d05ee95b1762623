//! The messages of a run to its caller. Layer 0.
//!
//! Invariant: library code does not write to the streams of the process; it calls the observer of
//! its context.

#![deny(missing_docs)]

pub mod number;
pub mod output;
mod table;
mod terminal;

use std::time::Duration;

pub use terminal::Terminal;

/// A logged value. Integers stay integers (`num_tokens`).
#[derive(Clone, Debug, PartialEq)]
pub enum MetricValue {
    /// A count.
    Int(u64),
    /// A measured value, possibly NaN.
    Float(f64),
    /// A word.
    Text(String),
}

impl From<u64> for MetricValue {
    fn from(v: u64) -> Self {
        MetricValue::Int(v)
    }
}

impl From<f64> for MetricValue {
    fn from(v: f64) -> Self {
        MetricValue::Float(v)
    }
}

impl From<&str> for MetricValue {
    fn from(v: &str) -> Self {
        MetricValue::Text(v.to_string())
    }
}

/// The progress and speed of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total: u64,
    /// Steps per second over about the last ten seconds; 0 before the second step.
    pub steps_per_second: f64,
    /// Tokens per second over about the last ten seconds.
    pub tokens_per_second: f64,
    /// Time since training began, or was resumed.
    pub elapsed: Duration,
    /// Estimated time for the remaining steps at the mean pace so far; None before the first step.
    pub left: Option<Duration>,
}

/// The progress of work besides training steps, for example the prompts of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work<'a> {
    /// The counted items: "questions".
    pub what: &'a str,
    /// Number of finished items.
    pub done: usize,
    /// Number of all items.
    pub total: usize,
}

/// Receives the messages of a run. By default every method does nothing.
pub trait Observer: Send + Sync {
    /// Information about every run: its device, its memory plan, its data.
    fn info(&self, _text: &str) {}

    /// Something that the user may not expect.
    fn note(&self, _text: &str) {}

    /// Something that went wrong but does not end the run.
    fn warn(&self, _text: &str) {}

    /// Training begins, or continues after `step` steps.
    fn begin(&self, _step: u64, _total: u64) {}

    /// An optimizer step has finished.
    fn progress(&self, _at: &Progress) {}

    /// A part of a long job has finished; the last call reports all of it.
    fn work(&self, _at: &Work) {}

    /// Metrics of training or evaluation were logged at `step` of `total`, in this order.
    fn metrics(&self, _step: u64, _total: u64, _metrics: &[(&str, MetricValue)]) {}

    /// Training has ended, possibly with an error.
    fn end(&self) {}

    /// The results and costs of a finished run as text to display.
    fn summary(&self, _text: &str) {}
}

/// An observer that prints nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
