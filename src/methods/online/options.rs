//! Options that the online methods share. Layer 7.
//!
//! Invariant: names and defaults are those of TRL's `GRPOConfig`; an option of ours says so.

use crate::config::{
    EnvironmentOptions, ReferenceSyncOptions, Report, RewardOptions, SamplingOptions, section,
};

section! {
    /// How many sequences are generated at once.
    pub struct RolloutOptions = "rollout" {
        /// Ours. Sequences to decode at once. none: as many as the memory plan has room for, at
        /// most 1024.
        pub max_sequences: Option<usize> = None,
    }
}

impl RolloutOptions {
    fn rules(&self, report: &mut Report) {
        report
            .must(self.max_sequences != Some(0), || "max_sequences = 0: must be at least 1".into());
    }
}

section! {
    /// What the methods with a policy loss share.
    pub struct OnlineConfig = "online" {
        /// Completions of each prompt.
        pub num_generations: usize = 8,
        /// Longest completion in tokens; with an environment, of all turns and answers together.
        pub max_completion_length: usize = 512,
        /// Micro-batches that use one generation. none: gradient_accumulation_steps.
        pub steps_per_generation: Option<usize> = None,
        /// Passes over a generation.
        pub num_iterations: usize = 1,
        /// Weight of the KL divergence from the reference model; 0: no reference model.
        pub beta: f64 = 0.0,
        /// Exclude truncated completions from the loss.
        pub mask_truncated_completions: bool = false,
        ..pub environment: EnvironmentOptions = EnvironmentOptions::default(),
        ..pub rewards: RewardOptions = RewardOptions::default(),
        ..pub sampling: SamplingOptions = SamplingOptions::default(),
        ..pub rollout: RolloutOptions = RolloutOptions::default(),
        ..pub sync: ReferenceSyncOptions = ReferenceSyncOptions::default(),
    }
}

impl OnlineConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("num_generations", self.num_generations, 1);
        report.at_least("max_completion_length", self.max_completion_length, 1);
        report.at_least("num_iterations", self.num_iterations, 1);
        report.must(self.steps_per_generation != Some(0), || {
            "steps_per_generation = 0: must be at least 1".into()
        });
        explores(&self.sampling, report);
        report.must(self.beta >= 0.0, || format!("beta = {}: must not be negative", self.beta));
        report.must(!self.sync.sync_ref_model || self.beta > 0.0, || {
            "sync_ref_model needs a reference: set beta".into()
        });
    }
}

/// Requires a temperature above 0: online methods sample, and the loss divides by it.
pub fn explores(sampling: &SamplingOptions, report: &mut Report) {
    let t = sampling.temperature;
    report.must(t > 0.0, || {
        format!("temperature = {t}: must be above 0, because the policy must explore")
    });
}

section! {
    /// How far a probability ratio may move.
    pub struct ClipOptions = "clipping" {
        /// Clip the ratio below 1 - epsilon.
        pub epsilon: f64 = 0.2,
        /// Clip the ratio above 1 + epsilon_high. none: epsilon.
        pub epsilon_high: Option<f64> = None,
    }
}

impl ClipOptions {
    /// The bounds below and above 1.
    pub fn bounds(&self) -> (f32, f32) {
        (self.epsilon as f32, self.epsilon_high.unwrap_or(self.epsilon) as f32)
    }

    fn rules(&self, report: &mut Report) {
        let epsilon = self.epsilon;
        report.must((0.0..1.0).contains(&epsilon), || {
            format!("epsilon = {epsilon}: must be below 1")
        });
    }
}
