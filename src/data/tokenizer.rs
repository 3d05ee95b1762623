//! Text to token ids and back, from a model folder's `tokenizer.json` and `tokenizer_config.json`. Floor 4.
//!
//! Invariant: ids are those of the Hugging Face tokenizer; the file's own truncation and padding settings are switched
//! off, so a text is never cut here, and a broken file is an error, never a panic.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::panics::caught;
use crate::error::{Error, Result};

/// First character of a token and the one after its last.
pub type CharSpan = (usize, usize);

/// A loaded tokenizer. Cheap to share between threads by reference.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    dir: PathBuf,
    special: Map<String, Value>,
    chat_template: Option<String>,
    files: Vec<PathBuf>,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads the tokenizer of a model folder.
    pub fn load(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::model(dir, missing_tokenizer(dir)));
        }
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let parsed = caught(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(|panic| broken(&path, &panic))?
            .map_err(|e| broken(&path, &e.to_string()))?;
        let mut inner = parsed;
        inner.with_truncation(None).map_err(|e| broken(&path, &e.to_string()))?;
        inner.with_padding(None);

        let config = read_json_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let special_file = read_json_object(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        let special = special_tokens(&special_file, &config);
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |m| *m as usize + 1);
        let mut tokenizer = Tokenizer {
            inner,
            dir: dir.to_path_buf(),
            special,
            chat_template: find_chat_template(dir, &config)?,
            files: tokenizer_files(dir),
            vocab_size,
        };
        tokenizer.check_special(&path)?;
        Ok(tokenizer)
    }

    /// Ids of `text`. `add_special` adds what the post-processor adds (BOS for Llama); a rendered chat template wants
    /// `false`, since it writes its own.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| self.failed("encode", &*e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids with the span of CHARACTERS (not bytes) that each token covers. Tokens that share one character have the
    /// same span; added special tokens have an empty one.
    pub fn encode_offsets(&self, text: &str, add_special: bool) -> Result<(Vec<u32>, Vec<CharSpan>)> {
        let encoding = self.inner.encode_char_offsets(text, add_special).map_err(|e| self.failed("encode", &*e))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| self.failed("decode", &*e))
    }

    /// Decodes a growing list of ids piece by piece, for printing while sampling.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special, ids: Vec::new(), start: 0, end: 0 }
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The largest id plus one. A model may have more rows than this (padding), never fewer.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub fn eos_token(&self) -> Option<&str> {
        self.named("eos_token")
    }

    pub fn eos_id(&self) -> Option<u32> {
        self.token_to_id(self.eos_token()?)
    }

    pub fn bos_token(&self) -> Option<&str> {
        self.named("bos_token")
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.token_to_id(self.bos_token()?)
    }

    pub fn pad_token(&self) -> Option<&str> {
        self.named("pad_token")
    }

    pub fn pad_id(&self) -> Option<u32> {
        self.token_to_id(self.pad_token()?)
    }

    /// The variables a chat template sees: `bos_token`, `eos_token`, and the other named special tokens.
    pub fn special_tokens(&self) -> &Map<String, Value> {
        &self.special
    }

    /// The source of the folder's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Every tokenizer file of the folder: a model writer copies these byte for byte.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The folder it was read from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn named(&self, key: &str) -> Option<&str> {
        self.special.get(key).and_then(Value::as_str)
    }

    /// A named special token that the vocabulary lacks would silently become ordinary text.
    fn check_special(&mut self, path: &Path) -> Result<()> {
        for key in ["eos_token", "bos_token"] {
            if let Some(token) = self.named(key)
                && self.token_to_id(token).is_none()
            {
                let message = format!(
                    "tokenizer_config.json names {key} {token:?}, which the vocabulary of this file does not have; \
                     copy both files from the same model, or correct {key}"
                );
                return Err(Error::model(path, message));
            }
        }
        Ok(())
    }

    fn failed(&self, what: &str, error: &dyn std::fmt::Display) -> Error {
        Error::model(self.dir.join("tokenizer.json"), format!("could not {what}: {error}"))
    }
}

/// See [`Tokenizer::stream`]. Text comes out as soon as its characters are whole.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    start: usize, // the window that is decoded begins here, so that a leading space keeps its context
    end: usize,   // ids before this one have been given out
}

impl DecodeStream<'_> {
    /// Adds an id; returns the new text, empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.window()?;
        if text.ends_with('\u{FFFD}') { Ok(String::new()) } else { Ok(self.advance(text)) }
    }

    /// What is left, incomplete characters included.
    pub fn finish(mut self) -> Result<String> {
        let text = self.window()?;
        Ok(self.advance(text))
    }

    /// The text of the window beyond what was given out.
    fn window(&self) -> Result<String> {
        let given = self.tokenizer.decode(&self.ids[self.start..self.end], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids[self.start..], self.skip_special)?;
        Ok(all.strip_prefix(given.as_str()).unwrap_or_default().to_string())
    }

    fn advance(&mut self, text: String) -> String {
        if !text.is_empty() {
            self.start = self.end;
            self.end = self.ids.len();
        }
        text
    }
}

