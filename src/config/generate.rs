//! Options of sampling (`temper generate`, `temper chat`). Layer 1.
//!
//! Invariant: the neutral value of an option leaves the model's distribution as it is; only the
//! tokens that end a text are read from the model folder's generation_config.json.

use super::{Report, SamplingOptions, TemplateOptions, section};

section! {
    /// Options of `temper generate` and `temper chat`.
    pub struct GenerateConfig = "generate" {
        /// Longest completion in tokens.
        pub max_new_tokens: usize = 256,
        /// Texts that end a completion.
        pub stop: Vec<String> = Vec::new(),
        /// Completions of each prompt.
        pub n: usize = 1,
        /// Seed of the sampling.
        pub seed: u64 = 42,
        ..pub template: TemplateOptions = TemplateOptions::default(),
        ..pub sampling: SamplingOptions = SamplingOptions::default(),
    }
}

impl GenerateConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("max_new_tokens", self.max_new_tokens, 1);
        report.at_least("n", self.n, 1);
    }
}
