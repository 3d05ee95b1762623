//! Generation: the trainer's forward over a paged cache, one step at a time. Layer 6.
//!
//! Invariant: the tokens and log-probs of a sequence depend only on its prompt, its number and the
//! seed: not on the rest of the batch, on the division of prefills, on its pages, on preemption, or
//! on whether steps are replayed or read late. Its log-probs are the trainer's, bit for bit (one
//! forward, one set of weights).

mod forward;
mod options;
mod record;
mod request;
mod rows;
pub mod sample;
mod schedule;
pub mod stop;
mod top;
mod turns;

use std::collections::VecDeque;
use std::sync::Arc;

use self::record::Recorder;
use self::request::Sequence;
use self::rows::Sampled;
use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::batch::Vocab;
use crate::model::decoder::Decoder;
use crate::model::kv::{KvCache, PAGE, PageTable};
use crate::ops::sample::seen_words;
use crate::tensor::Tensor;

pub use options::EngineOptions;
pub use request::{Completion, Finish, Request, RequestOptions, SampledToken, Turn};
pub use top::top_logps;

/// Counters since the engine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub steps: usize,
    /// Tokens that went into the model, and tokens that were sampled.
    pub tokens_in: usize,
    pub tokens_out: usize,
    /// Prompt tokens that were shared with a sequence of the same group.
    pub shared: usize,
    pub preempted: usize,
    /// Decode steps that were replayed.
    pub replayed: usize,
}

/// The results of a step.
#[derive(Default)]
pub struct Stepped {
    pub tokens: Vec<SampledToken>,
    pub done: Vec<Completion>,
    /// Completions whose turn has ended and that wait for more tokens.
    pub turns: Vec<Turn>,
}

pub struct Engine {
    pub options: EngineOptions,
    pub counts: Counts,
    cache: KvCache,
    /// One row per slot.
    table: PageTable,
    longest: usize,
    /// Includes the virtual tokens of a tuned prompt, with which every sequence starts.
    vocab: Vocab,
    /// I32 [max_sequences, words]: one bit for each token that occurs in a running sequence; only
    /// for a repetition penalty.
    seen: Option<Tensor>,
    free_slots: Vec<usize>,
    waiting: VecDeque<Sequence>,
    /// Sorted by age, oldest first.
    running: Vec<Sequence>,
    /// Sequences between two turns. They keep their pages until others need them.
    paused: Vec<Sequence>,
    requests: usize,
    /// Number of sequences admitted so far; the serial number of the next one.
    admitted: u64,
    /// Whether the tokens of a step are read after the next step is queued.
    ahead: bool,
    /// I32 [max_sequences]: the last token sampled in each slot; only if tokens are read late.
    latest: Option<Tensor>,
    /// Steps that were sampled but not read, oldest first.
    in_flight: VecDeque<Sampled>,
    /// Only if steps are replayed.
    recorder: Option<Recorder>,
}

