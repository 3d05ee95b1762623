//! Samples completions with the trainer's own forward. Layer 7.
//!
//! Invariant: sampled tokens are a function of (weights, prompts, seed, stream).

use super::episodes::{EpisodeBatch, Episodes};
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
use crate::rollout::{Completion, Engine, EngineOptions, Finish, Request};

pub struct Sampler {
    pub options: SamplingOptions,
    pub max_completion_length: usize,
    /// Sequences decoded at once, if the options set it; otherwise `planned`.
    max_sequences: Option<usize>,
    planned: usize,
    seed: u64,
    stop: Vec<u32>,
    tokenizer: Tokenizer,
    engine: Option<Engine>,
    /// The environment, if completions have several turns.
    pub episodes: Option<Episodes>,
}

/// Sequences decoded at once if neither the options nor a plan set it.
const UNPLANNED: usize = 64;

/// How many completions to sample per prompt, and how.
#[derive(Clone, Copy)]
pub struct SampleRequest {
    pub n: usize,
    /// The stream of random numbers, distinct for every generation.
    pub stream: u64,
    pub greedy: bool,
}

impl SampleRequest {
    pub fn new(n: usize, stream: u64) -> SampleRequest {
        SampleRequest { n, stream, greedy: false }
    }
}

impl Sampler {
    /// Error if no token would end a completion.
    pub fn new(
        options: &SamplingOptions,
        max_completion_length: usize,
        max_sequences: Option<usize>,
        seed: u64,
        inputs: &MethodInputs,
    ) -> Result<Sampler> {
        let tokenizer = inputs.tokenizer.clone();
        let stop = stop_ids(inputs.tokenizer, inputs.model, &[])?;
        if stop.is_empty() {
            return Err(Error::Config(
                "neither config.json nor the tokenizer has an EOS token, so no completion would end"
                    .into(),
            ));
        }
        let options = options.clone();
        Ok(Sampler {
            options,
            max_completion_length,
            max_sequences,
            planned: UNPLANNED,
            seed,
            stop,
            tokenizer,
            engine: None,
            episodes: None,
        })
    }

    /// Whether the memory plan chooses how many sequences are decoded at once.
    pub fn is_planned(&self) -> bool {
        self.max_sequences.is_none()
    }

    /// Sets the memory plan's choice; the options take precedence.
    pub fn set_sequences(&mut self, n: usize) {
        self.planned = n;
    }

    /// An engine with the run's options and a cache for `model` and sequences of `longest` tokens.
    pub fn engine(&self, cx: &Cx, model: &Decoder, longest: usize) -> Result<Engine> {
        let sampling = self.options.seeded(self.seed);
        if sampling.truncates() {
            cx.observer.note(
                "sampling is truncated or penalised, but ratios use the full distribution at the \
                 sampling temperature, as in TRL, so the policy differs slightly from its sampler",
            );
        }
        let (stop, length) = (self.stop.clone(), self.max_completion_length);
        let mut options =
            EngineOptions::new(length, sampling, stop, self.max_sequences.unwrap_or(self.planned));
        options.turns = self.episodes.is_some();
        // The engine only checks that the rope tables cover all positions, and they do.
        Engine::new(cx, &mut model.clone(), options, longest)
    }

    pub fn attach(&mut self, cx: &Cx, model: &Decoder, longest: usize) -> Result<()> {
        self.engine = Some(self.engine(cx, model, longest)?);
        Ok(())
    }

    /// Swaps the engine with another model's.
    pub fn swap_engine(&mut self, other: &mut Option<Engine>) {
        std::mem::swap(&mut self.engine, other);
    }

