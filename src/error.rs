//! Errors that say the next step. Layer 0.
//!
//! Invariant: library code returns these errors and never panics on input. Each message names the
//! wrong file, tensor, row or option and says what to change. The variant determines the exit code
//! of the command line (see [`Error::exit_code`]).

#![deny(missing_docs)]

use std::path::{Path, PathBuf};

/// A result with the crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and what to change.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the fields are named in the messages
pub enum Error {
    /// A wrong command line or run file. All problems of a file are reported at once, one per line.
    #[error("{0}")]
    Config(String),
    /// A file could not be read or written.
    #[error("{}: {source}{}", path.display(), next_step(source))]
    Io { path: PathBuf, source: std::io::Error },
    /// A model folder (config.json, weights, tokenizer) that cannot be used.
    #[error("{}: {message}", path.display())]
    Model { path: PathBuf, message: String },
    /// A wrong data file or row (lines count from 1).
    #[error("{}{}: {message}", path.display(), line.map(|l| format!(":{l}")).unwrap_or_default())]
    Data { path: PathBuf, line: Option<usize>, message: String },
    /// An op was called with shapes, dtypes or values that it does not support.
    #[error("{op}: {message}")]
    Op { op: &'static str, message: String },
    /// The device failed or is not present.
    #[error("{0}")]
    Device(String),
    /// A device allocation did not fit. The message lists the largest blocks and what to change.
    #[error("{0}")]
    OutOfMemory(String),
    /// A run stopped because of the values it computed (NaN, divergence).
    #[error("{0}")]
    Run(String),
    /// A checkpoint that fails its checksums or belongs to another run.
    #[error("{}: {message}", path.display())]
    Checkpoint { path: PathBuf, message: String },
    /// Stopped by a signal after a clean checkpoint.
    #[error("{0}")]
    Interrupted(String),
}

impl Error {
    /// [`Error::Io`] for a path.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// [`Error::Model`] for a folder or file.
    pub fn model(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Model { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// [`Error::Data`] for a file, with the line if it is known.
    pub fn data(path: impl AsRef<Path>, line: Option<usize>, message: impl Into<String>) -> Self {
        Error::Data { path: path.as_ref().to_path_buf(), line, message: message.into() }
    }

    /// [`Error::Op`] for the op of this name.
    pub fn op(op: &'static str, message: impl Into<String>) -> Self {
        Error::Op { op, message: message.into() }
    }

    /// [`Error::Checkpoint`] for a folder.
    pub fn checkpoint(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// Whether a write exceeded the disk, a quota or a file-size limit. What was saved earlier is
    /// unchanged, and a run can continue and try again later.
    pub fn is_no_space(&self) -> bool {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        matches!(self, Error::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
    }

    /// 1: a run failed; 2: bad usage or config; 130: interrupted after a clean checkpoint.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Config(_) => 2,
            Error::Interrupted(_) => 130,
            _ => 1,
        }
    }
}

/// The next step after an input or output error that a user can correct.
fn next_step(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::{IsADirectory, NotADirectory, NotFound, PermissionDenied};
    match error.kind() {
        NotFound => "; check the path",
        PermissionDenied => "; check the permissions of the file and of its folder",
        IsADirectory => "; give a file in it",
        NotADirectory => "; a part of the path is a file",
        _ => "",
    }
}

/// The known name nearest to `name` by edit distance, for "did you mean" in messages. None if no
/// name is near.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (edit_distance(name, k), k))
        .filter(|(d, k)| *d <= 1 + k.len().min(name.len()) / 3)
        .min()
        .map(|(_, k)| k)
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_file_says_what_to_do() {
        let error = Error::io("rows.jsonl", std::io::ErrorKind::NotFound.into()).to_string();
        assert!(
            error.starts_with("rows.jsonl: ") && error.ends_with("; check the path"),
            "{error}"
        );
        let other = Error::io("rows.jsonl", std::io::ErrorKind::TimedOut.into()).to_string();
        assert!(!other.contains(';'), "{other}");
    }

    #[test]
    fn nearest_finds_a_typo_and_refuses_a_stranger() {
        let keys = ["learning_rate", "max_length", "seed"];
        assert_eq!(nearest("learning_rte", keys), Some("learning_rate"));
        assert_eq!(nearest("sead", keys), Some("seed"));
        assert_eq!(nearest("gradient_checkpointing", keys), None);
    }
}