/// The object in a JSON file; None if there is no such file.
pub fn read_json_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    match serde_json::from_str(text.trim_start_matches('\u{FEFF}')) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(_) => Err(Error::model(path, "must be a JSON object; copy the file again from the model's repository")),
        Err(e) => Err(Error::model(path, format!("not valid JSON ({e}); copy the file again from the model's source"))),
    }
}

fn broken(path: &Path, why: &str) -> Error {
    let why: String = why.chars().take(200).collect();
    let message = format!(
        "not a tokenizer that can be read ({why}); download the file again, or save it again with transformers"
    );
    Error::model(path, message)
}

fn missing_tokenizer(dir: &Path) -> String {
    let sentencepiece = ["tokenizer.model", "spiece.model", "vocab.json"].iter().find(|f| dir.join(f).is_file());
    match sentencepiece {
        Some(f) => format!(
            "has {f} but no tokenizer.json; convert it once with transformers: \
             AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        ),
        None => "has no tokenizer.json; copy it from the model's repository".to_string(),
    }
}

const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Named special tokens as strings: tokenizer_config.json wins over special_tokens_map.json.
fn special_tokens(file: &Map<String, Value>, config: &Map<String, Value>) -> Map<String, Value> {
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

/// chat_template.jinja, then `chat_template` in tokenizer_config.json (a string, or a list of named ones), then the
/// folder of extra templates, then the old chat_template.json.
fn find_chat_template(dir: &Path, config: &Map<String, Value>) -> Result<Option<String>> {
    for path in [dir.join("chat_template.jinja"), dir.join("additional_chat_templates").join("default.jinja")] {
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
            let default = named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            default.or(named.first()).and_then(source)
        }
        _ => None,
    })
}

fn tokenizer_files(dir: &Path) -> Vec<PathBuf> {
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
    let mut files: Vec<PathBuf> = names.iter().map(|n| dir.join(n)).filter(|p| p.is_file()).collect();
    if let Ok(entries) = std::fs::read_dir(dir.join("additional_chat_templates")) {
        let mut extra: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
        extra.sort();
        files.extend(extra);
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::bpe;

    fn tiny(dir: &Path) -> Tokenizer {
        let texts = ["one two three two one", "naïve 日本語 🙂 one two"];
        let trained = bpe::train_bpe(texts.into_iter(), 300, &["<|end|>", "<|pad|>"]).unwrap();
        trained.write(dir, "<|end|>", "<|pad|>", Some("{{ messages[0].content }}")).unwrap();
        Tokenizer::load(dir).unwrap()
    }

    #[test]
    fn text_survives_encode_and_decode() {
        let dir = tempfile::tempdir().unwrap();
        let t = tiny(dir.path());
        for text in ["one two", "  日本語\n\t🙂🙂 x<|end|>", ""] {
            assert_eq!(t.decode(&t.encode(text, false).unwrap(), false).unwrap(), text);
        }
        assert_eq!((t.eos_token(), t.pad_token(), t.bos_id()), (Some("<|end|>"), Some("<|pad|>"), None));
        assert_eq!(t.encode("<|end|>", false).unwrap(), vec![t.eos_id().unwrap()]);
        assert_eq!(t.chat_template(), Some("{{ messages[0].content }}"));
        assert_eq!(t.files().len(), 3);
        assert!(t.vocab_size() > 256 && t.vocab_size() <= 300);
    }

    #[test]
    fn a_stream_gives_the_same_text_as_one_decode() {
        let dir = tempfile::tempdir().unwrap();
        let t = tiny(dir.path());
        let text = "naïve 🙂🙂 日本語 one two";
        let mut stream = t.stream(true);
        let mut out = String::new();
        for id in t.encode(text, false).unwrap() {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains('\u{FFFD}'));
            out += &piece;
        }
        assert_eq!(out + &stream.finish().unwrap(), text);
    }

    #[test]
    fn a_broken_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let said = |text: &str| {
            std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
            Tokenizer::load(dir.path()).map(|_| ()).unwrap_err().to_string()
        };
        for text in
            ["", "{", "[]", "{\"version\":\"1.0\",\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[\"a b\"]}}"]
        {
            assert!(said(text).contains("tokenizer.json: not a tokenizer that can be read"), "{}", said(text));
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(Tokenizer::load(empty.path()).map(|_| ()).unwrap_err().to_string().contains("no tokenizer.json"));
    }

    #[test]
    fn mutated_files_never_panic() {
        let dir = tempfile::tempdir().unwrap();
        tiny(dir.path());
        let path = dir.path().join("tokenizer.json");
        let good = std::fs::read(&path).unwrap();
        let mut state = 9u64;
        let mut next = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for _ in 0..300 {
            let mut bad = good.clone();
            for _ in 0..1 + next(4) {
                let at = next(bad.len());
                match next(3) {
                    0 => bad[at] = b"0123456789\"{}[],:null-"[next(22)],
                    1 => drop(bad.drain(at..(at + 1 + next(40)).min(bad.len()))),
                    _ => bad.insert(at, b"9\"}x"[next(4)]),
                }
            }
            std::fs::write(&path, bad).unwrap();
            if let Ok(t) = Tokenizer::load(dir.path()) {
                let _ = t.encode("one 🙂 two", true);
            }
        }
    }
}
