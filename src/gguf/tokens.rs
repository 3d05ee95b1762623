//! A tokenizer as metadata of a GGUF file. Layer 6.
//!
//! Invariant: what a GGUF file cannot say of a tokenizer is an error, not left out.

use std::path::Path;

use serde_json::Value;

use super::pieces::kind;
use super::pieces::scores_of;
use super::pre::{PreTokenizer, steps_of};
use super::tokenizer::SPECIAL;
use super::write::MetaEntry;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::layout::ModelConfig;

/// What [`entries_of`] reads of a tokenizer.
struct Parts<'a> {
    path: &'a Path,
    json: &'a Value,
    tokens: Vec<String>,
    kinds: Vec<i32>,
}

/// `tokenizer.*` of a model's file. `ends`: the ids that end a text, the tokenizer's EOS among them.
pub fn entries_of(
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    ends: &[u32],
    notes: &mut Vec<String>,
) -> Result<Vec<(String, MetaEntry)>> {
    let path = tokenizer.dir().join("tokenizer.json");
    let json: Value = serde_json::from_slice(&crate::fsio::read(&path)?)
        .map_err(|e| Error::model(&path, format!("is not JSON: {e}")))?;
    let rows = config.vocab_size;
    if tokenizer.vocab_size() > rows {
        let n = tokenizer.vocab_size();
        return Err(Error::model(
            &path,
            format!("has {n} tokens, but the model has {rows} embeddings"),
        ));
    }
    let mut parts = Parts { path: &path, json: &json, tokens: Vec::new(), kinds: Vec::new() };
    let pieces = json["model"]["byte_fallback"] == Value::Bool(true);
    for id in 0..rows as u32 {
        let token = tokenizer.id_to_token(id);
        let (text, kind) = match (token, tokenizer.added_token(id)) {
            (None, _) => (format!("[PAD{id}]"), kind::UNUSED),
            (Some(text), Some(special)) => {
                let unknown = pieces
                    && tokenizer.special_tokens().get("unk_token").is_some_and(|u| *u == text);
                let kind = match special {
                    _ if unknown => kind::UNKNOWN,
                    true => kind::CONTROL,
                    false => kind::USER,
                };
                (text, kind)
            }
            (Some(text), None) if pieces && is_byte(&text) => (text, kind::BYTE),
            (Some(text), None) => (text, kind::NORMAL),
        };
        parts.tokens.push(text);
        parts.kinds.push(kind);
    }
    let mut out = if pieces { pieces_bpe(&parts, notes)? } else { bytes_bpe(&parts)? };
    let mut put = |key: &str, entry| out.push((format!("tokenizer.{key}"), entry));
    let (bos, eos) = added_ends(tokenizer, &path)?;
    put("ggml.add_bos_token", MetaEntry::Bool(bos));
    put("ggml.add_eos_token", MetaEntry::Bool(eos));
    for (name, key) in SPECIAL {
        let named = tokenizer.special_tokens().get(key).and_then(Value::as_str);
        let id = named.and_then(|text| tokenizer.token_to_id(text)).or(match name {
            "bos" => config.bos,
            "eos" => config.eos.first().copied(),
            "padding" => config.pad,
            _ => None,
        });
        if let Some(id) = id {
            put(&format!("ggml.{name}_token_id"), MetaEntry::U32(id));
        }
    }
    let eos = tokenizer.eos_id().or(config.eos.first().copied());
    let mut more = ends.iter().filter(|id| Some(**id) != eos);
    for (name, id) in ["eot", "eom"].iter().zip(more.by_ref()) {
        put(&format!("ggml.{name}_token_id"), MetaEntry::U32(*id));
    }
    for id in more {
        notes.push(format!("a GGUF file has no place for a fourth token that ends a text: {id}"));
    }
    if let Some(template) = tokenizer.chat_template() {
        put("chat_template", MetaEntry::Text(template.into()));
    }
    let named: Vec<&(String, String)> =
        tokenizer.templates().iter().filter(|t| t.0 != "default").collect();
    if !named.is_empty() {
        put("chat_templates", MetaEntry::Texts(named.iter().map(|t| t.0.clone()).collect()));
        for (name, template) in named {
            put(&format!("chat_template.{name}"), MetaEntry::Text(template.clone()));
        }
    }
    Ok(out)
}

/// `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|h| h.len() == 2 && h.chars().all(|c| c.is_ascii_hexdigit()))
}

impl Parts<'_> {
    fn bad<T>(&self, why: impl std::fmt::Display) -> Result<T> {
        let message = format!("cannot be expressed in a GGUF file: {why}");
        Err(Error::model(self.path, message))
    }

    fn common(&self, model: &str, pre: &str) -> Vec<(String, MetaEntry)> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        vec![
            (key("model"), MetaEntry::Text(model.into())),
            (key("pre"), MetaEntry::Text(pre.into())),
            (key("tokens"), MetaEntry::Texts(self.tokens.clone())),
            (key("token_type"), MetaEntry::Ints(self.kinds.clone())),
        ]
    }

    /// Merges of tokenizer.json, in its new form (pairs) or its old (`left right`).
    fn merges(&self) -> Result<Vec<[&str; 2]>> {
        if self.json["model"]["type"] != "BPE" {
            return self.bad(format_args!("its model is {}, not BPE", self.json["model"]["type"]));
        }
        let list = self.json["model"]["merges"].as_array().map_or(&[][..], Vec::as_slice);
        let mut out = Vec::with_capacity(list.len());
        for merge in list {
            match pair_of(merge) {
                Some(two) => out.push(two),
                None => return self.bad(format_args!("{merge} is not a merge")),
            }
        }
        Ok(out)
    }
}

