//! The data that users bring: formats, columns, bad rows.

use std::io::Write;
use std::path::Path;

use temper::config::value::{Given, Value};
use temper::config::{ColumnMap, DataOptions, OnBadRow};
use temper::data::preference::{PairStyle, PreferenceOptions, pairs};
use temper::data::read::{FolderSplit, ReadRows, WantedFields, read};
use temper::data::sft::{SftOptions, prepare};
use temper::error::Result;

use crate::support::{temper, tokenizer_and_template};

fn options(columns: &str, on_bad_row: OnBadRow) -> DataOptions {
    let columns = ColumnMap::read(&Given::Text(columns.into())).unwrap();
    DataOptions { columns, on_bad_row, ..DataOptions::default() }
}

fn rows_of(path: &Path, options: &DataOptions) -> Result<ReadRows> {
    read(&[path.to_path_buf()], FolderSplit::Train, options, &WantedFields::All)
}

fn shown(read: &ReadRows) -> Vec<String> {
    read.rows.iter().map(|r| serde_json::to_string(&r.value).unwrap()).collect()
}

#[test]
fn compressed_and_separated_text_gives_the_rows_of_lines() {
    let dir = tempfile::tempdir().unwrap();
    let lines =
        b"{\"prompt\":\"a,b\",\"completion\":\"c\\nd\"}\n{\"prompt\":\"e\",\"completion\":\"f\"}\n";
    let gz = dir.path().join("a.jsonl.gz");
    let mut encoder =
        flate2::write::GzEncoder::new(std::fs::File::create(&gz).unwrap(), Default::default());
    encoder.write_all(lines).unwrap();
    encoder.finish().unwrap();
    let zst = dir.path().join("a.jsonl.zst");
    std::fs::write(&zst, zstd::encode_all(&lines[..], 1).unwrap()).unwrap();
    let csv = dir.path().join("a.csv");
    std::fs::write(&csv, "prompt,completion,empty\n\"a,b\",\"c\nd\",\ne,f,\n").unwrap();
    let plain = dir.path().join("a.jsonl");
    std::fs::write(&plain, lines).unwrap();
    let want = shown(&rows_of(&plain, &DataOptions::default()).unwrap());
    for path in [gz, zst, csv] {
        assert_eq!(shown(&rows_of(&path, &DataOptions::default()).unwrap()), want, "{path:?}");
    }
}

#[test]
fn of_a_folder_with_splits_the_train_files_are_taken_and_told() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["train-1.jsonl", "train-0.jsonl", "test-0.jsonl", "dataset_info.json"] {
        std::fs::write(dir.path().join(name), format!("{{\"text\":\"{name}\"}}")).unwrap();
    }
    let found = rows_of(dir.path(), &DataOptions::default()).unwrap();
    assert_eq!(shown(&found), [r#"{"text":"train-0.jsonl"}"#, r#"{"text":"train-1.jsonl"}"#]);
    assert!(found.told()[0].ends_with("its train split, 2 of 3 files (1 left out)"));
    let all = rows_of(&dir.path().join("t*.jsonl"), &DataOptions::default()).unwrap();
    assert_eq!(all.rows.len(), 3);
}

#[test]
fn columns_are_renamed_and_a_missing_one_is_named_with_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gsm8k.jsonl");
    std::fs::write(&path, "{\"question\":\"q\",\"answer\":\"a\"}\n").unwrap();
    let map = |columns| rows_of(&path, &options(columns, OnBadRow::Error));
    let found = map("prompt:question,completion:answer").unwrap();
    assert_eq!(shown(&found), [r#"{"prompt":"q","completion":"a"}"#]);
    let said = map("prompt:qestion").err().unwrap().to_string();
    assert!(said.contains(r#"it has "answer", "question"); did you mean "question"?"#), "{said}");
    let said = map("question:answer").err().unwrap().to_string();
    assert!(said.contains("already has a column \"question\""), "{said}");
}

#[test]
fn bad_rows_are_dropped_counted_and_the_first_three_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.jsonl");
    let long = "x".repeat(200);
    let text = format!("{{\"text\":\"a b\"}}\n{{\n[1]\n{{\"text\":\"{long}\"}}\n");
    let bytes = [text.as_bytes(), b"{\"text\":\"\xff\"}\n", b"{\"text\":3}\n"].concat();
    std::fs::write(&path, bytes).unwrap();
    let drop = DataOptions { max_row_bytes: 100, ..options("", OnBadRow::Drop) };
    let found = rows_of(&path, &drop).unwrap();
    assert_eq!((found.rows.len(), found.bad.count, found.bad.named.len()), (2, 4, 3));
    assert!(found.bad.named[1].contains("r.jsonl:3: a row must be a JSON object"));
    assert!(found.bad.named[2].contains("max_row_bytes=100"));
    let (tokenizer, template) = tokenizer_and_template();
    let sft = SftOptions { on_bad_row: OnBadRow::Drop, ..SftOptions::default() };
    let (examples, stats) = prepare(&found.rows, &tokenizer, Some(&template), 320, &sft).unwrap();
    assert_eq!((examples.len(), stats.bad.count), (1, 1));
    let said = stats.to_string();
    let last = said.lines().last().unwrap();
    assert!(last.contains("r.jsonl:6: field \"text\" must be a string"), "{said}");
    assert!(rows_of(&path, &options("", OnBadRow::Error)).is_err());
}

#[test]
fn an_empty_text_counts_as_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.jsonl");
    std::fs::write(&path, "{\"text\":\"\"}\n{\"text\":\"a b\"}\n").unwrap();
    let rows = rows_of(&path, &DataOptions::default()).unwrap().rows;
    let (tokenizer, template) = tokenizer_and_template();
    let (examples, stats) =
        prepare(&rows, &tokenizer, Some(&template), 320, &SftOptions::default()).unwrap();
    assert_eq!((examples.len(), examples[0].row, stats.dropped_empty), (1, 1, 1));
}

#[test]
fn a_text_prompt_beside_conversations_is_taken_from_them() {
    let dir = tempfile::tempdir().unwrap();
    let turn = |role: &str, text: &str| format!(r#"{{"role":"{role}","content":"{text}"}}"#);
    let side = |answer: &str| format!("[{},{}]", turn("user", "q"), turn("assistant", answer));
    let row = |prompt: &str| {
        format!(r#"{{{prompt}"chosen":{},"rejected":{}}}"#, side("good"), side("bad"))
    };
    let (tokenizer, template) = tokenizer_and_template();
    let make = |prompt: &str| {
        let path = dir.path().join("r.jsonl");
        std::fs::write(&path, row(prompt)).unwrap();
        let rows = rows_of(&path, &DataOptions::default()).unwrap().rows;
        let options = PreferenceOptions::default();
        pairs(&rows, &tokenizer, Some(&template), 320, PairStyle::Dpo, &options).unwrap().0
    };
    assert_eq!(make(r#""prompt":"q","#), make(""));
}

#[test]
fn an_evaluation_without_rows_is_an_error_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let args = ["sft", "--model", "tests/fixtures/sft/model", "--data"];
    let rest =
        ["tests/fixtures/sft/text.jsonl", "--output", &out, "device=cpu", "eval_strategy=steps"];
    let (code, _, said) = temper(&[&args[..], &rest[..]].concat());
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("give --eval-data FILE"), "{said}");
}
