//! Keys of reward models: TRL's `RewardConfig`. Layer 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are TRL's.

use super::dpo::length_rules;
use super::{MethodSection, OnTruncation, Report, TrainingConfig, section};

section! {
    /// Keys of `temper reward`, beside the common ones.
    pub struct RewardConfig {
        /// Weight of (chosen + rejected)^2, which holds rewards around 0; 0.01 is usual. none: off.
        pub center_rewards_coefficient: Option<f64> = None,
        /// Tokens of a prompt with a completion at most. none: no limit.
        pub max_length: Option<usize> = Some(1024),
        /// Ours. A pair longer than max_length is dropped (truncate does the same: a cut answer has
        /// another worth); error names the row.
        pub on_truncation: OnTruncation = OnTruncation::Drop,
        /// Switch the model's dropout off.
        pub disable_dropout: bool = true,
        /// The token that ends a row. none: the tokenizer's.
        pub eos_token: Option<String> = None,
        /// A Jinja file, or a folder with a tokenizer, whose chat template replaces the model's.
        pub chat_template_path: Option<String> = None,
    }
}

impl MethodSection for RewardConfig {
    const NAME: &'static str = "reward";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-4, ..Default::default() }
    }
}

impl RewardConfig {
    fn rules(&self, report: &mut Report) {
        if let Some(c) = self.center_rewards_coefficient {
            report.must(c >= 0.0, || {
                format!("center_rewards_coefficient = {c}: must not be below 0")
            });
        }
        length_rules(self.max_length, report);
        if self.max_length.is_none() {
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}
