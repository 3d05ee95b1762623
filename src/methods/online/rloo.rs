//! REINFORCE leave-one-out: the baseline of a completion is the mean reward of its siblings.
//!
//! Rewards are clipped (`reward_clip_range`), and beta times the sequence's sum of log pi_old - log
//! pi_ref is subtracted. The loss is -min(rho A, clip(rho) A) with one ratio per sequence, exp of
//! the summed log-ratios, averaged over sequences (Ahmadian et al., "Back to Basics", 2024; TRL
//! 1.16.0).
//!
//! Layer 7. Invariant: see `methods::online::policy`.

use super::advantage::{rloo, rloo_rewards};
use super::metrics::mean;
use super::options::{ClipOptions, OnlineConfig};
use super::policy::{AdvantageContext, PolicyObjective, WeighedRollouts, clip_term};
use super::weights::Normalizer;
use crate::config::{Report, section};
use crate::error::Result;
use crate::methods::MethodEntry;
use crate::ops::policy::{ImportanceLevel, PolicyLoss};

pub const METHOD: MethodEntry =
    MethodEntry::new::<RlooConfig>("rloo", "REINFORCE leave-one-out").on_page("grpo");

section! {
    /// TRL's `RLOOConfig`. epsilon clips the sequence's ratio.
    pub struct RlooConfig = "rloo" {
        /// Divide advantages by their standard deviation over the batch.
        pub normalize_advantages: bool = false,
        /// Clip rewards to this range. none: no clipping.
        pub reward_clip_range: Option<Vec<f64>> = None,
        ..pub clip: ClipOptions = ClipOptions::default(),
        ..pub online: OnlineConfig =
            OnlineConfig { num_generations: 2, beta: 0.05, ..OnlineConfig::default() },
    }
}

impl RlooConfig {
    fn rules(&self, report: &mut Report) {
        report.must(
            self.reward_clip_range.as_ref().is_none_or(|r| r.len() == 2 && r[0] < r[1]),
            || "reward_clip_range must be two numbers, the lower first".into(),
        );
        let n = self.online.num_generations;
        report.must(n != 1, || format!("num_generations = {n}: RLOO's baseline needs at least 2"));
    }
}

impl PolicyObjective for RlooConfig {
    fn advantages(&self, context: &mut AdvantageContext) -> Result<WeighedRollouts> {
        let rollouts = context.rollouts;
        let kl: Vec<f64> = match context.reference {
            Some(reference) => {
                let difference = |p: &[f32], q: &[f32]| -> f64 {
                    p.iter().zip(q).map(|(p, q)| f64::from(*p) - f64::from(*q)).sum()
                };
                rollouts.iter().zip(reference).map(|(r, q)| difference(&r.logps, q)).collect()
            }
            None => vec![0.0; rollouts.len()],
        };
        let clip = self.reward_clip_range.as_ref().map(|r| (r[0], r[1]));
        let rewards = rloo_rewards(&context.scores.total(), clip, self.online.beta, &kl);
        let advantages = rloo(&rewards, context.group, self.normalize_advantages)?;
        let mut weighed: WeighedRollouts = advantages.into();
        weighed.metrics.push(("kl".into(), mean(kl.iter().copied())));
        Ok(weighed)
    }

    fn loss(&self) -> PolicyLoss {
        PolicyLoss {
            term: clip_term(&self.clip),
            level: ImportanceLevel::SequenceSum,
            beta: 0.0,
            bias_correction_kl: false,
        }
    }

    fn normalizer(&self, _: usize, _: usize) -> Normalizer {
        Normalizer::Sequence
    }

    fn online(&self) -> &OnlineConfig {
        &self.online
    }
}
