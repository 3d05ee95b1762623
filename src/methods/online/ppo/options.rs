//! The options of PPO. Layer 7.
//!
//! Invariant: names and defaults are those that TRL's `PPOConfig` had; an option of ours says so.

use crate::config::value::words;
use crate::config::{Report, section};
use crate::methods::online::advantage::KlEstimator;
use crate::methods::online::options::OnlineConfig;

words! {
    /// The source of PPO's values.
    pub enum ValueModel {
        /// A separate trunk, initialised from the reward model or the policy.
        Own = "own",
        /// A separate LoRA on the policy's frozen base.
        Lora = "lora",
        /// A score on the policy's last hidden state.
        Shared = "shared",
    }
}

section! {
    /// What TRL's `PPOConfig` was before PPO left the package.
    pub struct PpoConfig = "ppo" {
        /// Passes over a generation.
        pub num_ppo_epochs: usize = 4,
        /// Mini-batches in a pass, one optimizer step each.
        pub num_mini_batches: usize = 1,
        /// Weight of the KL divergence in the token rewards.
        pub kl_coef: f64 = 0.05,
        /// k1: log pi - log ref. k3: the unbiased estimator that is never negative.
        pub kl_estimator: KlEstimator = KlEstimator::K1,
        /// Ours (Ziegler et al., 2019). Adapt kl_coef to reach this KL per sequence. none: kl_coef
        /// is fixed.
        pub target_kl: Option<f64> = None,
        /// Ours. Episodes over which an adaptive kl_coef changes.
        pub kl_horizon: f64 = 10000.0,
        /// Clip the policy's ratio to 1 +- this.
        pub cliprange: f64 = 0.2,
        /// Weight of the value loss.
        pub vf_coef: f64 = 0.1,
        /// Clip values to this distance from those of the generation.
        pub cliprange_value: f64 = 0.2,
        /// Discount of later rewards.
        pub gamma: f64 = 1.0,
        /// GAE's lambda.
        pub lam: f64 = 0.95,
        /// Divide token rewards by their standard deviation.
        pub whiten_rewards: bool = false,
        /// Subtracted from the score of a completion without EOS. none: 0.
        pub missing_eos_penalty: Option<f64> = None,
        /// Ours. Clip scores to +- this. none: no clipping.
        pub reward_clip: Option<f64> = None,
        /// Ours. own: a separate value model. lora: a LoRA of its own on the policy's base
        /// (use_peft=true). shared: a value head on the policy.
        pub value_model: ValueModel = ValueModel::Own,
        /// Ours, for value_model=lora. Rank of the value model's LoRA. none: the policy's.
        pub value_lora_r: Option<usize> = None,
        /// Ours, for value_model=lora. Scale: value_lora_alpha / value_lora_r. none: the policy's.
        pub value_lora_alpha: Option<f64> = None,
        /// Ours, for value_model=lora. As lora_target_modules. none: the policy's.
        pub value_lora_target_modules: Option<Vec<String>> = None,
        /// Ours. Learning rate of the value model. none: learning_rate.
        pub value_learning_rate: Option<f64> = None,
        ..pub online: OnlineConfig = default_online(),
    }
}

fn default_online() -> OnlineConfig {
    let mut online =
        OnlineConfig { num_generations: 1, max_completion_length: 53, ..OnlineConfig::default() };
    online.sampling.temperature = 0.7;
    online
}

impl PpoConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("num_ppo_epochs", self.num_ppo_epochs, 1);
        report.at_least("num_mini_batches", self.num_mini_batches, 1);
        for (key, value) in [("gamma", self.gamma), ("lam", self.lam)] {
            report.must((0.0..=1.0).contains(&value), || {
                format!("{key} = {value}: must be from 0 to 1")
            });
        }
        report.must(self.cliprange > 0.0, || "cliprange: must be above 0".into());
        report.must(self.value_lora_r != Some(0), || "value_lora_r = 0: must be at least 1".into());
        report.must(self.value_lora_alpha.is_none_or(|alpha| alpha > 0.0), || {
            "value_lora_alpha: must be above 0".into()
        });
        if self.value_model != ValueModel::Lora {
            for key in ["value_lora_r", "value_lora_alpha", "value_lora_target_modules"] {
                report.idle(key, "value_model", "value_model is not lora");
            }
        }
    }
}
