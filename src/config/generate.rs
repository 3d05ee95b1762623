//! Keys of sampling (`temper generate`, `temper chat`). Layer 1.
//!
//! Invariant: a key's neutral value leaves the model's distribution as it is; nothing is read from
//! the model folder's generation_config.json but the tokens that end a text.

use super::{Report, section};

section! {
    /// Keys of `temper generate` and `temper chat`.
    pub struct GenerateConfig {
        /// Tokens of a completion at most.
        pub max_new_tokens: usize = 256,
        /// Logits are divided by it; 0: greedy.
        pub temperature: f64 = 1.0,
        /// Only the k most probable tokens; 0: all.
        pub top_k: usize = 0,
        /// Only the smallest set of tokens that has this probability; 1: all.
        pub top_p: f64 = 1.0,
        /// Only tokens with at least this share of the most probable one's probability; 0: all.
        pub min_p: f64 = 0.0,
        /// Logits of tokens that prompt and completion have are divided by it (negative ones
        /// multiplied); 1: off.
        pub repetition_penalty: f64 = 1.0,
        /// Texts that end a completion.
        pub stop: Vec<String> = Vec::new(),
        /// Completions of each prompt.
        pub n: usize = 1,
        /// Seed of the draws.
        pub seed: u64 = 42,
    }
}

impl GenerateConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("max_new_tokens", self.max_new_tokens, 1);
        report.at_least("n", self.n, 1);
        let penalty = self.repetition_penalty;
        report.must(penalty > 0.0, || {
            format!("repetition_penalty = {penalty}: must be above 0; 1 is off")
        });
        let (t, top_p, min_p) = (self.temperature, self.top_p, self.min_p);
        report.must(t >= 0.0, || format!("temperature = {t}: must not be negative; 0 is greedy"));
        report.must(top_p > 0.0 && top_p <= 1.0, || {
            format!("top_p = {top_p}: must be above 0 and at most 1")
        });
        report.must((0.0..=1.0).contains(&min_p), || {
            format!("min_p = {min_p}: must be between 0 and 1")
        });
        if t == 0.0 {
            for key in ["top_k", "top_p", "min_p"] {
                report.idle(key, "temperature", "temperature = 0 takes the most probable token");
            }
        }
    }
}
