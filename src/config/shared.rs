//! Sections that several commands share. Layer 1.
//!
//! Invariant: a shared option exists once; a method that needs another default sets it where it
//! nests the section.

use super::value::words;
use super::{PathText, Report, RewardSpecs, section};

words! {
    pub enum TruncationMode {
        KeepStart = "keep_start",
        KeepEnd = "keep_end",
    }
}

words! {
    pub enum OnTruncation {
        Truncate = "truncate",
        Drop = "drop",
        Error = "error",
    }
}

section! {
    /// How long a row may be.
    pub struct LengthOptions = "length" {
        /// Longest row in tokens, prompt and completion together. With packing: the length of a
        /// pack. none: no limit.
        pub max_length: Option<usize> = Some(1024),
        /// Ours. What to do with a longer row (TRL: truncate). drop: leave it out. error: end the
        /// run and name it.
        pub on_truncation: OnTruncation = OnTruncation::Truncate,
    }
}

impl LengthOptions {
    fn rules(&self, report: &mut Report) {
        if let Some(length @ (0 | 1)) = self.max_length {
            report.problem(format!(
                "max_length = {length}: a row needs at least 2 tokens, one to predict from and one \
                 to predict"
            ));
        }
        if self.max_length.is_none() {
            report.idle("on_truncation", "max_length", "max_length is \"none\"");
        }
    }
}

section! {
    /// How long a row may be, and which end of a longer one is kept.
    pub struct TruncationOptions = "truncation" {
        /// Which end to keep of a row longer than max_length.
        pub truncation_mode: TruncationMode = TruncationMode::KeepStart,
        ..pub length: LengthOptions = LengthOptions::default(),
    }
}

impl TruncationOptions {
    fn rules(&self, report: &mut Report) {
        if self.length.max_length.is_none() {
            report.idle("truncation_mode", "max_length", "max_length is \"none\"");
        }
    }
}

section! {
    /// A reference model that follows the policy (TR-DPO).
    pub struct ReferenceSyncOptions = "reference sync" {
        /// Move the reference model towards the policy during training.
        pub sync_ref_model: bool = false,
        /// Share of the policy in an update: reference = (1 - alpha) reference + alpha policy.
        pub ref_model_mixup_alpha: f64 = 0.6,
        /// Optimizer steps between two updates of the reference.
        pub ref_model_sync_steps: usize = 512,
    }
}

impl ReferenceSyncOptions {
    /// The policy's share and the steps between two updates, if the reference is updated.
    pub fn schedule(&self) -> Option<(f64, u64)> {
        self.sync_ref_model
            .then_some((self.ref_model_mixup_alpha, self.ref_model_sync_steps as u64))
    }

    fn rules(&self, report: &mut Report) {
        let alpha = self.ref_model_mixup_alpha;
        report.must((0.0..=1.0).contains(&alpha), || {
            format!("ref_model_mixup_alpha = {alpha}: must be in [0, 1]")
        });
        report.at_least("ref_model_sync_steps", self.ref_model_sync_steps, 1);
        if !self.sync_ref_model {
            for key in ["ref_model_mixup_alpha", "ref_model_sync_steps"] {
                report.idle(key, "sync_ref_model", "sync_ref_model is false");
            }
        }
    }
}

section! {
    /// The frozen model that a preference method compares the policy with.
    pub struct ReferenceOptions = "reference" {
        /// Ours. Folder of the reference model. none: the initial weights.
        pub ref_model: Option<PathText> = None,
        /// Compute the reference log-probs once, before training, and keep them on disk.
        pub precompute_ref_log_probs: bool = false,
        /// Batch size for precomputing reference log-probs. none: per_device_train_batch_size.
        pub precompute_ref_batch_size: Option<usize> = None,
        ..pub sync: ReferenceSyncOptions = ReferenceSyncOptions::default(),
    }
}

impl ReferenceOptions {
    fn rules(&self, report: &mut Report) {
        report.must(!(self.sync.sync_ref_model && self.precompute_ref_log_probs), || {
            "sync_ref_model = true changes the reference, and the log-probs of \
             precompute_ref_log_probs = true would be out of date; unset one of them"
                .into()
        });
        if !self.precompute_ref_log_probs {
            let why = "precompute_ref_log_probs is false";
            report.idle("precompute_ref_batch_size", "precompute_ref_log_probs", why);
        }
    }
}

section! {
    /// How tokens are sampled.
    pub struct SamplingOptions = "sampling" {
        /// Divides the logits. 0: take the most probable token (not in online RL, where the loss
        /// divides by it too).
        pub temperature: f64 = 1.0,
        /// Sample from the k most probable tokens. 0: all.
        pub top_k: usize = 0,
        /// Sample from the smallest set of tokens whose probabilities add up to this. 1: all.
        pub top_p: f64 = 1.0,
        /// Sample from tokens with at least this fraction of the highest probability. none: all.
        pub min_p: Option<f64> = None,
        /// Penalty for tokens already in the sequence. 1: no penalty.
        pub repetition_penalty: f64 = 1.0,
    }
}

impl SamplingOptions {
    fn rules(&self, report: &mut Report) {
        let penalty = self.repetition_penalty;
        report.must(penalty > 0.0, || {
            format!("repetition_penalty = {penalty}: must be above 0; 1 is off")
        });
        let (t, top_p) = (self.temperature, self.top_p);
        report.must(t >= 0.0, || format!("temperature = {t}: must not be negative; 0 is greedy"));
        report.must(top_p > 0.0 && top_p <= 1.0, || {
            format!("top_p = {top_p}: must be above 0 and at most 1")
        });
        if let Some(min_p) = self.min_p {
            report.must((0.0..=1.0).contains(&min_p), || {
                format!("min_p = {min_p}: must be between 0 and 1")
            });
        }
        if t == 0.0 {
            for key in ["top_k", "top_p", "min_p"] {
                report.idle(key, "temperature", "temperature = 0 takes the most probable token");
            }
        }
    }
}

section! {
    /// What scores completions.
    pub struct RewardOptions = "rewards" {
        /// Ours (TRL: reward_funcs of a trainer). Rewards: exact_match, numeric_match,
        /// regex:PATTERN, think_format, json_schema:FILE, length, soft_overlong, repetition,
        /// command:CMD, python:FILE.py:FUNC; docs/rewards.md lists them.
        pub reward_funcs: RewardSpecs = RewardSpecs::default(),
        /// A weight for each reward: reward_funcs first, then functions of a program, then the
        /// environment, then reward_model. none: 1 each.
        pub reward_weights: Option<Vec<f64>> = None,
        /// Ours. Environment variables passed to reward programs (and to an environment) besides
        /// PATH and HOME. none: all, including tokens and keys.
        pub reward_env: Option<Vec<String>> = None,
        /// Ours. Folder of a reward model whose score is added as a reward.
        pub reward_model: Option<PathText> = None,
        /// Show the best and the worst completion of the last generation with each log line.
        pub log_completions: bool = false,
    }
}

impl RewardOptions {
    fn rules(&self, report: &mut Report) {
        let given = self.reward_funcs.len() + usize::from(self.reward_model.is_some());
        let rewards = given + report.reward_functions;
        report.must(rewards > 0, || {
            "no reward: give reward_funcs=NAME,... or reward_model=DIR; docs/rewards.md lists them"
                .into()
        });
        if let Some(weights) = self.reward_weights.as_ref().filter(|_| rewards > 0) {
            let n = weights.len();
            report.must(n == rewards, || {
                format!("reward_weights has {n} values for {rewards} rewards; give one each")
            });
        }
    }
}
