//! Checkpoints: written completely or not at all, and verified before they are read. Layer 8.
//!
//! Invariant: a folder named `checkpoint-N` was complete and on disk when it got that name, and
//! reading it returns what was written: its `MANIFEST` has the length and CRC-32 of every file, and
//! as its last line the CRC of the manifest itself. No checkpoint is deleted before a newer one is
//! durable.
//!
//! ```text
//! checkpoint-20.tmp/   being written: each file is synced, then MANIFEST, then the folder
//! checkpoint-20/       renamed into place; the parent folder is synced
//! checkpoint-10.del/   being deleted: renamed first, so that no half-deleted folder has the
//!                      name of a checkpoint
//! ```

mod disk;
mod folder;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::fsio::{self, Written};
use crate::tensor::safetensors::{self, TensorSpec};

pub use disk::{Lock, free_bytes};
pub use folder::{MERGE_FILE, RunFolder, is_moved_away, prepare_output};

const MANIFEST: &str = "MANIFEST";
const HEAD: &str = "temper checkpoint 1";

/// A checkpoint that is being written. Dropping it before [`finish`](Self::finish) removes it.
#[derive(Debug)]
pub struct CheckpointWriter {
    output: PathBuf,
    tmp: PathBuf,
    step: u64,
    files: BTreeMap<String, Written>,
    done: bool,
}

impl CheckpointWriter {
    /// Starts `output_dir/checkpoint-STEP.tmp`. `bytes` is its approximate size (0: unknown).
    /// Errors: less than 1.2 x `bytes` are free ([`Error::is_no_space`]); a valid checkpoint of
    /// that step exists (see [`is_saved`]). Deletes a broken checkpoint of that step.
    pub fn new(output_dir: impl AsRef<Path>, step: u64, bytes: u64) -> Result<Self> {
        let output = output_dir.as_ref().to_path_buf();
        let path = checkpoint_path(&output, step);
        if let Some(free) = free_bytes(&output) {
            let needed = bytes.saturating_add(bytes / 5);
            if free < needed {
                let message = format!(
                    "a checkpoint needs {} ({} with a margin), but {} are free; older \
                     checkpoints are kept",
                    fsio::size_text(bytes),
                    fsio::size_text(needed),
                    fsio::size_text(free)
                );
                return Err(Error::io(
                    path,
                    std::io::Error::new(std::io::ErrorKind::StorageFull, message),
                ));
            }
        }
        if path.exists() {
            if verify(&path).is_ok() {
                return Err(Error::checkpoint(path, "step is already saved"));
            }
            discard(&path)?;
        }
        let tmp = fsio::with_suffix(&path, ".tmp");
        if tmp.exists() {
            std::fs::remove_dir_all(&tmp).map_err(|e| Error::io(&tmp, e))?;
        }
        std::fs::create_dir(&tmp).map_err(|e| Error::io(&tmp, e))?;
        Ok(Self { output, tmp, step, files: BTreeMap::new(), done: false })
    }

    /// The folder to write to, for code that writes files itself (a model folder);
    /// [`finish`](Self::finish) includes every file in it.
    pub fn dir(&self) -> &Path {
        &self.tmp
    }

    pub fn add_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let written = fsio::atomic_write(self.place(name)?, bytes)?;
        self.files.insert(name.to_string(), written);
        Ok(())
    }

    /// Adds a safetensors file with one tensor in memory at a time: see [`safetensors::write`].
    pub fn add_safetensors(
        &mut self,
        name: &str,
        tensors: &[TensorSpec],
        metadata: &[(&str, &str)],
        bytes_of: &mut dyn FnMut(usize, &TensorSpec) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let written = safetensors::write(self.place(name)?, tensors, metadata, bytes_of)?;
        self.files.insert(name.to_string(), written);
        Ok(())
    }

    /// Makes the checkpoint durable under its final name and returns its path.
    pub fn finish(mut self) -> Result<PathBuf> {
        for (name, path) in entries(&self.tmp)? {
            let Entry::Vacant(slot) = self.files.entry(name) else { continue };
            let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
            if !file.metadata().is_ok_and(|m| m.is_file()) {
                return Err(Error::checkpoint(path, "is not a file; a checkpoint is flat"));
            }
            file.sync_all().map_err(|e| Error::io(&path, e))?;
            slot.insert(checksum(&path)?);
        }
        fsio::atomic_write(self.tmp.join(MANIFEST), manifest(self.step, &self.files).as_bytes())?;
        fsio::fsync_dir(&self.tmp)?;
        let path = checkpoint_path(&self.output, self.step);
        std::fs::rename(&self.tmp, &path).map_err(|e| Error::io(&path, e))?;
        self.done = true;
        fsio::fsync_dir(&self.output)?;
        Ok(path)
    }

    fn place(&self, name: &str) -> Result<PathBuf> {
        let plain = Path::new(name).file_name().is_some_and(|n| n == name) && !name.contains('\n');
        if !plain || name == MANIFEST || self.files.contains_key(name) {
            return Err(Error::checkpoint(
                &self.tmp,
                format!("{name:?} is not a valid file name here, or is in use"),
            ));
        }
        Ok(self.tmp.join(name))
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.done {
            let _ = std::fs::remove_dir_all(&self.tmp);
        }
    }
}

