//! A row of a data file. Layer 6.
//!
//! Invariant: a row knows its file and line, so that later errors can name them. A null field
//! counts as absent, since `datasets` writes nulls for missing fields.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

#[derive(Clone, Debug)]
pub struct Row {
    pub value: Map<String, Value>,
    pub file: Arc<Path>,
    pub line: usize, // from 1; in .json and .parquet files the row number
}

/// The file and line of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowPlace {
    pub file: Arc<Path>,
    pub line: usize,
}

impl RowPlace {
    /// An error at this row.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::data(&self.file, Some(self.line), message)
    }
}

impl fmt::Display for RowPlace {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

impl Row {
    /// The place of the row, for messages after the row itself is gone.
    pub fn at(&self) -> RowPlace {
        RowPlace { file: self.file.clone(), line: self.line }
    }

    /// An error at this row.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::data(&self.file, Some(self.line), message)
    }

    /// `file:line`.
    pub fn place(&self) -> String {
        format!("{}:{}", self.file.display(), self.line)
    }

    pub fn has(&self, field: &str) -> bool {
        self.value.contains_key(field)
    }

    pub fn get(&self, field: &str) -> Option<&Value> {
        self.value.get(field)
    }

    /// Returns a required field.
    pub fn need(&self, field: &str) -> Result<&Value> {
        self.get(field).ok_or_else(|| {
            let known = self.value.keys().map(|k| format!("{k:?}")).collect::<Vec<_>>().join(", ");
            let near = crate::error::nearest(field, self.value.keys().map(String::as_str));
            let hint = near.map_or_else(
                || format!("; columns={field}:COLUMN reads it from another column"),
                |n| format!("; did you mean {n:?}?"),
            );
            self.error(format!("has no field {field:?} (it has {known}){hint}"))
        })
    }

    pub fn string(&self, field: &str) -> Result<&str> {
        let value = self.need(field)?;
        value.as_str().ok_or_else(|| self.wrong(field, "a string", value))
    }

    pub fn bool(&self, field: &str) -> Result<bool> {
        let value = self.need(field)?;
        value.as_bool().ok_or_else(|| self.wrong(field, "true or false", value))
    }

    /// Returns a list of messages: objects that each have a string `role`.
    pub fn messages(&self, field: &str) -> Result<Vec<Value>> {
        match self.need(field)? {
            Value::Array(items) => self.checked_messages(field, items),
            other => Err(self.wrong(field, "a list of messages", other)),
        }
    }

    /// Returns the token ids in `input_ids`: at least one, each below `vocab`.
    pub fn input_ids(&self, vocab: usize) -> Result<Vec<u32>> {
        let Value::Array(items) = self.need("input_ids")? else {
            return Err(self.error("field \"input_ids\" must be a list of token ids"));
        };
        let id = |v: &Value| v.as_u64().filter(|id| *id < vocab as u64).map(|id| id as u32);
        match items.iter().map(id).collect::<Option<Vec<u32>>>() {
            Some(ids) if !ids.is_empty() => Ok(ids),
            Some(_) => Err(self.error("field \"input_ids\" is empty")),
            None => {
                let last = vocab - 1;
                Err(self.error(format!("field \"input_ids\" must hold token ids from 0 to {last}")))
            }
        }
    }

    /// The error for a field of the wrong type.
    pub fn wrong(&self, field: &str, want: &str, found: &Value) -> Error {
        self.error(format!("field {field:?} must be {want}, found {}", kind(found)))
    }

    pub fn checked_messages(&self, field: &str, items: &[Value]) -> Result<Vec<Value>> {
        let check = |(i, item): (usize, &Value)| -> Result<Value> {
            let at = format!("{field}[{i}]");
            let Value::Object(message) = item else {
                return Err(self.wrong(&at, "a message with \"role\" and \"content\"", item));
            };
            match message.get("role") {
                Some(Value::String(_)) => {}
                Some(other) => return Err(self.wrong(&format!("{at}.role"), "a string", other)),
                None => return Err(self.error(format!("field {at:?} has no \"role\""))),
            }
            match message.get("content") {
                None | Some(Value::Null | Value::String(_) | Value::Array(_)) => {}
                Some(other) => {
                    return Err(self.wrong(
                        &format!("{at}.content"),
                        "a string or a list of parts",
                        other,
                    ));
                }
            }
            let mut message = message.clone();
            // keep a null content: templates test for it
            message.retain(|key, value| key == "content" || !value.is_null());
            Ok(Value::Object(message))
        };
        items.iter().enumerate().map(check).collect()
    }
}

/// The type of a JSON value, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
