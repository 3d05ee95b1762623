//! Weighted mixtures of files.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{MODEL, command, finish, json_lines, temper, write_rows};

/// Two files: 30 rows that say a, 10 that say b.
fn sources() -> (TempDir, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let rows = |name: &str, n: usize| {
        let row = |i: usize| json!({ "prompt": format!("{name} {i}"), "completion": " x", "label": i.is_multiple_of(2) });
        write_rows(dir.path().join(format!("{name}.jsonl")), &(0..n).map(row).collect::<Vec<_>>())
    };
    let (a, b) = (rows("a", 30), rows("b", 10));
    (dir, a, b)
}

fn train(method: &str, data: &[&str], out: &Path, more: &[&str]) -> Command {
    let mut command = command(&[method, "--model", MODEL, "--data"]);
    command.args(data).arg("--output").arg(out);
    command.args(["per_device_train_batch_size=2", "save_steps=3", "max_steps=6"]).args(more);
    command
}

fn losses(out: &Path) -> Vec<Value> {
    let lines = json_lines(out.join("metrics.jsonl"));
    lines.iter().map(|line| line["loss"].clone()).collect()
}

#[test]
fn both_forms_and_a_run_file_are_the_same_mixture_with_counts_in_the_log() {
    let (dir, a, b) = sources();
    let (x, y, z) = (dir.path().join("x"), dir.path().join("y"), dir.path().join("z"));
    let step = &["logging_steps=1"];
    let list = [format!("{a}:0.5"), format!("{b}:0.5")];
    let (code, said) = finish(&mut train("sft", &[&list[0], &list[1]], &x, step));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("mixture, first_exhausted: "), "{said}");
    assert!(said.contains("b.jsonl: 10 of its 10 rows"), "{said}");
    let (code, said) = finish(&mut train("sft", &[&list.join(",")], &y, step));
    assert_eq!(code, Some(0), "{said}");
    let file = dir.path().join("run.toml");
    std::fs::write(&file, "[data]\n\"a.jsonl\" = 1\n\"b.jsonl\" = 1\n").unwrap();
    let mut from_file = command(&["sft", "--model", MODEL, "--config"]);
    from_file.arg(&file).arg("--output").arg(&z);
    from_file.args(["per_device_train_batch_size=2", "save_steps=3", "max_steps=6"]).args(step);
    let (code, said) = finish(&mut from_file);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(losses(&x).len(), 6);
    assert_eq!(losses(&x), losses(&y));
    assert_eq!(losses(&x), losses(&z));
}

#[test]
fn a_resumed_mixture_has_the_same_bytes_and_other_weights_are_refused() {
    let (dir, a, b) = sources();
    let data = [format!("{a}:0.7,{b}:0.3")];
    let data = [data[0].as_str()];
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let more = &["stopping_strategy=all_exhausted"];
    assert_eq!(finish(&mut train("sft", &data, &whole, more)).0, Some(0));
    assert_eq!(finish(&mut train("sft", &data, &cut, more)).0, Some(0));
    std::fs::remove_dir_all(cut.join("checkpoint-6")).unwrap();
    let other = [format!("{a}:0.6,{b}:0.4")];
    let resume = &["stopping_strategy=all_exhausted", "--resume"];
    let (code, said) = finish(&mut train("sft", &[other[0].as_str()], &cut, resume));
    assert!(code == Some(2) && said.contains("training rows"), "{said}");
    let (code, said) = finish(&mut train("sft", &data, &cut, resume));
    assert_eq!(code, Some(0), "{said}");
    let bytes = |dir: &PathBuf| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(bytes(&whole) == bytes(&cut));
}

#[test]
fn methods_of_every_kind_read_mixtures_and_evaluate_on_rows_of_their_own() {
    let (dir, a, b) = sources();
    let data = [format!("{a}:3"), format!("{b}:1")];
    let data = [data[0].as_str(), data[1].as_str()];
    let grpo: &[&str] = &[
        "reward_funcs=length:min=1,max=9",
        "num_generations=2",
        "max_completion_length=4",
        "max_steps=1",
    ];
    let split = ["eval_rows=8", "eval_strategy=steps", "stopping_strategy=all_exhausted"];
    for (method, more) in [("sft", &[][..]), ("kto", &[]), ("grpo", grpo)] {
        let out = dir.path().join(method);
        let (code, said) = finish(&mut train(method, &data, &out, &[&split, more].concat()));
        assert_eq!(code, Some(0), "{method}: {said}");
        // Of 8 evaluation rows, 6 come off the 30 and 2 off the 10.
        assert!(said.contains("of its 24 rows") && said.contains("of its 8 rows"), "{said}");
    }
}

#[test]
fn wrong_weights_are_errors_that_say_the_way_out() {
    let (dir, a, b) = sources();
    let out = dir.path().join("out");
    for (data, message) in [
        (format!("{a}:0.7,{b}"), "has no weight, but others have one"),
        (format!("{a}:0,{b}:1"), "must be above 0"),
        (format!("{a}:1,{}/none.jsonl:1", dir.path().display()), "none.jsonl"),
        (format!("{a}:1e-9,{b}:1"), "bring the weights closer together"),
    ] {
        let more = &["stopping_strategy=all_exhausted"];
        let (code, said) = finish(&mut train("sft", &[&data], &out, more));
        assert!(code.is_some_and(|c| c > 0) && said.contains(message), "{data}: {said}");
    }
    let odd = dir.path().join("a:0.5");
    std::fs::create_dir(&odd).unwrap();
    std::fs::copy(&a, odd.join("rows.jsonl")).unwrap();
    let args = ["data", "--model", MODEL, "--data", odd.to_str().unwrap()];
    let (code, shown, err) = temper(&args);
    assert!(code == Some(0) && shown.contains("0 of 30 rows"), "{err}");
}
