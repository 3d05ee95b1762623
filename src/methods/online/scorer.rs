//! Rewards of completions: verifiers, commands, a reward model. Layer 7.
//!
//! Invariant: a score has one entry for each rollout, in their order; an error of a reward names
//! the row.

use std::path::Path;

use serde_json::Value;

use super::prompts::{Prompt, Prompts};
use super::rollout::Rollout;
use crate::autograd::Cx;
use crate::config::RewardOptions;
use crate::data::chat::TemplateSetup;
use crate::error::Result;
use crate::methods::MethodInputs;
use crate::rewards::model::RewardModel;
use crate::rewards::{RewardBatch, Rewards, Scores, said};

pub struct Scorer {
    options: RewardOptions,
    rewards: Rewards,
    pub reward_model: Option<RewardModel>,
    setup: TemplateSetup,
    /// Columns of the prompts. In a batch whose prompts lack one, its values are null.
    columns: Vec<String>,
    /// Whether the environment gives rewards as well.
    environment: bool,
    /// The batch being generated, for programs that score completions as they end.
    coming: Option<ComingBatch>,
}

struct ComingBatch {
    /// All its prompts and columns; the completions that have ended so far.
    batch: RewardBatch,
    ended: Vec<bool>,
    offered: usize,
}

impl Scorer {
    /// The rewards of the options, and those of the calling program.
    pub fn new(
        options: &RewardOptions,
        environment: bool,
        inputs: &MethodInputs,
    ) -> Result<Scorer> {
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
        let (reward_model, coming, columns) = (None, None, Vec::new());
        Ok(Scorer { options, rewards, reward_model, setup, columns, environment, coming })
    }

    /// Records the columns that the prompts of each split have. Error if a reward reads a column
    /// that no prompt of a split has.
    pub fn set_columns(&mut self, prompts: &Prompts) -> Result<()> {
        for split in [&prompts.train, &prompts.eval] {
            if !split.is_empty() {
                let columns = self.rewards.columns(split.iter().map(|prompt| &prompt.columns))?;
                self.columns.extend(columns);
            }
        }
        self.columns.sort();
        self.columns.dedup();
        Ok(())
    }

    /// The environment variables that programs see; None: all.
    pub fn reward_env(&self) -> Option<&[String]> {
        self.options.reward_env.as_deref()
    }

    /// Announces that `n` completions of each of `indices` will be generated, and then scored.
    pub fn expect(&mut self, prompts: &[Prompt], indices: &[usize], n: usize) {
        self.coming = None;
        if !self.rewards.have_programs() {
            return;
        }
        let mut batch = RewardBatch::with_columns(&self.columns);
        for index in indices.iter().flat_map(|i| std::iter::repeat_n(i, n)) {
            let prompt = &prompts[*index];
            batch.push(&prompt.value, prompt.columns.iter(), "", Vec::new());
        }
        let ended = vec![false; batch.len()];
        self.coming = Some(ComingBatch { batch, ended, offered: 0 });
    }

    /// Records that completion `i` has ended: programs receive it once all before it have ended.
    pub fn hear(&mut self, i: usize, rollout: &Rollout) {
        let Some(coming) = &mut self.coming else { return };
        coming.batch.replace(i, said_of(&coming.batch.prompts[i], rollout), rollout.whole().into());
        coming.ended[i] = true;
        while coming.ended.get(coming.offered) == Some(&true) {
            self.rewards.offer(&coming.batch, coming.offered);
            coming.offered += 1;
        }
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
        self.coming = None;
        let mut batch = RewardBatch::with_columns(&self.columns);
        for r in rollouts {
            let prompt = &prompts[r.prompt];
            let (said, ids) = (said_of(&prompt.value, r), r.whole().to_vec());
            batch.push_whole(&prompt.value, prompt.columns.iter(), said, ids);
        }
        let mut scores = self.rewards.score(&batch, &*cx.observer)?;
        let weights = self.options.reward_weights.as_ref();
        if self.environment {
            let reward = |r: &Rollout| r.conversation.as_ref().and_then(|c| c.reward);
            scores.each.push(rollouts.iter().map(reward).collect());
            scores.names.push("environment".into());
            let at = scores.weights.len();
            scores.weights.push(weights.and_then(|w| w.get(at).copied()).unwrap_or(1.0));
        }
        if let Some(model) = &mut self.reward_model {
            let each = model.score(cx, &batch)?.into_iter().map(|s| Some(f64::from(s))).collect();
            scores.each.push(each);
            scores.names.push("reward_model".into());
            scores.weights.push(weights.and_then(|w| w.last().copied()).unwrap_or(1.0));
        }
        Ok(scores)
    }

    /// For the memory plan: runs the reward model, and calls no other reward. Scores differ, so
    /// that no group has zero variance.
    fn rehearse(
        &mut self,
        cx: &mut Cx,
        prompts: &[Prompt],
        rollouts: &[Rollout],
    ) -> Result<Scores> {
        if let Some(model) = &mut self.reward_model {
            let length = |r: &Rollout| prompts[r.prompt].ids.len() + r.whole().len();
            model.rehearse(cx, rollouts.iter().map(length))?;
        }
        let each = (0..rollouts.len()).map(|i| Some(i as f64)).collect();
        Ok(Scores { names: vec!["plan".into()], weights: vec![1.0], each: vec![each] })
    }
}

/// The completion that rewards see: the whole of a conversation.
fn said_of(prompt: &Value, rollout: &Rollout) -> Value {
    match &rollout.conversation {
        Some(conversation) => conversation.said.clone(),
        None => said(prompt, &rollout.text),
    }
}
