//! Columns of parquet files: every codec, and structs that pad one row with another's keys.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{DictionaryArray, Int32Array, RecordBatch, StringArray};
use serde_json::Value;
use temper::data::rows::read_rows;

use crate::support::{done, fixture};

fn values(path: &Path) -> Vec<Value> {
    let rows = read_rows(&[path.to_path_buf()]).unwrap();
    rows.into_iter().map(|row| Value::Object(row.value)).collect()
}

#[test]
fn parquet_of_every_codec_has_the_rows_of_lines() {
    let want = values(&fixture("parquet/rows.jsonl"));
    assert_eq!(want.len(), 40);
    for codec in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"] {
        assert_eq!(values(&fixture(format!("parquet/{codec}.parquet"))), want, "{codec}");
    }
}

#[test]
fn keys_of_another_row_do_not_appear_in_tools_and_arguments() {
    let [lines, columns] =
        ["jsonl", "parquet"].map(|e| values(&fixture(format!("parquet/tools.{e}"))));
    for (want, found) in lines.iter().zip(&columns) {
        assert_eq!(found["tools"], want["tools"]);
        let calls = |row: &Value| row["messages"][1]["tool_calls"].clone();
        assert_eq!(calls(found), calls(want));
        assert_eq!(found["messages"][1].get("content"), Some(&Value::Null));
    }
    // What is rendered is the same text, and the same mask.
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("t.jinja");
    std::fs::write(
        &template,
        "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}",
    )
    .unwrap();
    let shown = |extension: &str| {
        let rows = format!("tests/fixtures/parquet/tools.{extension}");
        let option = format!("chat_template_path={}", template.display());
        let out = done(&["data", "--model", crate::support::MODEL, "--data", &rows, &option]);
        out.replace(&rows, "rows")
    };
    let text = shown("parquet");
    assert!(text.contains("\"query\"") && !text.contains("null, \"y\""), "{text}");
    assert_eq!(sorted(&text), sorted(&shown("jsonl")));
}

/// The letters of a text in order: a struct has its own order of keys.
fn sorted(text: &str) -> Vec<char> {
    let mut all: Vec<char> = text.chars().filter(|c| !"[]".contains(*c)).collect();
    all.sort_unstable();
    all
}

#[test]
fn a_dictionary_of_many_rows_is_read_in_one_pass() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.arrow");
    const N: i32 = 200_000;
    let keys = Int32Array::from_iter((0..N).map(|i| (i % 5 != 0).then_some(i % 3)));
    let words = Arc::new(StringArray::from(vec![Some("a"), None, Some("c")]));
    let column: arrow_array::ArrayRef = Arc::new(DictionaryArray::new(keys, words));
    let batch = RecordBatch::try_from_iter([("text", column)]).unwrap();
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = arrow_ipc::writer::FileWriter::try_new(file, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let start = Instant::now();
    let found = values(&path);
    // All keys for each row took minutes; one key a row takes well under a second.
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(found.len(), N as usize);
    for (i, row) in found.iter().enumerate().take(30) {
        let want = [Some("a"), None, Some("c")][i % 3].filter(|_| i % 5 != 0);
        assert_eq!(row.get("text").and_then(Value::as_str), want, "row {i}");
    }
}
