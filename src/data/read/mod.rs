//! Rows of files, whatever the format and compression. Layer 6.
//!
//! Invariant: a row knows its file and line; bytes become text or an error. At most `max_row_bytes`
//! of a row are held while it is read. A null field of a row counts as absent, since `datasets`
//! writes nulls for fields that a row does not have.
//!
//! | module | what it reads |
//! |---|---|
//! | `open` | which files are meant by a path, a folder or a pattern; compression |
//! | `file` | columns renamed, bad rows counted |
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

use std::path::PathBuf;

use crate::config::DataOptions;
use crate::error::{Error, Result};
use file::FileRows;

pub use file::{ReadRows, WantedFields};
pub use open::FolderSplit;

/// The files that paths name, in the order in which they are read.
pub fn files(paths: &[PathBuf], split: FolderSplit) -> Result<Vec<PathBuf>> {
    open::expand(paths, split, &mut Vec::new())
}

/// Reads files one after the other. Files without rows are errors.
pub fn read(
    paths: &[PathBuf],
    split: FolderSplit,
    options: &DataOptions,
    fields: &WantedFields,
) -> Result<ReadRows> {
    let mut notes = Vec::new();
    let files = open::expand(paths, split, &mut notes)?;
    let mut read = ReadRows::new(options.on_bad_row, notes);
    for path in files {
        let (before, bad) = (read.rows.len(), read.bad.count);
        let mut file = FileRows::new(&path, options, fields, &mut read);
        match open::format(&path)? {
            open::FileFormat::Lines => json::read(&path, json::JsonLayout::Lines, &mut file)?,
            open::FileFormat::Json => json::read(&path, json::JsonLayout::Array, &mut file)?,
            open::FileFormat::Csv => csv::read(&path, b',', &mut file)?,
            open::FileFormat::Tsv => csv::read(&path, b'\t', &mut file)?,
            open::FileFormat::Parquet => parquet::read(&path, &mut file)?,
            open::FileFormat::Arrow => arrow::read(&path, &mut file)?,
        }
        file.finish()?;
        if read.rows.len() == before && read.bad.count == bad {
            return Err(Error::data(
                &path,
                None,
                "has no rows; give a file with rows, such as one JSON object a line",
            ));
        }
    }
    read.bad.some_left(read.rows.len())?;
    Ok(read)
}
