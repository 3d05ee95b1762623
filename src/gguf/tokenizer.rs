//! Tokenizer files from the metadata of a GGUF file. Layer 6.
//!
//! Invariant: if the metadata do not determine something, the error names what is missing; every
//! token keeps its id.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::pieces::{kind, merges_of};
use super::pre::PreTokenizer;
use super::read::GgufFile;
use crate::error::{Error, Result};
use crate::model::folder::NamedFiles;

/// The names of special tokens in GGUF files and in tokenizer_config.json.
pub const SPECIAL: [(&str, &str); 4] = [
    ("bos", "bos_token"),
    ("eos", "eos_token"),
    ("unknown", "unk_token"),
    ("padding", "pad_token"),
];

/// Tokens that end a text: `eos`, and the others beside it.
const ENDS: [&str; 3] = ["eos", "eot", "eom"];

/// The tokenizer of a file in the form of Hugging Face's files.
pub struct GgufTokenizer {
    pub files: NamedFiles,
    pub generation_config: Map<String, Value>,
}

/// Reads `tokenizer.*` of a file whose model has `rows` token embeddings.
pub fn tokenizer_of(file: &GgufFile, rows: usize) -> Result<GgufTokenizer> {
    let bad = |message: String| Err(Error::model(file.path(), message));
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let Some(model) = file.text(&key("model"))? else {
        return bad(format!("has no tokenizer: no {}", key("model")));
    };
    let Some(tokens) = file.texts(&key("tokens"))? else {
        return bad(format!("has no {}, so its tokenizer is incomplete", key("tokens")));
    };
    if tokens.len() > rows {
        return bad(format!("has {} tokens, but only {rows} embeddings", tokens.len()));
    }
    let Some(kinds) = file.ints(&key("token_type"))? else {
        return bad(format!("has no {}, so its special tokens are unknown", key("token_type")));
    };
    if kinds.len() != tokens.len() {
        return bad(format!("has {} tokens and {} token types", tokens.len(), kinds.len()));
    }
    let mut vocab = Map::new();
    for (id, (token, kind)) in tokens.iter().zip(&kinds).enumerate() {
        if *kind != kind::UNUSED && vocab.insert(token.to_string(), json!(id)).is_some() {
            return bad(format!("has the token {token:?} twice (again as {id})"));
        }
    }
    let added: Vec<Value> = tokens
        .iter()
        .zip(&kinds)
        .enumerate()
        .filter(|(_, (_, kind))| [kind::CONTROL, kind::USER, kind::UNKNOWN].contains(kind))
        .map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind != kind::USER
            })
        })
        .collect();
    let mut special = BTreeMap::new();
    for (name, _) in SPECIAL {
        if let Some(id) = file.unsigned(&key(&format!("{name}_token_id")))? {
            match usize::try_from(id).ok().and_then(|id| Some((id, *tokens.get(id)?))) {
                Some(found) => drop(special.insert(name, found)),
                None => return bad(format!("{} is {id}; there is no such token", key(name))),
            }
        }
    }
    let (mut json, adds_bos) = match model {
        "gpt2" => bytes_bpe(file, vocab)?,
        "llama" => pieces_bpe(file, vocab, &tokens, &kinds, special.get("unknown").map(|t| t.1))?,
        other => {
            return bad(format!(
                "has a tokenizer of the model {other:?}; supported: gpt2 (byte-level BPE) and \
                 llama (sentencepiece BPE). Use the model's own folder instead"
            ));
        }
    };
    let adds_bos = file.flag(&key("add_bos_token"))?.unwrap_or(adds_bos);
    let adds_eos = file.flag(&key("add_eos_token"))?.unwrap_or(false);
    let wanted = [("bos", adds_bos), ("eos", adds_eos)].into_iter().filter(|w| w.1);
    for (name, _) in wanted.clone() {
        if !special.contains_key(name) {
            return bad(format!("adds {name} to a text, but has no {}", key(name) + "_token_id"));
        }
    }
    let ends: Vec<&str> = wanted.map(|w| w.0).collect();
    json["added_tokens"] = json!(added);
    json["post_processor"] = post_processor(&ends, &special);
    let config = tokenizer_config(file, &special, adds_bos, adds_eos)?;
    let mut files: NamedFiles = vec![
        ("tokenizer.json".into(), pretty(&json)),
        ("tokenizer_config.json".into(), pretty(&config)),
    ];
    if let (Some(template), false) =
        (file.text("tokenizer.chat_template")?, config.get("chat_template").is_some())
    {
        files.push(("chat_template.jinja".into(), template.as_bytes().to_vec()));
    }
    Ok(GgufTokenizer { files, generation_config: generation_config(file)? })
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// The pairs of the merges, which are stored as `left right`. A token may begin with a space.
fn merges(file: &GgufFile) -> Result<Option<Vec<[&str; 2]>>> {
    const KEY: &str = "tokenizer.ggml.merges";
    let Some(list) = file.texts(KEY)? else { return Ok(None) };
    let pair = |(i, merge): (usize, &&'_ str)| {
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        at.ok_or_else(|| {
            let message = format!("{KEY}[{i}] is {merge:?}; it must be two tokens and a space");
            Error::model(file.path(), message)
        })
    };
    let places = list.iter().enumerate().map(pair).collect::<Result<Vec<usize>>>()?;
    Ok(Some(list.iter().zip(places).map(|(m, at)| [&m[..at], &m[at + 1..]]).collect()))
}

