//! The rows of one file: columns renamed, bad rows counted. Layer 6.
//!
//! Invariant: every row of every format comes through here, with its line.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::config::DataOptions;
use crate::data::bad::BadRows;
use crate::data::format::FIELDS;
use crate::data::row::{Row, kind};
use crate::error::{Error, Result};

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
}

impl ReadRows {
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

    /// Takes a row, or the reason why there is none.
    pub fn push(&mut self, line: usize, value: Result<Value, String>) -> Result<()> {
        let row = self.row(line, value);
        if let Some(row) = self.read.bad.admit(row)? {
            self.read.rows.push(row);
        }
        Ok(())
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
        Ok(Row { value, file: self.file.clone(), line })
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
                let hint = near.map(|n| format!("; did you mean {n:?}?")).unwrap_or_default();
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
