//! Several rewards, their scores and the weighted sum. Layer 6.
//!
//! Invariant: a completion without any score has no total and is part of no baseline.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::batch::RewardBatch;
use super::function::RewardFunction;
use super::reward::{Reward, Verifier};
use super::spec;
use crate::error::{Error, Result};
use crate::observer::Observer;
use crate::signals::Stop;

/// Several rewards and their weighted sum.
#[derive(Debug)]
pub struct Rewards {
    pub list: Vec<Reward>,
}

/// The scores of a batch.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    pub names: Vec<String>,
    pub weights: Vec<f64>,
    /// Indexed by reward, then by completion.
    pub each: Vec<Vec<Option<f64>>>,
}

impl Rewards {
    /// Parses one reward per spec (see [`Reward::parse`]). `weights` is TRL's `reward_weights`: one
    /// per reward, or None.
    pub fn parse(specs: &[String], weights: Option<&[f64]>) -> Result<Rewards> {
        Rewards::with_functions(specs, &[], weights)
    }

    /// [`Rewards::parse`], followed by functions of the program.
    pub fn with_functions(
        specs: &[String],
        functions: &[RewardFunction],
        weights: Option<&[f64]>,
    ) -> Result<Rewards> {
        let mut list = specs.iter().map(|s| Reward::parse(s)).collect::<Result<Vec<_>>>()?;
        list.extend(functions.iter().cloned().map(Reward::from));
        if list.is_empty() {
            return Err(Error::Config(format!(
                "no reward is given; known ones: {}",
                spec::known()
            )));
        }
        if let Some(weights) = weights {
            if weights.len() != list.len() {
                let (w, r) = (weights.len(), list.len());
                return Err(Error::Config(format!(
                    "reward_weights has {w} values for {r} rewards; give one each"
                )));
            }
            list.iter_mut().zip(weights).for_each(|(r, w)| r.weight = *w);
        }
        Rewards::new(list)
    }

    /// Numbers rewards with the same name, so that metrics keep them apart.
    pub fn new(mut list: Vec<Reward>) -> Result<Rewards> {
        for i in 1..list.len() {
            let same = list[..i].iter().filter(|r| r.name == list[i].name).count();
            if same > 0 {
                list[i].name = format!("{}_{}", list[i].name, same + 1);
            }
        }
        Ok(Rewards { list })
    }

    /// Ends reward programs when `stop` is requested, and restricts their environment variables to
    /// `env` (None: all of this process).
    pub fn govern(&mut self, stop: &Stop, env: Option<&[String]>) {
        for reward in &mut self.list {
            if let Verifier::Worker(worker) = &mut reward.kind {
                worker.heed(stop);
                env.into_iter().for_each(|names| worker.limit_environment(names));
            }
        }
    }

    /// The names of all columns of `rows` except the prompt. Error: a reward reads a column that no
    /// row has; checked here, before anything is generated.
    pub fn columns<'a>(
        &self,
        rows: impl Iterator<Item = &'a Map<String, Value>>,
    ) -> Result<Vec<String>> {
        let names = rows.flat_map(|row| row.keys().map(String::as_str));
        let names: BTreeSet<&str> = names.filter(|name| *name != "prompt").collect();
        for reward in &self.list {
            reward.answer_column(names.iter().copied())?;
        }
        Ok(names.into_iter().map(str::to_string).collect())
    }

    /// Whether another program computes any of the rewards.
    pub fn have_programs(&self) -> bool {
        self.list.iter().any(|reward| matches!(reward.kind, Verifier::Worker(_)))
    }

    /// Sends row `row` of an unfinished batch to the programs. Rows come in order, and `batch` has
    /// the columns of all rows.
    pub fn offer(&mut self, batch: &RewardBatch, row: usize) {
        for reward in &mut self.list {
            if let Verifier::Worker(worker) = &mut reward.kind {
                worker.offer(batch, row);
            }
        }
    }

    pub fn score(&mut self, batch: &RewardBatch, observer: &dyn Observer) -> Result<Scores> {
        let mut scores = Scores::default();
        for reward in &mut self.list {
            scores.each.push(reward.score(batch, observer)?);
            scores.names.push(reward.name.clone());
            scores.weights.push(reward.weight);
        }
        Ok(scores)
    }
}

impl Scores {
    /// `sum_k w_k r_k` over the rewards that apply to a row. `None` if none applies: such a
    /// completion is part of no baseline and gets advantage 0.
    pub fn total(&self) -> Vec<Option<f64>> {
        let n = self.each.first().map_or(0, Vec::len);
        let row = |i: usize| {
            let mut terms =
                self.each.iter().zip(&self.weights).filter_map(|(r, w)| Some(w * r[i]?)).peekable();
            terms.peek().is_some().then(|| terms.sum())
        };
        (0..n).map(row).collect()
    }
}
