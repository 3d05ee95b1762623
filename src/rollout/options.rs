//! How sequences are generated. Layer 6.
//!
//! Invariant: only `sampling`, `max_new_tokens` and the stops change what is generated; the others
//! change memory and speed.

use std::sync::Arc;

use super::sample::Sampling;
use super::stop::{StopStrings, stop_ids};
use crate::config::GenerateConfig;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::model::layout::ModelConfig;

/// How an engine generates.
#[derive(Clone)]
pub struct EngineOptions {
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// Tokens that end a completion.
    pub stop: Vec<u32>,
    pub stop_strings: Option<StopStrings>,
    /// Sequences decoded at once.
    pub max_sequences: usize,
    /// Tokens that go in at once: a longer prompt is prefilled in pieces.
    pub max_step_tokens: usize,
    /// Pages of 64 tokens in the cache; None: so many that no sequence ever has to wait for one.
    pub pages: Option<usize>,
    /// Record decode steps (one token of each sequence) as graphs, one for each of a few numbers of
    /// rows, and replay them; None: where the device works behind the host.
    pub replay: Option<bool>,
    /// Read the tokens of a step while the next one runs. A stop is then noticed a step late, and
    /// the token that came after it is dropped. None: where the device works behind the host.
    pub ahead: Option<bool>,
    /// As [`super::RequestOptions::turns`].
    pub turns: bool,
}

impl EngineOptions {
    /// The options of `temper generate` for a model: with all that ends a text of it.
    pub fn of(
        config: &GenerateConfig,
        model: &ModelConfig,
        tokenizer: &Arc<Tokenizer>,
        max_sequences: usize,
    ) -> Result<EngineOptions> {
        let sampling = config.sampling.seeded(config.seed);
        let stop = stop_ids(tokenizer, model, &config.stop)?;
        let mut options = EngineOptions::new(config.max_new_tokens, sampling, stop, max_sequences);
        options.stop_strings = StopStrings::new(&config.stop, tokenizer);
        Ok(options)
    }

    pub fn new(
        max_new_tokens: usize,
        sampling: Sampling,
        stop: Vec<u32>,
        max_sequences: usize,
    ) -> EngineOptions {
        let max_sequences = max_sequences.max(1);
        let max_step_tokens = 2048.max(max_sequences);
        EngineOptions {
            max_new_tokens,
            sampling,
            stop,
            stop_strings: None,
            max_sequences,
            max_step_tokens,
            pages: None,
            replay: None,
            ahead: None,
            turns: false,
        }
    }
}
