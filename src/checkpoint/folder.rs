//! The output folder of a run: one run at a time, and never files of two runs mixed. Layer 8.
//!
//! Invariant: the files of an old run are deleted only after the run that replaces it has saved
//! something durable. `--overwrite` moves them into `.overwritten-N.del`, which
//! [`RunFolder::discard_overwritten`] removes.

use std::path::{Path, PathBuf};

use super::disk::Lock;
use super::{Found, Search, entries, latest, list, step_of};
use crate::error::{Error, Result};
use crate::fsio;

/// An output folder that this process has locked. Dropping it releases the lock.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    resume: Option<Found>,
    notes: Vec<String>,
    _lock: Option<Lock>,
}

/// Creates `dir` if necessary, locks it, removes the leftovers of interrupted saves, and decides
/// where the run starts.
///
/// - neither flag: `dir` must hold no run (config.toml, metrics.jsonl, checkpoint-N, weights);
/// - `overwrite`: the files of an old run are moved into `.overwritten-N.del`; other files stay;
/// - `resume`: `dir` must hold a checkpoint that verifies; [`RunFolder::notes`] names newer broken
///   ones.
///
/// Errors: both flags are set; the folder cannot be written (a test file is written and renamed
/// before any work is done); another process writes into `dir`; one of the conditions above fails.
/// The message says what was found and what to do.
pub fn prepare_output(dir: impl AsRef<Path>, overwrite: bool, resume: bool) -> Result<RunFolder> {
    let path = dir.as_ref().to_path_buf();
    let shown = path.display().to_string();
    if overwrite && resume {
        return Err(Error::Config(
            "--overwrite and --resume cannot be combined: give only one".into(),
        ));
    }
    if resume && !path.is_dir() {
        return Err(Error::Config(format!(
            "{shown}: is not a folder: --resume continues a run in an existing output folder"
        )));
    }
    std::fs::create_dir_all(&path).map_err(|e| Error::io(&path, e))?;
    let lock = Lock::take(&path)?;
    let mut folder = RunFolder { path, resume: None, notes: Vec::new(), _lock: lock };
    if folder._lock.is_none() {
        folder.notes.push(format!(
            "{shown}: this file system has no locks; make sure that only one run writes here"
        ));
    }
    folder.clean()?;
    fsio::AtomicDir::try_out(&folder.path)?;
    let held = folder.held()?;
    if resume {
        folder.find_checkpoint(&held)?;
    } else if !held.is_empty() && overwrite {
        folder.move_away(&held)?;
    } else if !held.is_empty() {
        let resumes = held.iter().any(|name| name.starts_with("checkpoint-"));
        let or = if resumes { ", --resume to go on with it," } else { "" };
        return Err(Error::Config(format!(
            "{shown}: already holds a run ({}); give another --output{or} or --overwrite",
            some(&held)
        )));
    }
    Ok(folder)
}

impl RunFolder {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checkpoint to continue from, if the run resumes.
    pub fn resume(&self) -> Option<&Found> {
        self.resume.as_ref()
    }

    /// Notes for the user: skipped checkpoints and moved files.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Removes the files that `--overwrite` moved away. Call it once the new run has a checkpoint
    /// or its final model on disk.
    pub fn discard_overwritten(&self) -> Result<()> {
        for (_, path) in overwritten(&self.path)? {
            std::fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        }
        Ok(())
    }

    /// Removes `checkpoint-N.tmp`, `checkpoint-N.del` and staged files. Under the lock nothing is
    /// writing them.
    fn clean(&self) -> Result<()> {
        for (name, path) in entries(&self.path)? {
            let stale = name.strip_suffix(".tmp").or_else(|| name.strip_suffix(".del"));
            let staged = name == fsio::STAGING;
            if (staged || stale.and_then(step_of).is_some()) && path.is_dir() {
                std::fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
            }
        }
        Ok(())
    }

