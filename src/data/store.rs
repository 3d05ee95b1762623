//! Tokenised rows in flat arrays. Layer 6.
//!
//! Invariant: the sequences of a row are contiguous; ids and mask have the same length. Tokens may
//! be in a file; then memory holds only the index of where rows begin and end.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::row::RowPlace;
use super::token_file::TokenFile;
use crate::error::{Error, Result};

/// The source files and lines of rows. A pack comes from several lines.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pub(super) files: Vec<Arc<Path>>,
    pub(super) at: Vec<(u32, u32)>, // file, line; line 0: only the file's name
    pub(super) ends: Vec<u64>,
}

impl Places {
    /// Adds a row that comes from these lines.
    pub fn push<'a>(&mut self, lines: impl IntoIterator<Item = (&'a Arc<Path>, usize)>) {
        for (file, line) in lines {
            // Rows of a file are adjacent, so the last file nearly always matches.
            let known = self.files.iter().rposition(|f| Arc::ptr_eq(f, file) || f == file);
            let file = known.unwrap_or_else(|| {
                self.files.push(file.clone());
                self.files.len() - 1
            });
            self.at.push((file as u32, u32::try_from(line).unwrap_or(u32::MAX)));
        }
        self.ends.push(self.at.len() as u64);
    }

    /// Adds a row that comes from one row of a file.
    pub fn push_row(&mut self, row: &RowPlace) {
        self.push([(&row.file, row.line)]);
    }

    /// Adds a row that does not come from a file.
    pub fn push_name(&mut self, name: &str) {
        self.push([(&Path::new(name).into(), 0)]);
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// Returns `file:line` of each source line of a row.
    pub fn lines(&self, row: usize) -> Vec<String> {
        self.at[range(&self.ends, row)]
            .iter()
            .map(|(file, line)| match line {
                0 => self.files[*file as usize].display().to_string(),
                line => format!("{}:{line}", self.files[*file as usize].display()),
            })
            .collect()
    }

    /// Returns the source lines of a row in one text.
    pub fn text(&self, row: usize) -> String {
        let mut lines = self.lines(row);
        lines.dedup();
        lines.join(" + ")
    }
}

/// Token ids and masks, in memory or in a file.
#[derive(Clone, Debug)]
pub(super) enum Tokens {
    Memory { ids: Vec<u32>, mask: Vec<bool> },
    File(StoredTokens),
}

/// Tokens in a file: for each row its ids, then its mask with one byte per token.
#[derive(Clone, Debug)]
pub(super) struct StoredTokens {
    pub(super) file: Arc<TokenFile>,
    /// Byte offset of the first row.
    pub(super) start: u64,
    /// Bytes of rows not yet written.
    pending: Vec<u8>,
    /// Number of tokens written.
    written: u64,
}

/// Bytes of a token in the file: id and mask.
pub(super) const TOKEN_BYTES: u64 = 5;

/// Bytes per write.
const WRITE: usize = 1 << 20;

impl StoredTokens {
    /// The `tokens` tokens at offset `start` of a finished file.
    pub(super) fn finished(file: Arc<TokenFile>, start: u64, tokens: u64) -> StoredTokens {
        StoredTokens { file, start, pending: Vec::new(), written: tokens }
    }

    fn write(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let at = self.file.append(&self.pending)?;
        match self.written {
            0 => self.start = at,
            n if at == self.start + TOKEN_BYTES * n => {}
            _ => return Err(Error::Run("rows of two splits are mixed in the row cache".into())),
        }
        self.written += self.pending.len() as u64 / TOKEN_BYTES;
        self.pending.clear();
        Ok(())
    }

    /// Reads a range of tokens.
    fn read(&self, tokens: Range<usize>) -> Result<(Vec<u32>, Vec<bool>)> {
        let (first, count) = (tokens.start as u64, tokens.len());
        let mut bytes = vec![0u8; TOKEN_BYTES as usize * count];
        match first.checked_sub(self.written) {
            None => self.file.read(self.start + TOKEN_BYTES * first, &mut bytes)?,
            Some(later) => {
                let at = (TOKEN_BYTES * later) as usize;
                let end = at + bytes.len();
                bytes.copy_from_slice(&self.pending[at..end]);
            }
        }
        let (ids, mask) = bytes.split_at(4 * count);
        let ids = bytemuck::allocation::pod_collect_to_vec(ids);
        Ok((ids, mask.iter().map(|target| *target != 0).collect()))
    }
}

/// A row of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRow<'a> {
    ids: Cow<'a, [u32]>,
    mask: Cow<'a, [bool]>,
    parts: Vec<Range<usize>>,
}

impl StoredRow<'_> {
    /// The sequences of the row: ids, and which of them are loss targets.
    pub fn sequences(&self) -> impl Iterator<Item = (&[u32], &[bool])> {
        self.parts.iter().map(|at| (&self.ids[at.clone()], &self.mask[at.clone()]))
    }
}

