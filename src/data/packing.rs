//! Assigns sequences to rows by TRL's three strategies, and groups sequences into forward batches.
//! Layer 6.
//!
//! Invariant: the packs and their order are those of TRL 1.16.0's `pack_dataset`, which packs each
//! batch of 1,000 examples separately. No token is in two packs.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::config::value::words;

words! {
    pub enum PackingStrategy {
        Bfd = "bfd",
        BfdSplit = "bfd_split" | "bfd-requeue",
        Wrapped = "wrapped",
    }
}

/// `Bfd`: best-fit decreasing; a sequence longer than the limit is truncated. `BfdSplit`: such a
/// sequence is cut into pieces that are packed as separate sequences. `Wrapped`: all tokens are
/// concatenated and cut every `max_len`; a pack is ONE sequence, whose positions and attention
/// cross example boundaries.
impl PackingStrategy {
    /// Whether every piece is a separate sequence: its positions start at 0, and it attends to no
    /// other piece.
    pub fn isolates(self) -> bool {
        self != PackingStrategy::Wrapped
    }
}

/// The pieces of one row: (example, range of its tokens), in order.
pub type Pack = Vec<(usize, Range<usize>)>;

pub fn pack(strategy: PackingStrategy, lengths: &[usize], max_len: usize) -> Vec<Pack> {
    match strategy {
        PackingStrategy::Bfd => pack_bfd(lengths, max_len),
        PackingStrategy::BfdSplit => pack_bfd_split(lengths, max_len),
        PackingStrategy::Wrapped => pack_wrapped(lengths, max_len),
    }
}

pub fn pack_bfd(lengths: &[usize], max_len: usize) -> Vec<Pack> {
    best_fit(lengths, max_len, |i, n| vec![(i, 0..n.min(max_len))])
}

pub fn pack_bfd_split(lengths: &[usize], max_len: usize) -> Vec<Pack> {
    best_fit(lengths, max_len, |i, n| {
        (0..n).step_by(max_len).map(|start| (i, start..(start + max_len).min(n))).collect()
    })
}

pub fn pack_wrapped(lengths: &[usize], max_len: usize) -> Vec<Pack> {
    let mut packs: Vec<Pack> = Vec::new();
    if max_len == 0 {
        return packs;
    }
    for (batch, lengths) in lengths.chunks(BATCH).enumerate() {
        let mut room = 0;
        for (i, &n) in lengths.iter().enumerate() {
            let mut start = 0;
            while start < n {
                if room == 0 {
                    packs.push(Vec::new());
                    room = max_len;
                }
                let take = room.min(n - start);
                if let Some(pack) = packs.last_mut() {
                    pack.push((batch * BATCH + i, start..start + take));
                }
                start += take;
                room -= take;
            }
        }
    }
    packs
}

/// Batch size of `datasets.map(batched=True)`.
pub const BATCH: usize = 1000;

fn best_fit(lengths: &[usize], max_len: usize, split: impl Fn(usize, usize) -> Pack) -> Vec<Pack> {
    let mut packs = Vec::new();
    if max_len == 0 {
        return packs;
    }
    for (batch, lengths) in lengths.chunks(BATCH).enumerate() {
        let whole = lengths.iter().enumerate().filter(|(_, n)| **n > 0);
        let mut pieces: Pack = whole.flat_map(|(i, n)| split(batch * BATCH + i, *n)).collect();
        pieces.sort_by_key(|(_, tokens)| std::cmp::Reverse(tokens.len())); // stable
        let first = packs.len();
        // packs with room, by room left; each amount of room has a FIFO queue
        let mut open: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
        for piece in pieces {
            let need = piece.1.len();
            let fit = open.range(need..).next().map(|(&room, _)| room);
            let (at, room) =
                match fit.and_then(|room| Some((open.get_mut(&room)?.pop_front()?, room))) {
                    Some((at, room)) => {
                        if open.get(&room).is_some_and(VecDeque::is_empty) {
                            open.remove(&room);
                        }
                        (at, room)
                    }
                    None => {
                        packs.push(Vec::new());
                        (packs.len() - 1, max_len)
                    }
                };
            debug_assert!(at >= first);
            packs[at].push(piece);
            if room > need {
                open.entry(room - need).or_default().push_back(at);
            }
        }
    }
    packs
}

/// Splits the sequences, in order, into ranges that each go through a model in one batch: as many
/// sequences as fit in `budget` tokens, at least one.
pub fn token_batches(lengths: &[usize], budget: usize) -> Vec<Range<usize>> {
    let (mut batches, mut start) = (Vec::new(), 0);
    while start < lengths.len() {
        let (mut end, mut tokens) = (start + 1, lengths[start]);
        while end < lengths.len() && tokens + lengths[end] <= budget {
            tokens += lengths[end];
            end += 1;
        }
        batches.push(start..end);
        start = end;
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_batches_keep_to_the_budget_and_the_order() {
        assert_eq!(token_batches(&[3, 4, 3, 9, 1, 1], 7), [0..2, 2..3, 3..4, 4..6]);
        assert_eq!(token_batches(&[9, 9], 0), [0..1, 1..2]);
        assert!(token_batches(&[], 7).is_empty());
    }

    #[test]
    fn every_token_is_packed_once() {
        let lengths: Vec<usize> = (0..2500).map(|i| i * 7919 % 61).collect();
        for strategy in [PackingStrategy::Bfd, PackingStrategy::BfdSplit, PackingStrategy::Wrapped]
        {
            let packs = pack(strategy, &lengths, 40);
            let mut seen: Vec<Vec<bool>> = lengths.iter().map(|n| vec![false; *n]).collect();
            for pack in &packs {
                assert!(pack.iter().map(|(_, t)| t.len()).sum::<usize>() <= 40);
                for (i, tokens) in pack {
                    assert!(seen[*i][tokens.clone()].iter().all(|s| !s));
                    seen[*i][tokens.clone()].fill(true);
                }
            }
            let kept: usize = seen.iter().flatten().filter(|s| **s).count();
            let cut = strategy == PackingStrategy::Bfd;
            assert_eq!(
                kept,
                lengths.iter().map(|n| if cut { *n.min(&40) } else { *n }).sum::<usize>()
            );
        }
        assert!(pack_bfd(&[0, 0], 4).is_empty() && pack_wrapped(&[], 4).is_empty());
    }
}