/// A byte-level BPE: tokenizer.json without the common parts, and whether it adds BOS by default.
fn bytes_bpe(file: &GgufFile, vocab: Map<String, Value>) -> Result<(Value, bool)> {
    let bad = |message: String| Err(Error::model(file.path(), message));
    let known = PreTokenizer::names();
    let name = file.text("tokenizer.ggml.pre")?;
    let Some(pre) = name.and_then(PreTokenizer::named) else {
        let what = match name {
            None => "has no tokenizer.ggml.pre".to_string(),
            Some(name) => format!("tokenizer.ggml.pre is {name:?}, which is not supported"),
        };
        return bad(format!(
            "{what}, so the split of text into words is unknown. Supported: {known}. Use the \
             tokenizer of the model's own folder"
        ));
    };
    let Some(merges) = merges(file)? else {
        return bad("has no tokenizer.ggml.merges, so its tokenizer is incomplete".into());
    };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": pre.nfc.then(|| json!({ "type": "NFC" })),
        "pre_tokenizer": pre.json(),
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.ignore_merges, "vocab": vocab, "merges": merges
        }
    });
    Ok((json, pre.adds_bos))
}

/// A sentencepiece BPE with byte tokens for unknown characters. Its merges follow from the scores.
fn pieces_bpe(
    file: &GgufFile,
    vocab: Map<String, Value>,
    tokens: &[&str],
    kinds: &[i32],
    unknown: Option<&str>,
) -> Result<(Value, bool)> {
    let bad = |message: String| Err(Error::model(file.path(), message));
    let Some(scores) = file.floats("tokenizer.ggml.scores")? else {
        return bad("has no tokenizer.ggml.scores, so the order of merges is unknown".into());
    };
    if scores.len() != tokens.len() {
        return bad(format!("has {} tokens and {} scores", tokens.len(), scores.len()));
    }
    let Some(unknown) = unknown else {
        return bad("has no tokenizer.ggml.unknown_token_id, so its tokenizer is incomplete".into());
    };
    let lacking = (0..=255u8).map(|b| format!("<0x{b:02X}>")).find(|t| !vocab.contains_key(t));
    if let Some(token) = lacking {
        return bad(format!(
            "has no token {token}, so characters without a token cannot be encoded"
        ));
    }
    if file.get("tokenizer.ggml.precompiled_charsmap").is_some()
        || file.flag("tokenizer.ggml.remove_extra_whitespaces")? == Some(true)
    {
        return bad("normalises text as sentencepiece can (precompiled_charsmap, \
                    remove_extra_whitespaces), which is not supported; use the tokenizer of the \
                    model's own folder"
            .into());
    }
    let Some(merges) = merges_of(tokens, kinds, &scores) else {
        return bad("tokenizer.ggml.scores are all equal, so the order of merges is unknown".into());
    };
    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let normalizers: Vec<Value> = prefix
        .then(|| json!({ "type": "Prepend", "prepend": "▁" }))
        .into_iter()
        .chain([replace(" ", "▁")])
        .collect();
    let decoders: Vec<Value> =
        [replace("▁", " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })]
            .into_iter()
            .chain(
                prefix.then(|| json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 })),
            )
            .collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges
        }
    });
    Ok((json, true))
}

