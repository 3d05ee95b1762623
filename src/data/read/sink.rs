//! Where rows go as they are read: kept, or handed on in batches. Layer 6.
//!
//! Invariant: rows that are handed on take at most [`BATCH_BYTES`] and one row at a time; those that
//! are kept, half of the memory that is free.

use std::path::Path;

use serde_json::Value;

use crate::config::OnBadRow;
use crate::data::bad::BadRows;
use crate::data::row::Row;
use crate::device::cgroup;
use crate::error::{Error, Result};
use crate::fsio::size_text;

/// What takes the rows of a batch.
pub type TakeRows<'a> = dyn FnMut(Vec<Row>) -> Result<()> + 'a;

/// Bytes of rows, about, that are handed on at once: enough for all threads to have work.
const BATCH_BYTES: usize = 8 << 20;

/// Rows that are handed on at once, at most.
const BATCH_ROWS: usize = 8192;

/// Rows that are handed on together.
#[derive(Default)]
pub struct RowBatch {
    pub rows: Vec<Row>,
    /// Bytes that they take, about.
    held: usize,
}

impl RowBatch {
    pub fn push(&mut self, row: Row) {
        self.held += size_of::<Row>() + row.value.iter().map(|(k, v)| entry(k, v)).sum::<usize>();
        self.rows.push(row);
    }

    /// Whether it is time to hand them on.
    pub fn is_full(&self) -> bool {
        self.held >= BATCH_BYTES || self.rows.len() >= BATCH_ROWS
    }

    /// Hands on what there is.
    pub fn hand_on(&mut self, take: &mut TakeRows) -> Result<()> {
        self.held = 0;
        match std::mem::take(&mut self.rows) {
            rows if rows.is_empty() => Ok(()),
            rows => take(rows),
        }
    }
}

/// The rows of some files.
pub struct RowSink<'t> {
    /// Those that were read and not handed on.
    pub batch: RowBatch,
    /// None: all are kept.
    take: Option<&'t mut TakeRows<'t>>,
    /// Rows so far, without bad ones.
    pub count: usize,
    pub bad: BadRows,
    /// What to tell about the files.
    pub notes: Vec<String>,
    /// Bytes that rows may take.
    most: usize,
}

impl<'t> RowSink<'t> {
    /// No rows yet. Those that are kept may take half of the memory that is free: what is made of
    /// them needs the rest.
    pub fn new(
        on_bad_row: OnBadRow,
        notes: Vec<String>,
        take: Option<&'t mut TakeRows<'t>>,
    ) -> RowSink<'t> {
        let most = cgroup::host_memory(Path::new("/")).free / 2;
        let bad = BadRows::new(on_bad_row);
        RowSink { batch: RowBatch::default(), take, count: 0, bad, notes, most }
    }

    /// Takes a row. Error: there is no memory for it, or what the rows are handed to fails.
    pub fn push(&mut self, row: Row) -> Result<()> {
        let place = row.at();
        self.batch.push(row);
        if self.batch.held > self.most {
            return Err(Error::OutOfMemory(format!(
                "{place}: the rows before it take {}, half of the memory that is free, and what is made of them needs the rest; \
                 give fewer rows, or take a machine with more memory",
                size_text(self.most as u64)
            )));
        }
        self.count += 1;
        if self.batch.is_full() { self.hand_on() } else { Ok(()) }
    }

    /// Hands on what was read, where rows are not kept.
    pub fn hand_on(&mut self) -> Result<()> {
        match &mut self.take {
            Some(take) => self.batch.hand_on(take),
            None => Ok(()),
        }
    }
}

/// What a field takes, about: its slot in the object and in its table, and what the allocator adds to
/// each of its parts.
fn entry(key: &str, value: &Value) -> usize {
    const SLOT: usize = 64;
    size_of::<(String, Value)>() + SLOT + key.len() + heap(value)
}

/// What a value takes beside itself, about.
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
