//! The cache file with the tokenised rows of a run. Layer 8.
//!
//! Invariant: the key covers everything on which the rows depend: the contents of the files, the
//! tokenizer, the chat template with the values that the run gives it, the options that affect
//! rows, and the program. A cache that cannot be read or written costs time, but never a run.
//!
//! The contents of a large file are not read at each start: beside the rows there is a note for
//! each file with its digest, size, inode, modification and status time. The note is trusted while
//! these agree, provided that the file was unchanged for a while when the note was made.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::rows::{RunFiles, files_of};
use super::setup::RunSetup;
use crate::data::cache::{self, TokenisedRun};
use crate::data::jinja::Clock;
use crate::data::token_file::TokenFile;
use crate::digest::{self, Digest};
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::MethodRun;
use crate::observer::Observer;

/// Size of the input from which `data_cache=auto` caches rows, in bytes.
const WORTH: u64 = 8 << 20;

/// Most bytes of all cache files; the least recently used are deleted first.
const MOST: u64 = 32 << 30;

/// Options of methods that do not affect rows. All others are part of the key.
const NO_ROWS: [&str; 14] = [
    "beta",
    "label_smoothing",
    "desirable_weight",
    "undesirable_weight",
    "center_rewards_coefficient",
    "temperature",
    "lmbda",
    "ref_model",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "teacher_model_name_or_path",
];

/// The cache file of a run.
pub struct RowCache {
    path: PathBuf,
    key: String,
    files: Vec<Arc<Path>>,
}

impl RowCache {
    /// The cache of a run. None: its rows are not cached. Reports a cache that cannot be used.
    pub fn of(
        run: &MethodRun,
        setup: &RunSetup,
        files: &RunFiles,
        observer: &dyn Observer,
    ) -> Option<RowCache> {
        let option = &*run.training.data_cache;
        if option == "off" || !run.method.rows_are_stored() {
            return None;
        }
        let made = || -> Result<Option<RowCache>> {
            let all = files_of(files)?;
            let mut bytes = 0;
            for file in &all {
                bytes += std::fs::metadata(file).map_err(|e| Error::io(&**file, e))?.len();
            }
            let dir = match option {
                "auto" if bytes < WORTH => return Ok(None),
                "auto" => usual_folder(),
                dir => Some(PathBuf::from(dir)),
            };
            let Some(dir) = dir else { return Ok(None) };
            std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
            let key = key(run, setup, files, &all, &dir)?;
            Ok(Some(RowCache { path: dir.join(format!("{key}.rows")), key, files: all }))
        };
        match made() {
            Ok(cache) => cache,
            // The reader reports unreadable files with more detail.
            Err(Error::Data { .. }) => None,
            Err(e) => {
                observer.warn(&format!("tokenised rows are not kept for the next start: {e}"));
                None
            }
        }
    }

    /// The rows that an earlier run has cached. Reports a damaged file, whose rows are made again.
    pub fn read(&self, observer: &dyn Observer) -> Option<TokenisedRun> {
        if !self.path.is_file() {
            return None;
        }
        match cache::read(&self.path, &self.key, &self.files) {
            Ok(run) => {
                // The modification time records the last use.
                let now =
                    std::fs::File::open(&self.path).and_then(|f| f.set_modified(SystemTime::now()));
                drop(now);
                observer.info(&format!("tokenised rows are read from {}", self.path.display()));
                run.notes.iter().for_each(|note| observer.note(note));
                Some(run)
            }
            Err(why) => {
                observer.warn(&format!(
                    "{}: {why}, so the rows are tokenised again and the file is replaced",
                    self.path.display()
                ));
                None
            }
        }
    }

    /// The file that rows are written to while they are made. What keeps it from being made is
    /// told; then they stay in memory.
    pub fn begin(&self, observer: &dyn Observer) -> Option<Arc<TokenFile>> {
        let begun = cache::begin(&self.path);
        begun.map_err(|e| not_kept(&e, observer)).ok()
    }

    /// Keeps the rows for the next start. A full disk is told.
    pub fn finish(&self, file: &TokenFile, rows: &TokenisedRun, observer: &dyn Observer) {
        match cache::finish(file, &self.path, &self.key, &self.files, rows) {
            Ok(()) => prune(fsio::parent(&self.path), &self.path),
            Err(e) => not_kept(&e, observer),
        }
    }
}

fn not_kept(e: &Error, observer: &dyn Observer) {
    observer.warn(&format!(
        "the tokenised rows were not kept for the next start: {e}; set data_cache=DIR to keep \
         them elsewhere, or data_cache=off"
    ));
}

