//! REINFORCE++ and ReMax: one advantage a completion, without siblings or with them only as a
//! baseline.
//!
//! REINFORCE++ whitens rewards over all tokens of the generation, each token having its
//! completion's reward, and clips as PPO does; with `group_baseline` the prompt's mean is taken off
//! first (Hu et al., arXiv 2501.03262). ReMax (`greedy_baseline`) takes off the reward of the
//! greedy completion instead and whitens nothing (Li et al., arXiv 2310.10505). beta adds the k3
//! divergence from the reference to the loss.
//!
//! Layer 7. Invariant: see `methods::online::policy`.

use crate::config::{ReinforceConfig, ReinforceKeys, TrainingConfig};
use crate::error::Result;
use crate::methods::online::advantage::reinforce_plus_plus;
use crate::methods::online::env::{Rollout, Set, World};
use crate::methods::online::policy::{Act, Objective, Policy};
use crate::methods::online::weights::Normalizer;
use crate::methods::{Method, Metric, Recipe, Source};
use crate::ops::policy::{Level, PolicyLoss, Term};
use crate::rewards::Scores;

impl Recipe for ReinforceConfig {
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
        let objective = Reinforce { keys: self.own.clone(), beta: self.online.beta };
        Ok((Box::new(Policy::new(world, objective, training)?), said))
    }
}

pub struct Reinforce {
    pub keys: ReinforceKeys,
    pub beta: f64,
}

impl Objective for Reinforce {
    fn advantages(
        &mut self,
        act: &mut Act,
        rollouts: &[Rollout],
        scores: &Scores,
    ) -> Result<(Vec<f64>, Vec<Metric>)> {
        let n = act.world.keys.num_generations;
        if self.keys.greedy_baseline {
            let prompts: Vec<usize> = rollouts.iter().step_by(n).map(|r| r.prompt).collect();
            let draw = act.generation | 1 << 56;
            let greedy =
                act.world.generate(act.cx, act.model, Set::Train, &prompts, 1, draw, true)?;
            let baseline = act.world.score(act.cx, Set::Train, &greedy)?.total();
            let total = scores.total();
            let advantages = total.iter().enumerate().map(|(i, r)| match (r, baseline[i / n]) {
                (Some(r), Some(b)) => r - b,
                _ => 0.0,
            });
            let known: Vec<f64> = baseline.iter().flatten().copied().collect();
            let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
            return Ok((advantages.collect(), vec![("reward_greedy".into(), mean)]));
        }
        let lengths: Vec<usize> = rollouts.iter().map(|r| r.ids.len()).collect();
        let group = self.keys.group_baseline.then_some(n);
        Ok((reinforce_plus_plus(&scores.total(), &lengths, group)?, Vec::new()))
    }

    fn loss(&self) -> PolicyLoss {
        let high = self.keys.epsilon_high.unwrap_or(self.keys.epsilon) as f32;
        let term = Term::Clip {
            epsilon: self.keys.epsilon as f32,
            epsilon_high: high,
            delta: f32::INFINITY,
        };
        PolicyLoss { term, level: Level::Token, beta: self.beta as f32, bias_correction_kl: false }
    }

    fn normalizer(&self, active_tokens: usize, steps_per_generation: usize) -> Normalizer {
        Normalizer::Window { num_items_in_batch: active_tokens, steps_per_generation }
    }

    fn wants_reference(&self) -> bool {
        self.beta != 0.0
    }
}
