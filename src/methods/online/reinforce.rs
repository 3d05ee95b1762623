//! REINFORCE++ and ReMax: one advantage per completion, without siblings or with them only as a
//! baseline.
//!
//! REINFORCE++ whitens rewards over all tokens of the generation, where each token has its
//! completion's reward, and clips as PPO does; with `group_baseline` the prompt's mean is
//! subtracted first (Hu et al., arXiv 2501.03262). ReMax (`greedy_baseline`) instead subtracts the
//! reward of the greedy completion and does not whiten (Li et al., arXiv 2310.10505). beta adds the
//! k3 divergence from the reference to the loss.
//!
//! Layer 7. Invariant: see `methods::online::policy`.

use super::advantage::reinforce_plus_plus;
use super::metrics::mean;
use super::options::{ClipOptions, OnlineConfig};
use super::policy::{AdvantageContext, PolicyObjective, WeighedRollouts, clip_term};
use super::sampler::SampleRequest;
use super::weights::Normalizer;
use crate::config::{Report, section};
use crate::error::Result;
use crate::methods::MethodEntry;
use crate::methods::offline::rows::Split;
use crate::ops::policy::{ImportanceLevel, PolicyLoss};

pub const METHOD: MethodEntry =
    MethodEntry::new::<ReinforceConfig>("reinforce", "REINFORCE++ and ReMax").on_page("grpo");

section! {
    /// REINFORCE++ and ReMax, beside the options of all policy losses.
    pub struct ReinforceConfig = "reinforce" {
        /// Subtract the mean reward of the prompt's completions first (REINFORCE++-baseline).
        pub group_baseline: bool = false,
        /// ReMax: subtract the reward of the greedy completion, and whiten nothing.
        pub greedy_baseline: bool = false,
        ..pub clip: ClipOptions = ClipOptions::default(),
        ..pub online: OnlineConfig = OnlineConfig::default(),
    }
}

impl ReinforceConfig {
    fn rules(&self, report: &mut Report) {
        report.must(!(self.group_baseline && self.greedy_baseline), || {
            "group_baseline and greedy_baseline cannot be combined: set only one".into()
        });
    }

    /// ReMax's advantages: rewards minus the reward of the greedy completion.
    fn remax(&self, context: &mut AdvantageContext) -> Result<WeighedRollouts> {
        let AdvantageContext { cx, model, env, rollouts, scores, group, .. } = context;
        let prompts: Vec<usize> = rollouts.iter().step_by(*group).map(|r| r.prompt).collect();
        let request = SampleRequest { n: 1, stream: context.generation | 1 << 56, greedy: true };
        let greedy = env.generate(cx, model, Split::Train, &prompts, request)?;
        let baseline = env.score(cx, Split::Train, &greedy)?.total();
        let less = |(i, r): (usize, Option<f64>)| match (r, baseline[i / *group]) {
            (Some(r), Some(b)) => r - b,
            _ => 0.0,
        };
        let advantages = scores.total().into_iter().enumerate().map(less).collect();
        let known: Vec<f64> = baseline.iter().flatten().copied().collect();
        let metrics = vec![("reward_greedy".into(), mean(known.into_iter()))];
        Ok(WeighedRollouts { advantages, metrics })
    }
}

impl PolicyObjective for ReinforceConfig {
    fn advantages(&self, context: &mut AdvantageContext) -> Result<WeighedRollouts> {
        if self.greedy_baseline {
            return self.remax(context);
        }
        let lengths: Vec<usize> = context.rollouts.iter().map(|r| r.ids.len()).collect();
        let group = self.group_baseline.then_some(context.group);
        let advantages = reinforce_plus_plus(&context.scores.total(), &lengths, group)?;
        Ok(WeighedRollouts { advantages, metrics: Vec::new() })
    }

    fn loss(&self) -> PolicyLoss {
        PolicyLoss {
            term: clip_term(&self.clip),
            level: ImportanceLevel::Token,
            beta: self.online.beta as f32,
            bias_correction_kl: false,
        }
    }

    fn normalizer(&self, active_tokens: usize, steps_per_generation: usize) -> Normalizer {
        Normalizer::Window { num_items_in_batch: active_tokens, steps_per_generation }
    }

    fn online(&self) -> &OnlineConfig {
        &self.online
    }
}
