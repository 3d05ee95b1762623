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
pub use request::{Completion, Finish, Request};

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
    /// (request, member, token) of each sampled token.
    pub tokens: Vec<(usize, usize, u32)>,
    pub done: Vec<Completion>,
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
    /// I32 [2]
    seed: Tensor,
    /// I32 [max_sequences, words]: a bit for each token that a running sequence has; only for a
    /// repetition penalty.
    seen: Option<Tensor>,
    free_slots: Vec<usize>,
    waiting: VecDeque<Sequence>,
    /// Oldest first.
    running: Vec<Sequence>,
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
        let shape = [options.max_sequences, seen_words(vocab.tokens)];
        let seen = options
            .sampling
            .penalises()
            .then(|| Tensor::new(&cx.pool, "seen tokens", DType::I32, &shape));
        let seed = options.sampling.seed;
        let asynchronous = cx.device.capabilities().asynchronous;
        let ahead = options.ahead.unwrap_or(asynchronous);
        // The strict device records nothing.
        let replay = options.replay.unwrap_or(asynchronous) && !cx.device.is_strict();
        let latest = || Tensor::new(&cx.pool, "latest tokens", DType::I32, &shape[..1]);
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
            seed: cx.ints("sampling seed", &[seed as i32, (seed >> 32) as i32])?,
            seen: seen.transpose()?,
            free_slots: (0..options.max_sequences).rev().collect(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            requests: 0,
            counts: Counts::default(),
            options,
        })
    }

    /// Another seed for the tokens sampled from now on.
    pub fn set_seed(&mut self, seed: u64) -> Result<()> {
        self.options.sampling.seed = seed;
        self.seed.upload(&[seed as u32, (seed >> 32) as u32])
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
        if !self.has_work() {
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
        let total = request.prompt.len() + self.options.max_new_tokens;
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
        let prompt: Arc<[u32]> = self.vocab.prompted(&request.prompt).into();
        for member in 0..request.n {
            let number = request.number.wrapping_add(member as u32);
            self.waiting.push_back(Sequence::new(index, member, number, &prompt));
        }
        self.requests += 1;
        Ok(index)
    }

    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Forgets everything that was submitted and is not done.
    pub fn abort(&mut self) {
        self.in_flight.clear();
        while let Some(mut sequence) = self.running.pop() {
            self.leave(&mut sequence);
        }
        self.waiting.clear();
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
        let draws = sampled.draws.wait()?;
        if draws.len() < sampled.rows.len() {
            return Err(Error::op("rollout", "fewer tokens than sequences"));
        }
        let mut in_slot = vec![usize::MAX; self.options.max_sequences];
        self.running.iter().enumerate().for_each(|(i, s)| in_slot[s.slot] = i);
        for ((slot, serial), d) in sampled.rows.into_iter().zip(&draws) {
            let running = self.running.get_mut(in_slot[slot]).filter(|s| s.serial == serial);
            // Its last token was read a step ago, when this step ran already.
            let Some(s) = running else { continue };
            s.push(d);
            stepped.tokens.push((s.completion.request, s.completion.member, d.token));
            self.counts.tokens_out += 1;
            let said = match &self.options.stop_strings {
                Some(strings) => strings.reached(&s.completion.ids)?,
                None => false,
            };
            if said || self.options.stop.contains(&d.token) {
                s.end = Some(Finish::Stop);
            } else if s.completion.ids.len() >= self.options.max_new_tokens {
                s.end = Some(Finish::Length);
            }
        }
        let (ended, still): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.running).into_iter().partition(|s| s.end.is_some());
        self.running = still;
        for mut s in ended {
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
