//! The architecture rules that a program can check: layers, who calls kernels, where `unsafe` is
//! used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use regex::Regex;
use temper::config::{Section, ServeConfig, markdown, one_line};
use temper::methods::registry::REGISTRY;

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
fn files_import_each_other_in_autograd_alone() {
    let graph = import_graph(&all());
    for circle in circles(&graph) {
        let allowed = circle.iter().all(|file| file.starts_with("autograd/"));
        let edges: Vec<String> = circle
            .iter()
            .flat_map(|from| graph[from].iter().map(move |to| (from, to)))
            .filter(|(_, to)| circle.contains(to))
            .map(|(from, to)| format!("  {from} imports {to}"))
            .collect();
        assert!(allowed, "these files import each other:\n{}", edges.join("\n"));
    }
}

#[test]
fn a_circle_is_found_through_every_form_of_import() {
    let files = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        list.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect()
    };
    let found = |list: &[(&str, &str)]| circles(&import_graph(&files(list)));
    let circle = vec![vec!["a/b.rs".to_string(), "a/mod.rs".to_string()]];
    let child = ("a/b.rs", "use super::{self as parent, f};\n");
    assert_eq!(found(&[("a/mod.rs", "mod b;\nuse b::g;\n"), child]), circle);
    assert_eq!(found(&[("a/mod.rs", "mod b;\nfn f() { b::g() }\n"), child]), circle);
    assert_eq!(found(&[("a/mod.rs", "use crate::{c, a::{b::g, x}};\n"), child]), circle);
    assert_eq!(found(&[("a/mod.rs", "fn f() { crate::a::b::g() }\n"), child]), circle);
    for allowed in
        ["mod b;\npub use b::g;\n", "// see crate::a::b\n", "const S: &str = \"b::g\";\n"]
    {
        assert!(found(&[("a/mod.rs", allowed), child]).is_empty(), "{allowed}");
    }
}

type Graph = BTreeMap<String, BTreeSet<String>>;

/// Which file imports which: by `use` that is no `pub use`, and by paths in the code.
fn import_graph(files: &[(String, String)]) -> Graph {
    let module = |file: &str| -> Vec<String> {
        let path = file.trim_end_matches(".rs");
        let path = path.strip_suffix("/mod").unwrap_or(path);
        path.split('/').filter(|name| *name != "lib").map(String::from).collect()
    };
    let by_module: BTreeMap<Vec<String>, &String> =
        files.iter().map(|(file, _)| (module(file), file)).collect();
    let imports = |(file, text): &(String, String)| {
        let own = module(file);
        let targets = imported_paths(text).into_iter().filter_map(|path| {
            let names: Vec<&str> = path.split("::").map(str::trim).collect();
            let ups = names.iter().take_while(|name| **name == "super").count();
            let (base, rest) = match names[0] {
                "crate" => (0, &names[1..]),
                "self" => (own.len(), &names[1..]),
                "super" => (own.len().saturating_sub(ups), &names[ups..]),
                _ => (own.len(), &names[..]),
            };
            let mut path: Vec<String> = own[..base].to_vec();
            path.extend(rest.iter().map(|name| name.to_string()));
            (0..=path.len()).rev().find_map(|n| by_module.get(&path[..n])).copied().cloned()
        });
        (file.clone(), targets.filter(|target| target != file).collect())
    };
    files.iter().map(imports).collect()
}

/// The paths of a file that lead to other files: those from `crate`, `super`, `self` or a module
/// that the file declares.
fn imported_paths(text: &str) -> Vec<String> {
    let line_comments = Regex::new(r"//[^\n]*").unwrap();
    let strings = Regex::new(r#""(\\.|[^"\\])*""#).unwrap();
    let uses = Regex::new(r"(?m)^\s*(pub(?:\([^)]*\))?\s+)?use ([^;]*);").unwrap();
    let modules = Regex::new(r"\bmod (\w+);").unwrap();
    let paths = Regex::new(r"\b[a-z_]\w*(?:::\w+)+").unwrap();
    let code = line_comments.replace_all(text, "");
    let code = strings.replace_all(&code, "\"\"");
    let children: Vec<&str> =
        modules.captures_iter(&code).map(|m| m.get(1).unwrap().as_str()).collect();
    let mut found: Vec<String> = Vec::new();
    for m in uses.captures_iter(&code).filter(|m| m.get(1).is_none()) {
        expand(&m[2], &mut found);
    }
    let rest = uses.replace_all(&code, "");
    found.extend(
        paths
            .find_iter(&rest)
            .filter(|m| !rest[..m.start()].ends_with("::"))
            .map(|m| m.as_str().to_string()),
    );
    found.retain(|path| {
        let first = path.split("::").next().unwrap().trim();
        ["crate", "super", "self"].contains(&first) || children.contains(&first)
    });
    found
}

/// `a::{b, c::d}` to `a::b` and `a::c::d`.
fn expand(tree: &str, out: &mut Vec<String>) {
    let Some(open) = tree.find('{') else {
        out.push(tree.split(" as ").next().unwrap().trim().to_string());
        return;
    };
    let (prefix, inner) = (&tree[..open], &tree[open + 1..tree.rfind('}').unwrap()]);
    let (mut depth, mut from) = (0, 0);
    for (i, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !inner[from..i].trim().is_empty() {
                    expand(&format!("{prefix}{}", inner[from..i].trim()), out);
                }
                from = i + 1;
            }
            _ => {}
        }
    }
}