fn post_processor(ends: &[&str], special: &BTreeMap<&str, (usize, &str)>) -> Value {
    if ends.is_empty() {
        return Value::Null;
    }
    let token = |name: &str, kind: usize| {
        let text = special.get(name).map_or("", |t| t.1);
        json!({ "SpecialToken": { "id": text, "type_id": kind } })
    };
    let part = |id: &str, kind: usize| {
        let mut out = Vec::new();
        out.extend(ends.contains(&"bos").then(|| token("bos", kind)));
        out.push(json!({ "Sequence": { "id": id, "type_id": kind } }));
        out.extend(ends.contains(&"eos").then(|| token("eos", kind)));
        out
    };
    let tokens: Map<String, Value> = ends
        .iter()
        .filter_map(|name| special.get(name))
        .map(|(id, text)| (text.to_string(), json!({ "id": text, "ids": [id], "tokens": [text] })))
        .collect();
    let (single, pair) = (part("A", 0), [part("A", 0), part("B", 1)].concat());
    json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens })
}

fn tokenizer_config(
    file: &GgufFile,
    special: &BTreeMap<&str, (usize, &str)>,
    adds_bos: bool,
    adds_eos: bool,
) -> Result<Value> {
    let mut config = json!({
        "add_bos_token": adds_bos, "add_eos_token": adds_eos, "clean_up_tokenization_spaces": false,
        "tokenizer_class": "PreTrainedTokenizerFast"
    });
    if let Some(arch) = file.text("general.architecture")? {
        let length = file.unsigned(&format!("{arch}.context_length"))?;
        config["model_max_length"] = json!(length);
    }
    for (name, key) in SPECIAL {
        if let Some((_, text)) = special.get(name) {
            config[key] = json!(text);
        }
    }
    // Named templates; the one without a name is `default`.
    if let Some(names) = file.texts("tokenizer.chat_templates")? {
        let mut list = Vec::new();
        if let Some(text) = file.text("tokenizer.chat_template")? {
            list.push(json!({ "name": "default", "template": text }));
        }
        for name in names {
            let Some(text) = file.text(&format!("tokenizer.chat_template.{name}"))? else {
                let message = format!(
                    "lists the chat template {name}, but has no tokenizer.chat_template.{name}"
                );
                return Err(Error::model(file.path(), message));
            };
            list.push(json!({ "name": name, "template": text }));
        }
        config["chat_template"] = json!(list);
    }
    Ok(config)
}

fn generation_config(file: &GgufFile) -> Result<Map<String, Value>> {
    let id = |name: &str| file.unsigned(&format!("tokenizer.ggml.{name}_token_id"));
    let mut out = Map::new();
    if let Some(bos) = id("bos")? {
        out.insert("bos_token_id".into(), json!(bos));
    }
    let mut ends = Vec::new();
    for name in ENDS {
        ends.extend(id(name)?.filter(|e| !ends.contains(e)));
    }
    match ends.as_slice() {
        [] => {}
        [one] => drop(out.insert("eos_token_id".into(), json!(one))),
        several => drop(out.insert("eos_token_id".into(), json!(several))),
    }
    if let Some(pad) = id("padding")? {
        out.insert("pad_token_id".into(), json!(pad));
    }
    Ok(out)
}