impl Engine {
    /// An engine for sequences (prompt and completion) of at most `longest` tokens. Error: the
    /// cache cannot hold one such sequence.
    pub fn new(
        cx: &Cx,
        model: &mut Decoder,
        options: EngineOptions,
        longest: usize,
    ) -> Result<Engine> {
        let vocab = model.vocab();
        model.ensure_positions(cx, longest + vocab.virtuals)?;
        let each = (longest + vocab.virtuals).div_ceil(PAGE).max(1);
        let pages = options.pages.unwrap_or(options.max_sequences * each);
        if pages < each || options.max_step_tokens == 0 || options.max_sequences == 0 {
            let message = format!(
                "{pages} pages are too few for sequences of up to {each} pages: raise the pages \
                 or lower max_new_tokens"
            );
            return Err(Error::op("rollout", message));
        }
        let penalises = options.sampling.penalises();
        let seen = penalises.then(|| seen_tokens(cx, options.max_sequences, vocab.tokens));
        let asynchronous = cx.device.capabilities().asynchronous;
        let ahead = options.ahead.unwrap_or(asynchronous);
        // The strict device cannot capture.
        let replay = options.replay.unwrap_or(asynchronous) && !cx.device.is_strict();
        let latest =
            || Tensor::new(&cx.pool, "latest tokens", DType::I32, &[options.max_sequences]);
        Ok(Engine {
            cache: KvCache::new(cx, &model.config, pages)?,
            table: PageTable::new(cx, options.max_sequences, longest + vocab.virtuals)?,
            latest: ahead.then(latest).transpose()?,
            recorder: if replay { Some(Recorder::new(cx, &model.config, &options)?) } else { None },
            admitted: 0,
            ahead,
            in_flight: VecDeque::new(),
            longest,
            vocab,
            seen: seen.transpose()?,
            free_slots: (0..options.max_sequences).rev().collect(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            paused: Vec::new(),
            requests: 0,
            counts: Counts::default(),
            options,
        })
    }

    /// Sets the seed of the requests that are submitted from now on.
    pub fn set_seed(&mut self, seed: u64) {
        self.options.sampling.seed = seed;
    }

    /// Hands out pages in another order from now on. For tests: results do not depend on the order.
    pub fn shuffle_pages(&mut self, seed: u64) {
        self.cache.shuffle(seed);
    }

    /// Generates the completions of all requests, in the order of the requests and of the members
    /// of each group. Aborts everything submitted before.
    pub fn generate(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        requests: &[Request],
    ) -> Result<Vec<Completion>> {
        self.abort();
        requests.iter().try_for_each(|r| self.submit(r).map(drop))?;
        let mut all = Vec::new();
        while self.has_work() {
            all.extend(self.step(cx, model)?.done);
        }
        all.sort_by_key(|c| (c.request, c.member));
        Ok(all)
    }

    /// Queues a request and returns its number, which counts from the last time that the engine was
    /// empty.
    pub fn submit(&mut self, request: &Request) -> Result<usize> {
        let all = &self.options;
        let own = RequestOptions {
            max_new_tokens: all.max_new_tokens,
            sampling: all.sampling.clone(),
            stop: all.stop.clone(),
            stop_strings: all.stop_strings.clone(),
            top_logprobs: 0,
            turns: all.turns,
        };
        self.submit_with(request, own)
    }

    /// [`Engine::submit`] with the request's own options instead of the engine's.
    pub fn submit_with(&mut self, request: &Request, options: RequestOptions) -> Result<usize> {
        if !self.has_work() && self.paused.is_empty() {
            self.requests = 0;
        }
        let index = self.requests;
        if request.prompt.is_empty() {
            return Err(Error::op(
                "rollout",
                format!("prompt {index} has no tokens; give at least a BOS token"),
            ));
        }
        if request.number as usize + request.n > i32::MAX as usize {
            let message = format!(
                "sequence number {} is above 2^31: count from 0 again and change the seed",
                request.number
            );
            return Err(Error::op("rollout", message));
        }
        let total = request.prompt.len() + options.max_new_tokens;
        if total > self.longest {
            let message = format!(
                "prompt {index} and its completion have {total} tokens; the limit is {}",
                self.longest
            );
            return Err(Error::op("rollout", message + "; shorten it or lower max_new_tokens"));
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= self.vocab.tokens) {
            let message = format!(
                "token {id} is outside the vocabulary of {}; use the model's own tokenizer",
                self.vocab.tokens
            );
            return Err(Error::op("rollout", message));
        }
        let (prompt, options) = (self.vocab.prompted(&request.prompt), Arc::new(options));
        for member in 0..request.n {
            let number = request.number.wrapping_add(member as u32);
            self.waiting.push_back(Sequence::new(&options, index, member, number, &prompt));
        }
        self.requests += 1;
        Ok(index)
    }

    /// Whether a step has anything to do. Completions between two turns do not count.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Drops everything that was submitted and has not finished.
    pub fn abort(&mut self) {
        self.in_flight.clear();
        while let Some(mut sequence) = self.running.pop() {
            self.leave(&mut sequence);
        }
        self.forget_idle(|_| true);
    }

    /// Drops a request with all its completions; nothing more is reported about them.
    pub fn cancel(&mut self, request: usize) {
        self.forget_idle(|s| s.completion.request == request);
        let (gone, still): (Vec<_>, Vec<_>) = std::mem::take(&mut self.running)
            .into_iter()
            .partition(|s| s.completion.request == request);
        self.running = still;
        gone.into_iter().for_each(|mut s| self.leave(&mut s));
        if self.running.is_empty() {
            self.in_flight.clear();
        }
    }

    /// Number of running and of waiting sequences.
    pub fn load(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// Runs one step: feeds tokens (prompts in pieces, one token of each decoding sequence) and
    /// samples one token of each sequence whose tokens are all fed. One upload, one download.
    /// Returns what this step sampled or, if tokens are read late, the step before.
    pub fn step(&mut self, cx: &mut Cx, model: &Decoder) -> Result<Stepped> {
        let mut stepped = Stepped::default();
        if !self.in_flight.is_empty() && self.pages_run_out() {
            // A preempted sequence needs all of its tokens to start again, and reading may end a
            // sequence, whose pages are then free.
            self.read_all_but(0, &mut stepped)?;
        }
        if self.seen.is_none() && self.waiting.iter().any(|s| s.options.sampling.penalises()) {
            self.seen = Some(seen_tokens(cx, self.options.max_sequences, self.vocab.tokens)?);
        }
        let scheduled = self.schedule()?;
        let sampled = self.launch(cx, model, &scheduled)?;
        self.read_all_but(usize::from(sampled && self.ahead), &mut stepped)?;
        Ok(stepped)
    }

    /// Reads sampled tokens into their sequences until only `late` steps are unread. Removes
    /// sequences that end.
    fn read_all_but(&mut self, late: usize, stepped: &mut Stepped) -> Result<()> {
        while self.in_flight.len() > late
            && let Some(sampled) = self.in_flight.pop_front()
        {
            self.read(sampled, stepped)?;
        }
        Ok(())
    }

    fn read(&mut self, sampled: Sampled, stepped: &mut Stepped) -> Result<()> {
        let mut in_slot = vec![usize::MAX; self.options.max_sequences];
        self.running.iter().enumerate().for_each(|(i, s)| in_slot[s.slot] = i);
        let mut rows = sampled.rows.into_iter();
        for group in sampled.draws {
            let draws = group.draws.wait()?;
            let logits = group.logits.map(|logits| logits.wait::<f32>()).transpose()?;
            let mut logits = logits.iter().flat_map(|all| all.chunks(self.vocab.tokens));
            for draw in &draws {
                let logits = logits.next();
                let Some((slot, serial)) = rows.next() else { break }; // padding rows
                let running = self.running.get_mut(in_slot[slot]).filter(|s| s.serial == serial);
                // The sequence ended with the previous step, when this step was already queued.
                let Some(s) = running else { continue };
                let n = s.options.top_logprobs;
                let top = |logits| top_logps(logits, draw.token, draw.logp, n);
                stepped.tokens.push(SampledToken {
                    request: s.completion.request,
                    member: s.completion.member,
                    token: draw.token,
                    logp: draw.logp,
                    top: logits.map(top).unwrap_or_default(),
                });
                s.take(draw)?;
                self.counts.tokens_out += 1;
            }
        }
        if rows.next().is_some() {
            return Err(Error::op("rollout", "fewer tokens than sequences"));
        }
        let (ended, still): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.running).into_iter().partition(|s| s.end.is_some());
        self.running = still;
        for mut s in ended {
            if s.options.turns && s.end == Some(Finish::Stop) {
                stepped.turns.push(self.pause(s));
                continue;
            }
            self.leave(&mut s);
            s.completion.finish = s.end.unwrap_or(Finish::Length);
            stepped.done.push(s.completion);
        }
        if self.running.is_empty() {
            self.in_flight.clear(); // no running sequence can use them
        }
        Ok(())
    }
}

/// I32 [sequences, words]: one bit for each token that occurs in a sequence.
fn seen_tokens(cx: &Cx, sequences: usize, vocab: usize) -> Result<Tensor> {
    Tensor::new(&cx.pool, "seen tokens", DType::I32, &[sequences, seen_words(vocab)])
}

/// One completion for every prompt (none empty), by a new engine. Calls `done(prompt number,
/// completion)` as each completion ends.
pub fn generate(
    cx: &mut Cx,
    model: &mut Decoder,
    prompts: &[Vec<u32>],
    options: &EngineOptions,
    mut done: impl FnMut(usize, &Completion),
) -> Result<Vec<Completion>> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + options.max_new_tokens;
    let mut options = options.clone();
    options.max_sequences = options.max_sequences.clamp(1, prompts.len().max(1));
    let mut engine = Engine::new(cx, model, options, longest)?;
    for (i, prompt) in prompts.iter().enumerate() {
        engine.submit(&Request { prompt: prompt.clone(), n: 1, number: i as u32 })?;
    }
    let mut results: Vec<Option<Completion>> = vec![None; prompts.len()];
    while engine.has_work() {
        for completion in engine.step(cx, model)?.done {
            let prompt = completion.request;
            done(prompt, &completion);
            results[prompt] = Some(completion);
        }
    }
    Ok(results.into_iter().flatten().collect())
}
