//! How tokens are sampled. Layer 6.
//!
//! Invariant: what is sampled, and what is known of it, is the op's ([`crate::ops::sample`]);
//! nothing is sampled on the host.

use crate::config::SamplingOptions;

pub use crate::ops::sample::{Draw, Sampling};

impl SamplingOptions {
    /// What an engine takes, with the seed of its random numbers.
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
