//! Reads the rows of files of every format and compression. Layer 6.
//!
//! Invariant: a row knows its file and line; bytes become text or an error. At most `max_row_bytes`
//! of a row are held while it is read. A null field of a row counts as absent, since `datasets`
//! writes nulls for missing fields.
//!
//! | module | content |
//! |---|---|
//! | `open` | finds the files of a path, folder or pattern; decompresses them |
//! | `file` | renames columns and counts bad rows |
//! | `sink` | collects rows, or passes them on in batches |
//! | `json` | lines and arrays of JSON |
//! | `csv` | comma- and tab-separated text |
//! | `arrow` | columns of arrow, feather and parquet files |
//! | `parquet` | batches of parquet files |

mod arrow;
mod csv;
mod file;
mod json;
mod open;
mod parquet;
mod sink;

use std::path::PathBuf;

use crate::config::DataOptions;
use crate::data::bad::BadRows;
use crate::data::row::Row;
use crate::error::{Error, Result};
use file::FileRows;
use sink::RowSink;

pub use file::WantedFields;
pub use open::FolderSplit;
pub use sink::{RowBatch, TakeRows};

/// The rows of some files.
pub struct ReadRows {
    pub rows: Vec<Row>,
    pub bad: BadRows,
    /// Notes on the files, for the user.
    pub notes: Vec<String>,
}

impl ReadRows {
    /// Returns all messages for the user: the notes, then the bad rows.
    pub fn told(&self) -> Vec<String> {
        let bad = (self.bad.count > 0).then(|| self.bad.to_string());
        self.notes.iter().cloned().chain(bad).collect()
    }
}

/// Lists the files that `paths` name, in reading order.
pub fn files(paths: &[PathBuf], split: FolderSplit) -> Result<Vec<PathBuf>> {
    open::expand(paths, split, &mut Vec::new())
}

/// Reads files in order. A file without rows is an error.
pub fn read(
    paths: &[PathBuf],
    split: FolderSplit,
    options: &DataOptions,
    fields: &WantedFields,
) -> Result<ReadRows> {
    read_into(paths, split, options, fields, None)
}

/// Like [`read`], but passes the rows to `take` in batches and keeps none. Returns all messages for
/// the user.
pub fn each<'t>(
    paths: &[PathBuf],
    split: FolderSplit,
    options: &DataOptions,
    fields: &WantedFields,
    take: &'t mut TakeRows<'t>,
) -> Result<Vec<String>> {
    Ok(read_into(paths, split, options, fields, Some(take))?.told())
}

fn read_into<'t>(
    paths: &[PathBuf],
    split: FolderSplit,
    options: &DataOptions,
    fields: &WantedFields,
    take: Option<&'t mut TakeRows<'t>>,
) -> Result<ReadRows> {
    let mut notes = Vec::new();
    let files = open::expand(paths, split, &mut notes)?;
    let mut sink = RowSink::new(options.on_bad_row, notes, take);
    for path in files {
        let (before, bad) = (sink.count, sink.bad.count);
        let mut file = FileRows::new(&path, options, fields, &mut sink);
        match open::format(&path)? {
            open::FileFormat::Lines => json::read(&path, json::JsonLayout::Lines, &mut file)?,
            open::FileFormat::Json => json::read(&path, json::JsonLayout::Array, &mut file)?,
            open::FileFormat::Csv => csv::read(&path, b',', &mut file)?,
            open::FileFormat::Tsv => csv::read(&path, b'\t', &mut file)?,
            open::FileFormat::Parquet => parquet::read(&path, &mut file)?,
            open::FileFormat::Arrow => arrow::read(&path, &mut file)?,
        }
        file.finish()?;
        if sink.count == before && sink.bad.count == bad {
            return Err(Error::data(
                &path,
                None,
                "has no rows; give a file with rows, such as one JSON object a line",
            ));
        }
    }
    sink.hand_on()?;
    sink.bad.some_left(sink.count)?;
    let RowSink { batch, bad, notes, .. } = sink;
    Ok(ReadRows { rows: batch.rows, bad, notes })
}
