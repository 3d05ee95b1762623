//! Files and folders named by options. Layer 1.
//!
//! Invariant: a relative path is relative to the file that contains it or, on the command line, to
//! the current folder. Once read it is absolute, so the resolved run file means the same wherever
//! it is.

use std::ops::Deref;
use std::path::Path;

use toml::Value as Toml;

use super::sources::DataFiles;
use super::value::{Given, Value};

/// The path of a file or folder.
#[derive(Clone, Debug, PartialEq)]
pub struct PathText(pub String);

impl Deref for PathText {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

const KIND: &str = "path";

impl Value for PathText {
    fn kind() -> String {
        KIND.into()
    }
    fn read(given: &Given) -> Result<Self, String> {
        String::read(given).map(PathText)
    }
    fn written(&self) -> Toml {
        Toml::String(self.0.clone())
    }
}

/// `given` for an option of `kind`, with its path made absolute. `folder` is that of the run file;
/// None on the command line. A name that is not a path there (a hub model's) is unchanged.
pub(super) fn placed(kind: &str, key: &str, given: Given, folder: Option<&Path>) -> Given {
    let is_path = kind.split(" or ").any(|k| k == KIND);
    if key == "data" {
        return data(given, folder);
    }
    if given.is_none() || !(is_path || key == "reward_funcs") {
        return given;
    }
    let place = |text: &str| match is_path {
        true => absolute(text, folder),
        false => reward(text, folder),
    };
    match given {
        Given::Text(text) if is_path => Given::Text(place(&text)),
        Given::Text(text) => {
            Given::Text(text.split(',').map(|t| place(t.trim())).collect::<Vec<_>>().join(","))
        }
        Given::File(Toml::String(text)) => Given::File(Toml::String(place(&text))),
        Given::File(Toml::Array(items)) => {
            let item = |v: Toml| match v {
                Toml::String(text) => Toml::String(place(&text)),
                other => other,
            };
            Given::File(Toml::Array(items.into_iter().map(item).collect()))
        }
        other => other,
    }
}

/// Files of rows. On the command line they are unchanged.
fn data(given: Given, folder: Option<&Path>) -> Given {
    let (Some(folder), Ok(DataFiles(mut files))) = (folder, DataFiles::read(&given)) else {
        return given;
    };
    for file in &mut files {
        file.path = std::path::absolute(folder.join(&file.path)).unwrap_or(file.path.clone());
    }
    Given::File(DataFiles(files).written())
}

/// A reward that names a file: `python:FILE.py:FUNC`, `json_schema:FILE`.
fn reward(text: &str, folder: Option<&Path>) -> String {
    for kind in ["python:", "json_schema:"] {
        if let Some(file) = text.strip_prefix(kind) {
            return match file.rsplit_once(".py:").filter(|_| kind == "python:") {
                Some((file, function)) => {
                    let file = absolute(&format!("{file}.py"), folder);
                    format!("{kind}{file}:{function}")
                }
                None => format!("{kind}{}", absolute(file, folder)),
            };
        }
    }
    text.to_string()
}

fn absolute(text: &str, folder: Option<&Path>) -> String {
    let joined = folder.map_or_else(|| Path::new(text).to_path_buf(), |f| f.join(text));
    let dotted = text.starts_with("./") || text.starts_with("../");
    if !dotted && !joined.exists() {
        return text.to_string();
    }
    std::path::absolute(&joined).map_or_else(|_| text.to_string(), |p| p.display().to_string())
}
