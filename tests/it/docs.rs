//! Pages are accurate: the links, paths, commands, arguments, options, metrics and tests that they
//! name exist.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use temper::config::{
    DataOptions, EvalConfig, GenerateConfig, Section, ServeConfig, TemplateOptions,
};
use temper::methods::registry::REGISTRY;

use crate::support::done;

/// Every page that is kept true. CHANGELOG.md and the results tell of the past.
fn pages() -> Vec<(PathBuf, String)> {
    let mut files: Vec<PathBuf> =
        ["README.md", "CONTRIBUTING.md", "SECURITY.md", "kernels/README.md"].map(Into::into).into();
    let mut folders = vec![PathBuf::from("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "md") {
                files.push(path);
            }
        }
    }
    files.sort();
    files.into_iter().map(|f| (f.clone(), std::fs::read_to_string(f).unwrap())).collect()
}

/// The anchor that a heading gets: small letters, digits, `-` and `_`; spaces become `-`.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    let heading = |line: &str| line.starts_with('#').then(|| anchor(line.trim_start_matches('#')));
    text.lines().filter_map(heading).collect()
}

#[test]
fn every_link_of_a_page_leads_somewhere() {
    let link = regex::Regex::new(r"\]\(([^)\s]+)\)").unwrap();
    let mut wrong = Vec::new();
    for (page, text) in pages() {
        let code_off = text.split("```").step_by(2).collect::<Vec<_>>().join("\n");
        for found in link.captures_iter(&code_off) {
            let target = &found[1];
            if target.starts_with("http") {
                continue;
            }
            let (file, part) = target.split_once('#').unwrap_or((target, ""));
            let path =
                if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            let there = path.exists()
                && (part.is_empty()
                    || std::fs::read_to_string(&path)
                        .is_ok_and(|text| anchors(&text).contains(part)));
            if !there {
                wrong.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The code of a page: the spans between backticks, and the lines of its blocks.
fn code(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    for (i, part) in text.split("```").enumerate() {
        if i % 2 == 1 {
            all.extend(part.replace("\\\n", " ").lines().skip(1).map(String::from));
        } else {
            let spans = part.split("\n\n").flat_map(|p| p.split('`').skip(1).step_by(2));
            all.extend(spans.map(|span| span.replace('\n', " ")));
            let indented = part.lines().filter(|line| line.starts_with("    "));
            all.extend(indented.map(String::from));
        }
    }
    all
}

#[test]
fn every_path_that_a_page_names_exists() {
    let in_kernels = ["prim/", "common/", "shim/"];
    let folders =
        ["src/", "docs/", "tests/", "kernels/", "benches/", "examples/", ".ci/", "build/"];
    let mut wrong = Vec::new();
    for (page, text) in pages() {
        for span in code(&text) {
            for word in span.split_whitespace() {
                let word = word.trim_matches(|c: char| "'\"(),;:".contains(c));
                let given = folders.iter().any(|f| word.starts_with(f));
                let of_kernels = page.starts_with("kernels") || page.ends_with("kernels.md");
                let short = of_kernels && in_kernels.iter().any(|f| word.starts_with(f));
                // A pattern or a name to be filled in is not a path.
                if !(given || short)
                    || word.contains(['*', '{', '<', '$', '='])
                    || placeholder(word)
                {
                    continue;
                }
                let word = word.split(':').next().unwrap();
                let there = if short {
                    Path::new("kernels").join(word).exists()
                } else {
                    Path::new(word).exists()
                };
                if !there {
                    wrong.push(format!("{}: {word}", page.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// `src/ops/x.rs`, `kernels/NAME.cu`: a name that the reader chooses.
fn placeholder(word: &str) -> bool {
    let stem = Path::new(word).file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    stem == "x"
        || stem.ends_with("_x")
        || stem.chars().any(|c| c.is_ascii_uppercase())
            && stem.chars().all(|c| c.is_ascii_uppercase() || "_-.…".contains(c))
}

/// Arguments and options of each command.
struct Commands {
    arguments: BTreeMap<String, String>, // its help
    options: BTreeMap<String, BTreeSet<String>>,
}

impl Commands {
    fn read() -> Commands {
        let help = done(&["--help"]);
        let names: Vec<String> = help
            .lines()
            .filter_map(|line| line.strip_prefix("  "))
            .filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()))
            .filter_map(|line| line.split_whitespace().next().map(String::from))
            .collect();
        // Without the example below it, which is as much in question as the pages.
        let help = |name: &String| {
            let text = done(&[name, "--help"]);
            (name.clone(), text.split("Example:").next().unwrap_or_default().to_string())
        };
        let arguments = names.iter().map(help).collect();
        let mut options: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for entry in REGISTRY {
            let run = (entry.run)();
            let sections = run.sections();
            let keys = sections.iter().flat_map(|s| s.keys()).map(|k| k.name.to_string());
            options.insert(entry.name.into(), keys.collect());
        }
        let of = |keys: Vec<temper::config::Key>| -> BTreeSet<String> {
            keys.iter().map(|k| k.name.to_string()).collect()
        };
        let generate = of(GenerateConfig::default().keys());
        let eval = of([EvalConfig::default().keys(), DataOptions::default().keys()].concat());
        options.insert("eval".into(), generate.union(&eval).cloned().collect());
        let rows = of([DataOptions::default().keys(), TemplateOptions::default().keys()].concat());
        options.insert("score".into(), rows.clone());
        options.insert("serve".into(), of(ServeConfig::default().keys()));
        let generate: BTreeSet<String> = generate.union(&rows).cloned().collect();
        options.insert("generate".into(), generate.clone());
        options.insert("chat".into(), generate);
        // These take the options of training commands.
        let all: BTreeSet<String> = options.values().flatten().cloned().collect();
        options.insert("data".into(), all.clone());
        options.insert("inspect".into(), all);
        Commands { arguments, options }
    }

    /// What is wrong with the words after `temper`.
    fn check(&self, words: &[&str]) -> Option<String> {
        let (name, rest) = words.split_first()?;
        let name = name.trim_matches(|c: char| ",.;:".contains(c));
        if name.starts_with(['-', '.', '=']) || name.chars().any(|c| c.is_ascii_uppercase()) {
            return None; // temper --help; temper COMMAND
        }
        let Some(help) = self.arguments.get(name) else {
            return Some(format!("no command {name}"));
        };
        for (i, word) in rest.iter().enumerate() {
            // --adapter NAME=DIR: what an argument takes is its own.
            let taken = i > 0 && rest[i - 1].starts_with("--") && !rest[i - 1].contains('=');
            if ["|", "&&", ">", "#", ";"].contains(word) || word.starts_with('#') {
                break;
            }
            let word = word.trim_matches(|c: char| "[](),;'\"".contains(c));
            let named = |flag: &str| {
                let known = self.options.get(name).is_some_and(|o| {
                    let key = flag.trim_start_matches("no-").replace('-', "_");
                    o.contains(&key) || o.contains(&flag.replace('-', "_"))
                });
                known || flag == "help" || help.contains(&format!("--{flag}"))
            };
            if let Some(flag) = word.strip_prefix("--") {
                let flag = flag.split('=').next().unwrap();
                if !flag.is_empty() && !named(flag) {
                    return Some(format!("{name} has no --{flag}"));
                }
            } else if let Some((key, _)) = word.split_once('=')
                && !taken
                && !key.is_empty()
                && key.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
                && !named(&key.replace('_', "-"))
            {
                return Some(format!("{name} has no option {key}"));
            }
        }
        None
    }
}

#[test]
fn every_command_that_a_page_shows_exists_with_its_options() {
    let commands = Commands::read();
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for (page, text) in pages() {
        for line in code(&text) {
            let line =
                line.replace("cargo run --release --", "temper").replace("cargo run --", "temper");
            let line = line.replace("target/release/temper", "temper");
            let words: Vec<&str> = line.split_whitespace().collect();
            for (i, _) in words.iter().enumerate().filter(|(_, w)| **w == "temper") {
                seen += 1;
                if let Some(what) = commands.check(&words[i + 1..]) {
                    wrong.push(format!("{}: {what}: {line}", page.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 100, "only {seen} commands were found");
}

#[test]
fn every_test_that_a_page_names_exists() {
    let mut sources = String::new();
    let mut folders = vec![PathBuf::from("tests/it"), PathBuf::from("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                sources += &std::fs::read_to_string(path).unwrap();
            }
        }
    }
    let command = regex::Regex::new(r"cargo test --test it ([^`\n]*)").unwrap();
    let mut wrong = Vec::new();
    for (page, text) in pages() {
        for found in command.captures_iter(&text) {
            let words =
                found[1].split_whitespace().take_while(|w| *w != "--" && !w.starts_with('#'));
            for word in words.filter(|w| !w.chars().any(|c| c.is_ascii_uppercase())) {
                let last = word.trim_end_matches([':', '.', ',', ')']);
                let (module, name) = last.rsplit_once("::").unwrap_or(("", last));
                let module_there = Path::new("tests/it").join(format!("{last}.rs")).exists();
                let name_there = sources
                    .lines()
                    .any(|line| line.trim_start().starts_with("fn ") && line.contains(name));
                let in_module = module.is_empty()
                    || Path::new("tests/it").join(format!("{module}.rs")).exists();
                if !(module_there || name_there && in_module) {
                    wrong.push(format!("{}: {word}", page.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
