//! The sampling options of a run. Layer 6.
//!
//! Invariant: the op ([`crate::ops::sample`]) samples tokens and computes their log-probs; nothing
//! is sampled on the host.

use crate::config::SamplingOptions;

pub use crate::ops::sample::{Draw, Sampling};

impl SamplingOptions {
    /// The options in the engine's form, with the seed of the random numbers.
    pub fn seeded(&self, seed: u64) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty,
            seed,
        }
    }
}
