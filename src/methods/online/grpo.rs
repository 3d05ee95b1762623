//! Group relative policy optimisation, and the losses derived from it.
//!
//! For a prompt, G completions are sampled from the policy; the advantage of one is its reward
//! minus the group's mean, divided by the group's standard deviation (+1e-4). The loss of a token
//! is -min(rho A, clip(rho, 1 - eps, 1 + eps_high) A), with rho the ratio of its probability now to
//! that at sampling, plus beta KL (k3) to the reference if beta is not 0 (Shao et al.,
//! "DeepSeekMath", 2024). `loss_type` sets the divisor of the sum (grpo, bnpo, dr_grpo, dapo) or
//! changes the term (cispo, sapo, luspo, vespo); `importance_sampling_level=sequence` is GSPO.
//! Formulas, names and defaults are TRL 1.16.0's.
//!
//! Unlike TRL: the sampler's log-probs are the trainer's, so there is no second forward for old
//! log-probs and no correction for a mismatch; `dynamic_sampling` (DAPO) replaces groups without
//! variance.
//!
//! Layer 7. Invariant: see `methods::online::policy`.

use super::advantage::{RewardAggregation, ScaleRewards, grpo};
use super::options::{ClipOptions, OnlineConfig};
use super::policy::{AdvantageContext, PolicyExtras, PolicyObjective, WeighedRollouts};
use super::weights::Normalizer;
use crate::config::value::words;
use crate::config::{Report, section};
use crate::error::Result;
use crate::methods::MethodEntry;
use crate::ops::policy::{ImportanceLevel, PolicyLoss, Term};

pub const METHOD: MethodEntry = MethodEntry::new::<GrpoConfig>(
    "grpo",
    "Group relative policy optimisation: prompts and rewards",
);

words! {
    pub enum GrpoLoss {
        Grpo = "grpo",
        Bnpo = "bnpo",
        DrGrpo = "dr_grpo",
        Dapo = "dapo",
        Cispo = "cispo",
        Sapo = "sapo",
        Luspo = "luspo",
        Vespo = "vespo",
    }
}

section! {
    /// TRL's `GRPOConfig`.
    pub struct GrpoConfig = "grpo" {
        /// The loss: how tokens are weighted and what their sum is divided by.
        pub loss_type: GrpoLoss = GrpoLoss::Dapo,
        /// Upper bound of the ratio, for either sign of the advantage (INTELLECT-2). none: no
        /// bound.
        pub delta: Option<f64> = None,
        /// token: a ratio for each token. sequence: one for the sequence, the geometric mean
        /// (GSPO). sequence_sum: their product.
        pub importance_sampling_level: ImportanceLevel = ImportanceLevel::Token,
        /// Divide advantages by the standard deviation of the group, of the batch, or by nothing.
        pub scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// With several rewards: sum, then normalise; or normalise each, then sum (GDPO).
        pub multi_objective_aggregation: RewardAggregation = RewardAggregation::SumThenNormalize,
        /// Multiply the KL term by the ratio, so that its gradient is unbiased.
        pub use_bias_correction_kl: bool = true,
        /// sapo's temperature for positive advantages.
        pub sapo_temperature_pos: f64 = 1.0,
        /// sapo's temperature for negative advantages.
        pub sapo_temperature_neg: f64 = 1.05,
        /// vespo's power for positive advantages.
        pub vespo_k_pos: f64 = 2.0,
        /// vespo's rate for positive advantages.
        pub vespo_lambda_pos: f64 = 3.0,
        /// vespo's power for negative advantages.
        pub vespo_k_neg: f64 = 3.0,
        /// vespo's rate for negative advantages.
        pub vespo_lambda_neg: f64 = 2.0,
        /// Train only on this share of tokens, those of highest entropy. 1: all.
        pub top_entropy_quantile: f64 = 1.0,
        /// Weight of the entropy bonus (mean token entropy).
        pub entropy_coef: f64 = 0.0,
        /// Drop sequences with a negative advantage whose KL from the sampling policy exceeds this.
        /// none: keep all.
        pub off_policy_mask_threshold: Option<f64> = None,
        /// Ours (DAPO). Replace groups whose rewards are all equal by groups of other prompts, in
        /// at most this many rounds.
        pub dynamic_sampling: usize = 0,
        ..pub clip: ClipOptions = ClipOptions::default(),
        ..pub online: OnlineConfig = OnlineConfig::default(),
    }
}

