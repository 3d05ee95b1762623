//! Options of generation. Layer 6.
//!
//! Invariant: only `sampling`, `max_new_tokens`, the stops and `turns` change the results; the
//! other options change memory and speed.

use std::sync::Arc;

use super::sample::Sampling;
use super::stop::{StopStrings, stop_ids};
use crate::config::GenerateConfig;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::model::layout::ModelConfig;

/// Options of an engine.
#[derive(Clone)]
pub struct EngineOptions {
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// Token ids that end a completion.
    pub stop: Vec<u32>,
    pub stop_strings: Option<StopStrings>,
    /// Most sequences that run at once.
    pub max_sequences: usize,
    /// Most tokens in one step; a longer prompt is prefilled in pieces.
    pub max_step_tokens: usize,
    /// Pages of 64 tokens in the cache. None: enough for all running sequences at full length.
    pub pages: Option<usize>,
    /// Whether to record decode steps (one token per sequence) as graphs, one graph for each of a
    /// few row counts, and to replay them. None: if the device runs asynchronously.
    pub replay: Option<bool>,
    /// Whether to read the tokens of a step while the next one runs. A stop is then noticed one
    /// step late, and the token after it is dropped. None: if the device runs asynchronously.
    pub ahead: Option<bool>,
    /// See [`super::RequestOptions::turns`].
    pub turns: bool,
}

impl EngineOptions {
    /// The options of `temper generate` for a model, with all tokens and strings that end its
    /// texts.
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
