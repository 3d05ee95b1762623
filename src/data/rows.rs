//! Rows, and reading them with default options. Layer 6.
//!
//! Invariant: commands with data options read rows through [`super::read`], not through here.

use std::path::PathBuf;

use super::read::{self, FolderSplit, WantedFields};
pub use super::row::{Row, RowPlace, kind};
use crate::config::DataOptions;
use crate::error::Result;

/// Reads the rows of files, with all columns and the default options. A file without rows is an
/// error.
pub fn read_rows(paths: &[PathBuf]) -> Result<Vec<Row>> {
    let options = DataOptions::default();
    Ok(read::read(paths, FolderSplit::Train, &options, &WantedFields::All)?.rows)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    fn said(name: &str, content: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let message = read_rows(&[path]).unwrap_err().to_string();
        message.replace(&format!("{}/", dir.path().display()), "")
    }

    fn row(text: &str) -> Row {
        let value = serde_json::from_str(text).unwrap();
        Row { value, file: Path::new("rows.jsonl").into(), line: 17 }
    }

    #[test]
    fn bad_files_are_named_with_line_and_next_step() {
        assert!(said("a.jsonl", b"").starts_with("a.jsonl: has no rows"));
        assert!(said("a.jsonl", b"\n  \n").starts_with("a.jsonl: has no rows"));
        assert!(said("a.json", b"[]").starts_with("a.json: has no rows"));
        let broken = said("a.jsonl", b"{\"text\":\"a\"}\n\n{\"text\":");
        assert!(
            broken.starts_with("a.jsonl:3: not valid JSON (EOF while parsing a value at column 8)"),
            "{broken}"
        );
        assert_eq!(said("a.jsonl", b"[1]"), "a.jsonl:1: a row must be a JSON object, found a list");
        assert_eq!(
            said("a.json", b"[{}, 3]"),
            "a.json:2: a row must be a JSON object, found a number"
        );
        assert!(said("a.jsonl", b"{}\n\xff\xfe").starts_with("a.jsonl:2: is not UTF-8"));
        assert!(said("a.xlsx", b"x").contains("unknown file type; give .jsonl, .json, .csv"));
        assert!(said("a.parquet", b"PAR1").contains("a.parquet: not a readable parquet file"));
        assert!(said("a.jsonl", "[".repeat(100_000).as_bytes()).contains("recursion limit"));
        assert!(
            read_rows(&["none.jsonl".into()]).unwrap_err().to_string().starts_with("none.jsonl: ")
        );
    }

    #[test]
    fn json_lines_and_arrays_give_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a.jsonl", "b.json", "c.json"].map(|n| dir.path().join(n));
        std::fs::write(&a, "\u{FEFF}{\"z\":1,\"a\":null}\r\n\n{\"z\":2}").unwrap();
        std::fs::write(&b, "[{\"z\":1,\"a\":null},\n{\"z\":2}]").unwrap();
        std::fs::write(&c, "{\"z\":1}\n{\"z\":2}\n").unwrap();
        let rows = read_rows(&[a, b, c]).unwrap();
        let values: Vec<String> =
            rows.iter().map(|r| serde_json::to_string(&r.value).unwrap()).collect();
        assert_eq!(values, ["{\"z\":1}", "{\"z\":2}"].repeat(3));
        assert_eq!(rows.iter().map(|r| r.line).collect::<Vec<_>>(), [1, 3, 1, 2, 1, 2]);
    }

    #[test]
    fn wrong_fields_are_named() {
        let r = row(
            r#"{"prompt": 3, "label": "x", "messages": [{"role": "user", "content": "a", "tool_calls": null}, 4]}"#,
        );
        assert_eq!(
            r.string("prompt").unwrap_err().to_string(),
            "rows.jsonl:17: field \"prompt\" must be a string, found a number"
        );
        assert!(r.string("promt").unwrap_err().to_string().contains("did you mean \"prompt\"?"));
        assert!(
            r.bool("label")
                .unwrap_err()
                .to_string()
                .contains("must be true or false, found a string")
        );
        assert!(
            r.messages("messages")
                .unwrap_err()
                .to_string()
                .contains("\"messages[1]\" must be a message")
        );
        let r = row(r#"{"messages": [{"role": "user", "content": null, "tool_calls": null}]}"#);
        assert_eq!(
            Value::Array(r.messages("messages").unwrap()).to_string(),
            r#"[{"role":"user","content":null}]"#
        );
    }
}
