//! Generation: the trainer's forward over a paged cache, one step at a time. Layer 6.
//!
//! Invariant: a sequence's tokens and log-probs depend on its prompt, its number and the seed
//! alone, not on what else is in the batch, on how prefills are cut, on which pages it got, on
//! whether it had to start again, on whether steps are replayed or read late; its log-probs are the
//! trainer's, bit for bit (one forward, one set of weights).

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

/// What happened, all in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub steps: usize,
    /// Tokens that went through the model, and those that came out.
    pub tokens_in: usize,
    pub tokens_out: usize,
    /// Prompt tokens that were taken from a sibling's pages.
    pub shared: usize,
    pub preempted: usize,
    /// Steps that were replayed.
    pub replayed: usize,
}

/// What a step gave.
#[derive(Default)]
pub struct Stepped {
    pub tokens: Vec<SampledToken>,
    pub done: Vec<Completion>,
    /// Completions that wait for more tokens.
    pub turns: Vec<Turn>,
}

pub struct Engine {
    pub options: EngineOptions,
    pub counts: Counts,
    cache: KvCache,
    /// A row for each slot.
    table: PageTable,
    longest: usize,
    /// With the virtual tokens of a tuned prompt: every sequence starts with them.
    vocab: Vocab,
    /// I32 [max_sequences, words]: a bit for each token that a running sequence has; only for a
    /// repetition penalty.
    seen: Option<Tensor>,
    free_slots: Vec<usize>,
    waiting: VecDeque<Sequence>,
    /// Oldest first.
    running: Vec<Sequence>,
    /// Between two turns; they keep their pages while nobody needs them.
    paused: Vec<Sequence>,
    requests: usize,
    /// Sequences that have run so far: the serial number of the next one.
    admitted: u64,
    /// Whether a step's tokens are read after the next one was queued.
    ahead: bool,
    /// I32 [max_sequences]: the token sampled last in each slot; only where tokens are read late.
    latest: Option<Tensor>,
    /// Sampled and not read yet, oldest first.
    in_flight: VecDeque<Sampled>,
    /// Only where steps are replayed.
    recorder: Option<Recorder>,
}

impl Engine {
    /// An engine for sequences (prompt and completion) of at most `longest` tokens. Error: a cache
    /// that cannot hold one.
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
                "{pages} pages, sequences of up to {each}: raise the pages or lower max_new_tokens"
            );
            return Err(Error::op("rollout", message));
        }
        let penalises = options.sampling.penalises();
        let seen = penalises.then(|| seen_tokens(cx, options.max_sequences, vocab.tokens));
        let asynchronous = cx.device.capabilities().asynchronous;
        let ahead = options.ahead.unwrap_or(asynchronous);
        // The strict device records nothing.
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

    /// Another seed for what is submitted from now on.
    pub fn set_seed(&mut self, seed: u64) {
        self.options.sampling.seed = seed;
    }

    /// Hands pages out in another order from now on: for tests, results do not depend on it.
    pub fn shuffle_pages(&mut self, seed: u64) {
        self.cache.shuffle(seed);
    }

    /// Completes every request; completions come in the order of the requests, a group's side by
    /// side.
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

    /// Queues a request and returns its number (counted from the last time that the engine had
    /// nothing to do).
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

    /// As [`Engine::submit`], with options of its own in place of the engine's.
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
                "sequence number {} is past 2^31: count from 0 and change the seed",
                request.number
            );
            return Err(Error::op("rollout", message));
        }
        let total = request.prompt.len() + options.max_new_tokens;
        if total > self.longest {
            let message = format!(
                "prompt {index} and its completion are {total} tokens; at most {}",
                self.longest
            );
            return Err(Error::op("rollout", message + "; shorten it or lower max_new_tokens"));
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= self.vocab.tokens) {
            let message = format!(
                "token {id}; the vocabulary has {}; is it the model's tokenizer?",
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

    /// Whether a step does something: completions between two turns are no work.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Forgets everything that was submitted and is not done.
    pub fn abort(&mut self) {
        self.in_flight.clear();
        while let Some(mut sequence) = self.running.pop() {
            self.leave(&mut sequence);
        }
        self.forget_idle(|_| true);
    }

    /// Forgets a request: its completions end where they are, and nobody hears of them.
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

    /// Sequences that run, and that wait.
    pub fn load(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// One step: tokens go in (prompts in pieces, one token of each sequence that decodes), one
    /// token is sampled of each sequence whose tokens are all in. One upload, one download. What
    /// comes out is what this step sampled or, where tokens are read late, the step before.
    pub fn step(&mut self, cx: &mut Cx, model: &Decoder) -> Result<Stepped> {
        let mut stepped = Stepped::default();
        if !self.in_flight.is_empty() && self.pages_run_out() {
            // A sequence that starts again needs all of its tokens; and one that has ended may have
            // left its pages.
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

    /// Gives sampled tokens to their sequences, until `late` steps are left to be read; sequences
    /// that end leave.
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
                let Some((slot, serial)) = rows.next() else { break }; // rows of padding
                let running = self.running.get_mut(in_slot[slot]).filter(|s| s.serial == serial);
                // Its last token was read a step ago, when this step ran already.
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
            self.in_flight.clear(); // nobody is left whose tokens they are
        }
        Ok(())
    }
}

/// I32 [sequences, words]: a bit for each token that a sequence has.
fn seen_tokens(cx: &Cx, sequences: usize, vocab: usize) -> Result<Tensor> {
    Tensor::new(&cx.pool, "seen tokens", DType::I32, &[sequences, seen_words(vocab)])
}

/// One completion of every prompt (none empty), by an engine made for them. `done` hears of each
/// completion as it ends: (prompt number, completion).
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
