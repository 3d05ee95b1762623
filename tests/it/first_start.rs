//! A first start on many rows: they are tokenised as they are read, so its memory does not grow with
//! the file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{MODEL, command, finish, json_lines};

/// Bytes of a row's column that nobody reads: they make the rows large, and cost no tokenising.
const NOTE: usize = 16 << 10;

/// Rows of the smaller file: 24 MiB, some batches. The larger has four times as many.
const ROWS: usize = 1536;

/// A row of the method's kind.
fn row(method: &str, i: usize) -> Value {
    let mut row = match method {
        "dpo" | "orpo" | "cpo" | "reward" => {
            json!({ "prompt": format!("a {i}"), "chosen": " y", "rejected": " z" })
        }
        "prm" => {
            json!({ "prompt": format!("a {i}"), "completions": ["y", "z"], "labels": [true, false] })
        }
        _ => {
            json!({ "prompt": format!("a {i}"), "completion": " y", "label": i.is_multiple_of(2) })
        }
    };
    row["note"] = "x".repeat(NOTE).into();
    row
}

/// Writes rows in the format of the file's name.
fn write(path: &Path, method: &str, rows: usize) {
    let name = path.to_str().unwrap();
    let file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let mut to: Box<dyn Write> = match name.ends_with(".gz") {
        true => Box::new(flate2::write::GzEncoder::new(file, flate2::Compression::fast())),
        false => Box::new(file),
    };
    let (csv, array) = (name.ends_with(".csv"), name.ends_with(".json"));
    if csv {
        to.write_all(b"prompt,chosen,rejected,note\n").unwrap();
    }
    for i in 0..rows {
        let row = row(method, i);
        let line = match (csv, array) {
            (true, _) => ["prompt", "chosen", "rejected", "note"]
                .map(|name| row[name].as_str().unwrap().to_string())
                .join(","),
            (_, true) => format!("{}{row}", if i == 0 { "[" } else { "," }),
            _ => row.to_string(),
        };
        writeln!(to, "{line}").unwrap();
    }
    if array {
        to.write_all(b"]").unwrap();
    }
}