/// TEMPER_CACHE, else the user's cache folder. None: neither is known.
fn usual_folder() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    of("TEMPER_CACHE")
        .or_else(|| of("XDG_CACHE_HOME").map(|dir| dir.join("temper")))
        .or_else(|| of("HOME").map(|dir| dir.join(".cache/temper")))
}

fn key(
    run: &MethodRun,
    setup: &RunSetup,
    files: &RunFiles,
    all: &[Arc<Path>],
    dir: &Path,
) -> Result<String> {
    let mut digest = Digest::default();
    digest.text(&program());
    digest.text(run.method.name());
    for file in all {
        // Of the name only the extension matters, which determines the format.
        let name = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        digest.text(name.split_once('.').map_or("", |(_, extensions)| extensions));
        digest.text(&contents(file, dir)?);
    }
    // The assignment of files to sources.
    for file in &files.train.0 {
        let one = RunFiles { train: crate::config::DataFiles(vec![file.clone()]), eval: vec![] };
        digest.number(files_of(&one)?.len() as u64);
        digest.text(&format!("{:?}", file.weight));
    }
    digest.number(files.eval.len() as u64);
    let training = &run.training;
    if files.train.is_mixture() {
        digest.text(&format!("{:?} {}", training.stopping_strategy, training.seed));
    }
    // KTO exchanges the completions within a batch.
    if run.method.name() == "kto" {
        digest.number(training.per_device_train_batch_size as u64);
        digest.number(training.per_device_eval_batch_size as u64);
    }
    digest.text(&format!("{:?} {:?}", training.eval_rows, training.reading));
    let own = run.sections()[2].keys();
    for option in own.iter().filter(|k| !NO_ROWS.contains(&k.name)) {
        digest.text(option.name);
        digest.text(&option.value.to_string());
    }
    digest.number(setup.config.vocab_size as u64);
    for file in setup.tokenizer.files() {
        digest.text(file.file_name().and_then(|n| n.to_str()).unwrap_or_default());
        digest.text(&digest::file(file)?);
    }
    digest.text(&serde_json::Value::Object(setup.tokenizer.special_tokens().clone()).to_string());
    let named = ["default", "tool_use"].map(|name| setup.tokenizer.named_template(name));
    let sources = [setup.template.as_ref().map(|t| t.source()), named[0], named[1]];
    for source in sources {
        digest.text(source.unwrap_or_default());
        digest.text(&date_of(source.unwrap_or_default(), setup.began));
    }
    digest.text(&format!("{:?}", setup.templates.tools));
    digest.text(&serde_json::Value::Object(setup.templates.kwargs.clone()).to_string());
    Ok(digest.finish())
}

/// Identifies the program, since another build may make other rows.
fn program() -> String {
    let own = std::env::current_exe().and_then(std::fs::metadata);
    let own = own.map(|m| format!("{} {} {}", m.len(), m.mtime(), m.mtime_nsec()));
    format!("{} {}", env!("CARGO_PKG_VERSION"), own.unwrap_or_default())
}

/// The part of the run's clock that a template may show: nothing, the day, or the second.
fn date_of(source: &str, began: Clock) -> String {
    let mentions = source.matches("strftime_now").count();
    if mentions == 0 {
        return String::new();
    }
    let mut plain = source.matches("strftime_now is defined").count();
    let mut days = true;
    for call in source.split("strftime_now(").skip(1) {
        plain += 1;
        let quote = call.trim_start().chars().next().filter(|c| ['"', '\''].contains(c));
        let format = quote.and_then(|q| call.trim_start()[1..].split_once(q)).map(|(f, _)| f);
        // Directives that denote a day or longer.
        let of_days =
            |f: &str| f.split('%').skip(1).all(|d| d.trim_start_matches('-').starts_with(OF_DAYS));
        days &= format.is_some_and(of_days);
    }
    match days && plain == mentions {
        true => format!("{}-{}-{}", began.year, began.month, began.day),
        false => format!("{began:?}"),
    }
}

const OF_DAYS: [char; 12] = ['a', 'A', 'd', 'e', 'b', 'B', 'm', 'y', 'Y', 'j', 'F', 'D'];

/// The properties of a file at the time when its contents were read.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct FileNote {
    size: u64,
    inode: u64,
    device: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    digest: String,
}

/// A file that was written within this time before its note was made may change again without a new
/// time stamp.
const REST: Duration = Duration::from_secs(2);

