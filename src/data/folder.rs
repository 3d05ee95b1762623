//! The contents of a tokenizer folder besides tokenizer.json: special tokens, added tokens, the
//! chat template. Layer 6.
//!
//! Invariant: if two files disagree, the one that transformers prefers is used.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{Error, Result};

/// Reads the object in a JSON file; None if there is no such file.
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
            format!("not valid JSON ({e}); copy the file again from the model's repository"),
        )),
    }
}

/// Returns the named special tokens as strings. special_tokens_map.json takes precedence, but is
/// read only if tokenizer_config.json has no `added_tokens_decoder` (transformers 5.17).
pub fn special_tokens(
    file: &Map<String, Value>,
    config: &Map<String, Value>,
) -> Map<String, Value> {
    let mut out = Map::new();
    for source in sources(file, config) {
        for (key, value) in source {
            let named = NAMED.contains(&key.as_str()) || key.ends_with("_token");
            if let Some(token) = token_text(value).filter(|_| named) {
                out.insert(key.clone(), Value::String(token.to_string()));
            }
        }
        // the model's own named tokens, such as image_token
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

/// Returns the unnamed special tokens: the list `extra_special_tokens`, or if absent its old name
/// `additional_special_tokens`.
pub fn extra_tokens(file: &Map<String, Value>, config: &Map<String, Value>) -> Vec<AddedToken> {
    let mut tokens: Vec<AddedToken> = Vec::new();
    for source in sources(file, config) {
        let list = source.get("extra_special_tokens");
        let list = list.or(source.get("additional_special_tokens")).and_then(Value::as_array);
        for token in list.into_iter().flatten() {
            let Some(added) = added_token(token, true) else { continue };
            if !tokens.iter().any(|t| t.content == added.content) {
                tokens.push(AddedToken { special: true, ..added });
            }
        }
    }
    tokens
}

fn sources<'a>(
    file: &'a Map<String, Value>,
    config: &'a Map<String, Value>,
) -> impl Iterator<Item = &'a Map<String, Value>> {
    let legacy = !config.contains_key("added_tokens_decoder");
    std::iter::once(config).chain(Some(file).filter(|_| legacy))
}

fn added_token(token: &Value, special: bool) -> Option<AddedToken> {
    let flag = |key: &str| token.get(key).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(special);
    Some(AddedToken {
        content: token_text(token)?.to_string(),
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        special,
    })
}

/// Returns the text of a token, given as a string or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// The chat templates of a folder, by name. A single template is named `default`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NamedTemplates {
    pub list: Vec<(String, String)>,
    /// Whether they came from an old location, or from files in a subfolder.
    pub moved: bool,
}

impl NamedTemplates {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.list.iter().find(|t| t.0 == name).map(|t| t.1.as_str())
    }

    /// The template to use if no name is requested: `default`, or else the first.
    pub fn main(&self) -> Option<&str> {
        self.get("default").or(self.list.first().map(|t| t.1.as_str()))
    }
}

/// Reads chat_template.jinja and the files of additional_chat_templates; if there are none,
/// `chat_template` in tokenizer_config.json (a string, or a list of named templates); else the old
/// chat_template.json.
pub fn chat_templates(dir: &Path, config: &Map<String, Value>) -> Result<NamedTemplates> {
    let read = |path: &Path| std::fs::read_to_string(path).map_err(|e| Error::io(path, e));
    let mut list = Vec::new();
    let main = dir.join("chat_template.jinja");
    if main.is_file() {
        list.push(("default".to_string(), read(&main)?));
    }
    let more = extra_template_files(dir);
    for path in &more {
        let name = path.file_stem().and_then(|n| n.to_str()).unwrap_or_default().to_string();
        list.retain(|t| t.0 != name);
        list.push((name, read(path)?));
    }
    if !list.is_empty() {
        return Ok(NamedTemplates { list, moved: !more.is_empty() });
    }
    if let Some(entry) = config.get("chat_template").filter(|t| !t.is_null()) {
        return Ok(NamedTemplates { list: named(entry), moved: false });
    }
    let old = read_json_object(&dir.join("chat_template.json"))?;
    let list = old.as_ref().and_then(|o| o.get("chat_template")).map(named).unwrap_or_default();
    Ok(NamedTemplates { moved: !list.is_empty(), list })
}

fn named(entry: &Value) -> Vec<(String, String)> {
    let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).map(str::to_string);
    match entry {
        Value::String(source) => vec![("default".to_string(), source.clone())],
        Value::Array(items) => {
            items.iter().filter_map(|t| Some((text(t, "name")?, text(t, "template")?))).collect()
        }
        _ => Vec::new(),
    }
}

fn extra_template_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.join("additional_chat_templates"));
    let paths = entries.into_iter().flatten().flatten().map(|e| e.path());
    let mut files: Vec<PathBuf> =
        paths.filter(|p| p.extension().is_some_and(|e| e == "jinja") && p.is_file()).collect();
    files.sort();
    files
}

/// Lists every tokenizer file of a folder.
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
    files.extend(extra_template_files(dir));
    files
}

/// Returns the tokens of `added_tokens_decoder` in tokenizer_config.json with their ids; if absent,
/// those of added_tokens.json (`old`), which are special where `special` returns true.
pub fn added_tokens(
    config: &Map<String, Value>,
    old: &Map<String, Value>,
    special: impl Fn(&str) -> bool,
) -> Vec<(u32, AddedToken)> {
    let entry =
        |(id, token): (&String, &Value)| Some((id.parse().ok()?, added_token(token, false)?));
    let from_old = |(text, id): (&String, &Value)| {
        Some((u32::try_from(id.as_u64()?).ok()?, {
            let special = special(text);
            AddedToken { normalized: !special, ..AddedToken::from(text.as_str(), special) }
        }))
    };
    let mut tokens: Vec<(u32, AddedToken)> = match config.get("added_tokens_decoder") {
        Some(decoder) => decoder.as_object().into_iter().flatten().filter_map(entry).collect(),
        None => old.iter().filter_map(from_old).collect(),
    };
    tokens.sort_by_key(|(id, _)| *id);
    tokens
}

const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
