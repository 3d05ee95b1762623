//! Group relative policy optimisation, and the losses that grew out of it.
//!
//! For a prompt, G completions are drawn from the policy; the advantage of one is its reward less
//! the group's mean, over the group's standard deviation (+1e-4). The loss of a token is -min(rho
//! A, clip(rho, 1 - eps, 1 + eps_high) A), rho the ratio of its probability now and as it was
//! drawn, and + beta KL (k3) to the reference where beta is not 0 (Shao et al., "DeepSeekMath",
//! 2024). `loss_type` says what the sum is divided by (grpo, bnpo, dr_grpo, dapo) or changes the
//! term (cispo, sapo, luspo, vespo); `importance_sampling_level=sequence` is GSPO. TRL 1.16.0's
//! formulas, names and defaults.
//!
//! Differs from TRL: log-probs of the sampler are the trainer's, so there is no second forward for
//! old log-probs and no correction for a mismatch; `dynamic_sampling` (DAPO) refills groups without
//! variance.
//!
//! Layer 7. Invariant: see `methods::online::policy`.

use crate::config::{
    GrpoConfig, GrpoKeys, GrpoLoss, ImportanceLevel, RewardAggregation, ScaleRewards,
    TrainingConfig,
};
use crate::error::Result;
use crate::methods::online::advantage::{Aggregation, Scale, grpo};
use crate::methods::online::env::{Rollout, World};
use crate::methods::online::policy::{Act, Objective, Options, Policy};
use crate::methods::online::weights::Normalizer;
use crate::methods::{Method, Metric, Recipe, Source};
use crate::ops::policy::{Level, PolicyLoss, Term};
use crate::rewards::Scores;

impl Recipe for GrpoConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.online.chat_template_path.as_deref()
    }

    fn method(
        &self,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let world = World::new(&self.online, training, source)?;
        let said = format!(
            "{} prompts, {} completions each",
            world.train.len(),
            self.online.num_generations
        );
        let objective = Grpo {
            keys: self.own.clone(),
            beta: self.online.beta,
            length: self.online.max_completion_length,
        };
        Ok((Box::new(Policy::new(world, objective, training)?), said))
    }
}

pub struct Grpo {
    pub keys: GrpoKeys,
    pub beta: f64,
    pub length: usize,
}

impl Objective for Grpo {
    fn advantages(
        &mut self,
        act: &mut Act,
        _: &[Rollout],
        scores: &Scores,
    ) -> Result<(Vec<f64>, Vec<Metric>)> {
        let scale = match self.keys.scale_rewards {
            ScaleRewards::Group => Scale::Group,
            ScaleRewards::Batch => Scale::Batch,
            ScaleRewards::None => Scale::None,
        };
        let how = match self.keys.multi_objective_aggregation {
            RewardAggregation::SumThenNormalize => Aggregation::SumThenNormalize,
            RewardAggregation::NormalizeThenSum => Aggregation::NormalizeThenSum,
        };
        let out = grpo(scores, act.world.keys.num_generations, scale, how)?;
        let flat =
            out.zero_std.iter().filter(|z| **z).count() as f64 / out.zero_std.len().max(1) as f64;
        Ok((out.advantages, vec![("frac_reward_zero_std".into(), flat)]))
    }

    fn loss(&self) -> PolicyLoss {
        let k = &self.keys;
        let (epsilon, high) = (k.epsilon as f32, k.epsilon_high.unwrap_or(k.epsilon) as f32);
        let term = match k.loss_type {
            GrpoLoss::Cispo => Term::Cispo { epsilon_high: high },
            GrpoLoss::Sapo => Term::Sapo {
                temperature_pos: k.sapo_temperature_pos as f32,
                temperature_neg: k.sapo_temperature_neg as f32,
            },
            GrpoLoss::Vespo => Term::Vespo {
                k_pos: k.vespo_k_pos as f32,
                lambda_pos: k.vespo_lambda_pos as f32,
                k_neg: k.vespo_k_neg as f32,
                lambda_neg: k.vespo_lambda_neg as f32,
            },
            _ => Term::Clip {
                epsilon,
                epsilon_high: high,
                delta: k.delta.map_or(f32::INFINITY, |d| d as f32),
            },
        };
        let level = match k.importance_sampling_level {
            ImportanceLevel::Token => Level::Token,
            ImportanceLevel::Sequence => Level::Sequence,
        };
        PolicyLoss {
            term,
            level,
            beta: self.beta as f32,
            bias_correction_kl: k.use_bias_correction_kl,
        }
    }

    fn normalizer(&self, active_tokens: usize, steps_per_generation: usize) -> Normalizer {
        match self.keys.loss_type {
            GrpoLoss::Grpo | GrpoLoss::Sapo => Normalizer::Sequence,
            GrpoLoss::Bnpo => Normalizer::Token,
            GrpoLoss::DrGrpo => Normalizer::Constant { max_completion_length: self.length },
            GrpoLoss::Luspo => Normalizer::Sum,
            GrpoLoss::Dapo | GrpoLoss::Cispo | GrpoLoss::Vespo => {
                Normalizer::Window { num_items_in_batch: active_tokens, steps_per_generation }
            }
        }
    }

    fn wants_reference(&self) -> bool {
        self.beta != 0.0
    }

    fn options(&self) -> Options {
        Options {
            top_entropy_quantile: self.keys.top_entropy_quantile,
            entropy_coef: self.keys.entropy_coef,
            off_policy_mask_threshold: self.keys.off_policy_mask_threshold,
            dynamic_sampling: self.keys.dynamic_sampling,
        }
    }
}
