//! Keys of training from single labelled completions: TRL's `KTOConfig`, and what BCO adds. Layer
//! 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are TRL's.

use super::dpo::{length_rules, reference_rules};
use super::value::words;
use super::{MethodSection, OnTruncation, Report, Sampling, TrainingConfig, section};

words! {
    pub enum KtoLoss {
        Kto = "kto",
        ApoZeroUnpaired = "apo_zero_unpaired",
        Bco = "bco",
    }
}

section! {
    /// Keys of `temper kto`, beside the common ones.
    pub struct KtoConfig {
        /// kto; apo_zero_unpaired: no KL estimate; bco (a trainer of its own in TRL): against the
        /// running mean reward.
        pub loss_type: KtoLoss = KtoLoss::Kto,
        /// Strength of the pull to the reference model.
        pub beta: f64 = 0.1,
        /// Weight of the completions labelled true.
        pub desirable_weight: f64 = 1.0,
        /// Weight of the completions labelled false.
        pub undesirable_weight: f64 = 1.0,
        /// Ours. A folder with the reference model. none: the initial weights.
        pub ref_model: Option<String> = None,
        /// Compute the reference's log-probs once, before training, and keep them on disk.
        pub precompute_ref_log_probs: bool = false,
        /// Rows in a batch while they are computed. none: per_device_train_batch_size.
        pub precompute_ref_batch_size: Option<usize> = None,
        /// Move the reference model towards the policy during training.
        pub sync_ref_model: bool = false,
        /// How far: reference = (1 - alpha) reference + alpha policy.
        pub ref_model_mixup_alpha: f64 = 0.6,
        /// Every so many steps.
        pub ref_model_sync_steps: usize = 512,
        /// Tokens of a prompt with its completion at most; the end is cut. none: no limit.
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

impl MethodSection for KtoConfig {
    const NAME: &'static str = "kto";

    fn training() -> TrainingConfig {
        TrainingConfig {
            learning_rate: 1e-6,
            train_sampling_strategy: Sampling::Sequential,
            ..Default::default()
        }
    }
}

impl KtoConfig {
    fn rules(&self, report: &mut Report) {
        report.must(self.beta > 0.0, || format!("beta = {}: must be above 0", self.beta));
        for (key, weight) in [
            ("desirable_weight", self.desirable_weight),
            ("undesirable_weight", self.undesirable_weight),
        ] {
            report.must(weight >= 0.0, || format!("{key} = {weight}: must not be below 0"));
        }
        report.must(!(self.sync_ref_model && self.precompute_ref_log_probs), || {
            "sync_ref_model = true changes the reference, so precompute_ref_log_probs = true would go stale; unset one"
                .into()
        });
        reference_rules(
            self.sync_ref_model,
            self.ref_model_mixup_alpha,
            self.ref_model_sync_steps,
            report,
        );
        if !self.precompute_ref_log_probs {
            report.idle(
                "precompute_ref_batch_size",
                "precompute_ref_log_probs",
                "precompute_ref_log_probs is false",
            );
        }
        length_rules(self.max_length, report);
        if self.max_length.is_none() {
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}
