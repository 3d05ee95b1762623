//! Keys of `temper eval`, beside those of sampling. Layer 1.
//!
//! Invariant: what a completion is measured by has the names and the spelling that online RL's
//! rewards have.

use super::{Report, RewardSpecs, section};

section! {
    /// Keys of `temper eval`.
    pub struct EvalConfig = "eval" {
        /// Verifiers of completions, as the online methods' reward_funcs; docs/rewards.md.
        pub reward_funcs: RewardSpecs = RewardSpecs(vec!["exact_match".into()]),
        /// The score from which a completion counts as passed, for pass@k.
        pub pass_score: f64 = 1.0,
        /// The field of plain-text rows.
        pub dataset_text_field: String = "text".into(),
    }
}

impl EvalConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("reward_funcs", self.reward_funcs.len(), 1);
    }
}
