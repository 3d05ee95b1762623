//! Keys of online RL: TRL's `GRPOConfig` and `RLOOConfig`, and for PPO those that TRL had before it
//! dropped it. Layer 1.
//!
//! Invariant: as for [`TrainingConfig`](super::TrainingConfig): names and defaults are TRL's; a key
//! of ours says so.

use super::value::{Given, words};
use super::{Key, MethodSection, Report, Section, TrainingConfig, section};

words! {
    pub enum GrpoLoss {
        Grpo = "grpo",
        Bnpo = "bnpo",
        DrGrpo = "dr_grpo",
        Dapo = "dapo",
        Cispo = "cispo",
        Sapo = "sapo",
        Luspo = "luspo",
        Vespo = "vespo",
    }
}

words! {
    pub enum ImportanceLevel {
        Token = "token",
        Sequence = "sequence",
    }
}

words! {
    pub enum ScaleRewards {
        Group = "group" | "true",
        Batch = "batch",
        None = "none" | "false",
    }
}

words! {
    pub enum RewardAggregation {
        SumThenNormalize = "sum_then_normalize",
        NormalizeThenSum = "normalize_then_sum",
    }
}

words! {
    pub enum KlEstimatorChoice {
        K1 = "k1",
        K3 = "k3",
    }
}

words! {
    /// Where PPO's values come from.
    pub enum ValueModel {
        /// A trunk of its own, which starts as the reward model's or the policy's.
        Own = "own",
        /// A score on the policy's last hidden state.
        Shared = "shared",
    }
}

section! {
    /// Keys that every online method has.
    pub struct OnlineConfig {
        /// Ours (TRL: reward_funcs of a trainer). Rewards: exact_match, numeric_match,
        /// regex:PATTERN, think_format, json_schema:FILE, length, soft_overlong, repetition,
        /// command:CMD, python:FILE.py:FUNC; docs/rewards.md.
        pub reward_funcs: Vec<String> = Vec::new(),
        /// A weight for each reward (reward_funcs first, then reward_model). none: 1 each.
        pub reward_weights: Option<Vec<f64>> = None,
        /// Ours. A reward-model folder, whose score is one more reward.
        pub reward_model: Option<String> = None,
        /// Completions of a prompt.
        pub num_generations: usize = 8,
        /// Tokens of a completion at most.
        pub max_completion_length: usize = 512,
        /// Logits are divided by it, in sampling and in the loss.
        pub temperature: f64 = 1.0,
        /// Only the smallest set of tokens that has this probability; 1: all.
        pub top_p: f64 = 1.0,
        /// Only the k most probable tokens; 0: all.
        pub top_k: usize = 0,
        /// Only tokens with at least this share of the most probable one's probability. none: all.
        pub min_p: Option<f64> = None,
        /// Tokens that stand already are made less likely by this factor; 1: not.
        pub repetition_penalty: f64 = 1.0,
        /// Micro-batches that one generation serves. none: gradient_accumulation_steps.
        pub steps_per_generation: Option<usize> = None,
        /// Passes over a generation.
        pub num_iterations: usize = 1,
        /// Weight of the KL divergence from the reference model; 0: no reference model.
        pub beta: f64 = 0.0,
        /// Completions that max_completion_length cut off teach nothing.
        pub mask_truncated_completions: bool = false,
        /// Move the reference towards the policy as training goes on (TR-DPO).
        pub sync_ref_model: bool = false,
        /// The policy's share in the reference at a move.
        pub ref_model_mixup_alpha: f64 = 0.6,
        /// Steps between two moves.
        pub ref_model_sync_steps: usize = 512,
        /// Show the best and the worst completion of each logged step.
        pub log_completions: bool = false,
        /// Ours. Sequences decoded at once.
        pub max_sequences: usize = 64,
        /// A Jinja file, or a folder with a tokenizer, whose chat template replaces the model's.
        pub chat_template_path: Option<String> = None,
    }
}

impl OnlineConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("num_generations", self.num_generations, 1);
        report.at_least("max_completion_length", self.max_completion_length, 1);
        report.at_least("num_iterations", self.num_iterations, 1);
        report.at_least("max_sequences", self.max_sequences, 1);
        report.must(self.steps_per_generation != Some(0), || {
            "steps_per_generation = 0: must be at least 1".into()
        });
        let (t, top_p) = (self.temperature, self.top_p);
        report.must(t > 0.0, || {
            format!("temperature = {t}: must be above 0, the policy must explore")
        });
        report.must(top_p > 0.0 && top_p <= 1.0, || {
            format!("top_p = {top_p}: must be above 0 and at most 1")
        });
        report.must(self.beta >= 0.0, || format!("beta = {}: must not be negative", self.beta));
        report.must(!self.reward_funcs.is_empty() || self.reward_model.is_some(), || {
            "no reward: give reward_funcs=NAME,... or reward_model=DIR; docs/rewards.md lists them".into()
        });
        let rewards = self.reward_funcs.len() + usize::from(self.reward_model.is_some());
        if let Some(weights) = &self.reward_weights {
            let n = weights.len();
            report.must(n == rewards, || {
                format!("reward_weights has {n} values for {rewards} rewards; give one each")
            });
        }
        if !self.sync_ref_model {
            report.idle("ref_model_mixup_alpha", "sync_ref_model", "sync_ref_model is false");
            report.idle("ref_model_sync_steps", "sync_ref_model", "sync_ref_model is false");
        }
        report.must(!self.sync_ref_model || self.beta > 0.0, || {
            "sync_ref_model needs a reference: set beta".into()
        });
    }
}

