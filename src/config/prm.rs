//! Keys of process reward models: TRL's former `PRMConfig` (1.16.0 has none). Layer 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are those that
//! TRL had.

use super::dpo::length_rules;
use super::{MethodSection, OnTruncation, Report, TrainingConfig, section};

section! {
    /// Keys of `temper prm`, beside the common ones.
    pub struct PrmConfig {
        /// Tokens of a prompt with its steps at most; the end is cut. none: no limit.
        pub max_length: Option<usize> = Some(1024),
        /// Ours. What happens to a row longer than max_length (TRL: truncate). error names the row.
        pub on_truncation: OnTruncation = OnTruncation::Truncate,
        /// What stands behind each step, and carries its label.
        pub step_separator: String = "\n".into(),
        /// Only the last step's label counts in training.
        pub train_on_last_step_only: bool = false,
        /// Switch the model's dropout off.
        pub disable_dropout: bool = true,
    }
}

impl MethodSection for PrmConfig {
    const NAME: &'static str = "prm";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-5, ..Default::default() }
    }
}

impl PrmConfig {
    fn rules(&self, report: &mut Report) {
        report.must(!self.step_separator.is_empty(), || {
            "step_separator = \"\": a step's label stands on its last token, so it needs one".into()
        });
        length_rules(self.max_length, report);
        if self.max_length.is_none() {
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}
