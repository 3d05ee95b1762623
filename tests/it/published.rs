//! Published data sets as they are: files that were cut off, GSM8K's columns, the entries of
//! reasoning-gym, each with one command and no preparation.

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use temper::config::{DataOptions, OnBadRow};
use temper::data::read::{FolderSplit, ReadRows, WantedFields, read};
use temper::error::Result;

use crate::support::{MODEL, command, done, finish, fixture, json_lines, metrics, write_rows};

fn rows_of(path: &Path, options: &DataOptions) -> Result<ReadRows> {
    read(&[path.to_path_buf()], FolderSplit::Train, options, &WantedFields::All)
}

fn options(on_bad_row: OnBadRow) -> DataOptions {
    DataOptions { on_bad_row, ..DataOptions::default() }
}

/// Rows that a compressor cannot make much smaller.
fn talks(n: usize) -> Vec<Value> {
    let mut dice = 88172645463325252u64;
    let mut word = || {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        format!("{dice:x}")
    };
    let turn = |from: &str, value: String| json!({ "from": from, "value": value });
    let row = |_| json!({ "conversations": [turn("human", word()), turn("gpt", word())] });
    (0..n).map(row).collect()
}

#[test]
fn of_a_file_that_is_cut_off_only_the_row_at_the_cut_is_bad() {
    let dir = tempfile::tempdir().unwrap();
    let all = talks(9000);
    let lines: String = all.iter().map(|row| format!("{row}\n")).collect();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), Default::default());
    gz.write_all(lines.as_bytes()).unwrap();
    let table: String = (0..9000).map(|i| format!("{i},\"{}\"\n", lines.len() - i)).collect();
    let mut csv = flate2::write::GzEncoder::new(Vec::new(), Default::default());
    csv.write_all(format!("prompt,completion\n{table}").as_bytes()).unwrap();
    let whole = [
        ("array.json", Value::Array(all.clone()).to_string().into_bytes()),
        ("lines.jsonl", lines.clone().into_bytes()),
        ("lines.jsonl.gz", gz.finish().unwrap()),
        ("lines.jsonl.zst", zstd::encode_all(lines.as_bytes(), 1).unwrap()),
        ("table.csv.gz", csv.finish().unwrap()),
    ];
    for (name, bytes) in whole {
        let path = dir.path().join(name);
        std::fs::write(&path, &bytes).unwrap();
        let every = rows_of(&path, &options(OnBadRow::Error)).unwrap();
        assert_eq!(every.rows.len(), 9000, "{name}");
        std::fs::write(&path, &bytes[..bytes.len() - bytes.len() / 10 - 7]).unwrap();
        let refused = rows_of(&path, &options(OnBadRow::Error)).err().expect(name).to_string();
        let rest = rows_of(&path, &options(OnBadRow::Drop)).expect(name);
        let n = rest.rows.len();
        assert!(n > 4000 && n < 9000, "{name}: {n}");
        assert_eq!(rest.bad.count, 1, "{name}: {:?}", rest.bad.named);
        let bad = rest.bad.named[0].clone();
        let line = if name.starts_with("table") { n + 2 } else { n + 1 };
        assert!(bad.contains(&format!("{name}:{line}: ")), "{bad}");
        assert_eq!(refused, bad);
        if name != "lines.jsonl" {
            assert!(refused.contains("on_bad_row=drop to use the rows before"), "{refused}");
        }
        let same = every.rows.iter().zip(&rest.rows).all(|(a, b)| a.value == b.value);
        assert!(same, "{name}");
    }
    // Nothing whole stands before the cut: there is nothing to go on with.
    let path = dir.path().join("one.json");
    std::fs::write(&path, "[{\"text\": \"a").unwrap();
    assert!(rows_of(&path, &options(OnBadRow::Drop)).is_err());
}

