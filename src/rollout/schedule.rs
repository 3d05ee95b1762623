//! Scheduling: pages, admission, preemption. Layer 6.
//!
//! Invariant: the oldest running sequence always makes progress: a younger one gives up its pages
//! and later starts again from its own tokens, with the same bits. So every sequence ends.

use super::Engine;
use super::request::Sequence;
use crate::error::Result;
use crate::model::kv::{CachedSequence, PAGE};

enum Admission {
    /// Admitted; this many tokens go in.
    Runs(usize),
    /// A sibling is computing the prompt, which will be shared.
    LaterThanSibling,
    NoRoom,
}

impl Engine {
    /// Whether the next step has too few pages for all running sequences.
    pub(super) fn pages_run_out(&self) -> bool {
        let (mut budget, mut free) = (self.options.max_step_tokens, self.cache.free_pages());
        self.running.iter().any(|s| {
            let take = s.wanted().min(budget);
            let pages = (s.cached.len + take).div_ceil(PAGE).saturating_sub(s.cached.pages.len());
            let short = pages > free;
            (budget, free) = (budget - take, free.saturating_sub(pages));
            short
        })
    }

    /// Decides how many tokens of each running sequence go in, after preempting and admitting
    /// sequences as memory allows. Reserves their pages.
    pub(super) fn schedule(&mut self) -> Result<Vec<usize>> {
        let mut budget = self.options.max_step_tokens;
        let mut scheduled = Vec::new();
        while scheduled.len() < self.running.len() {
            let i = scheduled.len();
            let take = self.running[i].wanted().min(budget);
            while i < self.running.len() && !self.cache.reserve(&mut self.running[i].cached, take) {
                if !self.reclaim() {
                    self.preempt_youngest();
                }
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
        let held = std::mem::take(&mut self.waiting[at].cached);
        let goes_on = held.len > 0;
        let s = &self.waiting[at];
        // The prompt without its last token: that token goes in for each member alone and predicts
        // the first token of its completion.
        let prefix = s.prompt - 1;
        let same = |r: &&Sequence| prefix > 0 && r.completion.request == s.completion.request;
        let mut cached = match self.running.iter().filter(same).max_by_key(|r| r.cached.len) {
            _ if goes_on => held,
            Some(sibling) if sibling.cached.len < prefix => return Ok(Admission::LaterThanSibling),
            Some(sibling) => match self.cache.fork(&sibling.cached, prefix)? {
                Some(cached) => cached,
                None => return Ok(Admission::NoRoom),
            },
            None => CachedSequence::default(),
        };
        let (shared, tokens) = (cached.len, s.tokens.len());
        let take = (tokens - shared).min(budget);
        // Keeps one page free. Otherwise the next step might preempt a sequence again.
        let need = (shared + take).div_ceil(PAGE).saturating_sub(cached.pages.len());
        let spare = usize::from(!self.running.is_empty());
        while need + spare > self.cache.free_pages() && self.reclaim() {}
        if need + spare > self.cache.free_pages() || !self.cache.reserve(&mut cached, take) {
            match goes_on {
                true => self.waiting[at].cached = cached,
                false => self.cache.release(&mut cached),
            }
            return Ok(Admission::NoRoom);
        }
        let (Some(mut s), Some(slot)) = (self.waiting.remove(at), self.free_slots.pop()) else {
            self.cache.release(&mut cached);
            return Ok(Admission::NoRoom);
        };
        if !goes_on {
            self.counts.shared += shared;
        }
        (s.cached, s.slot, s.serial) = (cached, slot, self.admitted);
        self.admitted += 1;
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

    /// Frees the pages and the slot of a sequence.
    pub(super) fn leave(&mut self, s: &mut Sequence) {
        self.cache.release(&mut s.cached);
        self.free_slots.push(s.slot);
    }
}
