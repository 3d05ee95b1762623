//! The paged cache of keys and values. Layer 5.
//!
//! Invariant: a page is 64 rows, the attention kernels' key block; page tables say where a
//! sequence's positions lie, so a cache never moves and sequences can share pages. Only a page that
//! one sequence holds is written.

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::layout::ModelConfig;
use crate::ops::embedding::TokenIndex;
use crate::rng::{philox, tag};
use crate::tensor::Tensor;

/// Rows (tokens) a page.
pub use crate::ops::attention::PAGE;

pub struct KvCache {
    /// One a layer: [pages * 64, 2 * kv_heads * head_dim] real, k|v of a token in a row.
    pub layers: Vec<Tensor>,
    /// How many sequences hold each page.
    holders: Vec<u32>,
    free: Vec<i32>,
}

/// The device arrays of one step: some new tokens of some sequences. One upload.
pub struct KvStep {
    pub tokens: TokenIndex,
    /// I32 `[n]`: position of each token in its sequence.
    pub positions: Tensor,
    /// I32 `[n]`: which sequence (row of the page table) each token belongs to.
    pub row_sequence: Tensor,
    /// I32 `[n]`: the cache row each token's k|v goes to.
    pub slots: Tensor,
    /// I32 [sequences, max pages]
    pub page_table: Tensor,
    /// What the caller sent along, I32.
    pub extra: Vec<Tensor>,
    pub longest: usize,
    /// Token ids lie below this.
    pub vocab: usize,
}

/// A sequence in the cache: its pages and how many tokens they hold.
#[derive(Debug, Default)]
pub struct CachedSequence {
    pub pages: Vec<i32>,
    pub len: usize,
}

impl KvCache {
    pub fn new(cx: &Cx, config: &ModelConfig, pages: usize) -> Result<KvCache> {
        let width = 2 * config.num_kv_heads * config.head_dim;
        let layer = |_| Tensor::new(&cx.pool, "kv cache", cx.dtype, &[pages * PAGE, width]);
        let layers = (0..config.num_layers).map(layer).collect::<Result<Vec<_>>>()?;
        Ok(KvCache { layers, holders: vec![0; pages], free: (0..pages as i32).rev().collect() })
    }

    /// Makes room for `tokens` more tokens; false (and nothing taken) if the pages run out.
    pub fn reserve(&mut self, sequence: &mut CachedSequence, tokens: usize) -> bool {
        let need = (sequence.len + tokens).div_ceil(PAGE).saturating_sub(sequence.pages.len());
        if need > self.free.len() {
            return false;
        }
        for page in self.free.drain(self.free.len() - need..).rev() {
            self.holders[page as usize] = 1;
            sequence.pages.push(page);
        }
        true
    }

    /// A second sequence with the first `tokens` tokens of `from`: whole pages are shared, the rest
    /// of the last one is copied (at most 63 rows a layer are moved; computing them again would be
    /// a forward of as many tokens). None if there is no page for the copy.
    pub fn fork(&mut self, from: &CachedSequence, tokens: usize) -> Result<Option<CachedSequence>> {
        let (whole, rest) = (tokens / PAGE, tokens % PAGE);
        let mut new = CachedSequence { pages: from.pages[..whole].to_vec(), len: whole * PAGE };
        new.pages.iter().for_each(|page| self.holders[*page as usize] += 1);
        if !self.reserve(&mut new, rest) {
            self.release(&mut new);
            return Ok(None);
        }
        for layer in self.layers.iter().filter(|_| rest > 0) {
            let rows = |s: &CachedSequence| {
                let first = s.pages[whole] as usize * PAGE;
                layer.rows(first, first + rest)
            };
            rows(&new)?.copy_from(&rows(from)?)?;
        }
        new.len = tokens;
        Ok(Some(new))
    }

    /// Gives a sequence's pages back; those that others hold stay theirs.
    pub fn release(&mut self, sequence: &mut CachedSequence) {
        for page in sequence.pages.drain(..).rev() {
            let holders = &mut self.holders[page as usize];
            *holders -= 1;
            if *holders == 0 {
                self.free.push(page);
            }
        }
        sequence.len = 0;
    }

    pub fn pages(&self) -> usize {
        self.holders.len()
    }

    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Puts the free pages into a random order: results do not depend on it, which is what tests do
    /// with this.
    pub fn shuffle(&mut self, seed: u64) {
        let key = [seed as u32, (seed >> 32) as u32];
        self.free.sort_by_key(|page| philox(key, [*page as u32, 0, 0, tag::PAGE_ORDER]));
    }

    /// A step that appends `new[i]` to `sequences[i]` (room was reserved); their lengths grow.
    /// `extra` is uploaded along.
    pub fn step(
        &self,
        cx: &Cx,
        sequences: &mut [&mut CachedSequence],
        new: &[&[u32]],
        vocab: usize,
        extra: &[&[i32]],
    ) -> Result<KvStep> {
        let n: usize = new.iter().map(|t| t.len()).sum();
        let width = sequences.iter().map(|s| s.pages.len()).max().unwrap_or(1).max(1);
        // tokens | positions | row sequences | slots | page table | extra
        let mut all = vec![0i32; 4 * n + sequences.len() * width];
        let (rows, table) = all.split_at_mut(4 * n);
        let (mut at, mut longest) = (0, 0);
        for (s, (sequence, tokens)) in sequences.iter_mut().zip(new).enumerate() {
            table[s * width..s * width + sequence.pages.len()].copy_from_slice(&sequence.pages);
            for &token in *tokens {
                if token as usize >= vocab {
                    let message = format!(
                        "token {token}; the vocabulary has {vocab}; is it the model's tokenizer?"
                    );
                    return Err(Error::op("kv_step", message));
                }
                let Some(page) = sequence.pages.get(sequence.len / PAGE) else {
                    return Err(Error::op("kv_step", "no page was reserved"));
                };
                rows[at] = token as i32;
                rows[n + at] = sequence.len as i32;
                rows[2 * n + at] = s as i32;
                rows[3 * n + at] = page * PAGE as i32 + (sequence.len % PAGE) as i32;
                sequence.len += 1;
                at += 1;
            }
            longest = longest.max(sequence.len);
        }
        extra.iter().for_each(|e| all.extend_from_slice(e));
        let uploaded = cx.ints("step", &all)?;
        let mut byte = 0;
        let mut part = |shape: &[usize]| {
            let view = uploaded.view(byte, DType::I32, shape);
            byte += 4 * shape.iter().product::<usize>();
            view
        };
        Ok(KvStep {
            tokens: TokenIndex::for_generation(part(&[n])?)?,
            positions: part(&[n])?,
            row_sequence: part(&[n])?,
            slots: part(&[n])?,
            page_table: part(&[sequences.len(), width])?,
            extra: extra.iter().map(|e| part(&[e.len()])).collect::<Result<_>>()?,
            longest,
            vocab,
        })
    }
}
