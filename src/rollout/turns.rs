//! Completions with several turns: waiting between two turns, and continuing. Layer 6.
//!
//! Invariant: a continued completion has the bits of one that never waited: its tokens stay in the
//! cache, or are recomputed with the same bits if others took its pages.

use super::Engine;
use super::request::{Completion, Finish, Sequence, Turn};
use crate::error::{Error, Result};

impl Engine {
    /// Pauses a sequence whose turn has ended: frees its slot and keeps its pages for now.
    pub(super) fn pause(&mut self, mut s: Sequence) -> Turn {
        self.free_slots.push(s.slot);
        // Tokens that were sampled after the stop are dropped when they are read.
        (s.end, s.pending) = (None, 0);
        let (c, ids) = (&s.completion, s.completion.ids.clone());
        let turn = Turn { request: c.request, member: c.member, ids };
        self.paused.push(s);
        turn
    }

    /// Appends `ids` to a paused completion and queues its next turn, before requests that wait for
    /// their first step. Errors: `ids` leave no room for another token, or contain an invalid
    /// token.
    pub fn resume(&mut self, request: usize, member: usize, ids: &[u32]) -> Result<()> {
        let at = self.paused_at(request, member)?;
        let most = self.paused[at].options.max_new_tokens;
        if ids.is_empty() || self.paused[at].length() + ids.len() >= most {
            let n = ids.len();
            let message =
                format!("{n} tokens after a turn, but the completion can have at most {most}");
            return Err(Error::op("rollout", message));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.vocab.tokens) {
            let message = format!("token {id} is outside the vocabulary of {}", self.vocab.tokens);
            return Err(Error::op("rollout", message));
        }
        let mut s = self.paused.remove(at);
        s.tokens.extend_from_slice(ids);
        s.inserted += ids.len();
        s.turn = s.completion.ids.len();
        self.waiting.push_front(s);
        Ok(())
    }

    /// Ends a paused completion with the given reason.
    pub fn finish(&mut self, request: usize, member: usize, finish: Finish) -> Result<Completion> {
        let at = self.paused_at(request, member)?;
        let mut s = self.paused.remove(at);
        self.cache.release(&mut s.cached);
        s.completion.finish = finish;
        Ok(s.completion)
    }

    fn paused_at(&self, request: usize, member: usize) -> Result<usize> {
        let is = |s: &Sequence| (s.completion.request, s.completion.member) == (request, member);
        self.paused.iter().position(is).ok_or_else(|| {
            let message =
                format!("completion {member} of request {request} does not wait for a turn");
            Error::op("rollout", message)
        })
    }

    /// Frees the pages of a sequence that does not run; it recomputes its tokens when it continues.
    /// False: no such sequence holds pages.
    pub(super) fn reclaim(&mut self) -> bool {
        let idle = self.paused.iter_mut().chain(self.waiting.iter_mut().rev());
        let mut idle = idle.filter(|s| !s.cached.pages.is_empty());
        let Some(s) = idle.next() else { return false };
        self.cache.release(&mut s.cached);
        self.counts.preempted += 1;
        true
    }

    /// Drops the sequences that do not run and for which `whose` is true.
    pub(super) fn forget_idle(&mut self, whose: impl Fn(&Sequence) -> bool) {
        for s in self.paused.iter_mut().chain(&mut self.waiting).filter(|s| whose(s)) {
            self.cache.release(&mut s.cached);
        }
        self.paused.retain(|s| !whose(s));
        self.waiting.retain(|s| !whose(s));
    }
}
