//! Digests of contents: rows, files, model folders. Layer 0.
//!
//! Invariant: a digest depends on contents and their order, never on a folder's path or a time.
//! Texts, lists and masks are prefixed with their length, so that two different lists of them are
//! never the same bytes. XXH3 with 128 bits finds changes; it does not resist an attacker.

#![deny(missing_docs)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::error::{Error, Result};

/// Bytes of a file that one thread hashes at a time.
const CHUNK: usize = 16 << 20;

/// A digest under construction.
#[derive(Clone, Default)]
pub struct Digest(Xxh3);

impl Digest {
    /// Adds bytes.
    pub fn bytes(&mut self, part: &[u8]) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    /// Adds a text.
    pub fn text(&mut self, part: &str) {
        self.bytes(part.as_bytes());
    }

    /// Adds token ids.
    pub fn ids(&mut self, ids: &[u32]) {
        self.bytes(bytemuck::cast_slice(ids));
    }

    /// Adds a mask.
    pub fn mask(&mut self, mask: &[bool]) {
        self.bytes(bytemuck::cast_slice(mask));
    }

    /// Adds a number as eight bytes, without a length.
    pub fn number(&mut self, n: u64) {
        self.0.update(&n.to_le_bytes());
    }

    /// 32 hexadecimal digits.
    pub fn finish(&self) -> String {
        format!("{:032x}", self.0.digest128())
    }
}

/// The digest of a file's contents. All threads read the file.
pub fn file(path: &Path) -> Result<String> {
    let mut digest = Digest::default();
    add_file(&mut digest, path)?;
    Ok(digest.finish())
}

/// The digest of a model or adapter folder: its configuration and weights, sorted by file name, and
/// the names. Error: a file cannot be read.
pub fn model_folder(dir: &Path) -> Result<String> {
    let wanted = |path: &PathBuf| {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        matches!(name, "config.json" | "adapter_config.json") || name.ends_with(".safetensors")
    };
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut files: Vec<PathBuf> =
        entries.filter_map(|e| e.ok().map(|e| e.path())).filter(wanted).collect();
    files.sort();
    let mut digest = Digest::default();
    for path in files {
        digest.text(path.file_name().and_then(|n| n.to_str()).unwrap_or_default());
        add_file(&mut digest, &path)?;
    }
    Ok(digest.finish())
}

fn add_file(digest: &mut Digest, path: &Path) -> Result<()> {
    let io = |e| Error::io(path, e);
    let file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    digest.number(length);
    let chunks = length.div_ceil(CHUNK as u64);
    let part = |i: u64| {
        let at = i * CHUNK as u64;
        let mut buffer = vec![0; (length - at).min(CHUNK as u64) as usize];
        file.read_exact_at(&mut buffer, at).map(|()| xxh3_128(&buffer))
    };
    let parts = (0..chunks).into_par_iter().map(part).collect::<std::io::Result<Vec<u128>>>();
    for part in parts.map_err(io)? {
        digest.bytes(&part.to_le_bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_run_into_each_other() {
        let of = |parts: &[&str]| {
            let mut digest = Digest::default();
            parts.iter().for_each(|p| digest.text(p));
            digest.finish()
        };
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
        assert_ne!(of(&["a"]), of(&["a", ""]));
        assert_eq!(of(&["a", "b"]), of(&["a", "b"]));
    }

    #[test]
    fn a_folder_is_its_contents_wherever_it_is() {
        let make = |weights: &[u8]| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("config.json"), "{}").unwrap();
            std::fs::write(dir.path().join("model.safetensors"), weights).unwrap();
            std::fs::write(dir.path().join("README.md"), weights).unwrap();
            model_folder(dir.path()).unwrap()
        };
        assert_eq!(make(&[1, 2]), make(&[1, 2]));
        assert_ne!(make(&[1, 2]), make(&[1, 3]));
        assert_ne!(make(&[0; CHUNK + 1]), make(&[0; CHUNK + 2]));
    }
}
