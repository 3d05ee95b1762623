//! Reads parquet files in batches. Layer 6.
//!
//! Invariant: batches are so small that expanding dictionary values, which the file stores once,
//! does not exhaust memory.

use std::fs::File;
use std::path::Path;

use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::metadata::ParquetMetaData;

use super::arrow;
use super::file::FileRows;
use crate::error::{Error, Result};

/// Maximum bytes of a batch.
const BATCH_BYTES: u64 = 64 << 20;
/// Maximum rows of a batch.
const BATCH_ROWS: u64 = 1024;

pub fn read(path: &Path, rows: &mut FileRows) -> Result<()> {
    let opened = File::open(path).map_err(|e| Error::io(path, e))?;
    let broken = |e: String| Error::data(path, None, format!("not a readable parquet file: {e}"));
    let builder = arrow::parsed(|| ParquetRecordBatchReaderBuilder::try_new(opened));
    let builder = builder.map_err(broken)?;
    let wanted = arrow::readable(builder.schema(), rows)?;
    let reader = arrow::parsed(|| {
        let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
        let batch = batch_rows(builder.metadata(), &mask);
        builder.with_projection(mask).with_batch_size(batch).build()
    });
    let mut reader = reader.map_err(broken)?;
    let mut first = 1;
    loop {
        let batch = arrow::parsed(|| reader.next().transpose());
        match batch.map_err(|e| broken(format!("{e} (near row {first})")))? {
            Some(batch) => first = arrow::push_batch(&batch, first, rows, broken)?,
            None => return Ok(()),
        }
    }
}

/// Returns the rows per batch. No value is larger than its column chunk, so this many rows of flat
/// columns fit even if each value is the largest.
fn batch_rows(file: &ParquetMetaData, mask: &ProjectionMask) -> usize {
    let largest = file.row_groups().iter().map(|group| {
        let chunks = group.columns().iter().enumerate();
        let read = chunks.filter(|(leaf, _)| mask.leaf_included(*leaf));
        read.map(|(_, chunk)| chunk.uncompressed_size().max(0) as u64)
            .fold(0u64, u64::saturating_add)
    });
    let largest = largest.max().unwrap_or(0).max(1);
    (BATCH_BYTES / largest).clamp(1, BATCH_ROWS) as usize
}
