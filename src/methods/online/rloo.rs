//! REINFORCE leave-one-out: the baseline of a completion is the mean reward of its siblings.
//!
//! Rewards are clipped (`reward_clip_range`) and lessened by beta times the sequence's sum of log
//! pi_old - log pi_ref; the loss is -min(rho A, clip(rho) A) with one ratio a sequence, exp of the
//! summed log-ratios, averaged over sequences (Ahmadian et al., "Back to Basics", 2024; TRL
//! 1.16.0).
//!
//! Layer 7. Invariant: see `methods::online::policy`.

use crate::config::{RlooConfig, RlooKeys, TrainingConfig};
use crate::error::{Error, Result};
use crate::methods::online::advantage::{rloo, rloo_rewards};
use crate::methods::online::env::{Rollout, World};
use crate::methods::online::policy::{Act, Objective, Policy};
use crate::methods::online::weights::Normalizer;
use crate::methods::{Method, Metric, Recipe, Source};
use crate::ops::policy::{Level, PolicyLoss, Term};
use crate::rewards::Scores;

impl Recipe for RlooConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.online.chat_template_path.as_deref()
    }

    fn method(
        &self,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        if self.online.num_generations < 2 {
            return Err(Error::Config(
                "num_generations = 1: RLOO's baseline needs at least 2".into(),
            ));
        }
        let world = World::new(&self.online, training, source)?;
        let said = format!(
            "{} prompts, {} completions each",
            world.train.len(),
            self.online.num_generations
        );
        let objective = Rloo { keys: self.own.clone(), beta: self.online.beta };
        Ok((Box::new(Policy::new(world, objective, training)?), said))
    }
}

pub struct Rloo {
    pub keys: RlooKeys,
    pub beta: f64,
}

impl Objective for Rloo {
    fn advantages(
        &mut self,
        act: &mut Act,
        rollouts: &[Rollout],
        scores: &Scores,
    ) -> Result<(Vec<f64>, Vec<Metric>)> {
        let kl: Vec<f64> = match act.reference {
            Some(reference) => rollouts
                .iter()
                .zip(reference)
                .map(|(r, q)| {
                    r.logps.iter().zip(q).map(|(p, q)| f64::from(*p) - f64::from(*q)).sum()
                })
                .collect(),
            None => vec![0.0; rollouts.len()],
        };
        let clip = self.keys.reward_clip_range.as_ref().map(|r| (r[0], r[1]));
        let rewards = rloo_rewards(&scores.total(), clip, self.beta, &kl);
        let out = rloo(&rewards, act.world.keys.num_generations, self.keys.normalize_advantages)?;
        let mean = kl.iter().sum::<f64>() / kl.len().max(1) as f64;
        let flat =
            out.zero_std.iter().filter(|z| **z).count() as f64 / out.zero_std.len().max(1) as f64;
        Ok((out.advantages, vec![("kl".into(), mean), ("frac_reward_zero_std".into(), flat)]))
    }

    fn loss(&self) -> PolicyLoss {
        let high = self.keys.epsilon_high.unwrap_or(self.keys.epsilon) as f32;
        let term = Term::Clip {
            epsilon: self.keys.epsilon as f32,
            epsilon_high: high,
            delta: f32::INFINITY,
        };
        PolicyLoss { term, level: Level::SequenceSum, beta: 0.0, bias_correction_kl: false }
    }

    fn normalizer(&self, _: usize, _: usize) -> Normalizer {
        Normalizer::Sequence
    }

    fn wants_reference(&self) -> bool {
        self.beta != 0.0
    }
}