    /// Samples completions of the prompts at `indices` of `prompts`, in order. Calls `done` for
    /// each as it ends, with its index.
    pub fn sample(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        prompts: &[Prompt],
        indices: &[usize],
        request: SampleRequest,
        done: &mut dyn FnMut(usize, &Rollout),
    ) -> Result<Vec<Rollout>> {
        let Some(engine) = self.engine.as_mut() else {
            return Err(Error::Run("the sampler is missing; attach comes first".into()));
        };
        let SampleRequest { n, stream, greedy } = request;
        if !cx.device.computes() {
            let all: Vec<Vec<u32>> = indices.iter().map(|p| prompts[*p].ids.clone()).collect();
            if engine.options.turns {
                rehearse_answers(cx, engine, model, &all)?;
            }
            rehearse(cx, engine, model, &Request::numbered(all, n))?;
            return Ok(longest_rollouts(indices, n, self.max_completion_length));
        }
        let ids = indices.iter().map(|p| prompts[*p].ids.clone());
        let requests = Request::numbered(ids, n);
        engine.set_seed(self.seed ^ (stream + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let sampling = engine.options.sampling.clone();
        if greedy {
            engine.options.sampling = Sampling::greedy();
        }
        let tokenizer = &self.tokenizer;
        engine.abort();
        let rollouts = match &mut self.episodes {
            Some(episodes) => {
                let batch = EpisodeBatch { prompts, indices, n, stream, tokenizer };
                let submitted = requests.iter().try_for_each(|r| engine.submit(r).map(drop));
                submitted.and_then(|()| episodes.run(cx, model, engine, &batch, done))
            }
            None => sample_all(cx, model, engine, &requests, &mut |c| {
                let at = c.request * n + c.member;
                let rollout = Rollout {
                    prompt: indices[c.request],
                    text: tokenizer.decode(&c.ids, true)?,
                    ids: c.ids,
                    logps: c.logps_scaled,
                    entropies: c.entropies,
                    finished: c.finish == Finish::Stop,
                    conversation: None,
                };
                done(at, &rollout);
                Ok((at, rollout))
            }),
        };
        engine.options.sampling = sampling;
        rollouts
    }
}

/// Completes every request; a completion becomes a rollout as it ends.
fn sample_all(
    cx: &mut Cx,
    model: &Decoder,
    engine: &mut Engine,
    requests: &[Request],
    ended: &mut dyn FnMut(Completion) -> Result<(usize, Rollout)>,
) -> Result<Vec<Rollout>> {
    requests.iter().try_for_each(|r| engine.submit(r).map(drop))?;
    let mut all = Vec::new();
    while engine.has_work() {
        for completion in engine.step(cx, model)?.done {
            all.push(ended(completion)?);
        }
    }
    all.sort_by_key(|(at, _)| *at);
    Ok(all.into_iter().map(|(_, rollout)| rollout).collect())
}

/// For the memory plan: submits prompts until as many sequences are decoded as can run at once.
fn rehearse(cx: &mut Cx, engine: &mut Engine, model: &Decoder, requests: &[Request]) -> Result<()> {
    engine.abort();
    requests.iter().try_for_each(|r| engine.submit(r).map(drop))?;
    // On a device that computes nothing no sampled token may end a completion.
    let stop = std::mem::take(&mut engine.options.stop);
    let all = requests.iter().map(|r| r.n).sum::<usize>().min(engine.options.max_sequences);
    while engine.has_work() && engine.step(cx, model)?.tokens.len() < all {}
    engine.options.stop = stop;
    engine.abort();
    Ok(())
}

/// For the memory plan: an environment's answers are processed like prompts, and may be longer.
fn rehearse_answers(
    cx: &mut Cx,
    engine: &mut Engine,
    model: &Decoder,
    prompts: &[Vec<u32>],
) -> Result<()> {
    let most = std::mem::replace(&mut engine.options.max_new_tokens, 1);
    let answered = prompts.iter().map(|prompt| vec![0; prompt.len() + most - 1]);
    let many = engine.options.max_sequences;
    engine.abort();
    let requests = Request::numbered(answered.take(many), 1);
    let submitted = requests.iter().try_for_each(|r| engine.submit(r).map(drop));
    engine.options.max_new_tokens = most;
    submitted?;
    engine.step(cx, model)?;
    engine.abort();
    Ok(())
}

/// For the memory plan: completions that all reach the length limit.
fn longest_rollouts(indices: &[usize], n: usize, tokens: usize) -> Vec<Rollout> {
    let rollout = |prompt: &usize| Rollout {
        prompt: *prompt,
        ids: vec![0; tokens],
        logps: vec![0.0; tokens],
        entropies: vec![0.0; tokens],
        finished: true,
        text: String::new(),
        conversation: None,
    };
    indices.iter().flat_map(|p| std::iter::repeat_n(rollout(p), n)).collect()
}