/// The files that `start` imports, and those that they import, and so on.
fn reachable<'a>(graph: &'a Graph, start: &'a String) -> BTreeSet<&'a String> {
    let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
    while let Some(file) = open.pop() {
        open.extend(graph.get(file).into_iter().flatten().filter(|next| seen.insert(*next)));
    }
    seen
}

/// The strongly connected components of more than one file: those that reach each other.
fn circles(graph: &Graph) -> Vec<Vec<String>> {
    let reached: BTreeMap<&String, BTreeSet<&String>> =
        graph.keys().map(|file| (file, reachable(graph, file))).collect();
    let component = |file: &String| -> Vec<String> {
        let back = |other: &&&String| reached.get(**other).is_some_and(|r| r.contains(file));
        reached[file].iter().filter(back).map(|other| other.to_string()).collect()
    };
    let all: BTreeSet<Vec<String>> =
        graph.keys().map(component).filter(|files| files.len() > 1).collect();
    all.into_iter().collect()
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

/// Every file with `unsafe`, and how many blocks and impls it has. Devices and the library product
/// call foreign code; a replayed graph touches memory by address; mapping a file is unsafe by nature
/// (another process may cut it); libc calls of checkpoints and signals have no safe wrapper.
const UNSAFE: &[(&str, usize)] = &[
    ("checkpoint/disk.rs", 3),
    ("device/cpu/gemm.rs", 6),
    ("device/cpu/mod.rs", 16),
    ("device/cuda/blas.rs", 12),
    ("device/cuda/code.rs", 8),
    ("device/cuda/downloads.rs", 6),
    ("device/cuda/find_blas.rs", 3),
    ("device/cuda/launch.rs", 1),
    ("device/cuda/mod.rs", 33),
    ("device/cuda/probe.rs", 2),
    ("device/pool.rs", 2),
    ("fsio.rs", 1),
    ("gguf/read.rs", 1),
    ("ops/library.rs", 1),
    ("rollout/record.rs", 1),
    ("tensor/mod.rs", 6),
];

#[test]
fn all_commands_print_through_one_writer() {
    let prints = Regex::new(r"\be?print(ln)?!|\b(stdout|stderr)\(\)\.|\bdbg!").unwrap();
    let code = |text: &str| -> String {
        text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
    };
    let files = all().into_iter().filter(|(_, text)| prints.is_match(&code(text)));
    let found: Vec<String> = files.map(|(file, _)| file).collect();
    assert_eq!(found, ["observer/output.rs", "observer/terminal.rs"]);
}

#[test]
fn unsafe_is_where_the_list_says_and_says_why() {
    let mut found = Vec::new();
    for (file, text) in all() {
        let lines: Vec<&str> = text.lines().collect();
        let mut blocks = 0;
        for (n, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            let here = ["unsafe {", "unsafe impl"].map(|s| code.matches(s).count());
            let here: usize = here.iter().sum();
            let said = lines[n.saturating_sub(6)..=n].iter().any(|l| l.contains("SAFETY:"));
            assert!(here == 0 || said, "{file}:{}: unsafe without // SAFETY:", n + 1);
            blocks += here;
        }
        if blocks > 0 {
            found.push((file, blocks));
        }
    }
    let found: Vec<(&str, usize)> = found.iter().map(|(file, n)| (file.as_str(), *n)).collect();
    assert_eq!(found, UNSAFE);
}

/// Names of types in ops that are to be qualified yet.
const SHARED_TYPE_NAMES: &[&str] = &["Kind", "Sample", "Segment"];

#[test]
fn no_two_public_types_share_a_name() {
    let types = Regex::new(r"(?m)^ *pub (?:struct|enum|trait|type|union) (\w+)").unwrap();
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (file, text) in all() {
        for name in types.captures_iter(&text) {
            places.entry(name[1].to_string()).or_default().push(file.clone());
        }
    }
    let generic = ["Ask", "Pass", "Set", "Sample", "Kind", "Options"];
    for (name, files) in &places {
        let known = SHARED_TYPE_NAMES.contains(&name.as_str());
        assert!(files.len() == 1 || known, "{name} is a type of {}", files.join(" and of "));
        assert!(!generic.contains(&name.as_str()) || known, "{name} of {} says little", files[0]);
    }
}

#[test]
fn every_module_says_its_layer_and_its_invariant() {
    let layers = layers();
    for (file, text) in all() {
        let tests = file.ends_with("/tests.rs") || file.ends_with("_tests.rs");
        if tests {
            continue;
        }
        let lines = text.lines().take_while(|l| l.starts_with("//!"));
        let head: Vec<&str> = lines.flat_map(|l| l[3..].split_whitespace()).collect();
        let head = head.join(" ");
        assert!(!head.is_empty(), "{file} starts without //!");
        let Some(layer) = layers.get(file.split(['/', '.']).next().unwrap()) else {
            assert!(["lib.rs", "main.rs"].contains(&file.as_str()), "{file} has no layer");
            continue;
        };
        assert!(head.contains(&format!("ayer {layer}")), "{file}: its head names no layer {layer}");
        assert!(
            head.contains("nvariant:") || head.contains("nvariants:"),
            "{file}: its head names no invariant"
        );
    }
}

/// Every file of the repository.
fn tree() -> BTreeSet<String> {
    fn walk(dir: &Path, out: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
            let path = entry.path();
            let name = path.strip_prefix("./").unwrap().to_str().unwrap().to_string();
            if path.is_dir() && name != "target" && name != ".git" {
                out.insert(name);
                walk(&path, out);
            } else {
                out.insert(name);
            }
        }
    }
    let mut all = BTreeSet::new();
    walk(Path::new("."), &mut all);
    all
}

