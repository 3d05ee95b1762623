//! Completions by the trainer's own forward. Layer 7.
//!
//! Invariant: sampled tokens are a function of (weights, prompts, seed, stream).

use super::prompts::Prompt;
use super::rollout::Rollout;
use crate::autograd::Cx;
use crate::config::SamplingOptions;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::methods::MethodInputs;
use crate::model::decoder::Decoder;
use crate::rollout::sample::Sampling;
use crate::rollout::stop::stop_ids;
use crate::rollout::{Engine, EngineOptions, Finish, Request};

pub struct Sampler {
    pub options: SamplingOptions,
    pub max_completion_length: usize,
    max_sequences: usize,
    seed: u64,
    stop: Vec<u32>,
    tokenizer: Tokenizer,
    engine: Option<Engine>,
}

/// How many completions of each prompt are sampled.
#[derive(Clone, Copy)]
pub struct SampleRequest {
    pub n: usize,
    /// Every generation has a stream of random numbers of its own.
    pub stream: u64,
    pub greedy: bool,
}

impl SampleRequest {
    pub fn new(n: usize, stream: u64) -> SampleRequest {
        SampleRequest { n, stream, greedy: false }
    }
}

impl Sampler {
    /// Errors: no token would end a completion.
    pub fn new(
        options: &SamplingOptions,
        max_completion_length: usize,
        max_sequences: usize,
        seed: u64,
        inputs: &MethodInputs,
    ) -> Result<Sampler> {
        let tokenizer = inputs.tokenizer.clone();
        let stop = stop_ids(inputs.tokenizer, inputs.model, &[])?;
        if stop.is_empty() {
            return Err(Error::Config(
                "neither config.json nor the tokenizer names an EOS token; no completion would end"
                    .into(),
            ));
        }
        let options = options.clone();
        let engine = None;
        Ok(Sampler { options, max_completion_length, max_sequences, seed, stop, tokenizer, engine })
    }

    /// An engine with the run's options and a cache for `model` and sequences of `longest` tokens.
    pub fn engine(&self, cx: &Cx, model: &Decoder, longest: usize) -> Result<Engine> {
        let sampling = self.options.seeded(self.seed);
        if sampling.truncates() {
            cx.observer.note(
                "sampling is truncated or penalised; ratios are of the full distribution at \
                 the sampling temperature, as TRL's are, so the policy is slightly off its sampler",
            );
        }
        let (stop, length) = (self.stop.clone(), self.max_completion_length);
        let options = EngineOptions::new(length, sampling, stop, self.max_sequences);
        // The engine only makes sure that positions are covered, and they are.
        Engine::new(cx, &mut model.clone(), options, longest)
    }

    pub fn attach(&mut self, cx: &Cx, model: &Decoder, longest: usize) -> Result<()> {
        self.engine = Some(self.engine(cx, model, longest)?);
        Ok(())
    }

    /// Exchanges the engine for another model's, and back.
    pub fn swap_engine(&mut self, other: &mut Option<Engine>) {
        std::mem::swap(&mut self.engine, other);
    }

    /// Completions of `prompts` (`indices` say which prompts they are), side by side.
    pub fn sample(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        prompts: &[Prompt],
        indices: &[usize],
        request: SampleRequest,
    ) -> Result<Vec<Rollout>> {
        let Some(engine) = self.engine.as_mut() else {
            return Err(Error::Run("the sampler is missing; attach comes first".into()));
        };
        let SampleRequest { n, stream, greedy } = request;
        let ids = indices.iter().map(|p| prompts[*p].ids.clone());
        let requests = Request::numbered(ids, n);
        engine.set_seed(self.seed ^ (stream + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))?;
        let sampling = engine.options.sampling.clone();
        if greedy {
            engine.options.sampling = Sampling::greedy();
        }
        let done = engine.generate(cx, model, &requests);
        engine.options.sampling = sampling;
        let rollout = |c: crate::rollout::Completion| {
            Ok(Rollout {
                prompt: indices[c.request],
                text: self.tokenizer.decode(&c.ids, true)?,
                ids: c.ids,
                logps: c.logps_scaled,
                entropies: c.entropies,
                finished: c.finish == Finish::Stop,
            })
        };
        done?.into_iter().map(rollout).collect()
    }
}
