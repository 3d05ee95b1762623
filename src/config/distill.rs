//! Keys of distillation from a teacher over rows that are there: what TRL's `GKDConfig` has of it.
//! Layer 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are TRL's.

use super::dpo::length_rules;
use super::{MethodSection, OnTruncation, Report, TrainingConfig, TruncationMode, section};

section! {
    /// Keys of `temper distill`, beside the common ones.
    pub struct DistillConfig {
        /// The folder of the teacher, of the same vocabulary.
        pub teacher_model_name_or_path: Option<String> = None,
        /// 0: forward KL, teacher to student; 1: reverse KL, student to teacher; between: the
        /// generalised Jensen-Shannon divergence.
        pub beta: f64 = 0.5,
        /// Both distributions are softened by it.
        pub temperature: f64 = 0.9,
        /// Tokens of a row at most. none: no limit.
        pub max_length: Option<usize> = Some(1024),
        /// Which end of a row longer than max_length is kept.
        pub truncation_mode: TruncationMode = TruncationMode::KeepStart,
        /// Ours. What happens to a row longer than max_length (TRL: truncate). error names the row.
        pub on_truncation: OnTruncation = OnTruncation::Truncate,
        /// Switch the model's dropout off.
        pub disable_dropout: bool = true,
        /// A Jinja file, or a folder with a tokenizer, whose chat template replaces the model's.
        pub chat_template_path: Option<String> = None,
    }
}

impl MethodSection for DistillConfig {
    const NAME: &'static str = "distill";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 2e-5, ..Default::default() }
    }
}

impl DistillConfig {
    fn rules(&self, report: &mut Report) {
        report.must((0.0..=1.0).contains(&self.beta), || {
            format!("beta = {}: must be in [0, 1]", self.beta)
        });
        report.must(self.temperature > 0.0, || {
            format!("temperature = {}: must be above 0", self.temperature)
        });
        length_rules(self.max_length, report);
        if self.max_length.is_none() {
            report.idle("truncation_mode", "max_length", "max_length is \"none\"");
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}
