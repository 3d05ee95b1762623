//! What std does not report about a disk: which process holds a folder, and how much space is free.
//! Layer 8.
//!
//! Invariant: a lock lives at most as long as its process; a killed run leaves none behind.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, Result};

/// An exclusive lock on a folder, by flock on its `.lock`.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Drop for Lock {
    /// Unlocks explicitly: a child process that is just being started holds a copy of the
    /// descriptor, so closing ours would keep the folder locked for that moment.
    fn drop(&mut self) {
        // SAFETY: the descriptor is open during the call; flock accesses no memory of ours.
        let _ = unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_UN) };
    }
}

impl Lock {
    /// Locks `dir/.lock`. None if the file system has no locks (some network mounts). Error:
    /// another process holds the lock; the message names its id.
    pub fn take(dir: &Path) -> Result<Option<Lock>> {
        let path = dir.join(".lock");
        let io = |e| Error::io(&path, e);
        let open =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open.map_err(io)?;
        // SAFETY: the descriptor is open during the call; flock accesses no memory of ours.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::WouldBlock {
                return Ok(None);
            }
            let mut owner = String::new();
            let _ = file.read_to_string(&mut owner); // for the message only
            let owner = owner.trim();
            let who = if owner.is_empty() { String::new() } else { format!(" (process {owner})") };
            let message = "another run is writing into this folder";
            return Err(Error::Config(format!(
                "{}: {message}{who}; wait for it, stop it, or give another --output",
                dir.display()
            )));
        }
        let note = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        note.map_err(io)?;
        Ok(Some(Lock { file }))
    }
}

/// Bytes that the user may still write to the file system of `dir`. None: unknown.
pub fn free_bytes(dir: &Path) -> Option<u64> {
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `path` ends with NUL. `stat` has room for the struct, which is plain numbers, so
    // zeros are valid.
    let stat = unsafe {
        if libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) != 0 {
            return None;
        }
        stat.assume_init()
    };
    #[allow(clippy::unnecessary_cast)] // u32 on macOS
    let blocks = stat.f_bavail as u64;
    #[allow(clippy::unnecessary_cast)]
    let size = stat.f_frsize as u64;
    blocks.checked_mul(size)
}