impl GrpoConfig {
    fn rules(&self, report: &mut Report) {
        let q = self.top_entropy_quantile;
        report.must(q > 0.0 && q <= 1.0, || {
            format!("top_entropy_quantile = {q}: must be above 0 and at most 1")
        });
        if self.loss_type != GrpoLoss::Sapo {
            for key in ["sapo_temperature_pos", "sapo_temperature_neg"] {
                report.idle(key, "loss_type", "loss_type is not sapo");
            }
        }
        if self.loss_type != GrpoLoss::Vespo {
            for key in ["vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"] {
                report.idle(key, "loss_type", "loss_type is not vespo");
            }
        }
        let sequence = self.importance_sampling_level == ImportanceLevel::Sequence;
        report.must(self.loss_type != GrpoLoss::Luspo || sequence, || {
            "loss_type = luspo needs importance_sampling_level=sequence; set it".into()
        });
    }
}

impl PolicyObjective for GrpoConfig {
    fn advantages(&self, context: &mut AdvantageContext) -> Result<WeighedRollouts> {
        let (scale, how) = (self.scale_rewards, self.multi_objective_aggregation);
        Ok(grpo(context.scores, context.group, scale, how)?.into())
    }

    fn loss(&self) -> PolicyLoss {
        let (epsilon, epsilon_high) = self.clip.bounds();
        let term = match self.loss_type {
            GrpoLoss::Cispo => Term::Cispo { epsilon_high },
            GrpoLoss::Sapo => Term::Sapo {
                temperature_pos: self.sapo_temperature_pos as f32,
                temperature_neg: self.sapo_temperature_neg as f32,
            },
            GrpoLoss::Vespo => Term::Vespo {
                k_pos: self.vespo_k_pos as f32,
                lambda_pos: self.vespo_lambda_pos as f32,
                k_neg: self.vespo_k_neg as f32,
                lambda_neg: self.vespo_lambda_neg as f32,
            },
            _ => {
                let delta = self.delta.map_or(f32::INFINITY, |d| d as f32);
                Term::Clip { epsilon, epsilon_high, delta }
            }
        };
        PolicyLoss {
            term,
            level: self.importance_sampling_level,
            beta: self.online.beta as f32,
            bias_correction_kl: self.use_bias_correction_kl,
        }
    }

    fn normalizer(&self, active_tokens: usize, steps_per_generation: usize) -> Normalizer {
        match self.loss_type {
            GrpoLoss::Grpo | GrpoLoss::Sapo => Normalizer::Sequence,
            GrpoLoss::Bnpo => Normalizer::Token,
            GrpoLoss::DrGrpo => {
                Normalizer::Constant { max_completion_length: self.online.max_completion_length }
            }
            GrpoLoss::Luspo => Normalizer::Sum,
            GrpoLoss::Dapo | GrpoLoss::Cispo | GrpoLoss::Vespo => {
                Normalizer::Window { num_items_in_batch: active_tokens, steps_per_generation }
            }
        }
    }

    fn online(&self) -> &OnlineConfig {
        &self.online
    }

    fn extras(&self) -> PolicyExtras {
        PolicyExtras {
            top_entropy_quantile: self.top_entropy_quantile,
            entropy_coef: self.entropy_coef,
            off_policy_mask_threshold: self.off_policy_mask_threshold,
            dynamic_sampling: self.dynamic_sampling,
        }
    }
}
