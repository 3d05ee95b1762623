//! Options of `temper eval`, beside those of sampling. Layer 1.
//!
//! Invariant: the measures of a completion have the names and the syntax of online RL's rewards.

use super::value::words;
use super::{PathText, Report, RewardSpecs, section};

words! {
    /// Which part of a choice is scored.
    pub enum ScoredChoice {
        Text = "text",
        Letter = "letter",
    }
}

section! {
    /// Keys of `temper eval`.
    pub struct EvalConfig = "eval" {
        /// Verifiers of completions, as the online methods' reward_funcs; docs/rewards.md.
        pub reward_funcs: RewardSpecs = RewardSpecs(vec!["exact_match".into()]),
        /// The score from which a completion counts as passed, for pass@k.
        pub pass_score: f64 = 1.0,
        /// The field of plain-text rows.
        pub dataset_text_field: String = "text".into(),
        /// How a multiple-choice question is written; {question} and {choices} (a line each, with its
        /// letter) stand for the row's, \n for a line break.
        pub question_format: String = "Question: {question}\nAnswer:".into(),
        /// What is scored after the question: the choice's text, or its letter (if question_format
        /// has {choices}).
        pub scored_choice: ScoredChoice = ScoredChoice::Text,
        /// Questions with their answers that stand before each multiple-choice question, chosen by seed
        /// from fewshot_data.
        pub num_fewshot: usize = 0,
        /// A file of questions as --data has them, to choose those of num_fewshot from.
        pub fewshot_data: Option<PathText> = None,
    }
}

impl EvalConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("reward_funcs", self.reward_funcs.len(), 1);
        report.must(self.question_format.contains("{question}"), || {
            "question_format has no {question}, so all questions would be the same".into()
        });
        report.must(self.num_fewshot == 0 || self.fewshot_data.is_some(), || {
            format!("num_fewshot = {} needs fewshot_data=FILE to choose from", self.num_fewshot)
        });
        if self.num_fewshot == 0 {
            report.idle("fewshot_data", "num_fewshot", "num_fewshot is 0");
        }
    }
}
