//! Reuses results of earlier builds: an object is compiled once for all profiles, features and
//! checkouts that need it.
//!
//! Invariant: beside a result NAME.ENDING there is NAME.STAMP, a digest of everything it was made
//! from; the stamp is removed before the result changes and written after it. Other builds' folders
//! are only read.

use std::fs;
use std::path::{Path, PathBuf};

/// Copies `name` from another build of this package in the same target folder, if one has all of
/// `endings` under this stamp. Without this, `cargo test` and `cargo build --release` would each
/// compile the same kernels with the same flags.
pub fn take(out: &Path, name: &str, endings: &[&str], stamp_ending: &str, stamp: &str) -> bool {
    let stamped = |folder: &Path| {
        let path = folder.join(format!("{name}.{stamp_ending}"));
        fs::read_to_string(path).is_ok_and(|found| found == stamp)
    };
    others(out).into_iter().any(|other| {
        let copied = |ending: &&str| {
            let file = format!("{name}.{ending}");
            fs::copy(other.join(&file), out.join(&file)).is_ok()
        };
        // Checked again afterwards: a concurrent build may have replaced the result.
        let taken = stamped(&other) && endings.iter().all(copied) && stamped(&other);
        if taken {
            write_stamp(out, name, stamp_ending, stamp);
        }
        taken
    })
}

pub fn is_fresh(out: &Path, name: &str, endings: &[&str], stamp_ending: &str, stamp: &str) -> bool {
    let path = |ending: &str| out.join(format!("{name}.{ending}"));
    fs::read_to_string(path(stamp_ending)).is_ok_and(|found| found == stamp)
        && endings.iter().all(|ending| path(ending).exists())
}

/// Call before a result is made again.
pub fn remove_stamp(out: &Path, name: &str, stamp_ending: &str) {
    let _ = fs::remove_file(out.join(format!("{name}.{stamp_ending}")));
}

pub fn write_stamp(out: &Path, name: &str, stamp_ending: &str, stamp: &str) {
    fs::write(out.join(format!("{name}.{stamp_ending}")), stamp).unwrap();
}

/// The output folders of the same package in all profiles: OUT_DIR is
/// TARGET/PROFILE/build/PACKAGE-HASH/out.
fn others(out: &Path) -> Vec<PathBuf> {
    let Some(profiles) = out.ancestors().nth(4) else { return Vec::new() };
    let package = format!("{}-", std::env::var("CARGO_PKG_NAME").unwrap());
    let folders = |path: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        found.sort();
        found
    };
    let mine = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with(&package)
    };
    folders(profiles)
        .iter()
        .flat_map(|profile| folders(&profile.join("build")))
        .filter(mine)
        .map(|folder| folder.join("out"))
        .filter(|folder| folder != out && folder.is_dir())
        .collect()
}
