//! Files that are either whole or absent. Layer 0.
//!
//! Invariant: a file under its final name has all its bytes, on disk, not only in the page cache:
//! whatever is saved is written beside its place under `NAME.tmp`, synced, renamed, and the folder
//! that holds it is synced.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What a finished file holds: enough for a manifest line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub bytes: u64,
    pub crc32: u32,
}

/// A file being written under `NAME.tmp`. [`commit`](Self::commit) gives it its name; dropped
/// before, it disappears.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    tmp: PathBuf,
    file: Option<File>,
    hasher: crc32fast::Hasher,
    bytes: u64,
}

impl AtomicFile {
    /// Opens `path.tmp` with mode 0644 (less the umask). A leftover of that name is overwritten.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let tmp = with_suffix(&path, ".tmp");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o644);
        let file = options.open(&tmp).map_err(|e| Error::io(&tmp, e))?;
        Ok(Self { path, tmp, file: Some(file), hasher: crc32fast::Hasher::new(), bytes: 0 })
    }

    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(file) = &mut self.file {
            file.write_all(bytes).map_err(|e| Error::io(&self.tmp, e))?;
        }
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Syncs, renames, syncs the folder. On an error the old file of that name, if any, is
    /// untouched.
    pub fn commit(mut self) -> Result<Written> {
        if let Some(file) = self.file.take() {
            let done = file.sync_all().and_then(|()| std::fs::rename(&self.tmp, &self.path));
            if let Err(e) = done {
                let _ = std::fs::remove_file(&self.tmp);
                return Err(Error::io(&self.path, e));
            }
        }
        fsync_dir(parent(&self.path))?;
        Ok(Written { bytes: self.bytes, crc32: self.hasher.clone().finalize() })
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = std::fs::remove_file(&self.tmp);
        }
    }
}

/// Writes a small file whole: [`AtomicFile`] in one call.
pub fn atomic_write(path: impl AsRef<Path>, bytes: &[u8]) -> Result<Written> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)?;
    file.commit()
}

/// Makes renames and new names in `dir` durable.
pub fn fsync_dir(dir: impl AsRef<Path>) -> Result<()> {
    let dir = dir.as_ref();
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(dir, e))
}

/// A folder that is filled beside its place, under `.NAME.temper-tmp`, and then moved there;
/// dropped before, it goes.
#[derive(Debug)]
pub struct AtomicDir {
    path: PathBuf,
    tmp: PathBuf,
}

impl AtomicDir {
    /// Makes the temporary folder (and the parents of `path`). A leftover of an interrupted save is
    /// removed.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let Some(name) = path.file_name() else {
            return Err(Error::model(path, "cannot be written: give a folder with a name"));
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".temper-tmp");
        let tmp = parent(&path).join(hidden);
        if tmp.is_dir() {
            std::fs::remove_dir_all(&tmp).map_err(|e| Error::io(&tmp, e))?;
        }
        std::fs::create_dir_all(&tmp).map_err(|e| Error::io(&tmp, e))?;
        Ok(Self { path, tmp })
    }

    /// Where to write the files; each of them through [`AtomicFile`], so that it is synced.
    pub fn tmp(&self) -> &Path {
        &self.tmp
    }

    /// Moves the folder into place. Where a folder of that name exists, its other files stay and
    /// the new ones replace theirs one by one, `last` at the end.
    pub fn commit(self, last: &str) -> Result<()> {
        fsync_dir(&self.tmp)?;
        if !self.path.exists() {
            std::fs::rename(&self.tmp, &self.path).map_err(|e| Error::io(&self.path, e))?;
            return fsync_dir(parent(&self.path));
        }
        let listing =
            std::fs::read_dir(&self.tmp).and_then(|d| d.collect::<std::io::Result<Vec<_>>>());
        let mut names: Vec<OsString> = listing
            .map_err(|e| Error::io(&self.tmp, e))?
            .into_iter()
            .map(|e| e.file_name())
            .collect();
        names.sort_by_key(|name| (name == last, name.clone()));
        for name in names {
            let to = self.path.join(&name);
            std::fs::rename(self.tmp.join(&name), &to).map_err(|e| Error::io(&to, e))?;
        }
        fsync_dir(&self.path)
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.tmp); // gone already after a commit by rename
    }
}

/// Reads a whole file; the error carries its path.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    std::fs::read(path.as_ref()).map_err(|e| Error::io(path, e))
}

/// The folder that holds `path` (`.` for a bare name).
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// `path` with `suffix` appended to its last component: `a/b` and `.tmp` give `a/b.tmp`.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.components().as_path().as_os_str().to_os_string();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        assert!(!path.exists());
        drop(file);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let written = atomic_write(&path, b"123456789").unwrap();
        assert_eq!(written, Written { bytes: 9, crc32: 0xcbf4_3926 });
        assert_eq!(std::fs::read(&path).unwrap(), b"123456789");
    }

    #[test]
    fn an_error_names_the_path() {
        let error = atomic_write("/nonexistent/folder/x", b"").unwrap_err().to_string();
        assert!(error.starts_with("/nonexistent/folder/x.tmp"), "{error}");
    }

    #[test]
    fn a_folder_is_moved_whole_and_keeps_strangers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/out");
        let save = |text: &[u8]| {
            let out = AtomicDir::create(&path).unwrap();
            atomic_write(out.tmp().join("config.json"), text).unwrap();
            out
        };
        drop(save(b"dropped"));
        assert!(!path.exists());
        save(b"one").commit("config.json").unwrap();
        std::fs::write(path.join("metrics.jsonl"), "x").unwrap();
        save(b"two").commit("config.json").unwrap();
        assert_eq!(std::fs::read(path.join("config.json")).unwrap(), b"two");
        assert!(path.join("metrics.jsonl").exists());
        assert_eq!(std::fs::read_dir(dir.path().join("deep")).unwrap().count(), 1);
    }

    #[test]
    fn a_suffix_goes_to_the_last_component() {
        assert_eq!(with_suffix(Path::new("a/b/"), ".tmp"), PathBuf::from("a/b.tmp"));
        assert_eq!(parent(Path::new("b")), Path::new("."));
    }
}