/// A checkpoint that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub path: PathBuf,
    pub step: u64,
}

/// The result of [`latest`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Search {
    pub found: Option<Found>,
    pub skipped: Vec<(PathBuf, String)>, // newer checkpoints that do not verify, and why
}

/// The valid checkpoint with the highest step. Reads all its bytes once.
pub fn latest(output_dir: impl AsRef<Path>) -> Result<Search> {
    let mut search = Search::default();
    for (step, path) in list(output_dir.as_ref())?.into_iter().rev() {
        match verify(&path) {
            Ok(manifest) if manifest.step == step => {
                search.found = Some(Found { path, step });
                break;
            }
            Ok(manifest) => {
                search
                    .skipped
                    .push((path, format!("its MANIFEST belongs to step {}", manifest.step)));
            }
            Err(Error::Checkpoint { message, .. }) => search.skipped.push((path, message)),
            Err(e) => search.skipped.push((path, e.to_string())),
        }
    }
    Ok(search)
}

/// Whether this step has a valid checkpoint.
pub fn is_saved(output_dir: impl AsRef<Path>, step: u64) -> bool {
    verify(checkpoint_path(output_dir.as_ref(), step)).is_ok_and(|m| m.step == step)
}

/// The contents of a manifest: the step, and the length and CRC-32 of each file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub step: u64,
    pub files: BTreeMap<String, Written>,
}

/// Verifies every byte of a checkpoint. The error names all wrong files.
pub fn verify(path: impl AsRef<Path>) -> Result<Manifest> {
    let path = path.as_ref();
    let wrong = |message: String| Error::checkpoint(path, message);
    let bytes = match std::fs::read(path.join(MANIFEST)) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(wrong(
                "has no MANIFEST: its save was cut short, or another tool wrote it".into(),
            ));
        }
        Err(e) => return Err(Error::io(path.join(MANIFEST), e)),
    };
    let manifest = parse(&bytes).ok_or_else(|| wrong("MANIFEST is damaged".into()))?;
    let mut problems = Vec::new();
    for (name, expected) in &manifest.files {
        match checksum(&path.join(name)) {
            Ok(found) if found == *expected => {}
            Ok(found) if found.bytes != expected.bytes => {
                problems.push(format!("{name} has {} of {} bytes", found.bytes, expected.bytes));
            }
            Ok(_) => problems.push(format!("{name} is damaged (CRC-32 differs)")),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                problems.push(format!("{name} is missing"));
            }
            Err(e) => problems.push(e.to_string()),
        }
    }
    if problems.is_empty() { Ok(manifest) } else { Err(wrong(problems.join("; "))) }
}

/// Deletes the oldest checkpoints so that `limit` remain (None: all remain), after `step` has been
/// saved. The checkpoint of `step` always remains, and so do those of later steps, which belong to
/// another run or are broken. Returns the deleted paths.
pub fn prune(
    output_dir: impl AsRef<Path>,
    limit: Option<usize>,
    step: u64,
) -> Result<Vec<PathBuf>> {
    prune_but(output_dir, limit, step, None)
}

/// [`prune`], but the checkpoint of step `best` remains, too. It counts towards `limit`, unless
/// `limit` is 1.
pub fn prune_but(
    output_dir: impl AsRef<Path>,
    limit: Option<usize>,
    step: u64,
    best: Option<u64>,
) -> Result<Vec<PathBuf>> {
    let Some(limit) = limit else { return Ok(Vec::new()) };
    let mut old = list(output_dir.as_ref())?;
    old.retain(|(n, _)| *n < step);
    let protected = 1 + usize::from(old.iter().any(|(n, _)| Some(*n) == best));
    let excess = (old.len() + 1).saturating_sub(limit.max(protected));
    let deletable = old.into_iter().filter(|(n, _)| Some(*n) != best);
    let gone: Vec<PathBuf> = deletable.take(excess).map(|(_, path)| path).collect();
    gone.iter().try_for_each(|path| discard(path))?;
    Ok(gone)
}

