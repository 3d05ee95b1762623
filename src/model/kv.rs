//! The paged cache of keys and values. Floor 3.
//!
//! Invariant: a page is 64 rows, the attention kernels' key block; page tables say where a sequence's positions lie, so
//! a cache never moves and sequences can share pages.

use crate::cx::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::ops::embedding::TokenIndex;
use crate::tensor::Tensor;

/// Rows (tokens) a page.
pub const PAGE: usize = 64;

pub struct KvCache {
    /// One a layer: [pages * 64, 2 * kv_heads * head_dim] real, k|v of a token in a row.
    pub layers: Vec<Tensor>,
    pages: usize,
    free: Vec<i32>,
}

/// The device arrays of one step: some new tokens of some sequences.
pub struct KvStep {
    pub tokens: TokenIndex,
    /// I32 [n]: position of each token in its sequence.
    pub positions: Tensor,
    /// I32 [n]: which sequence (row of the page table) each token belongs to.
    pub row_sequence: Tensor,
    /// I32 [n]: the cache row each token's k|v goes to.
    pub slots: Tensor,
    /// I32 [sequences, max pages]
    pub page_table: Tensor,
    pub longest: usize,
}

/// A sequence in the cache: its pages and how many tokens they hold.
#[derive(Clone, Debug, Default)]
pub struct CachedSequence {
    pub pages: Vec<i32>,
    pub len: usize,
}

impl KvCache {
    pub fn new(cx: &Cx, config: &ModelConfig, pages: usize) -> Result<KvCache> {
        let width = 2 * config.num_kv_heads * config.head_dim;
        let layer = |_| Tensor::new(&cx.pool, "kv cache", cx.dtype, &[pages * PAGE, width]);
        let layers = (0..config.num_layers).map(layer).collect::<Result<Vec<_>>>()?;
        Ok(KvCache { layers, pages, free: (0..pages as i32).rev().collect() })
    }

    /// Makes room for `tokens` more tokens; false (and nothing taken) if the pages run out.
    pub fn reserve(&mut self, sequence: &mut CachedSequence, tokens: usize) -> bool {
        let need = (sequence.len + tokens).div_ceil(PAGE).saturating_sub(sequence.pages.len());
        if need > self.free.len() {
            return false;
        }
        sequence.pages.extend(self.free.drain(self.free.len() - need..).rev());
        true
    }

    /// Gives a sequence's pages back.
    pub fn release(&mut self, sequence: &mut CachedSequence) {
        self.free.extend(sequence.pages.drain(..).rev());
        sequence.len = 0;
    }

    pub fn pages(&self) -> usize {
        self.pages
    }

    /// A step that appends `new[i]` to `sequences[i]` (room was reserved); their lengths grow.
    pub fn step(&self, cx: &Cx, sequences: &mut [&mut CachedSequence], new: &[&[u32]], vocab: usize) -> Result<KvStep> {
        let (mut ids, mut positions, mut rows, mut slots) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let width = sequences.iter().map(|s| s.pages.len()).max().unwrap_or(1).max(1);
        let mut table = vec![0i32; sequences.len() * width];
        let mut longest = 0;
        for (s, (sequence, tokens)) in sequences.iter_mut().zip(new).enumerate() {
            table[s * width..s * width + sequence.pages.len()].copy_from_slice(&sequence.pages);
            for &token in *tokens {
                if token as usize >= vocab {
                    let message = format!("token {token}; the vocabulary has {vocab}; is it the model's tokenizer?");
                    return Err(Error::op("kv_step", message));
                }
                let Some(page) = sequence.pages.get(sequence.len / PAGE) else {
                    return Err(Error::op("kv_step", "no page was reserved"));
                };
                ids.push(token);
                positions.push(sequence.len as i32);
                rows.push(s as i32);
                slots.push(page * PAGE as i32 + (sequence.len % PAGE) as i32);
                sequence.len += 1;
            }
            longest = longest.max(sequence.len);
        }
        Ok(KvStep {
            tokens: TokenIndex::new(cx, &ids)?,
            positions: cx.ints("positions", &positions)?,
            row_sequence: cx.ints("row sequences", &rows)?,
            slots: cx.ints("kv slots", &slots)?,
            page_table: Tensor::from_host(&cx.pool, "page table", DType::I32, &[sequences.len(), width], &table)?,
            longest,
        })
    }
}