section! {
    /// Keys of `temper grpo`, beside those of all online methods.
    pub struct GrpoKeys {
        /// The loss: how a token counts, and what the sum is divided by.
        pub loss_type: GrpoLoss = GrpoLoss::Dapo,
        /// The ratio is clipped below 1 - epsilon,
        pub epsilon: f64 = 0.2,
        /// and above 1 + epsilon_high. none: epsilon.
        pub epsilon_high: Option<f64> = None,
        /// Bound of the ratio on both sides of the advantage (INTELLECT-2). none: none.
        pub delta: Option<f64> = None,
        /// A ratio for each token, or one for the sequence (GSPO).
        pub importance_sampling_level: ImportanceLevel = ImportanceLevel::Token,
        /// What advantages are divided by: the standard deviation of the group, of the batch, or
        /// nothing.
        pub scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// Several rewards: summed first, or normalised one by one first (GDPO).
        pub multi_objective_aggregation: RewardAggregation = RewardAggregation::SumThenNormalize,
        /// The KL term times the ratio, so that its gradient is unbiased.
        pub use_bias_correction_kl: bool = true,
        /// sapo's temperature for positive advantages.
        pub sapo_temperature_pos: f64 = 1.0,
        /// sapo's temperature for negative advantages.
        pub sapo_temperature_neg: f64 = 1.05,
        /// vespo's power for positive advantages.
        pub vespo_k_pos: f64 = 2.0,
        /// vespo's rate for positive advantages.
        pub vespo_lambda_pos: f64 = 3.0,
        /// vespo's power for negative advantages.
        pub vespo_k_neg: f64 = 3.0,
        /// vespo's rate for negative advantages.
        pub vespo_lambda_neg: f64 = 2.0,
        /// Only the tokens of this share of highest entropy are trained; 1: all.
        pub top_entropy_quantile: f64 = 1.0,
        /// Weight of the mean token entropy, which is added to what is maximised.
        pub entropy_coef: f64 = 0.0,
        /// Sequences of negative advantage that the policy has left by more than this are dropped.
        /// none: none are.
        pub off_policy_mask_threshold: Option<f64> = None,
        /// Ours (DAPO). Groups whose rewards do not differ are generated anew for other prompts,
        /// this many times at most.
        pub dynamic_sampling: usize = 0,
    }
}

impl GrpoKeys {
    fn rules(&self, report: &mut Report) {
        let q = self.top_entropy_quantile;
        report.must(q > 0.0 && q <= 1.0, || {
            format!("top_entropy_quantile = {q}: must be above 0 and at most 1")
        });
        report.must((0.0..1.0).contains(&self.epsilon), || {
            format!("epsilon = {}: must be below 1", self.epsilon)
        });
        if self.loss_type != GrpoLoss::Sapo {
            report.idle("sapo_temperature_pos", "loss_type", "loss_type is not sapo");
            report.idle("sapo_temperature_neg", "loss_type", "loss_type is not sapo");
        }
        if self.loss_type != GrpoLoss::Vespo {
            for key in ["vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"] {
                report.idle(key, "loss_type", "loss_type is not vespo");
            }
        }
        let sequence = self.importance_sampling_level == ImportanceLevel::Sequence;
        report.must(self.loss_type != GrpoLoss::Luspo || sequence, || {
            "loss_type = luspo needs importance_sampling_level=sequence".into()
        });
    }
}

section! {
    /// Keys of `temper rloo`, beside those of all online methods.
    pub struct RlooKeys {
        /// The sequence's ratio is clipped below 1 - epsilon,
        pub epsilon: f64 = 0.2,
        /// and above 1 + epsilon_high. none: epsilon.
        pub epsilon_high: Option<f64> = None,
        /// Divide advantages by their standard deviation over the batch.
        pub normalize_advantages: bool = false,
        /// Rewards are clipped into this range. none: they are not.
        pub reward_clip_range: Option<Vec<f64>> = None,
    }
}

impl RlooKeys {
    fn rules(&self, report: &mut Report) {
        report.must(
            self.reward_clip_range.as_ref().is_none_or(|r| r.len() == 2 && r[0] < r[1]),
            || "reward_clip_range: two numbers, the lower first".into(),
        );
    }
}

section! {
    /// Keys of `temper reinforce`, beside those of all online methods.
    pub struct ReinforceKeys {
        /// The ratio is clipped below 1 - epsilon,
        pub epsilon: f64 = 0.2,
        /// and above 1 + epsilon_high. none: epsilon.
        pub epsilon_high: Option<f64> = None,
        /// Take the mean of a prompt's completions off first (REINFORCE++-baseline).
        pub group_baseline: bool = false,
        /// ReMax: the baseline is the reward of the greedy completion, and nothing is whitened.
        pub greedy_baseline: bool = false,
    }
}

