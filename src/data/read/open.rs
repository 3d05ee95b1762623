//! Finds data files, detects their format and opens them. Layer 6.
//!
//! Invariant: the files of a folder or pattern are sorted by name.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Which split to read from a folder that has splits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FolderSplit {
    Train,
    Eval,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    Lines,
    Json,
    Csv,
    Tsv,
    Parquet,
    Arrow,
}

/// The readable formats, for help and errors.
const FORMATS: &str =
    ".jsonl, .json, .csv or .tsv (also .gz or .zst), .parquet, .arrow or .feather";

/// Returns the name without `.gz` or `.zst`, and which of them it had.
fn compression(path: &Path) -> (PathBuf, Option<&'static str>) {
    let found = match extension(path).as_str() {
        "gz" => Some("gz"),
        "zst" | "zstd" => Some("zst"),
        _ => None,
    };
    (if found.is_some() { path.with_extension("") } else { path.to_path_buf() }, found)
}

fn extension(path: &Path) -> String {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
}

fn known(path: &Path) -> Option<FileFormat> {
    let (inner, compressed) = compression(path);
    let format = match extension(&inner).as_str() {
        "jsonl" | "ndjson" => FileFormat::Lines,
        "json" => FileFormat::Json,
        "csv" => FileFormat::Csv,
        "tsv" => FileFormat::Tsv,
        "parquet" => FileFormat::Parquet,
        "arrow" | "feather" | "ipc" => FileFormat::Arrow,
        _ => return None,
    };
    let columns = matches!(format, FileFormat::Parquet | FileFormat::Arrow);
    (!(columns && compressed.is_some())).then_some(format)
}

/// Returns the format by the file's extension. Error: an unknown extension.
pub fn format(path: &Path) -> Result<FileFormat> {
    known(path).ok_or_else(|| Error::data(path, None, format!("unknown file type; give {FORMATS}")))
}

/// Opens a text file, decompressing it if necessary.
pub fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    Ok(match compression(path).1 {
        Some("gz") => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file))),
        Some(_) => {
            let decoder = zstd::stream::read::Decoder::new(file).map_err(|e| broken(path, e))?;
            Box::new(BufReader::new(decoder))
        }
        None => Box::new(BufReader::new(file)),
    })
}

/// The error for a file that ends early or does not decompress.
pub fn broken(path: &Path, e: std::io::Error) -> Error {
    match compression(path).1 {
        Some(_) => Error::data(
            path,
            None,
            format!("cannot be decompressed: {e}; check that the download is complete"),
        ),
        None => Error::io(path, e),
    }
}

/// Lists the files that `paths` name: files, folders with all their data files, and patterns.
pub fn expand(
    paths: &[PathBuf],
    split: FolderSplit,
    notes: &mut Vec<String>,
) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let pattern = path.to_str().filter(|text| !path.exists() && text.contains(['*', '?', '[']));
        if path.is_dir() {
            let mut all = Vec::new();
            walk(path, &mut all, 0)?;
            all.sort();
            if all.is_empty() {
                let message = format!("is a folder without data files; give {FORMATS}");
                return Err(Error::data(path, None, message));
            }
            files.extend(of_split(path, all, split, notes));
        } else if let Some(pattern) = pattern {
            let found = glob::glob(pattern).map_err(|e| {
                Error::data(path, None, format!("is not a valid file pattern: {e}"))
            })?;
            let mut found: Vec<PathBuf> =
                found.flatten().filter(|p| p.is_file() && known(p).is_some()).collect();
            found.sort();
            if found.is_empty() {
                let message = format!("matches no data file; give a pattern of {FORMATS}");
                return Err(Error::data(path, None, message));
            }
            notes.push(format!("{pattern}: {} files", found.len()));
            files.extend(found);
        } else if !path.exists() {
            return Err(Error::data(path, None, "there is no such file; check the path"));
        } else {
            files.push(path.clone());
        }
    }
    Ok(files)
}

/// Maximum depth of nested folders.
const DEPTH: usize = 8;

fn walk(dir: &Path, files: &mut Vec<PathBuf>, depth: usize) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_string();
        if name.starts_with(['.', '_']) || DESCRIPTIONS.contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() && depth < DEPTH {
            walk(&path, files, depth + 1)?;
        } else if path.is_file() && known(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

/// Metadata files of a dataset, which hold no rows.
const DESCRIPTIONS: [&str; 6] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "package.json",
];

/// The words that `datasets` recognises as names of splits.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Returns the split named by a component of the path below `root`.
fn split_of(root: &Path, path: &Path) -> Option<&'static str> {
    let rest = path.strip_prefix(root).unwrap_or(path).to_string_lossy().to_lowercase();
    let words: Vec<&str> = rest.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    SPLITS.iter().find(|(_, names)| words.iter().any(|w| names.contains(w))).map(|(name, _)| *name)
}

/// Returns the files of the wanted split, or all files if the folder has no splits.
fn of_split(
    root: &Path,
    files: Vec<PathBuf>,
    split: FolderSplit,
    notes: &mut Vec<String>,
) -> Vec<PathBuf> {
    let wanted: &[&str] = match split {
        FolderSplit::Train => &["train"],
        FolderSplit::Eval => &["validation", "test"],
    };
    let all = files.len();
    let of = |name: &str| -> Vec<PathBuf> {
        files.iter().filter(|f| split_of(root, f) == Some(name)).cloned().collect()
    };
    for name in wanted {
        let taken = of(name);
        if !taken.is_empty() {
            let left = all - taken.len();
            let n = taken.len();
            notes.push(format!(
                "{}: its {name} split, {n} of {all} files ({left} left out)",
                root.display()
            ));
            return taken;
        }
    }
    notes.push(format!("{}: {all} files", root.display()));
    files
}
