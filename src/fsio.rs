//! Files that are either complete or absent. Layer 0.
//!
//! Invariant: a file under its final name has all its bytes on disk, not only in the page cache. A
//! file is written under `NAME.tmp`, synced and renamed, and then its folder is synced.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Size and checksum of a finished file: the contents of a manifest line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub bytes: u64,
    pub crc32: u32,
}

/// A file that is being written under `NAME.tmp`. [`commit`](Self::commit) renames it; dropping it
/// without a commit removes it.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    tmp: PathBuf,
    file: Option<File>,
    hasher: crc32fast::Hasher,
    bytes: u64,
}

impl AtomicFile {
    /// Opens `path.tmp` with mode 0644 (minus the umask). Overwrites a leftover of that name.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let tmp = with_suffix(&path, ".tmp");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
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

    /// The file, to read back what was written; it stays readable under its name and without one.
    pub fn reader(&self) -> Result<File> {
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let file = self.file.as_ref().ok_or_else(missing).and_then(File::try_clone);
        file.map_err(|e| Error::io(&self.tmp, e))
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

/// Writes a small file through an [`AtomicFile`].
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

/// A folder whose files are staged in its subfolder `.temper-tmp` and then moved into place.
/// Dropping it without a commit removes the staged files. The staging folder is inside, because the
/// folder may be a mount point, a link to another disk or `.`: a sibling would be on another file
/// system, or not writable.
#[derive(Debug)]
pub struct AtomicDir {
    path: PathBuf,
    tmp: PathBuf,
    /// The folder did not exist before, so it is removed if it stays empty.
    made: bool,
}

/// The name of the subfolder in which [`AtomicDir`] stages files.
pub const STAGING: &str = ".temper-tmp";

impl AtomicDir {
    /// Makes the folder and its staging folder. Removes the leftover of an interrupted save.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let (tmp, made) = (path.join(STAGING), !path.exists());
        if tmp.is_dir() {
            std::fs::remove_dir_all(&tmp).map_err(|e| Error::io(&tmp, e))?;
        }
        std::fs::create_dir_all(&tmp).map_err(|e| Error::io(&tmp, e))?;
        Ok(Self { path, tmp, made })
    }

    /// The folder to write to. Write each file through [`AtomicFile`], so that it is synced.
    pub fn tmp(&self) -> &Path {
        &self.tmp
    }

    /// Moves the files into place one by one, with `last` as the last. Other files of the folder
    /// stay.
    pub fn commit(self, last: &str) -> Result<()> {
        fsync_dir(&self.tmp)?;
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

    /// Writes, moves and removes a small file. Finds out before any work is done that `path` cannot
    /// be written.
    pub fn try_out(path: &Path) -> Result<()> {
        const PROBE: &str = ".temper-probe";
        let probe = || -> Result<()> {
            let out = AtomicDir::create(path)?;
            atomic_write(out.tmp().join(PROBE), b"temper")?;
            out.commit(PROBE)?;
            let file = path.join(PROBE);
            std::fs::remove_file(&file).map_err(|e| Error::io(&file, e))
        };
        probe().map_err(|e| {
            Error::Config(format!(
                "{}: files cannot be written and renamed here ({e}); give another --output",
                path.display()
            ))
        })
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.tmp);
        if self.made {
            let _ = std::fs::remove_dir(&self.path); // fails unless the folder is empty
        }
    }
}

/// A file to which whole lines are appended. If an append fails (a full disk), the partly written
/// text is cut off, and the text waits for the next append.
#[derive(Debug)]
pub struct AppendFile {
    path: PathBuf,
    file: File,
    /// Bytes of complete lines in the file.
    len: u64,
    waiting: Vec<u8>,
}

impl AppendFile {
    /// Opens `path`, or creates it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let io = |e| Error::io(&path, e);
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        Ok(Self { path, file, len, waiting: Vec::new() })
    }

    /// Appends the waiting text, then `text`. On an error the file is as before.
    pub fn append(&mut self, text: &str) -> Result<()> {
        self.waiting.extend_from_slice(text.as_bytes());
        if self.waiting.is_empty() {
            return Ok(());
        }
        if let Err(e) = self.file.write_all(&self.waiting) {
            let _ = self.file.set_len(self.len); // a device (/dev/full) has no length
            return Err(Error::io(&self.path, e));
        }
        self.len += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// Appends the waiting text and syncs.
    pub fn sync(&mut self) -> Result<()> {
        self.append("")?;
        self.file.sync_all().map_err(|e| Error::io(&self.path, e))
    }
}

/// A size in the largest fitting unit: "512 B", "3.4 KiB", "20.0 MiB", "1.25 GiB".
pub fn size_text(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", b / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", b / 1048576.0),
        _ => format!("{:.2} GiB", b / 1073741824.0),
    }
}

/// Reads a whole file. The error names the path.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    std::fs::read(path.as_ref()).map_err(|e| Error::io(path, e))
}

/// Maps a file for reading.
pub fn map(path: impl AsRef<Path>) -> Result<memmap2::Mmap> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // SAFETY: the map is read-only and belongs to the caller. If another process truncates the file
    // while it is mapped, SIGBUS ends this process; no undefined value is read. The engine replaces
    // its own files and never changes them in place; files of the user are the user's
    // responsibility.
    unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}

/// The folder of `path` (`.` for a bare name).
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
        AtomicDir::try_out(&path).unwrap();
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 2);
    }

    #[test]
    fn what_could_not_be_appended_waits_and_nothing_is_half_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = AppendFile::open(&path).unwrap();
        log.append("one\n").unwrap();
        // A file handle that refuses writes stands for a full disk.
        let whole = std::mem::replace(&mut log.file, File::open(&path).unwrap());
        assert!(log.append("two\n").is_err() && log.sync().is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"one\n");
        log.file = whole;
        log.append("three\n").unwrap();
        log.sync().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\nthree\n");
    }

    #[test]
    fn sizes_are_in_a_unit_that_shows_them() {
        let sizes = [0, 700, 4096, 5 << 20, 3 << 30].map(size_text);
        assert_eq!(sizes, ["0 B", "700 B", "4.0 KiB", "5.0 MiB", "3.00 GiB"]);
    }

    #[test]
    fn a_suffix_goes_to_the_last_component() {
        assert_eq!(with_suffix(Path::new("a/b/"), ".tmp"), PathBuf::from("a/b.tmp"));
        assert_eq!(parent(Path::new("b")), Path::new("."));
    }
}