/// Trains one step, and returns the most that the process held, in kilobytes.
fn peak(method: &str, data: &str, dir: &Path, more: &[&str]) -> u64 {
    let mut command = command(&[method, "--model", MODEL, "--data", data, "--output"]);
    command.arg(dir.join("out")).arg(format!("data_cache={}", dir.join("cache").display()));
    command.args(["max_steps=1", "per_device_train_batch_size=2", "save_strategy=no"]).args(more);
    command.stdout(Stdio::null()).stderr(std::fs::File::create(dir.join("said")).unwrap());
    let mut child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0;
    let code = loop {
        // The kernel keeps the high-water mark, so what was missed between two looks is seen later.
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let mark = mark.and_then(|m| m.trim().split(' ').next()?.parse().ok());
        most = most.max(mark.unwrap_or(0));
        if let Some(code) = child.try_wait().unwrap() {
            break code;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let said = std::fs::read_to_string(dir.join("said")).unwrap();
    assert!(code.success() && most > 0, "{method}: {said}");
    most
}

#[test]
fn the_memory_of_a_first_start_does_not_grow_with_the_file() {
    let teacher = "teacher_model_name_or_path=tests/fixtures/sft/model";
    let eval = ["eval_rows=0.1", "eval_strategy=steps"];
    for (method, name, weight, more) in [
        ("sft", "rows.json", "", &[][..]),
        ("sft", "rows.jsonl", "", &eval),
        ("sft", "rows.jsonl", ":1", &["packing=true", "max_length=64"]),
        ("dpo", "rows.jsonl", "", &[]),
        ("kto", "rows.jsonl.gz", "", &[]),
        ("reward", "rows.csv", "", &[]),
        ("prm", "rows.json", "", &[]),
        ("distill", "rows.jsonl", "", &[teacher]),
    ] {
        let peaks = [1, 4].map(|times| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(name);
            write(&path, method, times * ROWS);
            peak(method, &format!("{}{weight}", path.display()), dir.path(), more)
        });
        let grown = 3 * (ROWS * NOTE) as u64 / 1024;
        println!("{method} {name}{weight}: {peaks:?} kB, the file grew by {grown} kB");
        // Rows in memory would add what the file grew by, and more. The allocator keeps up to a batch
        // or two of those that are gone.
        assert!(peaks[1] < peaks[0] + grown / 2, "{method} {name}{weight}: {peaks:?} kB");
    }
}

struct Setup {
    dir: tempfile::TempDir,
}

impl Setup {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Trains on `data` with and without a cache: what was said, the losses and the digests.
    fn both(&self, method: &str, data: &[&str], more: &[&str]) -> [(String, Vec<Value>, Value); 2] {
        [format!("data_cache={}", self.path("cache").display()), "data_cache=off".into()].map(
            |cache| {
                let out = self.path(&format!("{method}-{}", cache.ends_with("off")));
                let mut command = command(&[method, "--model", MODEL, "--data"]);
                command.args(data).arg("--output").arg(&out).arg(cache).args(more);
                command.args(["max_steps=4", "save_steps=4", "logging_steps=1"]);
                let (code, said) = finish(&mut command);
                assert_eq!(code, Some(0), "{method}: {said}");
                let told = |line: &&str| line.contains(" read, ") || line.contains(" of its ");
                let told: Vec<&str> = said.lines().filter(told).collect();
                let lines = json_lines(out.join("metrics.jsonl"));
                let losses = lines.iter().map(|line| line["loss"].clone()).collect();
                let inputs = std::fs::read(out.join("checkpoint-4/inputs.json")).unwrap();
                (told.join("\n"), losses, serde_json::from_slice(&inputs).unwrap())
            },
        )
    }
}

#[test]
fn tokens_in_a_file_are_the_tokens_in_memory() {
    let setup = Setup { dir: tempfile::tempdir().unwrap() };
    let eval = ["eval_rows=0.1", "eval_strategy=steps", "eval_steps=2"];
    for (method, more) in [
        ("sft", &eval[..]),
        ("pretrain", &["max_length=64", "dataset_text_field=prompt"]),
        ("kto", &eval),
        ("cpo", &eval),
        ("prm", &eval),
        ("dpo", &["precompute_ref_log_probs=true", "eval_rows=3", "eval_strategy=steps"]),
    ] {
        // More rows than TRL packs, or takes apart, at once.
        let [a, b] = ["a.jsonl", "b.json"].map(|name| setup.path(name));
        write_short(&a, method, 2100);
        write_short(&b, method, 50);
        let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
        let mixture = [format!("{a}:0.9"), format!("{b}:0.1")];
        let mixture: Vec<&str> = mixture.iter().map(String::as_str).collect();
        for (data, more) in [
            (&[a, b][..], more),
            (&mixture, &[more, &["stopping_strategy=all_exhausted"]].concat()),
        ] {
            let [file, memory] = setup.both(method, data, &[more, &["--overwrite"]].concat());
            assert_eq!(file, memory, "{method}");
            assert_eq!(file.1.iter().filter(|loss| !loss.is_null()).count(), 4, "{method}");
        }
    }
}

fn write_short(path: &Path, method: &str, rows: usize) {
    let rows: Vec<Value> = (0..rows)
        .map(|i| {
            let mut row = row(method, i);
            row.as_object_mut().unwrap().remove("note");
            row
        })
        .collect();
    std::fs::write(path, Value::Array(rows).to_string()).unwrap();
    if path.extension().is_some_and(|e| e == "jsonl") {
        let text = std::fs::read_to_string(path).unwrap();
        let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
        crate::support::write_rows(path, &rows);
    }
}

#[test]
fn a_cache_that_takes_no_more_bytes_ends_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    // 2.6 MB of tokens.
    let row = |i: usize| json!({ "text": format!("{i} {}", "xyz ".repeat(300)) });
    crate::support::write_rows(&path, &(0..512).map(row).collect::<Vec<_>>());
    let run = |out: &str, limit: &str| {
        let line = format!(
            "{limit} exec {} sft --model {MODEL} --data {} --output {} data_cache={} max_steps=1 \
             per_device_train_batch_size=2 save_strategy=no",
            env!("CARGO_BIN_EXE_temper"),
            path.display(),
            dir.path().join(out).display(),
            dir.path().join("cache").display()
        );
        let mut shell = std::process::Command::new("sh");
        let (code, said) = finish(shell.arg("-c").arg(line).stdin(Stdio::null()));
        assert_eq!(code, Some(0), "{said}");
        (said, std::fs::read(dir.path().join(out).join("model.safetensors")).unwrap())
    };
    // Beside the rows there may be a note of the file's digest.
    let kept = || {
        let all = std::fs::read_dir(dir.path().join("cache")).unwrap();
        let rows =
            all.filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().contains(".rows"));
        rows.count()
    };
    // A limit on the size of files stands for a full disk; 1.5 MiB, in blocks of 512 bytes.
    let (said, limited) = run("limited", "ulimit -f 3000;");
    assert!(said.contains("the tokenised rows were not kept for the next start"), "{said}");
    assert_eq!(kept(), 0, "{said}");
    let (_, free) = run("free", "");
    assert!(free == limited);
    assert_eq!(kept(), 1);
}
