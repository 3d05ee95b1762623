//! How tokens are sampled. Layer 6.
//!
//! Invariant: what is sampled, and what is known of it, is the op's ([`crate::ops::sample`]);
//! nothing is sampled on the host.

use crate::config::GenerateConfig;

pub use crate::ops::sample::{Draw, Sampling};

/// The options that shape the distribution, under one name each for every command that generates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Logits are divided by it; 0: greedy.
    pub temperature: f64,
    /// Only the k most probable tokens; 0: all.
    pub top_k: usize,
    /// Only the smallest set of tokens that has this probability; 1: all.
    pub top_p: f64,
    /// Only tokens with at least this share of the most probable one's probability; 0: all.
    pub min_p: f64,
    /// Penalty for tokens already in the sequence; 1 disables it.
    pub repetition_penalty: f64,
}

impl SamplingOptions {
    /// What an engine takes, with the seed of its random numbers.
    pub fn seeded(self, seed: u64) -> Sampling {
        let SamplingOptions { temperature, top_k, top_p, min_p, repetition_penalty } = self;
        Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed }
    }
}

impl From<&GenerateConfig> for SamplingOptions {
    fn from(config: &GenerateConfig) -> SamplingOptions {
        SamplingOptions {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            min_p: config.min_p,
            repetition_penalty: config.repetition_penalty,
        }
    }
}
