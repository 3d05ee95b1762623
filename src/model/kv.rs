//! The paged cache of keys and values, and of the inputs of convolutions. Layer 5.
//!
//! Invariant: a page is 64 rows, the attention kernels' key block; page tables map a sequence's
//! positions to pages, so cached rows never move and sequences can share pages. Only a page that
//! one sequence holds is written.

use std::ops::Range;

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::model::layout::ModelConfig;
use crate::ops::attention::PagedRows;
use crate::ops::cache::CopyCached;
use crate::ops::embedding::TokenIndex;
use crate::rng::{philox, tag};
use crate::tensor::Tensor;

/// Rows (tokens) per page.
pub use crate::ops::attention::PAGE;

pub struct KvCache {
    /// One per layer: [pages * 64, width] real, one row per token: its k|v, or the input of a
    /// convolution.
    pub layers: Vec<Tensor>,
    /// For each width, the concatenated layers of that width and their number.
    stores: Vec<(Tensor, usize)>,
    /// Number of sequences that hold each page.
    holders: Vec<u32>,
    free: Vec<i32>,
}

/// The device arrays of one step: some new tokens of some sequences.
pub struct KvStep {
    pub tokens: TokenIndex,
    /// I32 `[n]`: position of each token in its sequence.
    pub positions: Tensor,
    /// I32 `[n]`: the page table row of each token's sequence; -1: padding.
    pub row_sequence: Tensor,
    /// I32 `[n]`: the cache row to which each token's k|v is written; -1: none.
    pub slots: Tensor,
    /// I32 [sequences, max pages]
    pub page_table: Tensor,
    /// Number of positions of the longest sequence.
    pub longest: usize,
    /// Token ids are below this.
    pub vocab: usize,
    /// Whether no two tokens belong to one sequence: a decode step.
    pub decodes: bool,
}

impl KvStep {
    /// The positions and cache slots of the rows.
    pub fn rows(&self) -> PagedRows<'_> {
        PagedRows {
            slots: &self.slots,
            page_table: &self.page_table,
            sequences: &self.row_sequence,
            positions: &self.positions,
        }
    }
}

/// The pages of each running sequence, on the device, in rows of fixed width. Its address is fixed,
/// so a recorded step can read it.
pub struct PageTable {
    /// I32 [sequences, max pages]
    pub pages: Tensor,
    host: Vec<i32>,
    /// Rows whose device copy is out of date.
    changed: Range<usize>,
}

/// A sequence in the cache: its pages and its number of tokens.
#[derive(Debug, Default)]
pub struct CachedSequence {
    pub pages: Vec<i32>,
    pub len: usize,
}

impl KvCache {
    pub fn new(cx: &Cx, config: &ModelConfig, pages: usize) -> Result<KvCache> {
        let rows = pages * PAGE;
        let width = |layer: usize| config.cached_width(layer);
        let mut widths: Vec<usize> = (0..config.num_layers).map(width).collect();
        widths.sort_unstable();
        let mut stores = Vec::new();
        for same in widths.chunk_by(|a, b| a == b) {
            let n = same.len();
            let store = Tensor::new(&cx.pool, "kv cache", cx.dtype, &[n * rows, same[0]])?;
            stores.push((store, n));
        }
        let mut used = vec![0; stores.len()];
        let layer = |layer: usize| {
            let fits = |s: &(Tensor, usize)| s.0.cols() == width(layer);
            let no_store = || Error::op("kv cache", format!("no store for layer {layer}"));
            let at = stores.iter().position(fits).ok_or_else(no_store)?;
            used[at] += rows;
            stores[at].0.rows(used[at] - rows, used[at])
        };
        Ok(KvCache {
            layers: (0..config.num_layers).map(layer).collect::<Result<_>>()?,
            stores,
            holders: vec![0; pages],
            free: (0..pages as i32).rev().collect(),
        })
    }

    /// Reserves pages for `tokens` more tokens; returns false (and reserves nothing) if too few are
    /// free.
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

    /// Creates a second sequence with the first `tokens` tokens of `from`: whole pages are shared,
    /// the rest of the last one is copied (at most 63 rows per layer; recomputing them would take a
    /// forward of as many tokens). None if there is no page for the copy.
    pub fn fork(&mut self, from: &CachedSequence, tokens: usize) -> Result<Option<CachedSequence>> {
        let (whole, rest) = (tokens / PAGE, tokens % PAGE);
        let mut new = CachedSequence { pages: from.pages[..whole].to_vec(), len: whole * PAGE };
        new.pages.iter().for_each(|page| self.holders[*page as usize] += 1);
        if !self.reserve(&mut new, rest) {
            self.release(&mut new);
            return Ok(None);
        }
        if rest > 0 {
            let first = |s: &CachedSequence| s.pages[whole] as usize * PAGE;
            let (from, to) = (first(from), first(&new));
            for (store, layers) in &self.stores {
                CopyCached { layers: *layers, from, to, rows: rest }
                    .run(&**store.device(), store)?;
            }
        }
        new.len = tokens;
        Ok(Some(new))
    }

    /// Releases a sequence's pages; pages that other sequences hold stay allocated.
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

    /// Shuffles the free pages, so that tests can check that results do not depend on their order.
    pub fn shuffle(&mut self, seed: u64) {
        let key = [seed as u32, (seed >> 32) as u32];
        self.free.sort_by_key(|page| philox(key, [*page as u32, 0, 0, tag::PAGE_ORDER]));
    }
}

impl CachedSequence {
    /// Returns the cache row of a position. Error: no page was reserved for it.
    pub fn row(&self, position: usize) -> Result<i32> {
        let page = self.pages.get(position / PAGE);
        let page = page.ok_or_else(|| Error::op("kv_step", "no page was reserved"))?;
        Ok(page * PAGE as i32 + (position % PAGE) as i32)
    }
}

impl PageTable {
    /// Creates a table for `sequences` sequences of at most `longest` tokens.
    pub fn new(cx: &Cx, sequences: usize, longest: usize) -> Result<PageTable> {
        let width = longest.div_ceil(PAGE).max(1);
        let host = vec![0; sequences * width];
        let pages =
            Tensor::from_host(&cx.pool, "page table", DType::I32, &[sequences, width], &host)?;
        Ok(PageTable { pages, host, changed: 0..0 })
    }

    /// Sets the pages of row `row`, effective from the next [`PageTable::upload`].
    pub fn set(&mut self, row: usize, pages: &[i32]) {
        let old = &mut self.host[row * self.pages.cols()..][..pages.len()];
        if old == pages {
            return;
        }
        old.copy_from_slice(pages);
        let none = self.changed.is_empty();
        self.changed.start = if none { row } else { self.changed.start.min(row) };
        self.changed.end = if none { row + 1 } else { self.changed.end.max(row + 1) };
    }

    /// Updates the device copy: one upload of the rows from the first to the last changed one, or
    /// none if none changed.
    pub fn upload(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.changed);
        if rows.is_empty() {
            return Ok(());
        }
        let width = self.pages.cols();
        let values = &self.host[rows.start * width..rows.end * width];
        self.pages.rows(rows.start, rows.end)?.upload(values)
    }
}
