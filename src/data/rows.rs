//! A row of a data file. Layer 6.
//!
//! Invariant: a row knows its file and line, so that whatever is wrong with it later can be said
//! with its place. A null field counts as absent, since `datasets` writes nulls for fields that a
//! row does not have.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::read::{self, FolderSplit, WantedFields};
use crate::config::DataOptions;
use crate::error::{Error, Result};

#[derive(Clone, Debug)]
pub struct Row {
    pub value: Map<String, Value>,
    pub file: Arc<Path>,
    pub line: usize, // from 1; in .json and .parquet files the number of the row
}

impl Row {
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

    /// A field that must be there.
    pub fn need(&self, field: &str) -> Result<&Value> {
        self.get(field).ok_or_else(|| {
            let known = self.value.keys().map(|k| format!("{k:?}")).collect::<Vec<_>>().join(", ");
            let near = crate::error::nearest(field, self.value.keys().map(String::as_str));
            let hint = near.map(|n| format!("; did you mean {n:?}?")).unwrap_or_default();
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

    /// A list of messages: objects that each have a string `role`.
    pub fn messages(&self, field: &str) -> Result<Vec<Value>> {
        match self.need(field)? {
            Value::Array(items) => self.checked_messages(field, items),
            other => Err(self.wrong(field, "a list of messages", other)),
        }
    }

    /// The token ids in `input_ids`, at least one, each below `vocab`.
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

    /// The error for a field of the wrong kind.
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
            // a null content says "none"; templates ask for it
            message.retain(|key, value| key == "content" || !value.is_null());
            Ok(Value::Object(message))
        };
        items.iter().enumerate().map(check).collect()
    }
}

/// The rows of files, with all columns and at the default options. Files without rows are errors.
pub fn read_rows(paths: &[PathBuf]) -> Result<Vec<Row>> {
    let options = DataOptions::default();
    Ok(read::read(paths, FolderSplit::Train, &options, &WantedFields::All)?.rows)
}

/// The kind of a JSON value, in words.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn said(name: &str, content: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let message = read_rows(&[path]).unwrap_err().to_string();
        message.replace(&format!("{}/", dir.path().display()), "")
    }

    fn row(text: &str) -> Row {
        let value = serde_json::from_str(text).unwrap();
        Row { value, file: Path::new("rows.jsonl").into(), line: 17 }
    }

    #[test]
    fn bad_files_are_named_with_line_and_next_step() {
        assert!(said("a.jsonl", b"").starts_with("a.jsonl: has no rows"));
        assert!(said("a.jsonl", b"\n  \n").starts_with("a.jsonl: has no rows"));
        assert!(said("a.json", b"[]").starts_with("a.json: has no rows"));
        let broken = said("a.jsonl", b"{\"text\":\"a\"}\n\n{\"text\":");
        assert!(
            broken.starts_with("a.jsonl:3: not valid JSON (EOF while parsing a value at column 8)"),
            "{broken}"
        );
        assert_eq!(said("a.jsonl", b"[1]"), "a.jsonl:1: a row must be a JSON object, found a list");
        assert_eq!(
            said("a.json", b"[{}, 3]"),
            "a.json:2: a row must be a JSON object, found a number"
        );
        assert!(said("a.jsonl", b"{}\n\xff\xfe").starts_with("a.jsonl:2: is not UTF-8"));
        assert!(said("a.xlsx", b"x").contains("unknown kind of file; give .jsonl, .json, .csv"));
        assert!(
            said("a.parquet", b"PAR1").contains("a.parquet: not a parquet file that can be read")
        );
        assert!(said("a.jsonl", "[".repeat(100_000).as_bytes()).contains("recursion limit"));
        assert!(
            read_rows(&["none.jsonl".into()]).unwrap_err().to_string().starts_with("none.jsonl: ")
        );
    }

    #[test]
    fn json_lines_and_arrays_give_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a.jsonl", "b.json", "c.json"].map(|n| dir.path().join(n));
        std::fs::write(&a, "\u{FEFF}{\"z\":1,\"a\":null}\r\n\n{\"z\":2}").unwrap();
        std::fs::write(&b, "[{\"z\":1,\"a\":null},\n{\"z\":2}]").unwrap();
        std::fs::write(&c, "{\"z\":1}\n{\"z\":2}\n").unwrap();
        let rows = read_rows(&[a, b, c]).unwrap();
        let values: Vec<String> =
            rows.iter().map(|r| serde_json::to_string(&r.value).unwrap()).collect();
        assert_eq!(values, ["{\"z\":1}", "{\"z\":2}"].repeat(3));
        assert_eq!(rows.iter().map(|r| r.line).collect::<Vec<_>>(), [1, 3, 1, 2, 1, 2]);
    }

    #[test]
    fn wrong_fields_are_named() {
        let r = row(
            r#"{"prompt": 3, "label": "x", "messages": [{"role": "user", "content": "a", "tool_calls": null}, 4]}"#,
        );
        assert_eq!(
            r.string("prompt").unwrap_err().to_string(),
            "rows.jsonl:17: field \"prompt\" must be a string, found a number"
        );
        assert!(r.string("promt").unwrap_err().to_string().contains("did you mean \"prompt\"?"));
        assert!(
            r.bool("label")
                .unwrap_err()
                .to_string()
                .contains("must be true or false, found a string")
        );
        assert!(
            r.messages("messages")
                .unwrap_err()
                .to_string()
                .contains("\"messages[1]\" must be a message")
        );
        let r = row(r#"{"messages": [{"role": "user", "content": null, "tool_calls": null}]}"#);
        assert_eq!(
            Value::Array(r.messages("messages").unwrap()).to_string(),
            r#"[{"role":"user","content":null}]"#
        );
    }
}
