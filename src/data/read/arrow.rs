//! Converts columns of arrow, feather and parquet files to JSON values. Layer 6.
//!
//! Invariant: a value is what Python shows for it (text, numbers, lists, objects), or an error that
//! names its type; bytes that are not UTF-8 are never text. Nulls that a struct has only because
//! other rows have the field are dropped at every depth; a message's null content stays, since
//! templates test for it.

use std::fmt::Display;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::types::*;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_cast::display::array_value_to_string;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType, Schema};
use serde_json::{Map, Value};

use super::file::FileRows;
use crate::data::panics::caught;
use crate::error::{Error, Result};

pub fn read(path: &Path, rows: &mut FileRows) -> Result<()> {
    let mut file = BufReader::new(File::open(path).map_err(|e| Error::io(path, e))?);
    let mut magic = [0; 6];
    let known = file.read_exact(&mut magic).is_ok();
    file.rewind().map_err(|e| Error::io(path, e))?;
    if known && magic.starts_with(b"FEA1") {
        let message = "is in feather version 1; write it again with version=2";
        return Err(Error::data(path, None, message));
    }
    let failed = |e: String| broken(path, e);
    if magic == *b"ARROW1" {
        let reader = parsed(|| FileReader::try_new(file, None)).map_err(failed)?;
        let wanted = readable(&reader.schema(), rows)?;
        read_batches(path, reader, &wanted, rows)
    } else {
        let reader = parsed(|| StreamReader::try_new(file, None)).map_err(failed)?;
        let wanted = readable(&reader.schema(), rows)?;
        read_batches(path, reader, &wanted, rows)
    }
}

/// Calls the parsing library, which panics on some broken files. Keep only its own calls inside: a
/// later failure of a row must not be reported as a broken file.
pub fn parsed<T, E: Display>(f: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    caught(f)?.map_err(|e| e.to_string())
}

fn broken(path: &Path, e: impl Display) -> Error {
    Error::data(path, None, format!("not a readable arrow or feather file: {e}"))
}

fn read_batches(
    path: &Path,
    mut batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
    wanted: &[usize],
    rows: &mut FileRows,
) -> Result<()> {
    let mut first = 1;
    let mut next = || parsed(|| batches.next().map(|b| b?.project(wanted)).transpose());
    while let Some(batch) = next().map_err(|e| broken(path, e))? {
        first = push_batch(&batch, first, rows, |e| broken(path, e))?;
    }
    Ok(())
}

/// Returns the indices of the columns to read. If all are read, unknown columns with bytes are left
/// out: they are images and the like.
pub fn readable(schema: &Schema, rows: &mut FileRows) -> Result<Vec<usize>> {
    let wanted = rows.wanted(schema.fields().iter().map(|f| f.name().as_str()))?;
    let known = |name: &str| {
        crate::data::format::FIELDS.contains(&name)
            || rows.options.columns.0.iter().any(|(_, c)| c == name)
    };
    let (kept, left): (Vec<usize>, Vec<usize>) = wanted.into_iter().partition(|i| {
        let field = schema.field(*i);
        known(field.name()) || unreadable(field.data_type()).is_none()
    });
    for i in left {
        let field = schema.field(i);
        let why = unreadable(field.data_type()).unwrap_or_default();
        rows.sink.notes.push(format!(
            "{}: column {:?} is not read because it holds {why}",
            rows.file.display(),
            field.name()
        ));
    }
    Ok(kept)
}

/// Describes the part of a type that is not text, a number, a list or an object.
fn unreadable(of: &DataType) -> Option<String> {
    use DataType::*;
    match of {
        Binary | LargeBinary | BinaryView | FixedSizeBinary(_) => Some("bytes".into()),
        Duration(_) | Interval(_) | Union(..) | RunEndEncoded(..) => {
            Some(format!("values of type {of}"))
        }
        List(f) | LargeList(f) | FixedSizeList(f, _) | ListView(f) | LargeListView(f) => {
            unreadable(f.data_type())
        }
        Struct(fields) => fields.iter().find_map(|f| unreadable(f.data_type())),
        Map(f, _) => unreadable(f.data_type()),
        Dictionary(_, of) => unreadable(of),
        _ => None,
    }
}

/// Pushes the rows of a batch, the first of which has number `first`; returns the next number.
pub fn push_batch(
    batch: &RecordBatch,
    first: usize,
    rows: &mut FileRows,
    broken: impl Fn(String) -> Error,
) -> Result<usize> {
    for i in 0..batch.num_rows() {
        let value = caught(|| row(batch, i, rows)).map_err(&broken)?;
        rows.push(first + i, value)?;
    }
    Ok(first + batch.num_rows())
}

fn row(batch: &RecordBatch, i: usize, rows: &FileRows) -> Result<Value, String> {
    let mut left = rows.limit();
    let mut value = Map::new();
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        let read = cell(column, i, &mut left).map_err(|e| match e {
            CellError::TooLarge => rows.too_large(),
            CellError::Unreadable(why) => format!(
                "column {:?} {why}; write it as text, or leave it out of the file",
                field.name()
            ),
        })?;
        value.insert(field.name().clone(), read);
    }
    Ok(Value::Object(value))
}

