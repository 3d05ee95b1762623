//! The rules of the architecture that a program can check: layers, who calls kernels, where `unsafe` is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use regex::Regex;
use temper::config::{Section, markdown, one_line};
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
    for (name, section) in shared {
        check_table("docs/options.md", name, &markdown(&section.default_keys()));
    }
}
