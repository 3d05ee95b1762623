//! The options of an evaluation. Layer 6.
//!
//! Invariant: two evaluations with the same options, rows and model give the same numbers.

use crate::config::{DataOptions, EvalConfig, GenerateConfig};
use crate::error::{Error, Result};

/// The metrics of an evaluation, and the amount of work at once.
pub struct EvalOptions {
    pub eval: EvalConfig,
    pub generate: GenerateConfig,
    /// How rows are read and bad rows are handled.
    pub data: DataOptions,
    /// Most sequences that are generated at once.
    pub batch: usize,
    /// Most tokens in one forward when nothing is generated.
    pub batch_tokens: usize,
}

impl EvalOptions {
    /// Error: several completions of a prompt would all be the same.
    pub fn check(&self) -> Result<()> {
        let n = self.generate.n;
        match n > 1 && self.generate.sampling.temperature == 0.0 {
            true => Err(Error::Config(format!(
                "n = {n} with temperature = 0: all {n} would be the same; set temperature=1"
            ))),
            false => Ok(()),
        }
    }
}