#[test]
fn records_of_separated_text_are_bounded_and_told_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.csv");
    let long = "x".repeat(5000);
    let text =
        format!("a,b\r\n\"1, \"\"2\"\"\",\"c\nd\"\r\n\r\n{long},y\n3\n\"{long}\n{long}\",z\n4,e\n");
    std::fs::write(&path, text).unwrap();
    let drop = DataOptions { max_row_bytes: 4000, ..options(OnBadRow::Drop) };
    let found = rows_of(&path, &drop).unwrap();
    let shown: Vec<String> =
        found.rows.iter().map(|r| serde_json::to_string(&r.value).unwrap()).collect();
    assert_eq!(shown, [r#"{"a":"1, \"2\"","b":"c\nd"}"#, r#"{"a":"4","b":"e"}"#]);
    assert_eq!(found.bad.count, 3);
    assert!(found.bad.named[0].contains("has more than max_row_bytes=4000"), "{:?}", found.bad);
    assert!(found.bad.named[1].contains("a.csv:6: has 1 fields"), "{:?}", found.bad);
    assert_eq!(found.rows[1].line, 9);
    // A quote that is never closed takes the rest of the file, and no more memory than a row.
    std::fs::write(&path, format!("a\nb\n\"{}", "x\n".repeat(5000))).unwrap();
    let found = rows_of(&path, &drop).unwrap();
    assert_eq!((found.rows.len(), found.bad.count), (1, 1));
    assert!(found.bad.named[0].contains("unclosed quote"), "{:?}", found.bad);
}

/// The completions of a run of `method` with what `columns` says of the rows.
fn trained(method: &str, rows: &str, more: &[&str]) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let mut run = command(&[method, "--model", MODEL, "--data", rows, "--output"]);
    run.arg(dir.path().join("out")).args(["max_steps=2", "logging_steps=1", "device=cpu"]);
    let (code, said) = finish(run.args(more));
    assert_eq!(code, Some(0), "{method} {more:?}: {said}");
    // The next command reads the rows in the same way.
    let next = said.lines().find(|line| line.trim().starts_with("temper eval"));
    assert!(next.is_some_and(|next| next.contains(more[0])), "{said}");
    let logged = metrics(&dir.path().join("out"));
    assert!(logged.iter().any(|line| line["loss"].is_number()), "{logged:?}");
    let path = dir.path().join("out/completions.jsonl");
    if path.exists() { json_lines(path) } else { Vec::new() }
}

const FEW: [&str; 3] =
    ["num_generations=4", "max_completion_length=8", "per_device_train_batch_size=8"];

#[test]
fn gsm8ks_columns_train_with_one_command_each() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize| {
        let (a, b) = (3 * i + 2, i + 4);
        json!({
            "question": format!("A shelf has {a} jars and {b} more are put on it. How many jars are there?"),
            "answer": format!("There are {a} + {b} = <<{a}+{b}={}>>{} jars.\n#### {}", a + b, a + b, a + b),
        })
    };
    let rows = write_rows(dir.path().join("train.jsonl"), &(0..16).map(row).collect::<Vec<_>>());
    trained("sft", &rows, &["columns=prompt:question,completion:answer"]);
    let more = ["columns=prompt:question", "reward_funcs=numeric_match"];
    let completions = trained("grpo", &rows, &[&more[..], &FEW].concat());
    assert_eq!(completions.len(), 16);
    // The number behind #### is what a completion is compared with: 0 here, and never absent.
    assert!(completions.iter().all(|c| c["rewards"]["numeric_match"].is_number()));
    let prompt = completions[0]["prompt"].as_str().unwrap();
    assert!(prompt.starts_with("A shelf has"), "{prompt}");
    let data = ["data", "--model", MODEL, "--method", "grpo", "--data", &rows, more[0], more[1]];
    let said = done(&data);
    assert!(said.contains("columns for the rewards: answer"), "{said}");
}

#[test]
fn entries_of_reasoning_gym_train_with_one_command_each() {
    let rows = fixture("reasoning_gym.jsonl").display().to_string();
    let entries = json_lines(&rows);
    assert!(entries.len() >= 12 && entries.iter().all(|e| e["metadata"].is_object()));
    trained("sft", &rows, &["columns=prompt:question,completion:answer"]);
    let more = ["columns=prompt:question", "reward_funcs=exact_match"];
    let completions = trained("grpo", &rows, &[&more[..], &FEW].concat());
    assert!(completions.iter().all(|c| c["rewards"]["exact_match"].is_number()));
}
