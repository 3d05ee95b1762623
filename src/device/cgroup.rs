//! Memory limits of Linux control groups, versions 1 and 2: what a container or a batch job may
//! use. Layer 1.
//!
//! Invariant: the tightest limit of the process's group and of all groups above it counts; a limit
//! that cannot be read is none.

use std::path::{Path, PathBuf};

use super::MemoryInfo;

/// Version 1 writes "no limit" as the largest multiple of a page, so a real limit is below this.
const NONE: u64 = 1 << 60;

/// The limit of this process, and the bytes left below it. None: no limit. `root` replaces `/` in
/// tests.
pub fn memory(root: &Path) -> Option<MemoryInfo> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut tightest: Option<MemoryInfo> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let files = match controllers {
            "" => Files {
                mount: "sys/fs/cgroup",
                limit: "memory.max",
                used: "memory.current",
                cache: "inactive_file",
            },
            c if c.split(',').any(|c| c == "memory") => Files {
                mount: "sys/fs/cgroup/memory",
                limit: "memory.limit_in_bytes",
                used: "memory.usage_in_bytes",
                cache: "total_inactive_file",
            },
            _ => continue,
        };
        for folder in files.folders(root, path) {
            let Some(found) = files.read(&folder) else { continue };
            tightest = Some(match tightest {
                Some(t) => {
                    MemoryInfo { free: t.free.min(found.free), total: t.total.min(found.total) }
                }
                None => found,
            });
        }
    }
    tightest
}

/// The memory of this machine, or of its container if that is less. `root` replaces `/` in tests.
pub fn host_memory(root: &Path) -> MemoryInfo {
    let text = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let field = |name: &str| -> Option<usize> {
        let line = text.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib * 1024)
    };
    let total = field("MemTotal:").unwrap_or(usize::MAX / 2);
    let free = field("MemAvailable:").unwrap_or(total);
    let left = memory(root).unwrap_or(MemoryInfo { free, total });
    MemoryInfo { free: free.min(left.free), total: total.min(left.total) }
}

/// The file names of one version.
struct Files {
    mount: &'static str,
    limit: &'static str,
    used: &'static str,
    cache: &'static str,
}

impl Files {
    /// The folders of the group and of those above it. In a container the mount is the group
    /// itself, so a folder that does not exist is skipped and the mount counts.
    fn folders(&self, root: &Path, path: &str) -> Vec<PathBuf> {
        let mount = root.join(self.mount);
        let group = Path::new(path.trim_start_matches('/'));
        group.ancestors().map(|part| mount.join(part)).collect()
    }

    fn read(&self, folder: &Path) -> Option<MemoryInfo> {
        let text = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let number = |name: &str| text(name)?.trim().parse::<u64>().ok(); // "max" is not a number
        let limit = number(self.limit).filter(|limit| *limit < NONE)?;
        // The kernel reclaims inactive file pages before the limit takes effect.
        let cache = text("memory.stat").and_then(|stat| {
            let line = stat.lines().find_map(|l| l.strip_prefix(self.cache)?.strip_prefix(' '))?;
            line.trim().parse::<u64>().ok()
        });
        let used = number(self.used).unwrap_or(0).saturating_sub(cache.unwrap_or(0));
        let bytes = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        Some(MemoryInfo { free: bytes(limit.saturating_sub(used)), total: bytes(limit) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(files: &[(&str, &str)]) -> Option<(usize, usize)> {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        memory(root.path()).map(|m| (m.free, m.total))
    }

    #[test]
    fn the_tightest_limit_of_nested_groups_counts() {
        assert_eq!(left(&[]), None);
        let v2 = [
            ("proc/self/cgroup", "0::/job/step\n"),
            ("sys/fs/cgroup/job/memory.max", "1000000000\n"),
            ("sys/fs/cgroup/job/memory.current", "300000000\n"),
            ("sys/fs/cgroup/job/memory.stat", "anon 1\ninactive_file 100000000\n"),
            ("sys/fs/cgroup/job/step/memory.max", "max\n"),
        ];
        assert_eq!(left(&v2), Some((800_000_000, 1_000_000_000)));
        // In a container the mount is the process's own group, and the group's path does not exist
        // below it.
        let inside =
            [("proc/self/cgroup", "0::/docker/abc\n"), ("sys/fs/cgroup/memory.max", "5000\n")];
        assert_eq!(left(&inside), Some((5000, 5000)));
    }

    #[test]
    fn version_1_has_its_own_files_and_its_own_none() {
        let group = "9:cpu:/x\n4:memory,hugetlb:/a\n0::/\n";
        let limit = |bytes: &'static str| {
            left(&[
                ("proc/self/cgroup", group),
                ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", bytes),
                ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "600\n"),
                (
                    "sys/fs/cgroup/memory/a/memory.stat",
                    "inactive_file 1\ntotal_inactive_file 100\n",
                ),
            ])
        };
        assert_eq!(limit("1000\n"), Some((500, 1000)));
        assert_eq!(limit("9223372036854771712\n"), None);
    }
}