/// The prose of a file: all of a page, the comments of a source.
fn prose(file: &str, text: &str) -> String {
    if file.ends_with(".md") {
        return Regex::new(r"\w+://\S+").unwrap().replace_all(text, "").into_owned();
    }
    let comments = text.lines().filter_map(|l| l.split_once("//").map(|(_, comment)| comment));
    comments.collect::<Vec<_>>().join("\n")
}

/// Whether a path that prose names is in the tree; `*` stands for any part of a name.
fn is_in(tree: &BTreeSet<String>, path: &str) -> bool {
    let pattern = regex::escape(path).replace(r"\*", "[^/]*");
    let pattern = Regex::new(&format!("(^|/){pattern}$")).unwrap();
    tree.iter().any(|file| pattern.is_match(file))
}

/// Files that the build writes.
const GENERATED: &[&str] = &["launchers.rs", "rng_tags.rs"];

#[test]
fn every_path_that_docs_and_comments_name_exists() {
    let tree = tree();
    let anchored = Regex::new(r"\b(?:src|kernels|tests|docs|benches|examples)/[\w*./-]*").unwrap();
    let named = Regex::new(r"[\w*./-]+\.(?:rs|cuh?|md)\b").unwrap();
    let placeholder = Regex::new(r"(^|/)(x|[A-Z]+)\.\w+$").unwrap();
    let mut missing = Vec::new();
    let read = |file: &&String| {
        let read = [".md", ".rs", ".cu", ".cuh"].iter().any(|end| file.ends_with(end));
        let of_its_time = file.starts_with("benches/results/") || *file == "CHANGELOG.md";
        read && !file.starts_with("tests/fixtures/") && !of_its_time
    };
    for file in tree.iter().filter(read) {
        let text = prose(file, &std::fs::read_to_string(file).unwrap());
        let paths = anchored.find_iter(&text).chain(named.find_iter(&text));
        for path in paths.map(|m| m.as_str().trim_end_matches(['.', '/', '-'])) {
            let path = path.trim_start_matches("./").trim_start_matches("../");
            let known = GENERATED.contains(&path) || placeholder.is_match(path);
            if !known && !is_in(&tree, path) {
                missing.push(format!("{file}: {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn every_module_path_that_docs_name_exists() {
    let layers = layers();
    let sources: BTreeMap<String, String> = all().into_iter().collect();
    let path = Regex::new(r"`(?:temper::)?([a-z_]\w*(?:::\w+)+)").unwrap();
    let mut missing = Vec::new();
    let pages = tree().into_iter().filter(|f| f.ends_with(".md") && f != "CHANGELOG.md");
    for file in pages {
        for found in path.captures_iter(&std::fs::read_to_string(&file).unwrap()) {
            let names: Vec<&str> = found[1].split("::").collect();
            // What is in `kernels` is generated.
            if !layers.contains_key(names[0]) || names[0] == "kernels" {
                continue;
            }
            let text = (1..=names.len()).rev().find_map(|n| {
                let module = names[..n].join("/");
                let files = [format!("{module}.rs"), format!("{module}/mod.rs")];
                Some((n, files.iter().find_map(|f| sources.get(f))?))
            });
            let known = text.is_some_and(|(n, text)| {
                names[n..]
                    .iter()
                    .all(|name| Regex::new(&format!(r"\b{name}\b")).unwrap().is_match(text))
            });
            if !known {
                missing.push(format!("{file}: {}", &found[1]));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
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
    let levels = kernel_sources("kernels/levels");
    for (file, text) in kernel_sources("kernels").into_iter().chain(levels) {
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
    let allowed: [(&str, &[&str]); 5] = [
        ("kernels", &["prim/", "common/"]),
        ("kernels/levels", &["prim/", "common/"]),
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

/// Sections in `section`, at any depth, by name.
fn nested<'a>(section: &'a dyn Section, all: &mut BTreeMap<&'static str, &'a dyn Section>) {
    for part in section.nested() {
        all.insert(part.name(), part);
        nested(part, all);
    }
}

/// Checks the table of `section` between its marks in a page, or writes it there where
/// TEMPER_WRITE_DOCS is set.
fn check_table(path: &str, name: &str, table: &str) {
    let page = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let (begin, end) = (format!("<!-- options: {name} -->\n"), "<!-- end of options -->");
    let from =
        page.find(&begin).unwrap_or_else(|| panic!("{path} has no line {begin}")) + begin.len();
    let to = from + page[from..].find(end).unwrap_or_else(|| panic!("{path}: no {end}"));
    if page[from..to] == *table {
        return;
    }
    assert!(
        std::env::var_os("TEMPER_WRITE_DOCS").is_some(),
        "{path}: the table of {name} is out of date; run TEMPER_WRITE_DOCS=1 cargo test docs_tables"
    );
    let page = [&page[..from], table, &page[to..]].concat();
    std::fs::write(path, page).unwrap();
}

/// What a method's page says about a section that it shares: its name, and defaults of its own.
fn mention(section: &dyn Section) -> String {
    let own: Vec<String> = section
        .own_keys()
        .iter()
        .zip(section.default_keys())
        .filter(|(own, default)| own.value != default.value)
        .map(|(own, _)| format!("`{} = {}`", own.name, one_line(&own.value)))
        .collect();
    let name = section.name();
    let link = format!("[{name}](../options.md#{})", name.replace(' ', "-"));
    if own.is_empty() { link } else { format!("{link} (here {})", own.join(", ")) }
}

#[test]
fn the_docs_tables_of_options_are_the_programs() {
    let runs: Vec<_> = REGISTRY.iter().map(|entry| (entry, (entry.run)())).collect();
    let mut shared: BTreeMap<&'static str, &dyn Section> = BTreeMap::new();
    for (entry, run) in &runs {
        let [training, peft, method] = run.sections();
        shared.extend([(training.name(), training), (peft.name(), peft)]);
        nested(training, &mut shared);
        nested(method, &mut shared);
        if entry.name != method.name() {
            continue; // another command over the same options
        }
        let mut parts = BTreeMap::new();
        nested(method, &mut parts);
        let mut mentions = vec![mention(training), mention(peft)];
        mentions.extend(parts.values().map(|s| mention(*s)));
        let own = method.own_keys();
        let own = if own.is_empty() { String::new() } else { markdown(&own) + "\n" };
        let table = format!("{own}Shared options: {}.\n", mentions.join(", "));
        check_table(&format!("docs/methods/{}.md", entry.page), entry.name, &table);
    }
    check_table("docs/serve.md", "serve", &markdown(&ServeConfig::default().own_keys()));
    for (name, section) in shared {
        check_table("docs/options.md", name, &markdown(&section.default_keys()));
    }
}