    /// Names that show that the folder holds a run, sorted.
    fn held(&self) -> Result<Vec<String>> {
        let mut held: Vec<String> =
            entries(&self.path)?.into_iter().map(|(name, _)| name).collect();
        held.retain(|name| {
            let checkpoint = name.starts_with("checkpoint-");
            checkpoint || name == "config.toml" || name == "metrics.jsonl" || is_weights(name)
        });
        held.sort();
        Ok(held)
    }

    fn find_checkpoint(&mut self, held: &[String]) -> Result<()> {
        let Search { found, skipped } = latest(&self.path)?;
        let skipped: Vec<String> =
            skipped.iter().map(|(p, why)| format!("{}: {why}", p.display())).collect();
        let shown = self.path.display();
        if found.is_none() {
            let mut message = format!("{shown}: nothing to resume: there is no valid checkpoint-N");
            message += &if !skipped.is_empty() {
                format!("; broken ones:\n{}", skipped.join("\n"))
            } else if held.is_empty() {
                "; the folder holds no run".into()
            } else {
                format!(
                    "; found only {}. Was the run stopped before its first checkpoint?",
                    some(held)
                )
            };
            for (name, _) in overwritten(&self.path)? {
                message += &format!("\nThe run that --overwrite replaced is in {name}");
            }
            return Err(Error::Config(message));
        }
        self.notes.extend(skipped.into_iter().map(|s| format!("skipped {s}")));
        self.resume = found;
        Ok(())
    }

    fn move_away(&mut self, held: &[String]) -> Result<()> {
        let own = |name: &str| self.path.join(name).exists();
        if !["config.toml", "metrics.jsonl", MERGE_FILE].into_iter().any(own)
            && list(&self.path)?.is_empty()
        {
            return Err(Error::Config(format!(
                "{}: holds a model ({}) but no run of temper, so --overwrite does not replace \
                 it; give another --output",
                self.path.display(),
                some(held)
            )));
        }
        let free =
            (1u32..).map(|n| self.path.join(format!(".overwritten-{n}.del"))).find(|p| !p.exists());
        let Some(aside) = free else { return Ok(()) }; // never None: the range has 2^32 names
        std::fs::create_dir(&aside).map_err(|e| Error::io(&aside, e))?;
        for (name, path) in entries(&self.path)? {
            if is_run_file(&name) {
                std::fs::rename(&path, aside.join(&name)).map_err(|e| Error::io(&path, e))?;
            }
        }
        fsio::fsync_dir(&self.path)?;
        let name = aside.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.notes.push(format!(
            "the old run was moved to {name}; it is deleted once this one has saved something"
        ));
        Ok(())
    }
}

/// Whether `--overwrite` on `output` moves `input` away: it is that folder, or a file or checkpoint
/// of a run in it.
pub fn is_moved_away(output: &Path, input: &Path) -> bool {
    let (Ok(output), Ok(input)) = (output.canonicalize(), input.canonicalize()) else {
        return false;
    };
    let Ok(rest) = input.strip_prefix(&output) else { return false };
    rest.components().next().is_none_or(|first| is_run_file(&first.as_os_str().to_string_lossy()))
}

/// `temper merge` writes this file beside a model: the inputs of the merge.
pub const MERGE_FILE: &str = "merge.json";

fn is_run_file(name: &str) -> bool {
    name.starts_with("checkpoint-") || is_weights(name) || RUN_FILES.contains(&name)
}

/// Files of a run besides checkpoints and weights.
const RUN_FILES: &[&str] = &[
    MERGE_FILE,
    "config.toml",
    "metrics.jsonl",
    "trainer_state.json",
    "completions.jsonl",
    "report.html",
    "report.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
}

fn overwritten(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut all = entries(dir)?;
    all.retain(|(name, _)| name.starts_with(".overwritten-") && name.ends_with(".del"));
    Ok(all)
}

/// The first four names of a list, and the number of the others.
fn some(names: &[String]) -> String {
    let shown = names.iter().take(4).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > 4 { format!("{shown}, and {} more", names.len() - 4) } else { shown }
}
