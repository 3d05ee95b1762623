//! The rows of one file: columns renamed, bad rows counted. Layer 6.
//!
//! Invariant: every row of every format comes through here, with its line.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::open;
use crate::config::{DataOptions, OnBadRow};
use crate::data::bad::BadRows;
use crate::data::format::FIELDS;
use crate::data::row::{Row, kind};
use crate::device::cgroup;
use crate::error::{Error, Result};
use crate::fsio::size_text;

/// Which columns are read where a file stores them apart.
#[derive(Clone, Debug)]
pub enum WantedFields {
    All,
    /// Those of [`FIELDS`], and these.
    Known(Vec<String>),
}

/// The rows of some files.
pub struct ReadRows {
    pub rows: Vec<Row>,
    pub bad: BadRows,
    /// What to tell about the files.
    pub notes: Vec<String>,
    /// Bytes that the rows take, about, and may take.
    held: usize,
    most: usize,
}

impl ReadRows {
    /// No rows yet. They may take half of the memory that is free: what is made of them needs the
    /// rest.
    pub fn new(on_bad_row: OnBadRow, notes: Vec<String>) -> ReadRows {
        let most = cgroup::host_memory(Path::new("/")).free / 2;
        ReadRows { rows: Vec::new(), bad: BadRows::new(on_bad_row), notes, held: 0, most }
    }

    /// Takes a row. Error: there is no memory for it.
    fn take(&mut self, row: Row) -> Result<()> {
        self.held += size_of::<Row>() + row.value.iter().map(|(k, v)| entry(k, v)).sum::<usize>();
        if self.held > self.most {
            return Err(Error::OutOfMemory(format!(
                "{}: the rows before it take {}, half of the memory that is free, and what is made of them needs the rest; \
                 give fewer rows, or take a machine with more memory",
                row.place(),
                size_text(self.most as u64)
            )));
        }
        self.rows.push(row);
        Ok(())
    }

    /// Everything to tell: notes, then what was dropped.
    pub fn told(&self) -> Vec<String> {
        let bad = (self.bad.count > 0).then(|| self.bad.to_string());
        self.notes.iter().cloned().chain(bad).collect()
    }
}

/// Where the rows of one file go.
pub struct FileRows<'a> {
    pub file: Arc<Path>,
    pub options: &'a DataOptions,
    fields: &'a WantedFields,
    pub read: &'a mut ReadRows,
    /// Columns of `columns` that some row had.
    found: BTreeSet<&'a str>,
    /// All columns of the file, as far as they are known.
    pub columns: BTreeSet<String>,
    rows: usize,
}

