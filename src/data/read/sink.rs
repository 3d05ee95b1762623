//! Collects rows as they are read, or passes them on in batches. Layer 6.
//!
//! Invariant: rows that are passed on take at most [`BATCH_BYTES`] plus one row; rows that are kept
//! take at most half of the free memory.

use std::path::Path;

use serde_json::Value;

use crate::config::OnBadRow;
use crate::data::bad::BadRows;
use crate::data::row::Row;
use crate::device::cgroup;
use crate::error::{Error, Result};
use crate::fsio::size_text;

/// Receives the rows of a batch.
pub type TakeRows<'a> = dyn FnMut(Vec<Row>) -> Result<()> + 'a;

/// Approximate bytes of rows per batch: enough to keep all threads busy.
const BATCH_BYTES: usize = 8 << 20;

/// Maximum rows of a batch.
const BATCH_ROWS: usize = 8192;

/// Rows that are passed on together.
#[derive(Default)]
pub struct RowBatch {
    pub rows: Vec<Row>,
    /// Approximate bytes of the rows.
    held: usize,
}

impl RowBatch {
    pub fn push(&mut self, row: Row) {
        self.held += size_of::<Row>() + row.value.iter().map(|(k, v)| entry(k, v)).sum::<usize>();
        self.rows.push(row);
    }

    /// Whether the batch should be passed on.
    pub fn is_full(&self) -> bool {
        self.held >= BATCH_BYTES || self.rows.len() >= BATCH_ROWS
    }

    /// Passes on the rows of the batch, if any.
    pub fn hand_on(&mut self, take: &mut TakeRows) -> Result<()> {
        self.held = 0;
        match std::mem::take(&mut self.rows) {
            rows if rows.is_empty() => Ok(()),
            rows => take(rows),
        }
    }
}

/// Collects the rows of some files.
pub struct RowSink<'t> {
    /// Rows read but not yet passed on.
    pub batch: RowBatch,
    /// None: keep all rows.
    take: Option<&'t mut TakeRows<'t>>,
    /// Good rows so far.
    pub count: usize,
    pub bad: BadRows,
    /// Notes on the files, for the user.
    pub notes: Vec<String>,
    /// Maximum bytes of the rows.
    most: usize,
}

impl<'t> RowSink<'t> {
    /// Creates an empty sink. Kept rows may take half of the free memory: tokenising them needs the
    /// rest.
    pub fn new(
        on_bad_row: OnBadRow,
        notes: Vec<String>,
        take: Option<&'t mut TakeRows<'t>>,
    ) -> RowSink<'t> {
        let most = cgroup::host_memory(Path::new("/")).free / 2;
        let bad = BadRows::new(on_bad_row);
        RowSink { batch: RowBatch::default(), take, count: 0, bad, notes, most }
    }

    /// Adds a row. Error: there is no memory for it, or the receiver fails.
    pub fn push(&mut self, row: Row) -> Result<()> {
        let place = row.at();
        self.batch.push(row);
        if self.batch.held > self.most {
            return Err(Error::OutOfMemory(format!(
                "{place}: the rows before it take {}, half of the free memory, and encoding them \
                 needs the rest; give fewer rows, or use a machine with more memory",
                size_text(self.most as u64)
            )));
        }
        self.count += 1;
        if self.batch.is_full() { self.hand_on() } else { Ok(()) }
    }

    /// Passes on the rows read so far, unless all are kept.
    pub fn hand_on(&mut self) -> Result<()> {
        match &mut self.take {
            Some(take) => self.batch.hand_on(take),
            None => Ok(()),
        }
    }
}

/// Approximate bytes of a field: its slots in the object's entries and hash table, and the
/// allocator's overhead for each part.
fn entry(key: &str, value: &Value) -> usize {
    const SLOT: usize = 64;
    size_of::<(String, Value)>() + SLOT + key.len() + heap(value)
}

/// Approximate heap bytes of a value.
fn heap(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + size_of::<usize>(),
        Value::Array(items) => items.iter().map(|v| size_of::<Value>() + heap(v)).sum(),
        Value::Object(object) => object.iter().map(|(k, v)| entry(k, v)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DataOptions;
    use crate::data::read::file::{FileRows, WantedFields};

    #[test]
    fn rows_beyond_the_memory_are_an_error_at_their_line() {
        let options = DataOptions::default();
        let fields = WantedFields::All;
        let mut read = RowSink::new(options.on_bad_row, Vec::new(), None);
        read.most = 100_000;
        let mut file = FileRows::new(Path::new("a.jsonl"), &options, &fields, &mut read);
        let row = || Ok(serde_json::json!({ "text": "x".repeat(1000) }));
        let line = (1..).find(|line| file.push(*line, row()).is_err()).unwrap();
        assert!((60..100).contains(&line), "{line}");
        let said = file.push(line, row()).unwrap_err().to_string();
        assert!(
            said.contains(&format!("a.jsonl:{line}: the rows before it take 97.7 KiB")),
            "{said}"
        );
    }

    #[test]
    fn no_more_rows_are_alive_than_a_batch_holds() {
        let (options, fields) = (DataOptions::default(), WantedFields::All);
        let (mut rows, mut largest) = (0, 0);
        let mut take = |batch: Vec<Row>| {
            rows += batch.len();
            largest = largest.max(batch.len());
            Ok(())
        };
        let mut sink = RowSink::new(options.on_bad_row, Vec::new(), Some(&mut take));
        let mut file = FileRows::new(Path::new("a.jsonl"), &options, &fields, &mut sink);
        for line in 1..=100 {
            file.push(line, Ok(serde_json::json!({ "text": "x".repeat(1 << 20) }))).unwrap();
        }
        for line in 101..=30_000 {
            file.push(line, Ok(serde_json::json!({ "text": "" }))).unwrap();
        }
        sink.hand_on().unwrap();
        assert_eq!((sink.count, sink.batch.rows.len()), (30_000, 0));
        assert_eq!((rows, largest), (30_000, BATCH_ROWS));
    }
}
