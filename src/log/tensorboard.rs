//! Event files for TensorBoard, `OUTPUT/runs/events.out.tfevents.*`. Layer 8.
//!
//! Invariant: a folder has one event file. Its records are complete and its steps are those of
//! metrics.jsonl. A resumed run copies the records that it keeps into a new file, so that a running
//! TensorBoard notices it, and deletes the old one. Tags are those of transformers'
//! TensorBoardCallback.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::fsio;
use crate::observer::MetricValue;

const DIR: &str = "runs";
const PREFIX: &str = "events.out.tfevents.";

/// The event file of a run.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Creates the file in `output_dir`. With `resume_from_step`, it starts with the records of the
    /// existing file up to that step.
    pub fn create(output_dir: &Path, resume_from_step: Option<u64>) -> Result<EventFile> {
        let dir = output_dir.join(DIR);
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        let mut old = event_files(&dir)?;
        old.sort();
        let mut bytes = record(&head(now()));
        for path in old.iter().filter(|_| resume_from_step.is_some()) {
            let all = fsio::read(path)?;
            for event in records(&all).filter(|e| is_scalar(e)) {
                if step_of(event).is_some_and(|s| Some(s) <= resume_from_step) {
                    bytes.extend(record(event));
                }
            }
        }
        // The new name must sort after the old ones.
        let mut seconds = now() as u64;
        let name = |seconds: u64| dir.join(format!("{PREFIX}{seconds:010}.temper"));
        while old.last().is_some_and(|last| name(seconds) <= *last) {
            seconds += 1;
        }
        let path = name(seconds);
        fsio::atomic_write(&path, &bytes)?;
        for path in &old {
            std::fs::remove_file(path).map_err(|e| Error::io(path, e))?;
        }
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(EventFile { path, file })
    }

    /// Adds the numbers of a log line.
    pub fn add(&mut self, step: u64, metrics: &[(&str, MetricValue)]) -> Result<()> {
        let mut bytes = Vec::new();
        for (key, metric) in metrics {
            let value = match metric {
                MetricValue::Int(v) => *v as f32,
                MetricValue::Float(v) => *v as f32,
                MetricValue::Text(_) => continue,
            };
            bytes.extend(record(&scalar(now(), step, &tag(key), value)));
        }
        self.file.write_all(&bytes).map_err(|e| Error::io(&self.path, e))
    }
}

/// `eval_loss` becomes `eval/loss`; all other keys become `train/...`.
fn tag(key: &str) -> String {
    match key.strip_prefix("eval_") {
        Some(rest) => format!("eval/{rest}"),
        None => format!("train/{key}"),
    }
}

fn event_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(PREFIX) && name.ends_with(".temper")
    };
    Ok(entries.flatten().map(|e| e.path()).filter(is_ours).collect())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

// The fields of tensorflow/core/util/event.proto that are used: Event: wall_time = 1 (double), step
// = 2, file_version = 3, summary = 5. Summary: value = 1. Value: tag = 1, simple_value = 2 (float).

/// The first event: the version of the format.
fn head(time: f64) -> Vec<u8> {
    let mut event = double(1, time);
    bytes(&mut event, 3, b"brain.Event:2");
    event
}

fn scalar(time: f64, step: u64, tag: &str, value: f32) -> Vec<u8> {
    let mut inner = Vec::new();
    bytes(&mut inner, 1, tag.as_bytes());
    inner.push(2 << 3 | 5);
    inner.extend(value.to_le_bytes());
    let mut summary = Vec::new();
    bytes(&mut summary, 1, &inner);
    let mut event = double(1, time);
    event.push(2 << 3);
    varint(&mut event, step);
    bytes(&mut event, 5, &summary);
    event
}

fn double(field: u8, v: f64) -> Vec<u8> {
    [&[field << 3 | 1], &v.to_le_bytes()[..]].concat()
}

fn bytes(out: &mut Vec<u8>, field: u8, v: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, v.len() as u64);
    out.extend(v);
}

fn varint(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

/// Whether one of our events is a scalar: the step follows the time.
fn is_scalar(event: &[u8]) -> bool {
    event.get(9) == Some(&(2 << 3))
}

fn step_of(event: &[u8]) -> Option<u64> {
    let mut step = 0u64;
    for (i, b) in event.get(10..)?.iter().enumerate().take(10) {
        step |= u64::from(b & 0x7f).checked_shl(7 * i as u32)?;
        if b & 0x80 == 0 {
            return Some(step);
        }
    }
    None
}

/// A TFRecord: length, masked checksum of the length, data, masked checksum of the data.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

/// The records of a file, up to the first damaged or truncated one.
fn records(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, tail) = rest.split_first_chunk::<8>()?;
        let (crc, tail) = tail.split_first_chunk::<4>()?;
        if masked_crc(length) != u32::from_le_bytes(*crc) {
            return None;
        }
        let n = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (data, tail) = tail.split_at_checked(n)?;
        let (crc, tail) = tail.split_first_chunk::<4>()?;
        rest = tail;
        (masked_crc(data) == u32::from_le_bytes(*crc)).then_some(data)
    })
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit, which is fast enough for the few hundred bytes of a log line.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| {
        (0..8)
            .fold(crc ^ u32::from(*byte), |c, _| (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    /// The step and value of each scalar.
    fn scalars(dir: &Path) -> Vec<(u64, u32)> {
        let files = event_files(&dir.join(DIR)).unwrap();
        assert_eq!(files.len(), 1, "{files:?}");
        let all = std::fs::read(&files[0]).unwrap();
        let whole: usize = records(&all).map(|r| r.len() + 16).sum();
        assert_eq!(whole, all.len(), "every record is framed and has its checksums");
        let read = |event: &[u8]| {
            let value = event[event.len() - 4..].try_into().unwrap();
            (step_of(event).unwrap(), u32::from_le_bytes(value))
        };
        records(&all).filter(|e| is_scalar(e)).map(read).collect()
    }

    #[test]
    fn a_resumed_event_file_has_each_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let write = |resume: Option<u64>, steps: std::ops::RangeInclusive<u64>| {
            let mut file = EventFile::create(dir.path(), resume).unwrap();
            for step in steps {
                let loss = MetricValue::Float(1.0 / step as f64);
                file.add(step, &[("loss", loss), ("note", "text".into())]).unwrap();
                file.add(step, &[("eval_loss", f64::NAN.into())]).unwrap();
            }
            file.path
        };
        let path = write(None, 1..=300);
        let first = scalars(dir.path());
        assert_eq!(first.len(), 600);
        // A truncated record, as after a kill.
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(&record(&scalar(1.0, 301, "train/loss", 1.0))[..20]).unwrap();
        write(Some(200), 201..=300);
        let again = scalars(dir.path());
        assert_eq!(first, again);
        write(None, 1..=2);
        assert_eq!(scalars(dir.path()).len(), 4);
        assert_eq!((tag("loss"), tag("eval_loss")), ("train/loss".into(), "eval/loss".into()));
    }
}
