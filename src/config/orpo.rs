//! Keys of odds-ratio preference optimisation: TRL's `ORPOConfig`. Layer 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are TRL's.

use super::dpo::length_rules;
use super::{MethodSection, OnTruncation, Report, TrainingConfig, section};

section! {
    /// Keys of `temper orpo`, beside the common ones.
    pub struct OrpoConfig {
        /// Weight of the odds ratio beside the chosen row's likelihood (the paper's lambda).
        pub beta: f64 = 0.1,
        /// Tokens of a prompt with a completion at most; the end is cut. none: no limit.
        pub max_length: Option<usize> = Some(1024),
        /// Ours. What happens to a row longer than max_length (TRL: truncate). error names the row.
        pub on_truncation: OnTruncation = OnTruncation::Truncate,
        /// Switch the model's dropout off.
        pub disable_dropout: bool = true,
        /// Ours. A Jinja file, or a folder with a tokenizer, whose chat template replaces the
        /// model's.
        pub chat_template_path: Option<String> = None,
    }
}

impl MethodSection for OrpoConfig {
    const NAME: &'static str = "orpo";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-6, ..Default::default() }
    }
}

impl OrpoConfig {
    fn rules(&self, report: &mut Report) {
        report.must(self.beta >= 0.0, || format!("beta = {}: must not be below 0", self.beta));
        length_rules(self.max_length, report);
        if self.max_length.is_none() {
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}
