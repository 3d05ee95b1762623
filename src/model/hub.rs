//! Resolves `--model NAME`: a folder, or a hub model in the local Hugging Face cache. Layer 5.
//!
//! Invariant: nothing is downloaded; if something is missing, the error prints the command that
//! downloads it.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Returns the folder that `arg` refers to: itself if it is a folder, else the cached snapshot of
/// the hub model of that name. Errors: neither; a file; a snapshot without config.json.
pub fn resolve_model(arg: &str) -> Result<PathBuf> {
    resolve_in(
        arg,
        cache_dir(&|key| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from))
            .as_deref(),
    )
}

fn resolve_in(arg: &str, cache: Option<&Path>) -> Result<PathBuf> {
    let path = Path::new(arg);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if path.exists() {
        return Err(Error::model(
            path,
            "is a file; give the folder that holds config.json and the weights",
        ));
    }
    if !is_hub_id(arg) {
        return Err(Error::model(
            path,
            "does not exist; give a model folder, or a hub name such as ORG/NAME",
        ));
    }
    let download = format!("hf download {arg}");
    let Some(cache) = cache else {
        return Err(Error::model(
            path,
            format!("is not a folder, and HOME is not set to find a cache: {download}"),
        ));
    };
    let repo = cache.join(format!("models--{}", arg.replace('/', "--")));
    let Some(snapshot) = snapshot(&repo) else {
        let message = format!(
            "is not a folder, and the Hugging Face cache {} does not hold a model of that name. Get it with:\n  {download}",
            cache.display()
        );
        return Err(Error::model(path, message));
    };
    if !snapshot.join("config.json").exists() {
        return Err(Error::model(
            snapshot,
            format!("has no config.json: the copy is partial. Complete it with:\n  {download}"),
        ));
    }
    Ok(snapshot)
}

/// Returns the snapshot that `refs/main` names, else the only one.
fn snapshot(repo: &Path) -> Option<PathBuf> {
    let snapshots = repo.join("snapshots");
    if let Ok(commit) = std::fs::read_to_string(repo.join("refs").join("main")) {
        let commit = commit.trim();
        let plain = !commit.is_empty() && commit.bytes().all(|b| b.is_ascii_alphanumeric());
        return Some(snapshots.join(commit)).filter(|p| plain && p.is_dir());
    }
    let mut all =
        std::fs::read_dir(snapshots).ok()?.flatten().map(|e| e.path()).filter(|p| p.is_dir());
    all.next().filter(|_| all.next().is_none())
}

/// Whether `arg` is `name` or `org/name`, in characters that the hub allows.
fn is_hub_id(arg: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    arg.split('/').count() <= 2 && arg.split('/').all(plain)
}

fn cache_dir(env: &dyn Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    env("HF_HUB_CACHE")
        .or_else(|| env("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| env("HF_HOME").map(|p| p.join("hub")))
        .or_else(|| env("XDG_CACHE_HOME").map(|p| p.join("huggingface").join("hub")))
        .or_else(|| env("HOME").map(|p| p.join(".cache").join("huggingface").join("hub")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_itself_and_a_cached_name_is_its_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("models--org--tiny-1.5");
        let snapshot = repo.join("snapshots").join("abc123");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc123\n").unwrap();
        let partial = resolve_in("org/tiny-1.5", Some(dir.path())).unwrap_err().to_string();
        assert!(
            partial.contains("has no config.json") && partial.contains("hf download org/tiny-1.5"),
            "{partial}"
        );
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(resolve_in("org/tiny-1.5", Some(dir.path())).unwrap(), snapshot);
        let folder = dir.path().to_str().unwrap();
        assert_eq!(resolve_in(folder, None).unwrap(), dir.path());
    }

    #[test]
    fn an_absent_model_prints_its_download_line() {
        let dir = tempfile::tempdir().unwrap();
        let error = resolve_in("org/absent", Some(dir.path())).unwrap_err().to_string();
        assert!(error.ends_with("\n  hf download org/absent"), "{error}");
        for not_a_name in ["/no/such/folder", "../no-such-folder", "a/b/c", "a b", "", "./x"] {
            let error = resolve_in(not_a_name, Some(dir.path())).unwrap_err().to_string();
            assert!(error.contains("give a model folder"), "{not_a_name}: {error}");
        }
    }

    #[test]
    fn the_cache_is_found_in_the_order_of_its_variables() {
        let env = |set: &'static [&'static str]| {
            cache_dir(&move |key| set.contains(&key).then(|| PathBuf::from(format!("/{key}"))))
        };
        assert_eq!(env(&["HOME", "HF_HOME", "HF_HUB_CACHE"]), Some("/HF_HUB_CACHE".into()));
        assert_eq!(env(&["HOME", "HF_HOME"]), Some("/HF_HOME/hub".into()));
        assert_eq!(
            env(&["HOME", "XDG_CACHE_HOME"]),
            Some("/XDG_CACHE_HOME/huggingface/hub".into())
        );
        assert_eq!(env(&["HOME"]), Some("/HOME/.cache/huggingface/hub".into()));
        assert_eq!(env(&[]), None);
    }
}
