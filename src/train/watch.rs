//! Warnings about a run that computes finite numbers but does not learn: a diverged loss, unusable
//! rewards. Layer 8.
//!
//! Invariant: nothing here changes a step; it warns once, or ends a run that learns nothing.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::observer::Observer;

/// Larger totals overflow in the variance of a group, or in float32.
const LARGEST: f64 = 1e18;
/// Number of steps without a usable reward after which a run that had some before ends.
const PATIENCE: u64 = 10;

/// The counters of one run.
#[derive(Debug, Default)]
pub struct Watch {
    diverged: bool,
    warned: bool,
    ever_usable: bool,
    /// Counted since the last log with a usable reward, or since the start.
    usable: usize,
    scored: usize,
    steps: u64,
}

impl Watch {
    /// Examines the lines of completions.jsonl for a step: scored lines have a `reward`, which is
    /// null if no reward applied or if the total is NaN or infinite.
    pub fn completions(&mut self, step: u64, lines: &[Value], observer: &dyn Observer) {
        self.steps += 1;
        let totals: Vec<&Value> = lines.iter().filter_map(|line| line.get("reward")).collect();
        let is_usable = |v: &&&Value| v.as_f64().is_some_and(|r| r.abs() <= LARGEST);
        let usable = totals.iter().filter(is_usable).count();
        self.usable += usable;
        self.scored += totals.len();
        self.ever_usable |= usable > 0;
        if usable == 0 && !totals.is_empty() && !self.warned {
            self.warned = true;
            observer.warn(&format!(
                "step {step}: none of {} completions has a usable reward: each is null, NaN, \
                 infinite or beyond {LARGEST:e}. The step learns nothing from them; check \
                 reward_funcs and the columns that they read",
                totals.len()
            ));
        }
    }

    /// Called at each log. Error: there has been no usable reward since the last log, at the start
    /// of a run or for ten steps.
    pub fn rewards(&mut self, step: u64) -> Result<()> {
        if self.usable > 0 {
            (self.usable, self.scored, self.steps) = (0, 0, 0);
            return Ok(());
        }
        if self.scored == 0 || (self.ever_usable && self.steps < PATIENCE) {
            return Ok(());
        }
        Err(Error::Run(format!(
            "step {step}: none of the last {} completions has a usable reward (each is null, NaN, \
             infinite or beyond {LARGEST:e}), so the run learns nothing.\nCheck reward_funcs, the columns \
             that they read and reward_weights; `rewards` in completions.jsonl has each reward's value.",
            self.scored
        )))
    }

    /// Warns once if the loss is far above its start and the gradient has vanished.
    pub fn loss(&mut self, history: &[Map<String, Value>], observer: &dyn Observer) {
        let value = |line: &Map<String, Value>, key: &str| line.get(key).and_then(Value::as_f64);
        let both = |line| Some((value(line, "loss")?, value(line, "grad_norm")?));
        let Some((first, first_norm)) = history.iter().find_map(both) else { return };
        let Some((last, norm)) = history.iter().rev().find_map(both) else { return };
        let far = last > first + first.abs().max(1.0);
        if self.diverged || !far || norm > 1e-3 * first_norm {
            return;
        }
        self.diverged = true;
        observer.warn(&format!(
            "the loss is {last:.3} ({first:.3} at the start) and the gradient norm is \
             {norm:.1e}: the run has diverged and will not recover. Stop it and start again with \
             a lower learning_rate"
        ));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::json;

    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Observer for Heard {
        fn warn(&self, text: &str) {
            self.0.lock().unwrap().push(text.into());
        }
    }

    #[test]
    fn rewards_of_which_none_is_usable_are_said_and_end_the_run() {
        let none = [json!({"reward": null}), json!({"reward": 1e308}), json!({"reward": -1e308})];
        let some = [json!({"reward": null}), json!({"reward": 0.0})];
        let (heard, mut watch) = (Heard::default(), Watch::default());
        watch.completions(1, &none, &heard);
        assert_eq!(heard.0.lock().unwrap().len(), 1);
        assert!(watch.rewards(1).unwrap_err().to_string().contains("none of the last 3"));
        // A run that works at first is given ten steps.
        let mut watch = Watch::default();
        watch.completions(1, &some, &heard);
        watch.rewards(1).unwrap();
        for step in 2..=10 {
            watch.completions(step, &none, &heard);
            watch.rewards(step).unwrap();
        }
        watch.completions(11, &none, &heard);
        assert!(watch.rewards(11).is_err());
        // Methods without rewards, and steps without generation.
        let mut watch = Watch::default();
        watch.completions(1, &[json!({"by": "teacher"})], &heard);
        watch.rewards(1).unwrap();
        assert_eq!(heard.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_loss_far_above_its_start_without_gradient_is_said_once() {
        let line = |loss: f64, norm: f64| {
            json!({"loss": loss, "grad_norm": norm}).as_object().unwrap().clone()
        };
        let (heard, mut watch) = (Heard::default(), Watch::default());
        let mut history = vec![line(2.0, 1.0), line(6.0, 0.5)];
        watch.loss(&history, &heard);
        history.push(line(2.5, 0.0));
        watch.loss(&history, &heard);
        assert!(heard.0.lock().unwrap().is_empty());
        history.push(line(6.0, 0.0));
        watch.loss(&history, &heard);
        watch.loss(&history, &heard);
        assert_eq!(heard.0.lock().unwrap().len(), 1);
    }
}
