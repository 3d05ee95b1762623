//! What goes into an engine, what comes out, and what it knows of a sequence in between. Layer 6.
//!
//! Invariant: none of it depends on what else the engine generates.

use std::sync::Arc;

use super::sample::{Draw, Sampling};
use super::stop::StopStrings;
use crate::error::Result;
use crate::model::kv::CachedSequence;

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end token or a stop string; the completion's last token is of it.
    Stop,
    /// max_new_tokens.
    Length,
}

/// A prompt and how many completions it is to have: a group, which shares the prompt's pages.
#[derive(Clone, Debug)]
pub struct Request {
    /// Not empty.
    pub prompt: Vec<u32>,
    /// num_generations
    pub n: usize,
    /// Number of its first completion in the random stream, below 2^31; the others follow.
    pub number: u32,
}

impl Request {
    /// `n` completions of each prompt, numbered through.
    pub fn numbered(prompts: impl IntoIterator<Item = Vec<u32>>, n: usize) -> Vec<Request> {
        let request = |(i, prompt)| Request { prompt, n, number: (i * n) as u32 };
        prompts.into_iter().enumerate().map(request).collect()
    }

    /// Tokens of the longest prompt.
    pub fn longest(requests: &[Request]) -> usize {
        requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0)
    }
}

/// How the completions of one request are generated.
#[derive(Clone)]
pub struct RequestOptions {
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// Tokens that end a completion.
    pub stop: Vec<u32>,
    pub stop_strings: Option<StopStrings>,
    /// How many of the most probable tokens are told beside each sampled one.
    pub top_logprobs: usize,
    /// A stop ends a turn and not the completion, which then waits: see [`Turn`].
    pub turns: bool,
}

impl RequestOptions {
    /// Whether one launch can sample for both.
    pub(super) fn samples_like(&self, other: &RequestOptions) -> bool {
        self.sampling == other.sampling && (self.top_logprobs > 0) == (other.top_logprobs > 0)
    }
}

/// A token that a step sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// Which request, and which of its completions.
    pub request: usize,
    pub member: usize,
    pub token: u32,
    /// Under the model's full distribution at temperature 1.
    pub logp: f32,
    /// The most probable tokens there, best first: as many as the request asked for.
    pub top: Vec<(u32, f32)>,
}

/// The end of a completion's turn, by a stop. The completion keeps its place in the cache until
/// `Engine::resume` or `Engine::finish`; its slot goes to others.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// Which request, and which of its completions.
    pub request: usize,
    pub member: usize,
    /// What was sampled of the completion so far, earlier turns included.
    pub ids: Vec<u32>,
}

/// A sampled continuation of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Which request, and which of its completions.
    pub request: usize,
    pub member: usize,
    /// What was sampled; tokens that were put between its turns are not here.
    pub ids: Vec<u32>,
    /// log p of each token under the model's full distribution at temperature 1.
    pub logps: Vec<f32>,
    /// The same at the sampling temperature (logits / temperature): what a trainer's ratio uses.
    pub logps_scaled: Vec<f32>,
    /// Under the distribution that it was sampled from, after penalty and truncation.
    pub logps_truncated: Vec<f32>,
    /// Entropy of the full distribution at the sampling temperature, before each token.
    pub entropies: Vec<f32>,
    pub finish: Finish,
}

/// A completion as it is generated.
pub(super) struct Sequence {
    pub options: Arc<RequestOptions>,
    pub number: u32,
    /// Prompt and completion, as far as it was read.
    pub tokens: Vec<u32>,
    /// How many of them were put between turns.
    pub inserted: usize,
    /// Sampled and not read yet.
    pub pending: usize,
    pub prompt: usize,
    pub cached: CachedSequence,
    /// Its row among the running ones' device state.
    pub slot: usize,
    /// Which of all that ever ran it is: a slot has many in turn.
    pub serial: u64,
    pub completion: Completion,
    pub end: Option<Finish>,
}

impl Sequence {
    pub fn new(
        options: &Arc<RequestOptions>,
        request: usize,
        member: usize,
        number: u32,
        prompt: &[u32],
    ) -> Sequence {
        let completion = Completion {
            request,
            member,
            ids: Vec::new(),
            logps: Vec::new(),
            logps_scaled: Vec::new(),
            logps_truncated: Vec::new(),
            entropies: Vec::new(),
            finish: Finish::Length,
        };
        let cached = CachedSequence::default();
        Sequence {
            options: options.clone(),
            number,
            tokens: prompt.to_vec(),
            inserted: 0,
            prompt: prompt.len(),
            pending: 0,
            cached,
            slot: 0,
            serial: 0,
            completion,
            end: None,
        }
    }

    /// Tokens of the completion, those between its turns included.
    pub fn length(&self) -> usize {
        self.completion.ids.len() + self.inserted
    }

    /// Tokens that are not in the cache.
    pub fn left(&self) -> usize {
        self.tokens.len() + self.pending - self.cached.len
    }

    /// How many of its tokens are to go in: none once the last that it may have was sampled.
    pub fn wanted(&self) -> usize {
        let full = self.length() + self.pending >= self.options.max_new_tokens;
        if self.pending > 0 && full { 0 } else { self.left() }
    }

    /// Takes a token that was pending; it may be the last one.
    pub fn take(&mut self, d: &Draw) -> Result<()> {
        self.push(d);
        let (options, ids) = (&self.options, &self.completion.ids);
        let said = match &options.stop_strings {
            Some(strings) => strings.reached(ids)?,
            None => false,
        };
        if said || options.stop.contains(&d.token) {
            self.end = Some(Finish::Stop);
        } else if self.length() >= options.max_new_tokens {
            self.end = Some(Finish::Length);
        }
        Ok(())
    }

    fn push(&mut self, d: &Draw) {
        self.pending -= 1;
        self.tokens.push(d.token);
        let c = &mut self.completion;
        c.ids.push(d.token);
        c.logps.push(d.logp);
        c.logps_scaled.push(d.logp_scaled);
        c.logps_truncated.push(d.logp_truncated);
        c.entropies.push(d.entropy);
    }
}
