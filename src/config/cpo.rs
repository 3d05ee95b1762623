//! Keys of contrastive preference optimisation, SimPO and AlphaPO: TRL's `CPOConfig`. Layer 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are TRL's.

use super::dpo::length_rules;
use super::value::words;
use super::{MethodSection, OnTruncation, Report, TrainingConfig, section};

words! {
    pub enum CpoLossType {
        Sigmoid = "sigmoid",
        Hinge = "hinge",
        Ipo = "ipo",
        Simpo = "simpo",
        Alphapo = "alphapo",
    }
}

section! {
    /// Keys of `temper cpo`, beside the common ones.
    pub struct CpoConfig {
        /// alphapo is simpo with cpo_alpha = 0; its shape is alpha.
        pub loss_type: CpoLossType = CpoLossType::Sigmoid,
        /// Scale of the difference in log-probs; of ipo the regulariser tau.
        pub beta: f64 = 0.1,
        /// Share of wrong labels, of sigmoid and simpo.
        pub label_smoothing: f64 = 0.0,
        /// Weight of the chosen completions' likelihood; 0 with simpo is SimPO as published.
        pub cpo_alpha: f64 = 1.0,
        /// Margin that simpo asks for.
        pub simpo_gamma: f64 = 0.5,
        /// Shape of the reward, (1 - p^-alpha) / alpha; 0: log p.
        pub alpha: f64 = 0.0,
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

impl MethodSection for CpoConfig {
    const NAME: &'static str = "cpo";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-6, ..Default::default() }
    }
}

impl CpoConfig {
    /// cpo_alpha as the loss uses it.
    pub fn nll_weight(&self) -> f64 {
        if self.loss_type == CpoLossType::Alphapo { 0.0 } else { self.cpo_alpha }
    }

    fn rules(&self, report: &mut Report) {
        report.must(self.beta > 0.0, || format!("beta = {}: must be above 0", self.beta));
        let e = self.label_smoothing;
        report
            .must((0.0..1.0).contains(&e), || format!("label_smoothing = {e}: must be in [0, 1)"));
        if matches!(self.loss_type, CpoLossType::Hinge | CpoLossType::Ipo) {
            report.idle("label_smoothing", "loss_type", "hinge and ipo have no label smoothing");
        }
        if !matches!(self.loss_type, CpoLossType::Simpo | CpoLossType::Alphapo) {
            report.idle("simpo_gamma", "loss_type", "only simpo and alphapo have a margin");
        }
        if self.loss_type == CpoLossType::Alphapo {
            report.idle("cpo_alpha", "loss_type", "alphapo has no likelihood term");
        }
        length_rules(self.max_length, report);
        if self.max_length.is_none() {
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}
