//! The rows of one file: renames columns and counts bad rows. Layer 6.
//!
//! Invariant: every row of every format passes through here, with its line.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::open;
use super::sink::RowSink;
use crate::config::DataOptions;
use crate::data::format::FIELDS;
use crate::data::row::{Row, kind};
use crate::error::{Error, Result};

/// Which columns to read from files that store columns separately.
#[derive(Clone, Debug)]
pub enum WantedFields {
    All,
    /// The columns of [`FIELDS`], and these.
    Known(Vec<String>),
}

/// Receives the rows of one file.
pub struct FileRows<'a, 't> {
    pub file: Arc<Path>,
    pub options: &'a DataOptions,
    fields: &'a WantedFields,
    pub sink: &'a mut RowSink<'t>,
    /// Columns of the option `columns` that some row had.
    found: BTreeSet<&'a str>,
    /// All columns of the file known so far.
    pub columns: BTreeSet<String>,
    rows: usize,
}

impl<'a, 't> FileRows<'a, 't> {
    pub fn new(
        path: &Path,
        options: &'a DataOptions,
        fields: &'a WantedFields,
        sink: &'a mut RowSink<'t>,
    ) -> FileRows<'a, 't> {
        let (found, columns) = (BTreeSet::new(), BTreeSet::new());
        FileRows { file: path.into(), options, fields, sink, found, columns, rows: 0 }
    }

    pub fn limit(&self) -> usize {
        self.options.max_row_bytes
    }

    /// The reason why a row larger than `max_row_bytes` is bad.
    pub fn too_large(&self) -> String {
        format!(
            "has more than max_row_bytes={} bytes; raise max_row_bytes, or set on_bad_row=drop",
            self.limit()
        )
    }

    /// Handles a read error. If compressed data ends early after complete rows, only the row that
    /// is cut off is bad.
    pub fn broken(&mut self, line: usize, e: std::io::Error) -> Result<()> {
        let cut = e.kind() == ErrorKind::UnexpectedEof && self.rows > 0;
        match open::broken(&self.file, e) {
            Error::Data { message, .. } if cut => self.cut_off(line, &message),
            other => Err(other),
        }
    }

    /// Handles a file that ends inside a row: a bad row if complete rows precede it, else an error.
    pub fn cut_off(&mut self, line: usize, message: &str) -> Result<()> {
        match self.rows {
            0 => Err(Error::data(&self.file, None, message)),
            _ => self.push(
                line,
                Err(format!(
                    "{message} Set on_bad_row=drop to use the rows before it and report this one"
                )),
            ),
        }
    }

    /// Adds a row, or the reason why it is bad.
    pub fn push(&mut self, line: usize, value: Result<Value, String>) -> Result<()> {
        let row = self.row(line, value);
        match self.sink.bad.admit(row)? {
            Some(row) => self.sink.push(row),
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
                        "already has a column {field:?}, and columns={field}:{column} needs that \
                         name; remove this pair from columns, or map the column {field:?} to \
                         another name there"
                    ),
                ));
            }
            value.insert(field.clone(), content);
        }
        Ok(Row { value: compact(value), file: self.file.clone(), line })
    }

    /// Whether to read a column.
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

    /// Returns the indices of the columns to read. Error: none of them is known.
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
                    "none of its columns is a field of a row (it has {}); map them with \
                     columns=prompt:COLUMN,completion:COLUMN, for example",
                    self.listed()
                ),
            )),
            false => Ok(wanted),
        }
    }

    fn listed(&self) -> String {
        self.columns.iter().map(|c| format!("{c:?}")).collect::<Vec<_>>().join(", ")
    }

    /// Returns an error if a column of the option `columns` is in no row.
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

/// Shrinks an object to its contents: parsers allocate room for at least four fields, and there may
/// be millions of rows.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compact_row_is_the_same_row() {
        let row = serde_json::json!({ "b": [{ "z": 1, "a": null }, "x", []], "a": {}, "c": 1.5 });
        let Value::Object(object) = row.clone() else { panic!() };
        let small = compact(object);
        assert_eq!(small.keys().collect::<Vec<_>>(), ["b", "a", "c"]);
        assert_eq!(Value::Object(small), row);
    }
}
