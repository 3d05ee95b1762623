//! What a tokenizer's folder says besides tokenizer.json: special tokens, added tokens, the chat
//! template. Layer 6.
//!
//! Invariant: where two files say different things, the one that transformers prefers wins.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{Error, Result};

/// The object in a JSON file; None if there is no such file.
pub fn read_json_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    match serde_json::from_str(text.trim_start_matches('\u{FEFF}')) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(Error::model(
            path,
            "must be a JSON object; copy the file again from the model's repository",
        )),
        Err(e) => Err(Error::model(
            path,
            format!("not valid JSON ({e}); copy the file again from the model's source"),
        )),
    }
}

/// Named special tokens as strings: tokenizer_config.json wins over special_tokens_map.json.
pub fn special_tokens(
    file: &Map<String, Value>,
    config: &Map<String, Value>,
) -> Map<String, Value> {
    let mut out = Map::new();
    for source in [file, config] {
        for key in NAMED {
            if let Some(token) = source.get(key).and_then(token_text) {
                out.insert(key.to_string(), Value::String(token.to_string()));
            }
        }
        // transformers 5 keeps a model's own named tokens (image_token ...) here
        for key in ["extra_special_tokens", "model_specific_special_tokens"] {
            for (name, value) in source.get(key).and_then(Value::as_object).into_iter().flatten() {
                if let Some(token) = token_text(value) {
                    out.insert(name.clone(), Value::String(token.to_string()));
                }
            }
        }
    }
    out
}

/// A token is written as a string, or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// chat_template.jinja, then `chat_template` in tokenizer_config.json (a string, or a list of named
/// ones), then the folder of extra templates, then the old chat_template.json.
pub fn find_chat_template(dir: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    for path in [
        dir.join("chat_template.jinja"),
        dir.join("additional_chat_templates").join("default.jinja"),
    ] {
        let inline = config.get("chat_template").is_some_and(|t| !t.is_null());
        if path.is_file() && (!inline || path.ends_with("chat_template.jinja")) {
            return Ok(Some(std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?));
        }
    }
    let old = read_json_object(&dir.join("chat_template.json"))?;
    let entry = config.get("chat_template").or_else(|| old.as_ref()?.get("chat_template"));
    Ok(match entry {
        Some(Value::String(source)) => Some(source.clone()),
        Some(Value::Array(named)) => {
            let source = |t: &Value| t.get("template").and_then(Value::as_str).map(str::to_string);
            let default =
                named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            default.or(named.first()).and_then(source)
        }
        _ => None,
    })
}

/// Every tokenizer file of a folder.
pub fn tokenizer_files(dir: &Path) -> Vec<PathBuf> {
    let names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ];
    let mut files: Vec<PathBuf> =
        names.iter().map(|n| dir.join(n)).filter(|p| p.is_file()).collect();
    if let Ok(entries) = std::fs::read_dir(dir.join("additional_chat_templates")) {
        let mut extra: Vec<PathBuf> =
            entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
        extra.sort();
        files.extend(extra);
    }
    files
}

/// `added_tokens_decoder` of tokenizer_config.json, by id.
pub fn added_tokens(config: &Map<String, Value>) -> Vec<(u32, AddedToken)> {
    let entry = |(id, token): (&String, &Value)| {
        let flag = |key: &str| token.get(key).and_then(Value::as_bool).unwrap_or(false);
        let added = AddedToken {
            content: token_text(token)?.to_string(),
            single_word: flag("single_word"),
            lstrip: flag("lstrip"),
            rstrip: flag("rstrip"),
            normalized: token
                .get("normalized")
                .and_then(Value::as_bool)
                .unwrap_or(!flag("special")),
            special: flag("special"),
        };
        Some((id.parse().ok()?, added))
    };
    let decoder = config.get("added_tokens_decoder").and_then(Value::as_object);
    let mut tokens: Vec<(u32, AddedToken)> =
        decoder.into_iter().flatten().filter_map(entry).collect();
    tokens.sort_by_key(|(id, _)| *id);
    tokens
}

const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
