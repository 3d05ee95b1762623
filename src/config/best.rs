//! Which checkpoint is the result of a run, and when a run ends before its last step. Layer 1.
//!
//! Invariant: the rules are those of transformers 5.17's `TrainingArguments` and
//! `EarlyStoppingCallback`.

use super::value::Amount;
use super::{Report, TrainingConfig, When, section};

section! {
    /// Which checkpoint is the result.
    pub struct BestModelOptions = "best model" {
        /// End with the model of the best checkpoint by metric_for_best_model instead of the last
        /// one. save_strategy must equal eval_strategy, and save_steps must be a multiple of
        /// eval_steps; save_total_limit keeps the best checkpoint.
        pub load_best_model_at_end: bool = false,
        /// The evaluation metric that decides which model is best, with or without the prefix
        /// `eval_`. none: loss.
        pub metric_for_best_model: Option<String> = None,
        /// Whether a larger metric_for_best_model is better. none: true unless its name ends in
        /// loss.
        pub greater_is_better: Option<bool> = None,
        /// Ours. End the run after this many evaluations in a row without improvement on the best,
        /// as transformers' EarlyStoppingCallback does. none: never.
        pub early_stopping_patience: Option<usize> = None,
        /// Ours. For early_stopping_patience, count only improvements larger than this.
        pub early_stopping_threshold: f64 = 0.0,
    }
}

impl BestModelOptions {
    /// Whether evaluations are compared at all.
    pub fn compares(&self) -> bool {
        self.load_best_model_at_end
            || self.early_stopping_patience.is_some()
            || self.metric_for_best_model.is_some()
    }

    /// The metric under its logged name, with the prefix `eval_`.
    pub fn metric(&self) -> String {
        let name = self.metric_for_best_model.as_deref().unwrap_or("loss");
        if name.starts_with("eval_") { name.into() } else { format!("eval_{name}") }
    }

    /// Whether a larger metric is better.
    pub fn greater(&self) -> bool {
        self.greater_is_better.unwrap_or(!self.metric().ends_with("loss"))
    }

    fn rules(&self, report: &mut Report) {
        let threshold = self.early_stopping_threshold;
        report.must(threshold >= 0.0, || {
            format!("early_stopping_threshold = {threshold}: must not be negative")
        });
        if let Some(patience) = self.early_stopping_patience {
            report.at_least("early_stopping_patience", patience, 1);
        } else {
            let why = "early_stopping_patience is none";
            report.idle("early_stopping_threshold", "early_stopping_patience", why);
        }
        if !self.compares() {
            let why =
                "no option compares evaluations (load_best_model_at_end, early_stopping_patience)";
            report.idle("greater_is_better", "load_best_model_at_end", why);
        }
    }

    /// The rules that combine these options with those that say when a run evaluates and saves.
    pub(super) fn rules_of_run(&self, training: &TrainingConfig, report: &mut Report) {
        let (evaluates, saves) = (training.eval_strategy, training.save_strategy);
        if evaluates == When::No {
            let key = match self {
                Self { load_best_model_at_end: true, .. } => "load_best_model_at_end",
                Self { early_stopping_patience: Some(_), .. } => "early_stopping_patience",
                _ => {
                    let why = "eval_strategy is \"no\"";
                    return report.idle("metric_for_best_model", "eval_strategy", why);
                }
            };
            return report.problem(format!(
                "{key} needs evaluations, and eval_strategy is \"no\"; set eval_strategy to steps or epoch"
            ));
        }
        if !self.load_best_model_at_end {
            return;
        }
        if evaluates != saves {
            let word = |when| match when {
                When::No => "no",
                When::Steps => "steps",
                When::Epoch => "epoch",
            };
            return report.problem(format!(
                "load_best_model_at_end needs a checkpoint for each evaluation that may be best: save_strategy is {:?}, \
                 eval_strategy {:?}; make them the same",
                word(saves),
                word(evaluates)
            ));
        }
        let (save, eval) =
            (training.save_steps, training.eval_steps.unwrap_or(training.logging_steps));
        let whole = match (save, eval) {
            (Amount::Count(save), Amount::Count(eval)) => save.is_multiple_of(eval.max(1)),
            (Amount::Share(save), Amount::Share(eval)) => (save * 1e6) % (eval * 1e6) == 0.0,
            _ => false,
        };
        report.must(evaluates == When::Epoch || whole, || {
            let shown = |amount| match amount {
                Amount::Count(n) => n.to_string(),
                Amount::Share(share) => share.to_string(),
            };
            format!(
                "load_best_model_at_end: save_steps = {} must be a multiple of eval_steps, which is {} (both whole numbers, \
                 or both shares)",
                shown(save),
                shown(eval)
            )
        });
    }
}
