//! Text to token ids and back, from a model folder's `tokenizer.json` and `tokenizer_config.json`.
//! Layer 6.
//!
//! Invariant: ids equal those of the Hugging Face tokenizer; the file's own truncation and padding
//! settings are disabled, so a text is never truncated here; a broken file is an error, never a
//! panic.

#![deny(missing_docs)]

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::folder::{self, NamedTemplates};
use super::panics::caught;
use crate::error::{Error, Result};
use crate::fsio;

/// Index of a token's first character, and of the one after its last.
pub type CharSpan = (usize, usize);

/// A loaded tokenizer. Cheap to share between threads by reference.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    dir: PathBuf,
    base: PathBuf,
    special: Map<String, Value>,
    templates: NamedTemplates,
    template_origin: PathBuf,
    files: Vec<PathBuf>,
    vocab_size: usize,
    changed_eos: bool,
    changed_template: bool,
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

        let config =
            folder::read_json_object(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let special_file =
            folder::read_json_object(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        let special = folder::special_tokens(&special_file, &config);
        let old = folder::read_json_object(&dir.join("added_tokens.json"))?.unwrap_or_default();
        let extra = folder::extra_tokens(&special_file, &config);
        let is_special = |text: &str| {
            special.values().any(|s| s.as_str() == Some(text))
                || extra.iter().any(|t| t.content == text)
        };
        let added = folder::added_tokens(&config, &old, is_special);
        add_tokens(&mut inner, &special, added, extra, &path)?;
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |m| *m as usize + 1);
        let tokenizer = Tokenizer {
            inner,
            dir: dir.to_path_buf(),
            base: dir.to_path_buf(),
            special,
            templates: folder::chat_templates(dir, &config)?,
            template_origin: dir.to_path_buf(),
            files: folder::tokenizer_files(dir),
            vocab_size,
            changed_eos: false,
            changed_template: false,
        };
        tokenizer.check_special(&path)?;
        Ok(tokenizer)
    }

    /// Reads the tokenizer of a model with an adapter. A tokenizer or chat template in the
    /// adapter's folder overrides the model's, because the adapter was trained with it.
    pub fn of_model(dir: &Path, adapter: Option<&Path>) -> Result<Tokenizer> {
        let Some(adapter) = adapter else { return Tokenizer::load(dir) };
        let own = adapter.join("tokenizer.json").is_file();
        let mut tokenizer = Tokenizer::load(if own { adapter } else { dir })?;
        tokenizer.base = dir.to_path_buf();
        if tokenizer.templates.list.is_empty() || !own {
            let from = if own { dir } else { adapter };
            let config = folder::read_json_object(&from.join("tokenizer_config.json"))?;
            let templates = folder::chat_templates(from, &config.unwrap_or_default())?;
            if !templates.list.is_empty() {
                tokenizer.set_templates(templates, from);
            }
        }
        Ok(tokenizer)
    }

    /// Uses the chat template at `path` (`chat_template_path`): a Jinja file, or a folder with a
    /// tokenizer. The special tokens that it writes remain the model's.
    pub fn take_template(&mut self, path: &Path) -> Result<()> {
        let templates = if path.is_dir() {
            let config = folder::read_json_object(&path.join("tokenizer_config.json"))?;
            let templates = folder::chat_templates(path, &config.unwrap_or_default())?;
            if templates.list.is_empty() {
                let message = "holds no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); \
                               chat_template_path takes a Jinja file, or a folder with the tokenizer of a chat model";
                return Err(Error::model(path, message));
            }
            templates
        } else {
            let source = String::from_utf8(fsio::read(path)?).map_err(|_| {
                Error::model(path, "is not UTF-8 text; chat_template_path takes a Jinja file")
            })?;
            NamedTemplates { list: vec![("default".to_string(), source)], moved: false }
        };
        self.set_templates(templates, path);
        Ok(())
    }

    fn set_templates(&mut self, templates: NamedTemplates, origin: &Path) {
        self.changed_template |= templates.list != self.templates.list;
        self.templates = templates;
        self.template_origin = origin.to_path_buf();
    }

    /// Uses `token` as the EOS token (the option `eos_token`). Error: it is not in the vocabulary.
    pub fn take_eos(&mut self, token: &str) -> Result<()> {
        if self.token_to_id(token).is_none() {
            return Err(Error::Config(format!(
                "eos_token={token:?} is not in the vocabulary of {}; give a token that it has",
                self.dir.display()
            )));
        }
        if self.eos_token() != Some(token) {
            let special = AddedToken::from(token, true);
            self.inner
                .add_special_tokens([special])
                .map_err(|e| self.failed("add eos_token", &*e))?;
            self.special.insert("eos_token".into(), Value::String(token.into()));
            self.changed_eos = true;
        }
        Ok(())
    }

    /// Returns the names and contents of the files that describe this tokenizer: byte for byte
    /// those of its folder, except for a chat template or EOS token set by an option. There are no
    /// subfolders: several templates go into tokenizer_config.json.
    pub fn saved_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let moves = self.changed_template || self.templates.moved;
        let mut out: Vec<(String, Vec<u8>)> = Vec::new();
        for file in &self.files {
            let Some(name) = file.file_name().and_then(|n| n.to_str()) else { continue };
            if !(moves && (name == "chat_template.json" || name.ends_with(".jinja"))) {
                out.push((name.to_string(), fsio::read(file)?));
            }
        }
        if !moves && !self.changed_eos {
            return Ok(out);
        }
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let config = name == "tokenizer_config.json";
            let map = folder::read_json_object(&self.dir.join(name))?;
            let Some(mut map) = map.or_else(|| config.then(Map::new)) else { continue };
            if let Some(eos) = self.special.get("eos_token").filter(|_| self.changed_eos) {
                map.insert("eos_token".into(), eos.clone());
            }
            if moves && config {
                map.shift_remove("chat_template");
                let named = |(name, template): &(String, String)| json!({ "name": name, "template": template });
                match self.templates.list.as_slice() {
                    [] => {}
                    [(name, source)] if name == "default" => {
                        out.push(("chat_template.jinja".into(), source.clone().into_bytes()));
                    }
                    several => {
                        map.insert("chat_template".into(), several.iter().map(named).collect());
                    }
                }
            }
            out.retain(|f| f.0 != name);
            out.push((name.into(), format!("{:#}\n", Value::Object(map)).into_bytes()));
        }
        Ok(out)
    }

    /// Tokenises `text`. `add_special` adds what the post-processor adds (BOS for Llama); use
    /// `false` for a rendered chat template, which writes its own.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, add_special).map_err(|e| self.failed("encode", &*e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokenises `text`; returns ids and for each token the span of CHARACTERS (not bytes) that it
    /// covers. Tokens that share one character have the same span; added special tokens have an
    /// empty one.
    pub fn encode_offsets(
        &self,
        text: &str,
        add_special: bool,
    ) -> Result<(Vec<u32>, Vec<CharSpan>)> {
        let encoding = self
            .inner
            .encode_char_offsets(text, add_special)
            .map_err(|e| self.failed("encode", &*e))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// Decodes tokens to text, without special tokens if `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| self.failed("decode", &*e))
    }

    /// Decodes ids one at a time, for printing while sampling.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, state: DecodeState::new(skip_special) }
    }

    /// Returns the text of each id, special tokens included; the pieces join to the whole text. A
    /// character of several tokens is in the piece of its last token.
    pub fn pieces(&self, ids: &[u32]) -> Result<Vec<String>> {
        let mut stream = self.stream(false);
        let mut pieces = ids.iter().map(|id| stream.push(*id)).collect::<Result<Vec<_>>>()?;
        let rest = stream.finish()?;
        if let Some(last) = pieces.last_mut() {
            last.push_str(&rest);
        }
        Ok(pieces)
    }

    /// Returns the id of a token; None if there is no such token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns the token of an id; None if there is no such id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns whether an added token is special; None if the id is not an added token.
    pub fn added_token(&self, id: u32) -> Option<bool> {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).map(|t| t.special)
    }

    /// Returns the length in bytes of the special token that `text` begins with.
    pub(super) fn special_prefix(&self, text: &str) -> Option<usize> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let special = added.values().filter(|t| t.special && text.starts_with(&t.content));
        special.map(|t| t.content.len()).max()
    }

    /// The largest id plus one. A model may have more embedding rows (padding), never fewer.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The EOS token, if tokenizer_config.json names one.
    pub fn eos_token(&self) -> Option<&str> {
        self.named("eos_token")
    }

    /// The id of the EOS token.
    pub fn eos_id(&self) -> Option<u32> {
        self.token_to_id(self.eos_token()?)
    }

    /// The BOS token, if tokenizer_config.json names one.
    pub fn bos_token(&self) -> Option<&str> {
        self.named("bos_token")
    }

    /// The id of the BOS token.
    pub fn bos_id(&self) -> Option<u32> {
        self.token_to_id(self.bos_token()?)
    }

    /// The padding token, if tokenizer_config.json names one.
    pub fn pad_token(&self) -> Option<&str> {
        self.named("pad_token")
    }

    /// The id of the padding token.
    pub fn pad_id(&self) -> Option<u32> {
        self.token_to_id(self.pad_token()?)
    }

    /// The token variables of a chat template: `bos_token`, `eos_token`, and the other named
    /// special tokens.
    pub fn special_tokens(&self) -> &Map<String, Value> {
        &self.special
    }

    /// The source of the chat template, if any; of several, that of `default`.
    pub fn chat_template(&self) -> Option<&str> {
        self.templates.main()
    }

    /// Returns the source of a named chat template; None if there is no such template. A single
    /// template is named `default`.
    pub fn named_template(&self, name: &str) -> Option<&str> {
        self.templates.get(name)
    }

    /// All chat templates by name.
    pub fn templates(&self) -> &[(String, String)] {
        &self.templates.list
    }

    /// The file or folder that the chat templates were read from, for messages.
    pub fn template_origin(&self) -> &Path {
        &self.template_origin
    }

    /// Every tokenizer file of the folder; a model writer copies them byte for byte.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The model's folder. Differs from [`Tokenizer::dir`] if an adapter has its own tokenizer.
    pub fn model_dir(&self) -> &Path {
        &self.base
    }

    /// The folder that the tokenizer was read from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn named(&self, key: &str) -> Option<&str> {
        self.special.get(key).and_then(Value::as_str)
    }

    /// A named special token that is not in the vocabulary would silently become ordinary text.
    fn check_special(&self, path: &Path) -> Result<()> {
        for key in CHECKED {
            if let Some(token) = self.named(key)
                && self.token_to_id(token).is_none()
            {
                let message = format!(
                    "tokenizer_config.json names {key} {token:?}, which is not in the vocabulary \
                     of this file; copy both files from the same model, or correct {key}"
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

/// See [`Tokenizer::stream`]. Returns text as soon as its characters are complete.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    state: DecodeState,
}

impl DecodeStream<'_> {
    /// Adds an id; returns the new text, empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.state.push(self.tokenizer, id)
    }

    /// Returns the remaining text, incomplete characters included.
    pub fn finish(mut self) -> Result<String> {
        self.state.finish(self.tokenizer)
    }
}

/// Like [`DecodeStream`], but each call passes the tokenizer, which must stay the same.
pub struct DecodeState {
    skip_special: bool,
    ids: Vec<u32>,
    start: usize, // start of the decoded window: a leading space needs its context
    end: usize,   // the text of ids before this one was returned
}

impl DecodeState {
    /// Creates a decoder that has seen no tokens.
    pub fn new(skip_special: bool) -> DecodeState {
        DecodeState { skip_special, ids: Vec::new(), start: 0, end: 0 }
    }

    /// See [`DecodeStream::push`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.window(tokenizer)?;
        if text.ends_with('\u{FFFD}') { Ok(String::new()) } else { Ok(self.advance(text)) }
    }

    /// See [`DecodeStream::finish`].
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = self.window(tokenizer)?;
        Ok(self.advance(text))
    }

    /// Returns the text of the window that was not returned yet.
    fn window(&self, tokenizer: &Tokenizer) -> Result<String> {
        let given = tokenizer.decode(&self.ids[self.start..self.end], self.skip_special)?;
        let all = tokenizer.decode(&self.ids[self.start..], self.skip_special)?;
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

/// Adds the tokens that tokenizer_config.json names and `added_tokens` of tokenizer.json lacks,
/// like transformers, so that their text is always one token.
fn add_tokens(
    inner: &mut tokenizers::Tokenizer,
    special: &Map<String, Value>,
    added: Vec<(u32, AddedToken)>,
    extra: Vec<AddedToken>,
    path: &Path,
) -> Result<()> {
    let known = |inner: &tokenizers::Tokenizer, text: &str| {
        inner.get_added_vocabulary().get_vocab().contains_key(text)
    };
    for (id, mut token) in added {
        if known(inner, &token.content) {
            continue;
        }
        token.special |= special.values().any(|s| s.as_str() == Some(&token.content));
        let text = token.content.clone();
        inner.add_tokens([token]).map_err(|e| broken(path, &e.to_string()))?;
        if inner.token_to_id(&text) != Some(id) {
            let message = format!(
                "token {text:?} has the id {id} in tokenizer_config.json or added_tokens.json, \
                 which does not match this file; save the tokenizer again with transformers"
            );
            return Err(Error::model(path, message));
        }
    }
    // As in transformers, a named or extra token that the vocabulary lacks gets a new id.
    let named = special.iter().filter_map(|(key, v)| Some((key, v.as_str()?)));
    let named =
        named.map(|(key, text)| (CHECKED.contains(&key.as_str()), AddedToken::from(text, true)));
    for (checked, token) in named.chain(extra.into_iter().map(|t| (false, t))) {
        // a named EOS or BOS that is in no file is a mistake, which `check_special` reports
        if known(inner, &token.content) || (checked && inner.token_to_id(&token.content).is_none())
        {
            continue;
        }
        inner.add_tokens([token]).map_err(|e| broken(path, &e.to_string()))?;
    }
    Ok(())
}

/// Named tokens that must be in the vocabulary.
const CHECKED: [&str; 2] = ["eos_token", "bos_token"];

fn broken(path: &Path, why: &str) -> Error {
    let why: String = why.chars().take(200).collect();
    let message = format!(
        "not a readable tokenizer ({why}); download the file again, or save it again with \
         transformers"
    );
    Error::model(path, message)
}

fn missing_tokenizer(dir: &Path) -> String {
    let sentencepiece =
        ["tokenizer.model", "spiece.model", "vocab.json"].iter().find(|f| dir.join(f).is_file());
    match sentencepiece {
        Some(f) => format!(
            "has {f} but no tokenizer.json; convert it once with transformers: \
             AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        ),
        None => "has no tokenizer.json; copy it from the model's repository".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::bpe;

    fn tiny(dir: &Path) -> Tokenizer {
        let texts = ["one two three two one", "naïve 日本語 🙂 one two"];
        let trained =
            bpe::train_bpe(texts.into_iter(), 300, &["<|end|>", "<|pad|>"], true).unwrap();
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
        assert_eq!(
            (t.eos_token(), t.pad_token(), t.bos_id()),
            (Some("<|end|>"), Some("<|pad|>"), None)
        );
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
        for text in [
            "",
            "{",
            "[]",
            "{\"version\":\"1.0\",\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[\"a b\"]}}",
        ] {
            assert!(
                said(text).contains("tokenizer.json: not a readable tokenizer"),
                "{}",
                said(text)
            );
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(
            Tokenizer::load(empty.path())
                .map(|_| ())
                .unwrap_err()
                .to_string()
                .contains("no tokenizer.json")
        );
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
