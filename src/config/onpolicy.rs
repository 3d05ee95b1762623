//! Keys of `temper online-dpo` and `temper gkd`, whose generation has names of its own in TRL
//! (`max_new_tokens`). Layer 1.
//!
//! Invariant: as for [`TrainingConfig`]: names and defaults are TRL's, of `OnlineDPOConfig` and
//! `GKDConfig`.

use super::dpo::length_rules;
use super::value::words;
use super::{
    MethodSection, OnTruncation, OnlineConfig, Report, Section, TrainingConfig, TruncationMode,
    section,
};

words! {
    pub enum OnlineDpoLoss {
        Sigmoid = "sigmoid",
        Ipo = "ipo",
    }
}

section! {
    /// Keys of `temper online-dpo`, beside the common ones.
    pub struct OnlineDpoConfig {
        /// Ours (TRL: reward_funcs of a trainer). Rewards, by which the two completions of a prompt
        /// are ranked; docs/rewards.md lists them.
        pub reward_funcs: Vec<String> = Vec::new(),
        /// A weight for each reward (reward_funcs first, then reward_model). none: 1 each.
        pub reward_weights: Option<Vec<f64>> = None,
        /// Ours (TRL: reward_model_path). A reward-model folder, whose score is one more reward.
        pub reward_model: Option<String> = None,
        /// Tokens of a completion at most.
        pub max_new_tokens: usize = 64,
        /// Logits are divided by it, in sampling and in the loss.
        pub temperature: f64 = 0.9,
        /// Only the smallest set of tokens that has this probability; 1: all.
        pub top_p: f64 = 1.0,
        /// Only the k most probable tokens; 0: all.
        pub top_k: usize = 0,
        /// Only tokens with at least this share of the most probable one's probability. none: all.
        pub min_p: Option<f64> = None,
        /// Tokens that stand already are made less likely by this factor; 1: not.
        pub repetition_penalty: f64 = 1.0,
        /// Taken off the reward of a completion that did not end. none: nothing.
        pub missing_eos_penalty: Option<f64> = None,
        /// Strength of the pull to the reference model; a list has one for each epoch, the last one
        /// stays.
        pub beta: Vec<f64> = vec![0.1],
        /// The loss of a pair.
        pub loss_type: OnlineDpoLoss = OnlineDpoLoss::Sigmoid,
        /// Ours. Show the best and the worst completion of each logged step.
        pub log_completions: bool = false,
        /// Ours. Sequences decoded at once.
        pub max_sequences: usize = 64,
        /// Ours. A Jinja file, or a folder with a tokenizer, whose chat template replaces the
        /// model's.
        pub chat_template_path: Option<String> = None,
    }
}

impl OnlineDpoConfig {
    /// The keys that all online methods have, as these say them.
    pub fn online(&self) -> OnlineConfig {
        OnlineConfig {
            reward_funcs: self.reward_funcs.clone(),
            reward_weights: self.reward_weights.clone(),
            reward_model: self.reward_model.clone(),
            num_generations: 2,
            max_completion_length: self.max_new_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            log_completions: self.log_completions,
            max_sequences: self.max_sequences,
            ..OnlineConfig::default()
        }
    }

    fn rules(&self, report: &mut Report) {
        report.at_least("max_new_tokens", self.max_new_tokens, 1);
        self.online().check(report);
        report.must(!self.beta.is_empty() && self.beta.iter().all(|b| *b > 0.0), || {
            "beta: one number above 0, or one for each epoch".into()
        });
    }
}

impl MethodSection for OnlineDpoConfig {
    const NAME: &'static str = "online-dpo";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 5e-7, ..Default::default() }
    }
}

section! {
    /// Keys of `temper gkd`, beside the common ones.
    pub struct GkdConfig {
        /// The folder of the teacher, of the same vocabulary.
        pub teacher_model_name_or_path: Option<String> = None,
        /// The probability that a micro-batch has the student's own completions; else it has the
        /// data's.
        pub lmbda: f64 = 0.5,
        /// 0: forward KL, teacher to student; 1: reverse KL, student to teacher; between: the
        /// generalised Jensen-Shannon divergence.
        pub beta: f64 = 0.5,
        /// Of the sampling. TRL's loss does not use it either: both distributions are compared as
        /// they are.
        pub temperature: f64 = 0.9,
        /// Tokens of a generated completion at most.
        pub max_new_tokens: usize = 128,
        /// Where the student's completions are not taken, the teacher's are, not the data's.
        pub seq_kd: bool = false,
        /// Tokens of a row of the data at most. none: no limit.
        pub max_length: Option<usize> = Some(1024),
        /// Which end of a row longer than max_length is kept.
        pub truncation_mode: TruncationMode = TruncationMode::KeepStart,
        /// Ours. What happens to a row longer than max_length (TRL: truncate). error names the row.
        pub on_truncation: OnTruncation = OnTruncation::Truncate,
        /// Ours. Sequences decoded at once.
        pub max_sequences: usize = 64,
        /// A Jinja file, or a folder with a tokenizer, whose chat template replaces the model's.
        pub chat_template_path: Option<String> = None,
    }
}

impl GkdConfig {
    /// The keys that all online methods have, as these say them.
    pub fn online(&self) -> OnlineConfig {
        OnlineConfig {
            num_generations: 1,
            max_completion_length: self.max_new_tokens,
            temperature: self.temperature,
            max_sequences: self.max_sequences,
            ..OnlineConfig::default()
        }
    }

    /// Whether a micro-batch may have the data's completions.
    pub fn uses_data(&self) -> bool {
        self.lmbda < 1.0 && !self.seq_kd
    }

    fn rules(&self, report: &mut Report) {
        for (key, value) in [("lmbda", self.lmbda), ("beta", self.beta)] {
            report.must((0.0..=1.0).contains(&value), || {
                format!("{key} = {value}: must be in [0, 1]")
            });
        }
        report.must(self.temperature > 0.0, || {
            format!("temperature = {}: must be above 0", self.temperature)
        });
        report.at_least("max_new_tokens", self.max_new_tokens, 1);
        report.at_least("max_sequences", self.max_sequences, 1);
        length_rules(self.max_length, report);
        report.must(self.teacher_model_name_or_path.is_some(), || {
            "teacher_model_name_or_path: name the teacher's folder".into()
        });
    }
}

impl MethodSection for GkdConfig {
    const NAME: &'static str = "gkd";

    fn training() -> TrainingConfig {
        TrainingConfig { learning_rate: 2e-5, ..Default::default() }
    }
}
