//! What goes into an engine, what comes out, and what it knows of a sequence in between. Layer 6.
//!
//! Invariant: none of it depends on what else the engine generates.

use std::sync::Arc;

use super::sample::Draw;
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

/// A sampled continuation of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Which request, and which of its completions.
    pub request: usize,
    pub member: usize,
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
    pub number: u32,
    /// Prompt and completion, as far as it was read.
    pub tokens: Vec<u32>,
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
    pub fn new(request: usize, member: usize, number: u32, prompt: &Arc<[u32]>) -> Sequence {
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
            number,
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            pending: 0,
            cached,
            slot: 0,
            serial: 0,
            completion,
            end: None,
        }
    }

    /// Tokens that are not in the cache.
    pub fn left(&self) -> usize {
        self.tokens.len() + self.pending - self.cached.len
    }

    /// How many of its tokens are to go in: none once the last that it may have was sampled.
    pub fn wanted(&self, max_new_tokens: usize) -> usize {
        let full = self.completion.ids.len() + self.pending >= max_new_tokens;
        if self.pending > 0 && full { 0 } else { self.left() }
    }

    /// Takes a token that was pending.
    pub fn push(&mut self, d: &Draw) {
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