enum CellError {
    TooLarge,
    Unreadable(String),
}

/// Converts one value; `left` is how many more bytes the row may hold.
fn cell(array: &ArrayRef, i: usize, left: &mut usize) -> Result<Value, CellError> {
    use DataType::*;
    if array.is_null(i) {
        return Ok(Value::Null);
    }
    let text = |text: &str, left: &mut usize| {
        *left = left.checked_sub(text.len()).ok_or(CellError::TooLarge)?;
        Ok(Value::from(text))
    };
    let bytes = |bytes: &[u8], left: &mut usize| match std::str::from_utf8(bytes) {
        Ok(said) => text(said, left),
        Err(_) => Err(CellError::Unreadable("holds bytes that are not UTF-8 text".into())),
    };
    *left = left.checked_sub(1).ok_or(CellError::TooLarge)?;
    macro_rules! number {
        ($kind:ty) => {
            Ok(Value::from(array.as_primitive::<$kind>().value(i)))
        };
    }
    match array.data_type() {
        Null => Ok(Value::Null),
        Boolean => Ok(Value::Bool(array.as_boolean().value(i))),
        Int8 => number!(Int8Type),
        Int16 => number!(Int16Type),
        Int32 => number!(Int32Type),
        Int64 => number!(Int64Type),
        UInt8 => number!(UInt8Type),
        UInt16 => number!(UInt16Type),
        UInt32 => number!(UInt32Type),
        UInt64 => number!(UInt64Type),
        Float16 => Ok(Value::from(array.as_primitive::<Float16Type>().value(i).to_f64())),
        Float32 => Ok(Value::from(f64::from(array.as_primitive::<Float32Type>().value(i)))),
        Float64 => number!(Float64Type),
        Utf8 => text(array.as_string::<i32>().value(i), left),
        LargeUtf8 => text(array.as_string::<i64>().value(i), left),
        Utf8View => text(array.as_string_view().value(i), left),
        Binary => bytes(array.as_binary::<i32>().value(i), left),
        LargeBinary => bytes(array.as_binary::<i64>().value(i), left),
        BinaryView => bytes(array.as_binary_view().value(i), left),
        FixedSizeBinary(_) => bytes(array.as_fixed_size_binary().value(i), left),
        List(_) => list(&array.as_list::<i32>().value(i), left),
        LargeList(_) => list(&array.as_list::<i64>().value(i), left),
        ListView(_) => list(&array.as_list_view::<i32>().value(i), left),
        LargeListView(_) => list(&array.as_list_view::<i64>().value(i), left),
        FixedSizeList(..) => list(&array.as_fixed_size_list().value(i), left),
        Struct(fields) => {
            let message = fields.find("role").is_some();
            let mut object = serde_json::Map::new();
            for (field, column) in fields.iter().zip(array.as_struct().columns()) {
                let value = cell(column, i, left)?;
                if !value.is_null() || (message && field.name() == "content") {
                    object.insert(field.name().clone(), value);
                }
            }
            Ok(Value::Object(object))
        }
        Map(..) => {
            let entries = array.as_map().value(i);
            let mut object = serde_json::Map::new();
            for j in 0..entries.len() {
                match cell(entries.column(0), j, left)? {
                    Value::String(key) => object.insert(key, cell(entries.column(1), j, left)?),
                    _ => {
                        let why = "is a map whose keys are not text";
                        return Err(CellError::Unreadable(why.into()));
                    }
                };
            }
            Ok(Value::Object(object))
        }
        Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            match key(dictionary.keys(), i) {
                Some(key) if key < dictionary.values().len() => {
                    cell(dictionary.values(), key, left)
                }
                _ => Err(CellError::Unreadable("has a dictionary key without a value".into())),
            }
        }
        Decimal32(..) | Decimal64(..) | Decimal128(..) | Decimal256(..) | Date32 | Date64
        | Time32(_) | Time64(_) | Timestamp(..) => match array_value_to_string(array, i) {
            Ok(shown) => text(&shown, left),
            Err(e) => Err(CellError::Unreadable(format!("cannot be shown as text: {e}"))),
        },
        other => Err(CellError::Unreadable(format!("has values of type {other}"))),
    }
}

/// Returns the dictionary key of one row. Casting all keys would be costly: a file may have
/// millions of rows.
fn key(keys: &dyn Array, i: usize) -> Option<usize> {
    macro_rules! of {
        ($kind:ty) => {
            usize::try_from(keys.as_primitive::<$kind>().value(i)).ok()
        };
    }
    match keys.data_type() {
        DataType::Int8 => of!(Int8Type),
        DataType::Int16 => of!(Int16Type),
        DataType::Int32 => of!(Int32Type),
        DataType::Int64 => of!(Int64Type),
        DataType::UInt8 => of!(UInt8Type),
        DataType::UInt16 => of!(UInt16Type),
        DataType::UInt32 => of!(UInt32Type),
        DataType::UInt64 => of!(UInt64Type),
        _ => None,
    }
}

fn list(items: &ArrayRef, left: &mut usize) -> Result<Value, CellError> {
    (0..items.len()).map(|i| cell(items, i, left)).collect::<Result<_, _>>().map(Value::Array)
}
