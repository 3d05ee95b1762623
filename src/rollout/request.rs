//! Requests, completions, and the state of a sequence in between. Layer 6.
//!
//! Invariant: none of it depends on the other sequences of the engine.

use std::sync::Arc;

use super::sample::{Draw, Sampling};
use super::stop::StopStrings;
use crate::error::Result;
use crate::model::kv::CachedSequence;

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The last token is a stop token, or completes a stop string.
    Stop,
    /// The limit max_new_tokens.
    Length,
}

/// A prompt and its number of completions: a group, which shares the pages of the prompt.
#[derive(Clone, Debug)]
pub struct Request {
    /// Not empty.
    pub prompt: Vec<u32>,
    /// Number of completions (num_generations).
    pub n: usize,
    /// Number of the first completion in the random stream, below 2^31. The others follow.
    pub number: u32,
}

impl Request {
    /// A request for `n` completions of each prompt, with consecutive numbers.
    pub fn numbered(prompts: impl IntoIterator<Item = Vec<u32>>, n: usize) -> Vec<Request> {
        let request = |(i, prompt)| Request { prompt, n, number: (i * n) as u32 };
        prompts.into_iter().enumerate().map(request).collect()
    }

    /// Length of the longest prompt in tokens.
    pub fn longest(requests: &[Request]) -> usize {
        requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0)
    }
}

/// Options of one request.
#[derive(Clone)]
pub struct RequestOptions {
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// Token ids that end a completion.
    pub stop: Vec<u32>,
    pub stop_strings: Option<StopStrings>,
    /// How many of the most probable tokens to report with each sampled one.
    pub top_logprobs: usize,
    /// A stop ends a turn instead of the completion, which then waits: see [`Turn`].
    pub turns: bool,
}

impl RequestOptions {
    /// Whether one launch can sample for both.
    pub(super) fn samples_like(&self, other: &RequestOptions) -> bool {
        self.sampling == other.sampling && (self.top_logprobs > 0) == (other.top_logprobs > 0)
    }
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// Index of the request; `member` is the index of the completion in its group.
    pub request: usize,
    pub member: usize,
    pub token: u32,
    /// Log-prob under the model's full distribution at temperature 1.
    pub logp: f32,
    /// The most probable tokens at this position, best first: as many as the request asked for.
    pub top: Vec<(u32, f32)>,
}

/// The end of a turn by a stop. The completion keeps its pages until `Engine::resume` or
/// `Engine::finish`, as long as no running sequence needs them; its slot is free for others.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// Index of the request; `member` is the index of the completion in its group.
    pub request: usize,
    pub member: usize,
    /// All sampled tokens of the completion so far, including earlier turns.
    pub ids: Vec<u32>,
}

/// A sampled continuation of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Index of the request; `member` is the index of the completion in its group.
    pub request: usize,
    pub member: usize,
    /// The sampled tokens, without the tokens inserted between turns.
    pub ids: Vec<u32>,
    /// Log-prob of each token under the model's full distribution at temperature 1.
    pub logps: Vec<f32>,
    /// Log-probs at the sampling temperature (logits / temperature), for a trainer's ratio.
    pub logps_scaled: Vec<f32>,
    /// Log-probs under the distribution used for sampling, after penalty and truncation.
    pub logps_truncated: Vec<f32>,
    /// Entropy of the full distribution at the sampling temperature, for each token.
    pub entropies: Vec<f32>,
    pub finish: Finish,
}

/// A completion in progress.
pub(super) struct Sequence {
    pub options: Arc<RequestOptions>,
    pub number: u32,
    /// The tokens of prompt and completion that are known on the host.
    pub tokens: Vec<u32>,
    /// Number of tokens that were inserted between turns.
    pub inserted: usize,
    /// Number of tokens that are sampled but not read.
    pub pending: usize,
    pub prompt: usize,
    pub cached: CachedSequence,
    /// Index of its row in the device state of running sequences.
    pub slot: usize,
    /// Unique among all sequences that ever ran; a slot serves many in turn.
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

    /// Length of the completion in tokens, including those inserted between turns.
    pub fn length(&self) -> usize {
        self.completion.ids.len() + self.inserted
    }

    /// Number of tokens that are not in the cache.
    pub fn left(&self) -> usize {
        self.tokens.len() + self.pending - self.cached.len
    }

    /// Number of tokens to feed: 0 once the last allowed token was sampled.
    pub fn wanted(&self) -> usize {
        let full = self.length() + self.pending >= self.options.max_new_tokens;
        if self.pending > 0 && full { 0 } else { self.left() }
    }

    /// Appends a pending token and checks whether it ends the completion.
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
