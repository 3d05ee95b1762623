//! Rewards of completions: verifiers, commands, a reward model. Layer 7.
//!
//! Invariant: a score has one entry for each rollout, in their order; an error of a reward names
//! the row.

use std::path::Path;

use super::prompts::Prompt;
use super::rollout::Rollout;
use crate::autograd::Cx;
use crate::config::RewardOptions;
use crate::data::chat::TemplateSetup;
use crate::error::Result;
use crate::methods::MethodInputs;
use crate::rewards::model::RewardModel;
use crate::rewards::{RewardBatch, Rewards, Scores};

pub struct Scorer {
    options: RewardOptions,
    rewards: Rewards,
    pub reward_model: Option<RewardModel>,
    setup: TemplateSetup,
}

impl Scorer {
    /// The rewards of the options, and those of the program.
    pub fn new(options: &RewardOptions, inputs: &MethodInputs) -> Result<Scorer> {
        let functions = inputs.rewards;
        let (specs, weights) = (&options.reward_funcs, options.reward_weights.as_deref());
        let rewards = match specs.len() + functions.len() {
            0 => Rewards { list: Vec::new() },
            n => {
                let weights = weights.map(|w| &w[..n.min(w.len())]);
                Rewards::with_functions(specs, functions, weights)?
            }
        };
        let (options, setup) = (options.clone(), inputs.setup.clone());
        Ok(Scorer { options, rewards, reward_model: None, setup })
    }

    pub fn attach(&mut self, cx: &Cx) -> Result<()> {
        self.rewards.govern(&cx.stop, self.options.reward_env.as_deref());
        if let Some(dir) = &self.options.reward_model {
            self.reward_model = Some(RewardModel::load(cx, Path::new(&**dir), &self.setup)?);
        }
        Ok(())
    }

    /// Every reward of every rollout.
    pub fn score(
        &mut self,
        cx: &mut Cx,
        prompts: &[Prompt],
        rollouts: &[Rollout],
    ) -> Result<Scores> {
        if !cx.device.computes() {
            return self.rehearse(cx, prompts, rollouts);
        }
        let mut batch = RewardBatch::default();
        for r in rollouts {
            let prompt = &prompts[r.prompt];
            batch.push(&prompt.value, prompt.columns.iter(), &r.text, r.ids.clone());
        }
        let mut scores = self.rewards.score(&batch, &*cx.observer)?;
        if let Some(model) = &mut self.reward_model {
            let each = model.score(cx, &batch)?.into_iter().map(|s| Some(f64::from(s))).collect();
            scores.each.push(each);
            scores.names.push("reward_model".into());
            let weights = self.options.reward_weights.as_ref();
            scores.weights.push(weights.and_then(|w| w.last().copied()).unwrap_or(1.0));
        }
        Ok(scores)
    }

    /// For the memory plan: the reward model reads what is there, and nobody else is asked. Scores
    /// differ, so that every group has something to learn from.
    fn rehearse(
        &mut self,
        cx: &mut Cx,
        prompts: &[Prompt],
        rollouts: &[Rollout],
    ) -> Result<Scores> {
        if let Some(model) = &mut self.reward_model {
            let length = |r: &Rollout| prompts[r.prompt].ids.len() + r.ids.len();
            model.rehearse(cx, rollouts.iter().map(length))?;
        }
        let each = (0..rollouts.len()).map(|i| Some(i as f64)).collect();
        Ok(Scores { names: vec!["plan".into()], weights: vec![1.0], each: vec![each] })
    }
}
