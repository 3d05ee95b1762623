//! `--overwrite`: what it replaces, and what it never touches.

use std::path::Path;

use crate::support::{MODEL, command, finish, json};

const ROWS: &str = "tests/fixtures/sft/text.jsonl";
const ADAPTER: &str = "tests/fixtures/peft/lora";

fn sft(model: &Path, data: &Path, out: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut run = command(&["sft", "--model"]);
    run.arg(model).arg("--data").arg(data).arg("--output").arg(out);
    finish(run.args(["max_steps=1", "device=cpu"]).args(more))
}

fn merge(model: &Path, adapter: &Path, out: &Path) -> (Option<i32>, String) {
    let mut run = command(&["merge", "--overwrite", "--model"]);
    finish(run.arg(model).arg("--adapter").arg(adapter).arg("--output").arg(out))
}

/// Names of a folder's files, hidden ones too.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().to_str().unwrap().into()).collect();
    names.sort();
    names
}

#[test]
fn a_merge_replaces_an_earlier_merge() {
    let dir = tempfile::tempdir().unwrap();
    let base = json("tests/fixtures/peft/losses.json")["runs"]["lora"]["base"].clone();
    let base = Path::new("tests/fixtures").join(base.as_str().unwrap());
    let out = dir.path().join("out");
    for _ in 0..2 {
        let (code, said) = merge(&base, Path::new(ADAPTER), &out);
        assert_eq!(code, Some(0), "{said}");
    }
    assert_eq!(json(out.join("merge.json"))["adapter"], ADAPTER);
    let once = dir.path().join("once");
    assert_eq!(merge(&base, Path::new(ADAPTER), &once).0, Some(0));
    assert_eq!(names(&out), names(&once));
    let weights = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&out) == weights(&once));
    // A model that no run of temper made stays.
    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("model.safetensors"), "theirs").unwrap();
    let (code, said) = merge(&base, Path::new(ADAPTER), &foreign);
    assert!(code == Some(2) && said.contains("no run of temper"), "{said}");
    assert_eq!(weights(&foreign), b"theirs");
    // Nor does a merge replace what it is made of.
    let (code, said) = merge(&out, Path::new(ADAPTER), &out);
    assert!(code == Some(2) && said.contains("--model"), "{said}");
    assert!(weights(&out) == weights(&once));
}

#[test]
fn a_run_does_not_replace_what_it_reads() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (code, said) = sft(Path::new(MODEL), Path::new(ROWS), &out, &[]);
    assert_eq!(code, Some(0), "{said}");
    let before = names(&out);
    let over = ["--overwrite"];
    let log = out.join("metrics.jsonl");
    let checkpoint = out.join("checkpoint-1");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&out, &link).unwrap();
    for (model, data, name) in [
        (&*out, Path::new(ROWS), "--model"),
        (&*link, Path::new(ROWS), "--model"),
        (&*checkpoint, Path::new(ROWS), "--model"),
        (Path::new(MODEL), &*log, "--data"),
    ] {
        let (code, said) = sft(model, data, &out, &over);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(name) && said.contains("which --overwrite replaces"), "{said}");
        assert_eq!(names(&out), before);
    }
    let teacher = format!("chat_template_path={}", out.join("chat_template.jinja").display());
    let (code, said) = sft(Path::new(MODEL), Path::new(ROWS), &out, &[over[0], &teacher]);
    assert!(code == Some(2) && said.contains("chat_template_path"), "{said}");
    // Rows of the user's own beside the run are not the run's.
    let own = out.join("rows.jsonl");
    std::fs::copy(ROWS, &own).unwrap();
    let (code, said) = sft(Path::new(MODEL), &own, &out, &over);
    assert_eq!(code, Some(0), "{said}");
    assert!(own.exists());
}
