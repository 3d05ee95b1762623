//! Who runs: pages, admission, preemption. Layer 6.
//!
//! Invariant: the oldest running sequence always gets on (a younger one gives its pages up, and
//! starts again later from its own tokens, with the same bits), so every sequence ends.

use std::sync::Arc;

use super::sample::Draw;
use super::{Completion, Engine, Finish};
use crate::error::Result;
use crate::model::kv::{CachedSequence, PAGE};

pub(super) struct Sequence {
    pub number: u32,
    /// Prompt and completion.
    pub tokens: Vec<u32>,
    pub prompt: usize,
    pub cached: CachedSequence,
    /// Its row among the running ones' device state.
    pub slot: usize,
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
            cached,
            slot: 0,
            completion,
            end: None,
        }
    }

    /// Tokens that are not in the cache.
    fn left(&self) -> usize {
        self.tokens.len() - self.cached.len
    }

    pub fn push(&mut self, d: &Draw) {
        self.tokens.push(d.token);
        let c = &mut self.completion;
        c.ids.push(d.token);
        c.logps.push(d.logp);
        c.logps_scaled.push(d.logp_scaled);
        c.logps_truncated.push(d.logp_truncated);
        c.entropies.push(d.entropy);
    }
}

enum Admission {
    /// With so many tokens.
    Runs(usize),
    /// A sibling is computing their prompt: it will be shared.
    LaterThanSibling,
    NoRoom,
}

impl Engine {
    /// Decides how many tokens of each running sequence go in, after preempting and admitting as
    /// room tells. Their pages are reserved.
    pub(super) fn schedule(&mut self) -> Result<Vec<usize>> {
        let mut budget = self.options.max_step_tokens;
        let mut scheduled = Vec::new();
        while scheduled.len() < self.running.len() {
            let i = scheduled.len();
            let take = self.running[i].left().min(budget);
            while i < self.running.len() && !self.cache.reserve(&mut self.running[i].cached, take) {
                self.preempt_youngest();
            }
            if i < self.running.len() {
                budget -= take;
                scheduled.push(take);
            }
        }
        let mut at = 0;
        while self.running.len() < self.options.max_sequences
            && budget > 0
            && at < self.waiting.len()
        {
            match self.admit(at, budget)? {
                Admission::Runs(take) => {
                    budget -= take;
                    scheduled.push(take);
                }
                Admission::LaterThanSibling => at += 1,
                Admission::NoRoom => break,
            }
        }
        Ok(scheduled)
    }

    fn preempt_youngest(&mut self) {
        if let Some(mut youngest) = self.running.pop() {
            self.leave(&mut youngest);
            self.waiting.push_front(youngest);
            self.counts.preempted += 1;
        }
    }

    fn admit(&mut self, at: usize, budget: usize) -> Result<Admission> {
        let s = &self.waiting[at];
        // All of the prompt but its last token: that one goes in alone, and predicts the first of
        // the completion.
        let prefix = s.prompt - 1;
        let siblings = self
            .running
            .iter()
            .filter(|r| prefix > 0 && r.completion.request == s.completion.request);
        let mut cached = match siblings.max_by_key(|r| r.cached.len) {
            Some(sibling) if sibling.cached.len < prefix => return Ok(Admission::LaterThanSibling),
            Some(sibling) => match self.cache.fork(&sibling.cached, prefix)? {
                Some(cached) => cached,
                None => return Ok(Admission::NoRoom),
            },
            None => CachedSequence::default(),
        };
        let shared = cached.len;
        let take = (s.tokens.len() - shared).min(budget);
        // One page to spare, or the next step might throw somebody out again.
        let need = (shared + take).div_ceil(PAGE) - cached.pages.len();
        let spare = usize::from(!self.running.is_empty());
        if need + spare > self.cache.free_pages() || !self.cache.reserve(&mut cached, take) {
            self.cache.release(&mut cached);
            return Ok(Admission::NoRoom);
        }
        let (Some(mut s), Some(slot)) = (self.waiting.remove(at), self.free_slots.pop()) else {
            self.cache.release(&mut cached);
            return Ok(Admission::NoRoom);
        };
        self.counts.shared += shared;
        (s.cached, s.slot) = (cached, slot);
        if let Some(seen) = &self.seen {
            let mut words = vec![0u32; seen.cols()];
            s.tokens
                .iter()
                .filter(|t| (**t as usize) < self.vocab.tokens)
                .for_each(|t| words[*t as usize / 32] |= 1 << (t % 32));
            seen.rows(slot, slot + 1)?.upload(&words)?;
        }
        self.running.push(s);
        Ok(Admission::Runs(take))
    }

    /// Gives back what a sequence holds.
    pub(super) fn leave(&mut self, s: &mut Sequence) {
        self.cache.release(&mut s.cached);
        self.free_slots.push(s.slot);
    }
}
