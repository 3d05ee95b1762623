//! Keys of direct preference optimisation: TRL's `DPOConfig`. Layer 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are TRL's.

use super::value::words;
use super::{MethodSection, OnTruncation, Report, TrainingConfig, TruncationMode, section};

words! {
    /// In the order of the kernel's numbers (`kernels/preference.cu`).
    pub enum DpoLoss {
        Sigmoid = "sigmoid",
        Hinge = "hinge",
        Ipo = "ipo",
        ExoPair = "exo_pair",
        NcaPair = "nca_pair",
        Robust = "robust",
        BcoPair = "bco_pair",
        SppoHard = "sppo_hard",
        Aot = "aot" | "aot_pair",
        AotUnpaired = "aot_unpaired",
        ApoZero = "apo_zero",
        ApoDown = "apo_down",
        Discopop = "discopop",
        Sft = "sft",
        SigmoidNorm = "sigmoid_norm",
    }
}

words! {
    pub enum FDivergence {
        ReverseKl = "reverse_kl",
        ForwardKl = "forward_kl",
        Js = "js_divergence",
        Alpha = "alpha_divergence",
    }
}

section! {
    /// Keys of `temper dpo`, beside the common ones.
    pub struct DpoConfig {
        /// Strength of the pull to the reference model; of ipo the regulariser tau.
        pub beta: f64 = 0.1,
        /// A loss, or a list of losses that are summed with loss_weights.
        pub loss_type: Vec<DpoLoss> = vec![DpoLoss::Sigmoid],
        /// A weight for each loss of the list. none: 1 each.
        pub loss_weights: Option<Vec<f64>> = None,
        /// Share of wrong labels: of exo_pair above 0, of robust, aot and aot_unpaired below 0.5.
        /// Others do not use it.
        pub label_smoothing: f64 = 0.0,
        /// The divergence from the reference model that is held down.
        pub f_divergence_type: FDivergence = FDivergence::ReverseKl,
        /// The alpha of alpha_divergence; at 1 it is reverse_kl.
        pub f_alpha_divergence_coef: f64 = 0.5,
        /// Temperature of discopop's blend.
        pub discopop_tau: f64 = 0.05,
        /// Weight of the tokens beyond the shorter completion's length (LD-DPO). none: 1.
        pub ld_alpha: Option<f64> = None,
        /// Weight pairs by how likely the policy finds them (WPO).
        pub use_weighting: bool = false,
        /// Ours. No reference model: its log-probs count as 0.
        pub reference_free: bool = false,
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
        /// Tokens of a prompt with a completion at most. none: no limit.
        pub max_length: Option<usize> = Some(1024),
        /// Which end of a longer sequence is kept.
        pub truncation_mode: TruncationMode = TruncationMode::KeepStart,
        /// Ours. What happens to a row longer than max_length (TRL: truncate). error names the row.
        pub on_truncation: OnTruncation = OnTruncation::Truncate,
        /// Switch the model's dropout off.
        pub disable_dropout: bool = true,
        /// Ours. A Jinja file, or a folder with a tokenizer, whose chat template replaces the
        /// model's.
        pub chat_template_path: Option<String> = None,
    }
}

impl MethodSection for DpoConfig {
    const NAME: &'static str = "dpo";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-6, ..Default::default() }
    }
}

impl DpoConfig {
    /// The losses with their weights.
    pub fn losses(&self) -> Vec<(DpoLoss, f32)> {
        let weights = self.loss_weights.clone().unwrap_or_else(|| vec![1.0; self.loss_type.len()]);
        self.loss_type.iter().zip(weights).map(|(loss, weight)| (*loss, weight as f32)).collect()
    }

    fn rules(&self, report: &mut Report) {
        let has = |loss| self.loss_type.contains(&loss);
        report.must(self.beta > 0.0, || format!("beta = {}: must be above 0", self.beta));
        report.must(!self.loss_type.is_empty(), || "loss_type = []: name a loss".into());
        if let Some(weights) = &self.loss_weights {
            report.must(weights.len() == self.loss_type.len(), || {
                let (n, losses) = (weights.len(), self.loss_type.len());
                format!("loss_weights has {n} numbers for {losses} losses in loss_type; give one for each")
            });
        }
        let e = self.label_smoothing;
        report
            .must((0.0..1.0).contains(&e), || format!("label_smoothing = {e}: must be in [0, 1)"));
        report.must(!has(DpoLoss::ExoPair) || e > 0.0, || {
            "loss_type exo_pair takes the logarithm of label_smoothing: set it above 0 (the paper: 1e-3)".into()
        });
        report.must(!has(DpoLoss::Robust) || e < 0.5, || {
            format!("label_smoothing = {e} and loss_type robust: it must be below 0.5")
        });
        let smoothed = [DpoLoss::ExoPair, DpoLoss::Robust, DpoLoss::Aot, DpoLoss::AotUnpaired];
        if !smoothed.into_iter().any(has) {
            report.idle("label_smoothing", "loss_type", "no loss of loss_type uses it");
        }
        report.must(!has(DpoLoss::Discopop) || self.discopop_tau > 0.0, || {
            format!("discopop_tau = {}: must be above 0", self.discopop_tau)
        });
        if !has(DpoLoss::Discopop) {
            report.idle("discopop_tau", "loss_type", "discopop is not in loss_type");
        }
        if self.f_divergence_type != FDivergence::Alpha {
            report.idle(
                "f_alpha_divergence_coef",
                "f_divergence_type",
                "f_divergence_type is not alpha_divergence",
            );
        }
        if let Some(alpha) = self.ld_alpha {
            report.must((0.0..=1.0).contains(&alpha), || {
                format!("ld_alpha = {alpha}: must be in [0, 1]")
            });
        }
        report.must(!(self.reference_free && self.ref_model.is_some()), || {
            "reference_free = true and ref_model: give one of them".into()
        });
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
        if self.reference_free {
            for key in ["precompute_ref_log_probs", "sync_ref_model"] {
                report.idle(key, "reference_free", "reference_free is true");
            }
        }
        if !self.precompute_ref_log_probs {
            report.idle(
                "precompute_ref_batch_size",
                "precompute_ref_log_probs",
                "precompute_ref_log_probs is false",
            );
        }
        length_rules(self.max_length, report);
        if self.max_length.is_none() {
            report.idle("truncation_mode", "max_length", "max_length is \"none\"");
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}

/// What DPO and KTO ask of a reference that follows the policy.
pub(super) fn reference_rules(sync: bool, alpha: f64, steps: usize, report: &mut Report) {
    report.must((0.0..=1.0).contains(&alpha), || {
        format!("ref_model_mixup_alpha = {alpha}: must be in [0, 1]")
    });
    report.at_least("ref_model_sync_steps", steps, 1);
    if !sync {
        report.idle("ref_model_mixup_alpha", "sync_ref_model", "sync_ref_model is false");
        report.idle("ref_model_sync_steps", "sync_ref_model", "sync_ref_model is false");
    }
}

pub(super) fn length_rules(max_length: Option<usize>, report: &mut Report) {
    if let Some(length @ (0 | 1)) = max_length {
        report.problem(format!(
            "max_length = {length}: a row needs at least 2 tokens, one to predict from and one to predict"
        ));
    }
}