/// `output_dir/checkpoint-STEP`.
pub fn checkpoint_path(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(format!("checkpoint-{step}"))
}

/// All folders `checkpoint-N`, oldest first, verified or not.
pub fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut all: Vec<(u64, PathBuf)> = Vec::new();
    for (name, path) in entries(output_dir)? {
        if let Some(step) = step_of(&name).filter(|_| path.is_dir()) {
            all.push((step, path));
        }
    }
    all.sort();
    Ok(all)
}

/// The N of `checkpoint-N`.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("checkpoint-")?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// Names and paths in a folder; empty if the folder does not exist. Skips names that are not UTF-8,
/// which are not ours.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let listing = match std::fs::read_dir(dir) {
        Ok(listing) => listing.collect::<std::io::Result<Vec<_>>>(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => Err(e),
    };
    let listing = listing.map_err(|e| Error::io(dir, e))?;
    Ok(listing
        .into_iter()
        .filter_map(|e| Some((e.file_name().into_string().ok()?, e.path())))
        .collect())
}

/// Renames the folder to `.del`, then removes it.
fn discard(path: &Path) -> Result<()> {
    let del = fsio::with_suffix(path, ".del");
    if del.exists() {
        std::fs::remove_dir_all(&del).map_err(|e| Error::io(&del, e))?;
    }
    std::fs::rename(path, &del).map_err(|e| Error::io(path, e))?;
    std::fs::remove_dir_all(&del).map_err(|e| Error::io(&del, e))
}

fn manifest(step: u64, files: &BTreeMap<String, Written>) -> String {
    let mut text = format!("{HEAD}\nstep {step}\n");
    for (name, written) in files {
        text += &format!("{:08x} {} {name}\n", written.crc32, written.bytes);
    }
    text += &last_line(text.as_bytes());
    text
}

fn last_line(bytes: &[u8]) -> String {
    format!("crc32 {:08x}\n", crc32fast::hash(bytes))
}

/// Strict: everything that [`manifest`] would not write is damaged, even the case of a hexadecimal
/// digit.
fn parse(bytes: &[u8]) -> Option<Manifest> {
    let text = std::str::from_utf8(bytes).ok()?;
    let body = text.get(..text.len().checked_sub(last_line(&[]).len())?)?;
    if text.strip_prefix(body)? != last_line(body.as_bytes()) {
        return None;
    }
    let mut lines = body.strip_prefix(HEAD)?.strip_prefix('\n')?.lines();
    let step = lines.next()?.strip_prefix("step ")?.parse().ok()?;
    let mut files = BTreeMap::new();
    for line in lines {
        let (crc, rest) = line.split_once(' ')?;
        let (bytes, name) = rest.split_once(' ')?;
        let written =
            Written { bytes: bytes.parse().ok()?, crc32: u32::from_str_radix(crc, 16).ok()? };
        files.insert(name.to_string(), written);
    }
    Some(Manifest { step, files })
}

fn checksum(path: &Path) -> Result<Written> {
    let io = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(io)?;
    let mut buffer = vec![0u8; 1 << 20];
    let (mut hasher, mut bytes) = (crc32fast::Hasher::new(), 0u64);
    loop {
        let n = match file.read(&mut buffer) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(io(e)),
        };
        let Some(read) = buffer.get(..n).filter(|r| !r.is_empty()) else { break };
        hasher.update(read);
        bytes += n as u64;
    }
    Ok(Written { bytes, crc32: hasher.finalize() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_reads_back_and_takes_no_other_form() {
        let files = [("a b.json", 3, 0xabcdef01), ("model.safetensors", 1 << 40, 7)];
        let files =
            files.map(|(name, bytes, crc32)| (name.to_string(), Written { bytes, crc32 })).into();
        let text = manifest(12, &files);
        assert_eq!(parse(text.as_bytes()), Some(Manifest { step: 12, files }));
        for bit in 0..text.len() * 8 {
            let mut bytes = text.clone().into_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(parse(&bytes), None, "bit {bit}");
        }
        for len in 0..text.len() {
            assert_eq!(parse(&text.as_bytes()[..len]), None, "length {len}");
        }
        assert_eq!(parse(format!("{text}\n").as_bytes()), None);
    }
}
