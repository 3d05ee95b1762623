//! The rules of the architecture that a program can check: layers, who calls kernels, where `unsafe` is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn all() -> Vec<(String, String)> {
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    files.sort();
    let name = |p: &PathBuf| p.strip_prefix("src").unwrap().to_str().unwrap().to_string();
    // Unit tests, at the end of a file, may use layers above it.
    let code = |p: &PathBuf| {
        let text = std::fs::read_to_string(p).unwrap();
        text.split("#[cfg(test)]").next().unwrap().to_string()
    };
    files.iter().map(|p| (name(p), code(p))).collect()
}

/// Layers, from the table in src/lib.rs.
fn layers() -> BTreeMap<String, u32> {
    let text = std::fs::read_to_string("src/lib.rs").unwrap();
    let mut layers = BTreeMap::new();
    for line in text
        .lines()
        .filter(|l| l.starts_with("//! | ") && l[6..].starts_with(|c: char| c.is_ascii_digit()))
    {
        let mut cells = line.trim_start_matches("//! |").split('|').map(str::trim);
        let layer: u32 = cells.next().unwrap().parse().unwrap();
        for module in cells.next().unwrap().split(',') {
            layers.insert(module.trim().trim_matches(|c| "[]`".contains(c)).to_string(), layer);
        }
    }
    layers
}

#[test]
fn modules_use_their_own_layer_and_those_below() {
    let layers = layers();
    let declared: Vec<String> = std::fs::read_to_string("src/lib.rs")
        .unwrap()
        .lines()
        .filter_map(|l| {
            l.strip_prefix("pub mod ").and_then(|l| l.strip_suffix(';')).map(str::to_string)
        })
        .collect();
    for module in &declared {
        assert!(layers.contains_key(module), "{module} has no layer in the table of src/lib.rs");
    }
    let mut wrong = Vec::new();
    for (file, text) in all() {
        let module = file.split(['/', '.']).next().unwrap().to_string();
        let Some(own) = layers.get(&module) else { continue };
        for (n, line) in text.lines().enumerate() {
            if line.trim_start().starts_with("//") {
                continue;
            }
            for used in line.split("crate::").skip(1) {
                let names = used.trim_start_matches('{');
                for name in names.split([',', '{', '}', ';']) {
                    let name: String = name
                        .trim()
                        .chars()
                        .take_while(|c| c.is_alphanumeric() || *c == '_')
                        .collect();
                    if layers.get(&name).is_some_and(|f| f > own) {
                        wrong.push(format!(
                            "{file}:{}: layer {own} uses {name} of layer {}",
                            n + 1,
                            layers[&name]
                        ));
                    }
                    if !used.starts_with('{') {
                        break;
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_ops_call_kernels() {
    for (file, text) in all() {
        let allowed = file.starts_with("ops/")
            || file == "kernels.rs"
            || file == "autograd/accumulate.rs"
            || file == "cli/inspect.rs";
        assert!(
            allowed || !text.contains("kernels::"),
            "{file} calls a kernel; that is an op's work"
        );
    }
}

#[test]
fn unsafe_stands_only_at_devices_and_says_why() {
    // Mapping a file is unsafe by nature (another process may cut it); libc calls of checkpoints
    // have no safe wrapper.
    let places = ["device/", "ops/matmul.rs", "tensor/", "checkpoint/", "kernels.rs", "signals.rs"];
    for (file, text) in all() {
        let lines: Vec<&str> = text.lines().collect();
        for (n, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            if !code.contains("unsafe {") && !code.contains("unsafe impl") {
                continue;
            }
            assert!(
                places.iter().any(|p| file.starts_with(p)),
                "{file}:{}: unsafe outside of the devices",
                n + 1
            );
            let said = lines[n.saturating_sub(6)..=n].iter().any(|l| l.contains("SAFETY:"));
            assert!(said, "{file}:{}: unsafe without // SAFETY:", n + 1);
        }
    }
}

/// The `.cu` and `.cuh` files of a folder of `kernels/`, with their text.
fn kernel_sources(folder: &str) -> Vec<(String, String)> {
    let paths = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    paths
        .filter(|p| p.extension().is_some_and(|e| e == "cu" || e == "cuh"))
        .map(|p| (p.display().to_string(), std::fs::read_to_string(&p).unwrap()))
        .collect()
}

#[test]
fn every_kernel_file_has_the_five_parts_of_its_head() {
    for (file, text) in kernel_sources("kernels") {
        let head: Vec<&str> = text.lines().take(60).collect();
        for part in ["Math", "Shapes", "Plan", "Numerics", "Cost"] {
            let there = head.iter().any(|l| l.starts_with("//") && l.contains(part));
            assert!(there, "{file}: no {part}");
        }
        assert!(!text.contains("atomicAdd"), "{file}: float atomics depend on the schedule");
    }
}

#[test]
fn kernels_include_prim_and_common_and_prim_only_itself() {
    let allowed: [(&str, &[&str]); 4] = [
        ("kernels", &["prim/", "common/"]),
        ("kernels/shim", &["prim/"]),
        ("kernels/common", &["prim/", "common/"]),
        ("kernels/prim", &["prim/"]),
    ];
    for (folder, folders) in allowed {
        let sources = kernel_sources(folder);
        assert!(!sources.is_empty(), "{folder} has no kernels");
        for (file, text) in sources {
            for line in text.lines().filter(|l| l.starts_with("#include \"")) {
                let path = line.trim_start_matches("#include \"");
                let fits = folders.iter().any(|f| path.starts_with(f)) && path.ends_with(".cuh\"");
                assert!(fits, "{file}: {line}: only headers of {folders:?}");
            }
        }
    }
}

#[test]
fn the_docs_tables_of_keys_are_the_programs() {
    use temper::config::*;
    let (sft, dpo, kto) = (SftRun::default(), DpoConfig::default(), KtoConfig::default());
    let (orpo, cpo, distill) =
        (OrpoConfig::default(), CpoConfig::default(), DistillConfig::default());
    let (reward, prm) = (RewardConfig::default(), PrmConfig::default());
    let (online, grpo, rloo) = (OnlineConfig::default(), GrpoKeys::default(), RlooKeys::default());
    let (reinforce, ppo) = (ReinforceKeys::default(), PpoKeys::default());
    let (online_dpo, gkd) = (OnlineDpoConfig::default(), GkdConfig::default());
    // The keys that all commands share stand in sft.md, before its own.
    let pages: [(&str, &[&dyn Section]); 16] = [
        ("sft", &[&sft.training, &sft.method]),
        ("peft", &[&sft.peft]),
        ("dpo", &[&dpo]),
        ("reward", &[&reward]),
        ("reward", &[&prm]),
        ("kto", &[&kto]),
        ("orpo", &[&orpo]),
        ("cpo", &[&cpo]),
        ("distill", &[&distill]),
        // The keys of all online methods stand in grpo.md, once.
        ("grpo", &[&online]),
        ("grpo", &[&grpo]),
        ("grpo", &[&rloo]),
        ("grpo", &[&reinforce]),
        ("ppo", &[&ppo]),
        ("online-dpo", &[&online_dpo]),
        ("gkd", &[&gkd]),
    ];
    for (page, sections) in pages {
        let (table, path) = (markdown(sections), format!("docs/{page}.md"));
        let docs = std::fs::read_to_string(&path).unwrap();
        assert!(docs.contains(table.trim()), "{path}: replace the table of keys by:\n{table}");
    }
}
