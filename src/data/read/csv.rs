//! Comma- and tab-separated text with a head. Layer 6.
//!
//! Invariant: a field is text, and an empty one is absent, as `datasets` reads it. Only in fields
//! that are never text (see [`NOT_TEXT`]) it is read as JSON.

use std::path::Path;

use serde_json::{Map, Value};

use super::file::FileRows;
use super::open;
use crate::error::{Error, Result};

/// Fields of rows that hold lists, objects, numbers or truth values.
const NOT_TEXT: [&str; 9] = [
    "messages",
    "conversations",
    "label",
    "margin",
    "completions",
    "labels",
    "input_ids",
    "tools",
    "chat_template_kwargs",
];

pub fn read(path: &Path, delimiter: u8, rows: &mut FileRows) -> Result<()> {
    let text = open::open(path)?;
    let mut reader =
        ::csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(text);
    let head = reader.byte_headers().map_err(|e| failed(path, e))?.clone();
    let mut names = Vec::with_capacity(head.len());
    for name in &head {
        let name = std::str::from_utf8(name).map_err(|_| {
            Error::data(
                path,
                Some(1),
                "the names of its columns are not UTF-8 text; convert it, e.g. with iconv -t UTF-8",
            )
        })?;
        names.push(name.trim_start_matches('\u{FEFF}').trim().to_string());
    }
    rows.columns.extend(names.iter().cloned());
    let mut record = ::csv::ByteRecord::new();
    while reader.read_byte_record(&mut record).map_err(|e| failed(path, e))? {
        let line = record.position().map_or(0, |p| p.line() as usize);
        let value = value(&names, &record, rows);
        rows.push(line, value)?;
    }
    Ok(())
}

fn value(names: &[String], record: &::csv::ByteRecord, rows: &FileRows) -> Result<Value, String> {
    if record.as_slice().len() > rows.limit() {
        return Err(rows.too_large());
    }
    if record.len() != names.len() {
        return Err(format!(
            "has {} fields, but the header names {}; put quotes around fields with a delimiter in them",
            record.len(),
            names.len()
        ));
    }
    let mut value = Map::new();
    for (name, field) in names.iter().zip(record) {
        let text = std::str::from_utf8(field).map_err(|_| {
            format!("field {name:?} is not UTF-8 text; convert the file, e.g. with iconv -t UTF-8")
        })?;
        if text.is_empty() {
            continue;
        }
        let mapped = rows.options.columns.0.iter().find(|(_, column)| column == name);
        let field = mapped.map_or(name.as_str(), |(field, _)| field);
        let parsed = match text {
            _ if !NOT_TEXT.contains(&field) => None,
            "True" | "TRUE" | "False" | "FALSE" if field == "label" => {
                Some(Value::Bool(text.eq_ignore_ascii_case("true")))
            }
            "1" | "0" if field == "label" => Some(Value::Bool(text == "1")),
            _ => serde_json::from_str(text).ok(),
        };
        value.insert(name.clone(), parsed.unwrap_or_else(|| Value::from(text)));
    }
    Ok(Value::Object(value))
}

fn failed(path: &Path, e: ::csv::Error) -> Error {
    let line = e.position().map(|p| p.line() as usize);
    match e.into_kind() {
        ::csv::ErrorKind::Io(e) => open::broken(path, e),
        _ => Error::data(path, line, "is not text in columns; check its quotes and delimiters"),
    }
}
