//! What a run reports to its caller. Layer 0.
//!
//! Invariant: library code writes to no stream of the process; it calls the observer of its
//! context.

#![deny(missing_docs)]

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

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

    /// Metrics of training or evaluation were logged at `step` of `total`, in this order.
    fn metrics(&self, _step: u64, _total: u64, _metrics: &[(&str, MetricValue)]) {}

    /// Training has ended, also with an error.
    fn end(&self) {}
}

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// Prints metrics on stdout, all else on stderr, where a progress bar is shown if it is a terminal.
#[derive(Debug, Default)]
pub struct Terminal {
    bar: Mutex<Option<ProgressBar>>,
}

impl Terminal {
    fn bar(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        self.bar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A closed terminal or pipe does not end a run: metrics.jsonl has what cannot be printed.
    fn print(&self, to: &mut dyn Write, line: &str) {
        let mut write = || {
            let _ = writeln!(to, "{line}").and_then(|()| to.flush());
        };
        match &*self.bar() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

impl Observer for Terminal {
    fn info(&self, text: &str) {
        self.print(&mut std::io::stderr(), text);
    }

    fn note(&self, text: &str) {
        self.info(&format!("note: {text}"));
    }

    fn warn(&self, text: &str) {
        self.info(&format!("warning: {text}"));
    }

    fn begin(&self, step: u64, total: u64) {
        *self.bar() = std::io::stderr().is_terminal().then(|| bar(step, total));
    }

    fn progress(&self, at: &Progress) {
        if let Some(bar) = &*self.bar() {
            bar.set_position(at.step);
            bar.set_message(format!(
                "{} steps/s  {} tokens/s",
                significant(at.steps_per_second),
                thousands(at.tokens_per_second)
            ));
        }
    }

    fn metrics(&self, step: u64, total: u64, metrics: &[(&str, MetricValue)]) {
        let shown = shown(metrics);
        let with_bar = self.bar().is_some();
        let line = if with_bar { shown } else { format!("{step}/{total} {shown}") };
        self.print(&mut std::io::stdout(), &line);
    }

    fn end(&self) {
        if let Some(bar) = self.bar().take() {
            bar.finish();
        }
    }
}

fn bar(first: u64, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        .with_position(first);
    let template = "{percent:>3}% [{bar:30}] {pos}/{len}  {elapsed}<{eta}  {msg}";
    let bar = match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar, // a constant: it parses
    };
    bar.reset_eta();
    bar
}

/// `{'loss': 2.345, 'learning_rate': 2e-05}`, as TRL prints it.
fn shown(metrics: &[(&str, MetricValue)]) -> String {
    let items = metrics.iter().map(|(key, metric)| match metric {
        MetricValue::Int(v) => format!("'{key}': {v}"),
        MetricValue::Float(v) => format!("'{key}': {}", significant(*v)),
        MetricValue::Text(v) => format!("'{key}': '{v}'"),
    });
    format!("{{{}}}", items.collect::<Vec<_>>().join(", "))
}

/// Four significant digits, as Python's `%.4g`.
fn significant(v: f64) -> String {
    if v.is_nan() {
        return "nan".into();
    }
    if v.is_infinite() || v == 0.0 {
        return if v == 0.0 { "0".into() } else { format!("{v}") };
    }
    let scientific = format!("{v:.3e}"); // rounded first: 9999.6 is 1e+04
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |digits: &str| match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => digits.to_string(),
    };
    if (-4..4).contains(&exponent) {
        return trim(&format!("{v:.*}", (3 - exponent).max(0) as usize));
    }
    format!("{}e{}{:02}", trim(mantissa), if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn thousands(v: f64) -> String {
    let digits = format!("{v:.0}");
    let grouped =
        digits.as_bytes().rchunks(3).rev().map(|c| String::from_utf8_lossy(c).into_owned());
    grouped.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_printed_as_python_prints_them() {
        let python = [
            (2.345678, "2.346"),
            (2e-5, "2e-05"),
            (1.23456e-5, "1.235e-05"),
            (0.0001, "0.0001"),
            (9999.6, "1e+04"),
            (999.96, "1000"),
            (12345678.0, "1.235e+07"),
            (-0.5, "-0.5"),
            (0.0, "0"),
            (1e100, "1e+100"),
            (f64::NAN, "nan"),
            (f64::INFINITY, "inf"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (v, text) in python {
            assert_eq!(significant(v), text);
        }
        assert_eq!(thousands(1234567.0), "1,234,567");
        let metrics = [("loss", f64::NAN.into()), ("num_tokens", 7.into()), ("lr", 0.5.into())];
        assert_eq!(shown(&metrics), "{'loss': nan, 'num_tokens': 7, 'lr': 0.5}");
    }
}
