//! Tokenised rows, flat. Layer 6.
//!
//! Invariant: the sequences of a row stand one after the other; ids and mask have the same length.
//! Ids may lie in a mapped file: then they take no memory but the page cache.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::row::Row;

/// Where rows come from: files and lines. A pack comes from several.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pub(super) files: Vec<Arc<Path>>,
    pub(super) at: Vec<(u32, u32)>, // file, line; line 0: the file's name says it all
    pub(super) ends: Vec<u64>,
}

impl Places {
    /// Adds a row that comes from these lines.
    pub fn push<'a>(&mut self, lines: impl IntoIterator<Item = (&'a Arc<Path>, usize)>) {
        for (file, line) in lines {
            // Rows of a file stand together, so the last is nearly always the one.
            let known = self.files.iter().rposition(|f| Arc::ptr_eq(f, file) || f == file);
            let file = known.unwrap_or_else(|| {
                self.files.push(file.clone());
                self.files.len() - 1
            });
            self.at.push((file as u32, u32::try_from(line).unwrap_or(u32::MAX)));
        }
        self.ends.push(self.at.len() as u64);
    }

    /// Adds a row that comes from a row of a file.
    pub fn push_row(&mut self, row: &Row) {
        self.push([(&row.file, row.line)]);
    }

    /// Adds a row that comes from no file.
    pub fn push_name(&mut self, name: &str) {
        self.push([(&Path::new(name).into(), 0)]);
    }

    /// `file:line` of each line that a row comes from.
    pub fn lines(&self, row: usize) -> Vec<String> {
        self.at[range(&self.ends, row)]
            .iter()
            .map(|(file, line)| match line {
                0 => self.files[*file as usize].display().to_string(),
                line => format!("{}:{line}", self.files[*file as usize].display()),
            })
            .collect()
    }

    /// The lines of a row in one text.
    pub fn text(&self, row: usize) -> String {
        let mut lines = self.lines(row);
        lines.dedup();
        lines.join(" + ")
    }
}

/// Token ids, in memory or in a file.
#[derive(Clone, Debug)]
pub(super) enum TokenIds {
    Owned(Vec<u32>),
    Mapped { map: Arc<Mmap>, at: usize, count: usize },
}

impl TokenIds {
    /// Adds ids; those of a file are copied first.
    fn extend(&mut self, more: &[u32]) {
        match self {
            TokenIds::Owned(ids) => ids.extend_from_slice(more),
            TokenIds::Mapped { .. } => *self = TokenIds::Owned([self.all(), more].concat()),
        }
    }

    pub(super) fn all(&self) -> &[u32] {
        match self {
            TokenIds::Owned(ids) => ids,
            // The range was checked when the file was opened.
            TokenIds::Mapped { map, at, count } => {
                bytemuck::cast_slice(&map[*at..*at + 4 * *count])
            }
        }
    }
}

/// The tokenised rows of a split.
#[derive(Clone, Debug)]
pub struct TokenStore {
    pub(super) ids: TokenIds,
    pub(super) mask: Vec<bool>,
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
        TokenStore {
            ids: TokenIds::Owned(Vec::new()),
            mask: Vec::new(),
            ends: Vec::new(),
            rows: Vec::new(),
            labels: Vec::new(),
            label_ends: Vec::new(),
            places: Places::default(),
        }
    }
}

impl TokenStore {
    /// Adds a row of sequences with their masks; its place is pushed apart.
    pub fn add<'a>(&mut self, sequences: impl IntoIterator<Item = (&'a [u32], &'a [bool])>) {
        self.add_labelled(sequences, &[]);
    }

    /// Adds a row that teaches more than its masks.
    pub fn add_labelled<'a>(
        &mut self,
        sequences: impl IntoIterator<Item = (&'a [u32], &'a [bool])>,
        labels: &[u8],
    ) {
        for (ids, mask) in sequences {
            self.ids.extend(ids);
            self.mask.extend_from_slice(mask);
            self.ends.push(self.mask.len() as u64);
        }
        self.rows.push(self.ends.len() as u64);
        self.labels.extend_from_slice(labels);
        self.label_ends.push(self.labels.len() as u64);
    }

    pub fn count(&self) -> usize {
        self.rows.len()
    }

    /// The sequences of a row.
    pub fn sequences(&self, row: usize) -> impl Iterator<Item = (&[u32], &[bool])> {
        range(&self.rows, row).map(|s| self.sequence(s))
    }

    fn sequence(&self, s: usize) -> (&[u32], &[bool]) {
        let at = range(&self.ends, s);
        (&self.ids.all()[at.clone()], &self.mask[at])
    }

    /// All sequences, row after row.
    pub fn all_sequences(&self) -> impl Iterator<Item = (&[u32], &[bool])> {
        (0..self.ends.len()).map(|s| self.sequence(s))
    }

    /// What a row teaches beside its masks.
    pub fn labels(&self, row: usize) -> &[u8] {
        &self.labels[range(&self.label_ends, row)]
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> Option<usize> {
        (0..self.ends.len()).map(|s| range(&self.ends, s).len()).max()
    }

    /// Tokens of each row.
    pub fn row_lengths(&self) -> Vec<usize> {
        let end = |s: usize| if s == 0 { 0 } else { self.ends[s - 1] as usize };
        (0..self.count())
            .map(|row| {
                let sequences = range(&self.rows, row);
                end(sequences.end) - end(sequences.start)
            })
            .collect()
    }
}

/// Item `i` of lists that stand one after the other, by their ends.
fn range(ends: &[u64], i: usize) -> Range<usize> {
    let start = if i == 0 { 0 } else { ends[i - 1] as usize };
    start..ends[i] as usize
}