impl ReinforceKeys {
    fn rules(&self, report: &mut Report) {
        report.must(!(self.group_baseline && self.greedy_baseline), || {
            "group_baseline and greedy_baseline: choose one".into()
        });
    }
}

section! {
    /// Keys of `temper ppo`, beside those of all online methods.
    pub struct PpoKeys {
        /// Passes over a generation.
        pub num_ppo_epochs: usize = 4,
        /// Mini-batches that a pass is cut into, an optimizer step each.
        pub num_mini_batches: usize = 1,
        /// Weight of the KL divergence in the token rewards.
        pub kl_coef: f64 = 0.05,
        /// k1: log pi - log ref; k3: the unbiased one that is never negative.
        pub kl_estimator: KlEstimatorChoice = KlEstimatorChoice::K1,
        /// Ours (Ziegler et al.). Steer kl_coef so that a sequence's KL is this. none: kl_coef is
        /// fixed.
        pub target_kl: Option<f64> = None,
        /// Ours. Episodes over which a steered kl_coef moves.
        pub kl_horizon: f64 = 10000.0,
        /// The policy's ratio is clipped to 1 +- this.
        pub cliprange: f64 = 0.2,
        /// Weight of the value loss.
        pub vf_coef: f64 = 0.1,
        /// Values may leave those of the generation by this before they are clipped.
        pub cliprange_value: f64 = 0.2,
        /// Discount of later rewards.
        pub gamma: f64 = 1.0,
        /// GAE's lambda.
        pub lam: f64 = 0.95,
        /// Divide token rewards by their standard deviation.
        pub whiten_rewards: bool = false,
        /// Taken off the score of a completion that did not end. none: nothing.
        pub missing_eos_penalty: Option<f64> = None,
        /// Ours. Scores are clipped to +- this. none: they are not.
        pub reward_clip: Option<f64> = None,
        /// Ours. Where values come from: a model of its own, or a score on the policy's trunk.
        pub value_model: ValueModel = ValueModel::Own,
        /// Ours. Learning rate of the value model. none: learning_rate.
        pub value_learning_rate: Option<f64> = None,
    }
}

impl PpoKeys {
    fn rules(&self, report: &mut Report) {
        report.at_least("num_ppo_epochs", self.num_ppo_epochs, 1);
        report.at_least("num_mini_batches", self.num_mini_batches, 1);
        report.must((0.0..=1.0).contains(&self.gamma), || {
            format!("gamma = {}: from 0 to 1", self.gamma)
        });
        report.must((0.0..=1.0).contains(&self.lam), || format!("lam = {}: from 0 to 1", self.lam));
        report.must(self.cliprange > 0.0, || "cliprange: must be above 0".into());
    }
}

/// The keys of one online method: those of all, then its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Online<K> {
    pub online: OnlineConfig,
    pub own: K,
}

impl<K: Section> Section for Online<K> {
    fn keys(&self) -> Vec<Key> {
        [self.own.keys(), self.online.keys()].concat()
    }

    fn set(&mut self, key: &str, given: &Given) -> Option<Result<(), String>> {
        self.own.set(key, given).or_else(|| self.online.set(key, given))
    }

    fn check(&self, report: &mut Report) {
        self.online.check(report);
        self.own.check(report);
    }
}

pub type GrpoConfig = Online<GrpoKeys>;
pub type RlooConfig = Online<RlooKeys>;
pub type ReinforceConfig = Online<ReinforceKeys>;
pub type PpoConfig = Online<PpoKeys>;

/// The common keys at TRL's defaults for online RL.
fn training(learning_rate: f64) -> TrainingConfig {
    TrainingConfig { learning_rate, ..Default::default() }
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Online { online: OnlineConfig::default(), own: GrpoKeys::default() }
    }
}

impl MethodSection for GrpoConfig {
    const NAME: &'static str = "grpo";

    fn training() -> TrainingConfig {
        training(1e-6)
    }
}

impl Default for RlooConfig {
    fn default() -> Self {
        let online = OnlineConfig { num_generations: 2, beta: 0.05, ..Default::default() };
        Online { online, own: RlooKeys::default() }
    }
}

impl MethodSection for RlooConfig {
    const NAME: &'static str = "rloo";

    fn training() -> TrainingConfig {
        training(1e-6)
    }
}

impl Default for ReinforceConfig {
    fn default() -> Self {
        Online { online: OnlineConfig::default(), own: ReinforceKeys::default() }
    }
}

impl MethodSection for ReinforceConfig {
    const NAME: &'static str = "reinforce";

    fn training() -> TrainingConfig {
        training(1e-6)
    }
}

impl Default for PpoConfig {
    fn default() -> Self {
        let online = OnlineConfig {
            num_generations: 1,
            temperature: 0.7,
            max_completion_length: 53,
            ..Default::default()
        };
        Online { online, own: PpoKeys::default() }
    }
}

impl MethodSection for PpoConfig {
    const NAME: &'static str = "ppo";

    fn training() -> TrainingConfig {
        training(3e-6)
    }
}