/// The digest of a file's contents, from its note if that is safe.
fn contents(file: &Path, dir: &Path) -> Result<String> {
    let meta = std::fs::metadata(file).map_err(|e| Error::io(file, e))?;
    let absolute = std::path::absolute(file).map_err(|e| Error::io(file, e))?;
    let mut name = Digest::default();
    name.text(&absolute.to_string_lossy());
    let path = dir.join(format!("{}.file", name.finish()));
    let noted = |digest: String| FileNote {
        size: meta.len(),
        inode: meta.ino(),
        device: meta.dev(),
        modified: (meta.mtime(), meta.mtime_nsec()),
        changed: (meta.ctime(), meta.ctime_nsec()),
        digest,
    };
    if let Ok(bytes) = std::fs::read(&path)
        && let Ok(old) = serde_json::from_slice::<FileNote>(&bytes)
        && old == noted(old.digest.clone())
    {
        return Ok(old.digest);
    }
    let digest = digest::file(file)?;
    let newest = meta.mtime().max(meta.ctime()).max(0) as u64;
    let rested = SystemTime::now() > UNIX_EPOCH + Duration::from_secs(newest) + REST;
    if rested && let Ok(text) = serde_json::to_vec(&noted(digest.clone())) {
        // If this fails, the next start reads the file again.
        let own = fsio::with_suffix(&path, &format!(".{}", std::process::id()));
        let kept = fsio::atomic_write(&own, &text).is_ok() && std::fs::rename(&own, &path).is_ok();
        if !kept {
            let _ = std::fs::remove_file(&own);
        }
    }
    Ok(digest)
}

/// Deletes cache files, the least recently used first, until the rest takes at most [`MOST`], and
/// temporary files that a killed run left more than a day ago. `keep` is not deleted.
fn prune(dir: &Path, keep: &Path) {
    let mut all: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, Ok(meta)) = (entry.path(), entry.metadata()) else { continue };
        let Ok(modified) = meta.modified() else { continue };
        match path.extension().and_then(|e| e.to_str()) {
            Some("rows") => all.push((modified, meta.len(), path)),
            Some("tmp") if modified.elapsed().is_ok_and(|age| age > Duration::from_secs(86400)) => {
                let _ = std::fs::remove_file(path);
            }
            _ => {}
        }
    }
    all.sort();
    let mut bytes: u64 = all.iter().map(|(_, size, _)| size).sum();
    for (_, size, path) in all {
        if bytes <= MOST {
            break;
        }
        if path != keep && std::fs::remove_file(&path).is_ok() {
            bytes -= size;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_that_shows_the_day_is_kept_for_a_day() {
        let at = |hour| Clock { year: 2026, month: 11, day: 27, hour, minute: 0, second: 0 };
        let same = |source: &str| date_of(source, at(1)) == date_of(source, at(2));
        assert_eq!(date_of("{{ messages }}", at(1)), "");
        assert!(same(
            "{% if strftime_now is defined %}{{ strftime_now(\"%d %b %Y\") }}{% endif %}"
        ));
        assert!(same("{{ strftime_now('%-d.%m.%y') }}"));
        assert!(!same("{{ strftime_now('%H:%M') }}"));
        assert!(!same("{{ strftime_now('%Y-%m-%d %H') }}"));
        assert!(!same("{% set f = '%H' %}{{ strftime_now(f) }}"));
        assert!(!same("{% set now = strftime_now %}{{ now('%H') }}"));
    }

    #[test]
    fn a_file_that_has_changed_is_read_again_whatever_its_time_says() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.jsonl");
        let write = |text: &str| {
            std::fs::write(&file, text).unwrap();
            // Makes the file appear old.
            let old = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
        };
        write("one");
        let one = contents(&file, dir.path()).unwrap();
        assert_eq!(contents(&file, dir.path()).unwrap(), one);
        write("two"); // the same size, inode and modification time
        assert_ne!(contents(&file, dir.path()).unwrap(), one);
    }

    #[test]
    fn a_note_is_trusted_while_nothing_of_the_file_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.jsonl");
        std::fs::write(&file, "one").unwrap();
        std::thread::sleep(REST + Duration::from_secs(2));
        let one = contents(&file, dir.path()).unwrap();
        let is_note = |p: &PathBuf| p.extension().is_some_and(|e| e == "file");
        let note = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).find(is_note);
        let note = note.expect("a note of a file that has rested");
        let text = std::fs::read_to_string(&note).unwrap();
        std::fs::write(&note, text.replace(&one, "from the note")).unwrap();
        assert_eq!(contents(&file, dir.path()).unwrap(), "from the note");
        std::fs::write(&file, "two").unwrap();
        assert_ne!(contents(&file, dir.path()).unwrap(), "from the note");
    }
}
