//! A file of token rows that can be read while it is still written. Layer 6.
//!
//! Invariant: appended bytes can be read at once, and the file gets its name only when it is
//! complete, so no other run sees a partial one. It is read, not mapped: mapped pages count as the
//! process's memory, and truncating a mapped file would kill the process.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::AnyBitPattern;
use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
use crate::fsio::{self, AtomicFile};

/// A file of token rows.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    file: File,
    to: Mutex<Appending>,
}

/// The file while it grows.
#[derive(Default)]
struct Appending {
    file: Option<AtomicFile>,
    /// The hash of everything before [`Appending::at`].
    hash: Xxh3,
    at: u64,
    failed: Option<Error>,
}

impl std::fmt::Debug for Appending {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} bytes of {:?}", self.at, self.file)
    }
}

impl TokenFile {
    /// Creates a file that [`TokenFile::finish`] renames to `path`. Other processes may write the
    /// same file at the same time.
    pub fn create(path: &Path) -> Result<TokenFile> {
        let thread = format!("{:?}", std::thread::current().id());
        let number: String = thread.chars().filter(char::is_ascii_digit).collect();
        let own = fsio::with_suffix(path, &format!(".{}-{number}", std::process::id()));
        let to = AtomicFile::create(&own)?;
        let file = to.reader()?;
        let to = Appending { file: Some(to), ..Appending::default() };
        Ok(TokenFile { path: own, file, to: Mutex::new(to) })
    }

    /// Opens a finished file.
    pub fn open(path: &Path) -> Result<TokenFile> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        Ok(TokenFile { path: path.into(), file, to: Mutex::default() })
    }

    fn appending(&self) -> MutexGuard<'_, Appending> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends bytes and returns their offset. Error: they cannot be written, or an earlier append
    /// failed.
    pub fn append(&self, bytes: &[u8]) -> Result<u64> {
        let mut guard = self.appending();
        let to = &mut *guard;
        let done = match (&to.failed, &mut to.file) {
            (None, Some(file)) => file.write_all(bytes),
            _ => Err(Error::Run(format!(
                "{}: cannot append, because an earlier write failed",
                self.path.display()
            ))),
        };
        if let Err(e) = done {
            let said = Error::Run(e.to_string());
            to.failed.get_or_insert(e);
            return Err(said);
        }
        to.hash.update(bytes);
        to.at += bytes.len() as u64;
        Ok(to.at - bytes.len() as u64)
    }

    /// The offset of the next bytes.
    pub fn end(&self) -> u64 {
        self.appending().at
    }

    /// Fills `values` with the bytes from offset `at` on.
    pub fn read<T: AnyBitPattern + bytemuck::NoUninit>(
        &self,
        at: u64,
        values: &mut [T],
    ) -> Result<()> {
        let bytes = bytemuck::cast_slice_mut(values);
        self.file.read_exact_at(bytes, at).map_err(|e| Error::io(&self.path, e))
    }

    /// The folder of the file.
    pub fn folder(&self) -> &Path {
        fsio::parent(&self.path)
    }

    /// The file's size in bytes.
    pub fn size(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(|e| Error::io(&self.path, e))?.len())
    }

    /// Appends the checksum of all bytes and renames the file to `path`. Error: this or an earlier
    /// append failed.
    pub fn finish(&self, path: &Path) -> Result<()> {
        let sum = self.appending().hash.digest128();
        let appended = self.append(&sum.to_le_bytes());
        let mut to = self.appending();
        if let Some(e) = to.failed.take() {
            to.file = None;
            return Err(e);
        }
        appended?;
        if let Some(file) = to.file.take() {
            file.commit()?;
        }
        std::fs::rename(&self.path, path).map_err(|e| {
            let _ = std::fs::remove_file(&self.path);
            Error::io(path, e)
        })
    }

    /// Whether the last 16 bytes are the checksum of the bytes before them.
    pub fn is_whole(&self) -> Result<bool> {
        let Some(body) = self.size()?.checked_sub(16) else { return Ok(false) };
        let (mut hash, mut part) = (Xxh3::new(), vec![0u8; PART]);
        for at in (0..body).step_by(PART) {
            let part = &mut part[..(body - at).min(PART as u64) as usize];
            self.read(at, part)?;
            hash.update(part);
        }
        let mut sum = [0u8; 16];
        self.read(body, &mut sum)?;
        Ok(u128::from_le_bytes(sum) == hash.digest128())
    }
}

/// Bytes per read when computing the checksum.
const PART: usize = 1 << 20;