impl<'a> FileRows<'a> {
    pub fn new(
        path: &Path,
        options: &'a DataOptions,
        fields: &'a WantedFields,
        read: &'a mut ReadRows,
    ) -> FileRows<'a> {
        let (found, columns) = (BTreeSet::new(), BTreeSet::new());
        FileRows { file: path.into(), options, fields, read, found, columns, rows: 0 }
    }

    pub fn limit(&self) -> usize {
        self.options.max_row_bytes
    }

    /// The reason why a row of more than `max_row_bytes` is bad.
    pub fn too_large(&self) -> String {
        format!(
            "has more than max_row_bytes={} bytes; raise max_row_bytes, or set on_bad_row=drop",
            self.limit()
        )
    }

    /// A file that cannot be read on. Where it ends in the middle of its compressed data, behind
    /// whole rows, only the row that is cut off is bad.
    pub fn broken(&mut self, line: usize, e: std::io::Error) -> Result<()> {
        let cut = e.kind() == ErrorKind::UnexpectedEof && self.rows > 0;
        match open::broken(&self.file, e) {
            Error::Data { message, .. } if cut => self.cut_off(line, &message),
            other => Err(other),
        }
    }

    /// The end of a file that ends inside of a row: a bad row, if whole ones stand before it.
    pub fn cut_off(&mut self, line: usize, message: &str) -> Result<()> {
        match self.rows {
            0 => Err(Error::data(&self.file, None, message)),
            _ => self.push(
                line,
                Err(format!("{message} on_bad_row=drop takes the rows before and names this one")),
            ),
        }
    }

    /// Takes a row, or the reason why there is none.
    pub fn push(&mut self, line: usize, value: Result<Value, String>) -> Result<()> {
        let row = self.row(line, value);
        match self.read.bad.admit(row)? {
            Some(row) => self.read.take(row),
            None => Ok(()),
        }
    }

    fn row(&mut self, line: usize, value: Result<Value, String>) -> Result<Row> {
        self.rows += 1;
        let error = |message: String| Error::data(&self.file, Some(line), message);
        let mut value: Map<String, Value> = match value.map_err(error)? {
            Value::Object(value) => value,
            other => {
                return Err(error(format!("a row must be a JSON object, found {}", kind(&other))));
            }
        };
        value.retain(|_, v| !v.is_null());
        if !self.options.columns.0.is_empty() {
            self.columns.extend(value.keys().cloned());
        }
        let mut renamed = Vec::new();
        for (field, column) in &self.options.columns.0 {
            if let Some(value) = value.shift_remove(column) {
                self.found.insert(column);
                renamed.push((field, column, value));
            }
        }
        for (field, column, content) in renamed {
            if value.contains_key(field) {
                return Err(Error::data(
                    &self.file,
                    None,
                    format!(
                        "has a column {field:?} of its own, and columns={field}:{column}; leave that out of columns, or give {field:?} another name there"
                    ),
                ));
            }
            value.insert(field.clone(), content);
        }
        Ok(Row { value: compact(value), file: self.file.clone(), line })
    }

    /// Whether a column is read.
    fn wants(&self, column: &str) -> bool {
        match self.fields {
            WantedFields::All => true,
            WantedFields::Known(more) => {
                FIELDS.contains(&column)
                    || more.iter().any(|f| f == column)
                    || self.options.columns.0.iter().any(|(_, c)| c == column)
            }
        }
    }

    /// Of the columns of a file, by name, those that are read. Error: none of them is known.
    pub fn wanted<'c>(&mut self, columns: impl Iterator<Item = &'c str>) -> Result<Vec<usize>> {
        let names: Vec<&str> = columns.collect();
        self.columns.extend(names.iter().map(|n| n.to_string()));
        let wanted: Vec<usize> = (0..names.len()).filter(|i| self.wants(names[*i])).collect();
        for (_, column) in &self.options.columns.0 {
            if names.contains(&column.as_str()) {
                self.found.insert(column);
            }
        }
        match wanted.is_empty() && !names.is_empty() {
            true => Err(Error::data(
                &self.file,
                None,
                format!(
                    "none of its columns is a field of a row (it has {}); name them with columns=prompt:COLUMN,completion:COLUMN or the like",
                    self.listed()
                ),
            )),
            false => Ok(wanted),
        }
    }

    fn listed(&self) -> String {
        self.columns.iter().map(|c| format!("{c:?}")).collect::<Vec<_>>().join(", ")
    }

    /// An error if a column of `columns` is in no row.
    pub fn finish(self) -> Result<()> {
        let missing = self.options.columns.0.iter().find(|(_, c)| !self.found.contains(c.as_str()));
        match missing {
            Some((field, column)) if self.rows > 0 => {
                let near = crate::error::nearest(column, self.columns.iter().map(String::as_str));
                let hint = match near {
                    _ if FIELDS.contains(&column.as_str()) && self.columns.contains(field) => {
                        format!("; the field comes first: columns={column}:{field}")
                    }
                    Some(near) => format!("; did you mean {near:?}?"),
                    None => String::new(),
                };
                let message = format!(
                    "has no column {column:?}, which columns={field}:{column} names (it has {}){hint}",
                    self.listed()
                );
                Err(Error::data(&self.file, None, message))
            }
            _ => Ok(()),
        }
    }
}

/// The same object without room for more: readers leave room for four fields where there is one,
/// and rows come by the million.
fn compact(object: Map<String, Value>) -> Map<String, Value> {
    fn within(value: Value) -> Value {
        match value {
            Value::Object(object) => Value::Object(compact(object)),
            Value::Array(items) => {
                let mut items: Vec<Value> = items.into_iter().map(within).collect();
                items.shrink_to_fit();
                Value::Array(items)
            }
            other => other,
        }
    }
    let mut out = Map::with_capacity(object.len());
    out.extend(object.into_iter().map(|(key, value)| (key, within(value))));
    out
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

    #[test]
    fn rows_beyond_the_memory_are_an_error_at_their_line() {
        let options = DataOptions::default();
        let fields = WantedFields::All;
        let mut read = ReadRows::new(options.on_bad_row, Vec::new());
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
    fn a_compact_row_is_the_same_row() {
        let row = serde_json::json!({ "b": [{ "z": 1, "a": null }, "x", []], "a": {}, "c": 1.5 });
        let Value::Object(object) = row.clone() else { panic!() };
        let small = compact(object);
        assert_eq!(small.keys().collect::<Vec<_>>(), ["b", "a", "c"]);
        assert_eq!(Value::Object(small), row);
    }
}
