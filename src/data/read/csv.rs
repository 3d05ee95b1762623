//! Comma- and tab-separated text with a header row. Layer 6.
//!
//! Invariant: a field is text, and an empty field is absent, as in `datasets`. Only fields that are
//! never text (see [`NOT_TEXT`]) are read as JSON. At most `max_row_bytes` of a record are held,
//! even if a quote is never closed.

use std::io::BufRead;
use std::path::Path;

use csv_core::ReadRecordResult;
use serde_json::{Map, Value};

use super::file::FileRows;
use super::open;
use crate::error::{Error, Result};

/// Fields that hold lists, objects, numbers or booleans.
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
    let mut text = open::open(path)?;
    let mut reader = csv_core::ReaderBuilder::new().delimiter(delimiter).build();
    let mut record = Record::default();
    let head = record.read(&mut reader, &mut text, rows.limit());
    let head = head.map_err(|e| open::broken(path, e))?;
    if head == Some(RecordSize::TooLarge) {
        return Err(Error::data(
            path,
            Some(1),
            "its header is too long; check that it is a CSV or TSV file",
        ));
    }
    let mut names = Vec::with_capacity(record.fields);
    for name in record.iter() {
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
    loop {
        let line = reader.line() as usize;
        match record.read(&mut reader, &mut text, rows.limit()) {
            Ok(Some(RecordSize::Whole)) => {
                let value = value(&names, &record, rows);
                rows.push(line, value)?;
            }
            Ok(Some(RecordSize::TooLarge)) => {
                let reason = format!("{}; check also for an unclosed quote", rows.too_large());
                rows.push(line, Err(reason))?;
            }
            Ok(None) => return Ok(()),
            Err(e) => return rows.broken(line, e),
        }
    }
}

/// A record: its fields concatenated, and where each ends.
#[derive(Default)]
struct Record {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    fields: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum RecordSize {
    Whole,
    TooLarge,
}

impl Record {
    /// Reads the next record; None at the end of the text. A record longer than `limit` is skipped
    /// to its end and not kept.
    fn read(
        &mut self,
        reader: &mut csv_core::Reader,
        text: &mut dyn BufRead,
        limit: usize,
    ) -> std::io::Result<Option<RecordSize>> {
        let (mut at, mut size) = (0, RecordSize::Whole);
        self.fields = 0;
        loop {
            let input = text.fill_buf()?;
            let (bytes, ends) = (&mut self.bytes[at..], &mut self.ends[self.fields..]);
            let (result, read, written, fields) = reader.read_record(input, bytes, ends);
            text.consume(read);
            (at, self.fields) = (at + written, self.fields + fields);
            match result {
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull if at < limit => {
                    self.bytes.resize((2 * at).clamp(1 << 10, limit.max(1 << 10)), 0);
                }
                ReadRecordResult::OutputEndsFull if self.fields < limit => {
                    self.ends.resize((2 * self.fields).max(16), 0);
                }
                ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull => {
                    (at, self.fields, size) = (0, 0, RecordSize::TooLarge);
                }
                ReadRecordResult::Record if at > limit => return Ok(Some(RecordSize::TooLarge)),
                ReadRecordResult::Record => return Ok(Some(size)),
                ReadRecordResult::End => return Ok(None),
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let start = |i: usize| if i == 0 { 0 } else { self.ends[i - 1] };
        (0..self.fields).map(move |i| &self.bytes[start(i)..self.ends[i]])
    }
}

fn value(names: &[String], record: &Record, rows: &FileRows) -> Result<Value, String> {
    if record.fields != names.len() {
        return Err(format!(
            "has {} fields, but the header names {}; put quotes around fields that contain the \
             delimiter",
            record.fields,
            names.len()
        ));
    }
    let mut value = Map::new();
    for (name, field) in names.iter().zip(record.iter()) {
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