fn pair_of(merge: &Value) -> Option<[&str; 2]> {
    match merge {
        Value::String(text) => text.split_once(' ').map(|(a, b)| [a, b]),
        Value::Array(two) => Some([two.first()?.as_str()?, two.get(1)?.as_str()?]),
        _ => None,
    }
}

fn bytes_bpe(parts: &Parts) -> Result<Vec<(String, MetaEntry)>> {
    let merges = parts.merges()?;
    let (pre, normalizer) = (&parts.json["pre_tokenizer"], &parts.json["normalizer"]);
    let nfc = normalizer["type"] == "NFC";
    if !normalizer.is_null() && !nfc {
        return parts.bad(format_args!("its normalizer is {}", normalizer["type"]));
    }
    let ignore = parts.json["model"]["ignore_merges"] == Value::Bool(true);
    let found = steps_of(pre).and_then(|steps| PreTokenizer::of_steps(&steps, nfc, ignore));
    let Some(found) = found else {
        return parts.bad(format_args!(
            "its combination of pre_tokenizer, normalizer and ignore_merges has no name in GGUF \
             files (these do: {}): {pre}",
            PreTokenizer::names()
        ));
    };
    // The file joins two tokens with a space.
    if let Some([left, right]) = merges.iter().find(|m| m[0].contains(' ') || m[1].contains(' ')) {
        return parts.bad(format_args!("the merge of {left:?} and {right:?} has a space"));
    }
    let mut out = parts.common("gpt2", found.name);
    let merges = merges.iter().map(|[left, right]| format!("{left} {right}")).collect();
    out.push(("tokenizer.ggml.merges".into(), MetaEntry::Texts(merges)));
    Ok(out)
}

fn pieces_bpe(parts: &Parts, notes: &mut Vec<String>) -> Result<Vec<(String, MetaEntry)>> {
    let merges = parts.merges()?;
    let Some(prefix) = space_prefix(parts.json, notes) else {
        return parts.bad(format_args!(
            "its normalizer {} and pre_tokenizer {} differ from those of sentencepiece",
            parts.json["normalizer"], parts.json["pre_tokenizer"]
        ));
    };
    let tokens: Vec<&str> = parts.tokens.iter().map(String::as_str).collect();
    let Some(scores) = scores_of(&tokens, &parts.kinds, &merges) else {
        return parts.bad("its merges cannot be expressed as one score per token");
    };
    let mut out = parts.common("llama", "default");
    out.push(("tokenizer.ggml.scores".into(), MetaEntry::Floats(scores)));
    out.push(("tokenizer.ggml.add_space_prefix".into(), MetaEntry::Bool(prefix)));
    Ok(out)
}

/// Whether a text gets a space before it; None: spaces are not handled as sentencepiece does.
fn space_prefix(json: &Value, notes: &mut Vec<String>) -> Option<bool> {
    let (normalizer, pre) = (&json["normalizer"], &json["pre_tokenizer"]);
    let steps = match normalizer["type"].as_str() {
        Some("Sequence") => normalizer["normalizers"].as_array().map_or(&[][..], Vec::as_slice),
        Some(_) => std::slice::from_ref(normalizer),
        None => &[],
    };
    let is_replace =
        |s: &Value| s["type"] == "Replace" && s["pattern"]["String"] == " " && s["content"] == "▁";
    let is_prepend = |s: &Value| s["type"] == "Prepend" && s["prepend"] == "▁";
    match (steps, pre["type"].as_str()) {
        ([prepend, replace], None) if is_prepend(prepend) && is_replace(replace) => Some(true),
        // Gemma's splits at spaces that are no longer there.
        ([replace], None | Some("Split")) if is_replace(replace) => Some(false),
        ([], Some("Metaspace"))
            if pre["replacement"] == "▁" && pre["split"] == Value::Bool(false) =>
        {
            match pre["prepend_scheme"].as_str() {
                Some("never") => Some(false),
                Some("always") => Some(true),
                _ => {
                    notes.push(
                        "the tokenizer of a GGUF file adds the space before a text also after \
                         each special token in it"
                            .into(),
                    );
                    Some(true)
                }
            }
        }
        _ => None,
    }
}

/// Whether the tokenizer puts BOS before a text and EOS behind it.
fn added_ends(tokenizer: &Tokenizer, path: &Path) -> Result<(bool, bool)> {
    let (plain, with) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
    for (bos, eos) in [(false, false), (true, false), (false, true), (true, true)] {
        let ends = |on: bool, id: Option<u32>| id.filter(|_| on);
        let wanted: Vec<u32> = ends(bos, tokenizer.bos_id())
            .into_iter()
            .chain(plain.iter().copied())
            .chain(ends(eos, tokenizer.eos_id()))
            .collect();
        if wanted == with {
            return Ok((bos, eos));
        }
    }
    let message =
        "cannot be expressed in a GGUF file: its post_processor adds tokens other than BOS and EOS";
    Err(Error::model(path, message))
}
