//! What a run reports to its caller. Layer 0.
//!
//! Invariant: library code writes to no stream of the process; it calls the observer of its
//! context.

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
    /// A measured value; may be NaN.
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

/// How far a run is, and how fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total: u64,
    /// Over about the last ten seconds; 0 before the second step.
    pub steps_per_second: f64,
    /// Likewise.
    pub tokens_per_second: f64,
    /// Since training began, or went on after a resume.
    pub elapsed: Duration,
    /// What the rest will take at the mean pace so far; None before the first step.
    pub left: Option<Duration>,
}

/// Work beside the training steps: an evaluation's prompts, for example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work<'a> {
    /// What is counted: "questions".
    pub what: &'a str,
    /// How many are done.
    pub done: usize,
    /// How many there are.
    pub total: usize,
}

/// Hears of what happens in a run. Every method does nothing unless it is implemented.
pub trait Observer: Send + Sync {
    /// Something that belongs to every run: its device, its memory plan, its data.
    fn info(&self, _text: &str) {}

    /// Something that differs from what the caller may expect.
    fn note(&self, _text: &str) {}

    /// Something that went wrong and does not end the run.
    fn warn(&self, _text: &str) {}

    /// Training begins, or goes on after `step` steps.
    fn begin(&self, _step: u64, _total: u64) {}

    /// An optimizer step was done.
    fn progress(&self, _at: &Progress) {}

    /// Part of a long job was done; nothing more follows when all of it is.
    fn work(&self, _at: &Work) {}

    /// Metrics of training or evaluation were logged at `step` of `total`, in this order.
    fn metrics(&self, _step: u64, _total: u64, _metrics: &[(&str, MetricValue)]) {}

    /// Training has ended, also with an error.
    fn end(&self) {}

    /// What a finished run took and gave, ready to be shown.
    fn summary(&self, _text: &str) {}
}

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
