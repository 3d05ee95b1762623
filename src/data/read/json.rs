//! Reads lines and arrays of JSON. Layer 6.
//!
//! Invariant: one row is in memory at a time, and at most `max_row_bytes` of it; invalid JSON in
//! one row does not affect its neighbours, so that it can be dropped alone.

use std::io::BufRead;
use std::path::Path;

use serde_json::Value;

use super::file::FileRows;
use super::open;
use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonLayout {
    Lines,
    /// One array if the file begins with a bracket; else lines.
    Array,
}

pub fn read(path: &Path, layout: JsonLayout, rows: &mut FileRows) -> Result<()> {
    let mut text = open::open(path)?;
    let failed = |e| open::broken(path, e);
    if text.fill_buf().map_err(failed)?.starts_with(b"\xEF\xBB\xBF") {
        text.consume(3);
    }
    if layout == JsonLayout::Array && first(&mut text).map_err(failed)? == Some(b'[') {
        text.consume(1);
        return array(path, &mut text, rows);
    }
    lines(&mut text, rows)
}

/// Returns the first byte that is not white space, without consuming it. Lines are counted from
/// there.
fn first(text: &mut dyn BufRead) -> std::io::Result<Option<u8>> {
    loop {
        let bytes = text.fill_buf()?;
        if bytes.is_empty() {
            return Ok(None);
        }
        if let Some(at) = bytes.iter().position(|b| !b.is_ascii_whitespace()) {
            let byte = bytes[at];
            text.consume(at);
            return Ok(Some(byte));
        }
        let all = bytes.len();
        text.consume(all);
    }
}

fn lines(text: &mut dyn BufRead, rows: &mut FileRows) -> Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let whole = match capped_line(text, &mut line, rows.limit()) {
            Ok(Some(whole)) => whole,
            Ok(None) => break,
            Err(e) => return rows.broken(number, e),
        };
        if !whole {
            let reason = rows.too_large();
            rows.push(number, Err(reason))?;
        } else if !line.trim_ascii().is_empty() {
            rows.push(number, parse(&line, "; each line must be one JSON object"))?;
        }
    }
    Ok(())
}

/// Reads a line without its newline. None at the end of the file, false if it was longer than
/// `limit`.
fn capped_line(
    text: &mut dyn BufRead,
    line: &mut Vec<u8>,
    limit: usize,
) -> std::io::Result<Option<bool>> {
    let (mut any, mut whole) = (false, true);
    loop {
        let bytes = text.fill_buf()?;
        if bytes.is_empty() {
            return Ok(any.then_some(whole));
        }
        any = true;
        let end = bytes.iter().position(|b| *b == b'\n');
        let part = &bytes[..end.unwrap_or(bytes.len())];
        whole &= line.len() + part.len() <= limit;
        if whole {
            line.extend_from_slice(part);
        }
        let used = part.len() + usize::from(end.is_some());
        text.consume(used);
        if end.is_some() {
            return Ok(Some(whole));
        }
    }
}

/// Reads the elements of an array, after its opening bracket.
fn array(path: &Path, text: &mut dyn BufRead, rows: &mut FileRows) -> Result<()> {
    let (mut element, mut number) = (Vec::new(), 0);
    let (mut depth, mut quoted, mut escaped, mut large) = (0usize, false, false, false);
    loop {
        let bytes = match text.fill_buf() {
            Ok(bytes) => bytes,
            Err(e) => return rows.broken(number + 1, e),
        };
        if bytes.is_empty() {
            let message = "not valid JSON: its array does not end; check that the file is complete";
            return rows.cut_off(number + 1, message);
        }
        let mut end = None;
        for (at, byte) in bytes.iter().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                _ if quoted => {}
                b'{' | b'[' => depth += 1,
                b',' | b']' | b'}' if depth == 0 => {
                    end = Some((at, *byte));
                    break;
                }
                b'}' | b']' => depth -= 1,
                _ => {}
            }
        }
        let part = &bytes[..end.map_or(bytes.len(), |(at, _)| at)];
        large |= element.len() + part.len() > rows.limit();
        if !large {
            element.extend_from_slice(part);
        }
        let used = part.len() + usize::from(end.is_some());
        text.consume(used);
        let Some((_, byte)) = end else { continue };
        let empty = !large && element.trim_ascii().is_empty();
        let none = empty && byte == b']' && number == 0;
        if !none {
            number += 1;
            let parsed =
                if large { Err(rows.too_large()) } else { parse(&element, "; check the commas") };
            rows.push(number, parsed)?;
        }
        element.clear();
        large = false;
        if byte == b']' {
            let rest = first(text).map_err(|e| open::broken(path, e))?;
            return match rest {
                None => Ok(()),
                Some(_) => Err(Error::data(
                    path,
                    None,
                    "not valid JSON: there is text after its array; remove it",
                )),
            };
        }
    }
}

fn parse(bytes: &[u8], hint: &str) -> Result<Value, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| "is not UTF-8 text; convert the file, e.g. with iconv -t UTF-8".to_string())?;
    serde_json::from_str(text).map_err(|e| format!("not valid JSON ({}){hint}", plain(&e)))
}

/// Returns the message without its "at line 1 column 7", whose line would be relative to the row.
fn plain(e: &serde_json::Error) -> String {
    let text = e.to_string();
    let cut = text.rfind(" at line ").unwrap_or(text.len());
    format!("{} at column {}", &text[..cut], e.column())
}