/// The tokenised rows of a split.
#[derive(Clone, Debug)]
pub struct TokenStore {
    pub(super) tokens: Tokens,
    /// The end of each sequence, in tokens.
    pub(super) ends: Vec<u64>,
    /// The end of each row, in sequences.
    pub(super) rows: Vec<u64>,
    pub(super) labels: Vec<u8>,
    pub(super) label_ends: Vec<u64>,
    pub places: Places,
}

impl Default for TokenStore {
    fn default() -> Self {
        TokenStore::over(Tokens::Memory { ids: Vec::new(), mask: Vec::new() })
    }
}

impl TokenStore {
    fn over(tokens: Tokens) -> TokenStore {
        TokenStore {
            tokens,
            ends: Vec::new(),
            rows: Vec::new(),
            labels: Vec::new(),
            label_ends: Vec::new(),
            places: Places::default(),
        }
    }

    /// Creates an empty store whose tokens go to a file, or to memory if they cannot be written.
    pub fn in_file(file: Arc<TokenFile>) -> TokenStore {
        TokenStore::over(Tokens::File(StoredTokens::finished(file, 0, 0)))
    }

    /// Adds a row of sequences with their masks; the caller adds its place separately.
    pub fn add<'a>(
        &mut self,
        sequences: impl IntoIterator<Item = (&'a [u32], &'a [bool])>,
    ) -> Result<()> {
        self.add_labelled(sequences, &[])
    }

    /// Adds a row with labels besides its masks.
    pub fn add_labelled<'a>(
        &mut self,
        sequences: impl IntoIterator<Item = (&'a [u32], &'a [bool])>,
        labels: &[u8],
    ) -> Result<()> {
        let mut end = self.ends.last().copied().unwrap_or(0);
        let mut masks: Vec<&[bool]> = Vec::new();
        for (ids, mask) in sequences {
            match &mut self.tokens {
                Tokens::Memory { ids: all, mask: masks } => {
                    all.extend_from_slice(ids);
                    masks.extend_from_slice(mask);
                }
                Tokens::File(to) => {
                    to.pending.extend_from_slice(bytemuck::cast_slice(ids));
                    masks.push(mask);
                }
            }
            end += ids.len() as u64;
            self.ends.push(end);
        }
        self.rows.push(self.ends.len() as u64);
        self.labels.extend_from_slice(labels);
        self.label_ends.push(self.labels.len() as u64);
        if let Tokens::File(to) = &mut self.tokens {
            masks.iter().for_each(|m| to.pending.extend_from_slice(bytemuck::cast_slice(m)));
            if to.pending.len() >= WRITE {
                self.write()?;
            }
        }
        Ok(())
    }

    /// Writes the pending tokens; call it before adding rows of another split. If writing fails,
    /// all rows are read back into memory. Error: they cannot be read.
    pub fn write(&mut self) -> Result<()> {
        let Tokens::File(to) = &mut self.tokens else { return Ok(()) };
        if to.write().is_ok() {
            return Ok(());
        }
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for row in 0..self.count() {
            let row = self.row(row)?;
            ids.extend_from_slice(&row.ids);
            mask.extend_from_slice(&row.mask);
        }
        self.tokens = Tokens::Memory { ids, mask };
        Ok(())
    }

    pub fn count(&self) -> usize {
        self.rows.len()
    }

    /// Returns the tokens of a row. Error: they cannot be read.
    pub fn row(&self, row: usize) -> Result<StoredRow<'_>> {
        let sequences = range(&self.rows, row);
        let first = self.end(sequences.start) as usize;
        let all = first..self.end(sequences.end) as usize;
        let part = |s: usize| {
            let at = range(&self.ends, s);
            at.start - first..at.end - first
        };
        let parts = sequences.map(part).collect();
        let (ids, mask) = match &self.tokens {
            Tokens::Memory { ids, mask } => (ids[all.clone()].into(), mask[all].into()),
            Tokens::File(file) => {
                let (ids, mask) = file.read(all)?;
                (ids.into(), mask.into())
            }
        };
        Ok(StoredRow { ids, mask, parts })
    }

    /// Total tokens of the sequences before `s`.
    fn end(&self, s: usize) -> u64 {
        if s == 0 { 0 } else { self.ends[s - 1] }
    }

    /// Returns the labels of a row.
    pub fn labels(&self, row: usize) -> &[u8] {
        &self.labels[range(&self.label_ends, row)]
    }

    /// Length of the longest sequence, in tokens.
    pub fn longest(&self) -> Option<usize> {
        (0..self.ends.len()).map(|s| range(&self.ends, s).len()).max()
    }

    /// Length of each row, in tokens.
    pub fn row_lengths(&self) -> Vec<usize> {
        let length = |row: usize| {
            let sequences = range(&self.rows, row);
            (self.end(sequences.end) - self.end(sequences.start)) as usize
        };
        (0..self.count()).map(length).collect()
    }
}

/// Returns the range of item `i` in concatenated lists, given their ends.
fn range(ends: &[u64], i: usize) -> Range<usize> {
    let start = if i == 0 { 0 } else { ends[i - 1] as usize };
    start..ends[i] as usize
}
