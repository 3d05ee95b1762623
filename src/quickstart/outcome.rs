//! The results of the quickstart's pipeline, and their text. Layer 9.
//!
//! Invariant: every metric is computed on held-out questions.

use std::fmt;

use super::data::{Problem, QuestionKind, STYLE};
use crate::report::Table;

/// The costs and the final loss of one training run.
#[derive(Clone, Debug)]
pub struct StageReport {
    pub name: &'static str,
    pub steps: u64,
    pub tokens: u64,
    pub seconds: f64,
    /// Mean of the last logged steps.
    pub loss: f64,
}

/// The replies of one model to held-out questions, and which are right.
#[derive(Clone, Debug)]
pub struct Score {
    pub model: &'static str,
    pub replies: Vec<String>,
    pub right: Vec<bool>,
}

impl Score {
    pub fn exact_match(&self) -> f64 {
        self.right.iter().filter(|r| **r).count() as f64 / self.right.len().max(1) as f64
    }

    /// The share of replies in the style that preference data prefers.
    pub fn styled(&self) -> f64 {
        self.replies.iter().filter(|r| r.ends_with(STYLE)).count() as f64
            / self.replies.len().max(1) as f64
    }
}

#[derive(Clone, Debug, Default)]
pub struct QuickstartOutcome {
    pub stages: Vec<StageReport>,
    /// Greedy replies to `problems`.
    pub scores: Vec<Score>,
    /// Greedy replies to `chains`.
    pub chain_scores: Vec<Score>,
    /// The share of held-out pairs that the reward model ranks correctly.
    pub ranked: f64,
    /// By model, the reward model's scores of its replies to `problems`, sampled at temperature 1.
    pub judged: Vec<(&'static str, Vec<f64>)>,
    pub problems: Vec<Problem>,
    pub chains: Vec<Problem>,
}

impl QuickstartOutcome {
    pub fn score(&self, model: &str) -> Option<&Score> {
        self.scores.iter().find(|s| s.model == model)
    }

    pub fn chain_score(&self, model: &str) -> Option<&Score> {
        self.chain_scores.iter().find(|s| s.model == model)
    }

    /// Mean and standard deviation of the reward model's scores for a model's replies.
    pub fn judged(&self, model: &str) -> Option<(f64, f64)> {
        let scores = &self.judged.iter().find(|j| j.0 == model)?.1;
        let n = scores.len().max(1) as f64;
        let mean = scores.iter().sum::<f64>() / n;
        Some((mean, (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt()))
    }

    /// One line for the purpose of each stage: before and after.
    pub fn table(&self) -> Table {
        let percent = |v: Option<f64>| v.map_or("-".to_string(), |v| format!("{:.1}%", 100.0 * v));
        let exact = |m: &str| percent(self.score(m).map(Score::exact_match));
        let styled = |m: &str| percent(self.score(m).map(Score::styled));
        let chain = |m: &str| percent(self.chain_score(m).map(Score::exact_match));
        let judged = |m: &str| {
            self.judged(m).map_or("-".to_string(), |(mean, std)| format!("{mean:.2} (sd {std:.2})"))
        };
        let row = |cells: [&str; 4]| cells.map(str::to_string).to_vec();
        Table {
            caption: "What each stage was for, on held-out questions".into(),
            columns: row(["stage", "metric", "before", "after"]),
            rows: vec![
                row(["sft", "exact_match", &exact("pretrained"), &exact("sft")]),
                row(["lora", "exact_match", &exact("pretrained"), &exact("lora")]),
                row(["reward", "pairs ranked right", "-", &percent(Some(self.ranked))]),
                row(["dpo", "replies in the preferred style", &styled("sft"), &styled("dpo")]),
                row(["dpo", "exact_match", &exact("sft"), &exact("dpo")]),
                row(["ppo", "reward model's score", &judged("sft"), &judged("ppo")]),
                row(["ppo", "exact_match", &exact("sft"), &exact("ppo")]),
                row(["grpo", "exact_match, two-step questions", &chain("sft"), &chain("grpo")]),
                row(["grpo", "exact_match", &exact("sft"), &exact("grpo")]),
            ],
        }
    }
}

impl fmt::Display for QuickstartOutcome {
    /// Samples, then the table, then the cost of the stages.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "Answers of each model to held-out questions (greedy, one of each kind):")?;
        for kind in QuestionKind::ALL {
            let Some(i) = self.problems.iter().position(|p| p.kind == kind) else { continue };
            writeln!(f, "\n  {}", self.problems[i].question)?;
            for score in &self.scores {
                let mark = if score.right[i] { "right" } else { "wrong" };
                writeln!(f, "    {:<10} {mark}  {}", score.model, one_line(&score.replies[i]))?;
            }
        }
        if let (Some(p), false) = (self.chains.first(), self.chain_scores.is_empty()) {
            writeln!(f, "\n  {}", p.question)?;
            for score in &self.chain_scores {
                let mark = if score.right[0] { "right" } else { "wrong" };
                writeln!(f, "    {:<10} {mark}  {}", score.model, one_line(&score.replies[0]))?;
            }
        }
        let table = self.table();
        writeln!(f, "\n{}, {} of each kind of set:", table.caption, self.problems.len())?;
        for row in std::iter::once(&table.columns).chain(&table.rows) {
            writeln!(f, "  {:<8} {:<34} {:>16} {:>16}", row[0], row[1], row[2], row[3])?;
        }
        writeln!(f)?;
        for r in &self.stages {
            let rate = r.tokens as f64 / r.seconds.max(1e-9);
            writeln!(
                f,
                "{:<10} {:>5} steps, {:>7} tokens, {:>5.1} s, {rate:>6.0} tokens/s, loss {:.3}",
                r.name, r.steps, r.tokens, r.seconds, r.loss
            )?;
        }
        Ok(())
    }
}

fn one_line(text: &str) -> String {
    let line: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(100).collect();
    if line.is_empty() { "(nothing)".into() } else { line }
}
