//! The pre-tokenizers that `tokenizer.ggml.pre` names. Layer 6.
//!
//! Invariant: a name stands for one sequence of steps, in both directions; a name or a sequence
//! that is not in the table is an error.

use serde_json::{Value, json};

/// A step of a pre-tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PreStep {
    /// Each match of the pattern becomes a piece.
    Split(String),
    /// Each digit becomes a piece.
    Digits,
    /// Maps bytes to characters; with `true`, first splits by GPT-2's pattern.
    Bytes(bool),
}

/// The pre-tokenizer of a byte-level BPE, as a GGUF file names it.
#[derive(Debug)]
pub struct PreTokenizer {
    pub name: &'static str,
    /// Other names of the same pre-tokenizer.
    aliases: &'static [&'static str],
    split: Option<&'static str>,
    digits: bool,
    /// Whether text is first normalised to NFC.
    pub nfc: bool,
    /// Whether a piece that is a token becomes that token, regardless of the merges.
    pub ignore_merges: bool,
    /// Whether BOS is added if the file does not say so.
    pub adds_bos: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: PreTokenizer = PreTokenizer {
    name: "gpt-2",
    aliases: &[],
    split: None,
    digits: false,
    nfc: false,
    ignore_merges: false,
    adds_bos: false,
};

const TABLE: &[PreTokenizer] = &[
    PLAIN,
    PreTokenizer { name: "smollm", aliases: &["starcoder", "refact"], digits: true, ..PLAIN },
    PreTokenizer {
        name: "llama-bpe",
        aliases: &["llama3", "llama-v3", "lfm2"],
        split: Some(LLAMA3),
        ignore_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    PreTokenizer { name: "dbrx", split: Some(LLAMA3), ..PLAIN },
    PreTokenizer {
        name: "qwen2",
        aliases: &["deepseek-r1-qwen"],
        split: Some(QWEN2),
        nfc: true,
        ..PLAIN
    },
    PreTokenizer {
        name: "tekken",
        split: Some(TEKKEN),
        ignore_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    PreTokenizer { name: "gpt-4o", split: Some(GPT4O), ..PLAIN },
];

impl PreTokenizer {
    pub fn named(name: &str) -> Option<&'static PreTokenizer> {
        TABLE.iter().find(|p| p.name == name || p.aliases.contains(&name))
    }

    /// The pre-tokenizer with these steps.
    pub fn of_steps(steps: &[PreStep], nfc: bool, ignore_merges: bool) -> Option<&'static Self> {
        TABLE
            .iter()
            .find(|p| p.steps() == steps && p.nfc == nfc && p.ignore_merges == ignore_merges)
    }

    /// All names, for messages.
    pub fn names() -> String {
        let all = TABLE.iter().flat_map(|p| std::iter::once(&p.name).chain(p.aliases));
        all.copied().collect::<Vec<_>>().join(", ")
    }

    fn steps(&self) -> Vec<PreStep> {
        let split = self.split.map(|s| PreStep::Split(s.to_string()));
        let digits = self.digits.then_some(PreStep::Digits);
        split.into_iter().chain(digits).chain([PreStep::Bytes(self.split.is_none())]).collect()
    }

    /// `pre_tokenizer` of a tokenizer.json.
    pub fn json(&self) -> Value {
        let one = |step: PreStep| match step {
            PreStep::Split(pattern) => json!({
                "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false
            }),
            PreStep::Digits => json!({ "type": "Digits", "individual_digits": true }),
            PreStep::Bytes(regex) => json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex
            }),
        };
        let mut steps: Vec<Value> = self.steps().into_iter().map(one).collect();
        match steps.len() {
            1 => steps.remove(0),
            _ => json!({ "type": "Sequence", "pretokenizers": steps }),
        }
    }
}

/// The steps of a tokenizer.json's `pre_tokenizer`. None: a step cannot be represented.
pub fn steps_of(pre: &Value) -> Option<Vec<PreStep>> {
    let flag = |key: &str| pre[key].as_bool();
    match pre["type"].as_str()? {
        "Sequence" => {
            let parts = pre["pretokenizers"].as_array()?.iter().map(steps_of);
            Some(parts.collect::<Option<Vec<_>>>()?.concat())
        }
        "Split" if pre["behavior"] == "Isolated" && flag("invert") != Some(true) => {
            Some(vec![PreStep::Split(pre["pattern"]["Regex"].as_str()?.to_string())])
        }
        "Digits" if flag("individual_digits") == Some(true) => Some(vec![PreStep::Digits]),
        "ByteLevel" if flag("add_prefix_space") == Some(false) => {
            Some(vec![PreStep::Bytes(flag("use_regex").unwrap_or(true))])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_its_steps_are_one() {
        for pre in TABLE {
            let steps = steps_of(&pre.json()).unwrap();
            let found = PreTokenizer::of_steps(&steps, pre.nfc, pre.ignore_merges).unwrap();
            assert_eq!(found.name, pre.name);
            for alias in pre.aliases {
                assert_eq!(PreTokenizer::named(alias).unwrap().name, pre.name);
            }
        }
        assert!(PreTokenizer::named("default").is_none());
        assert_eq!(steps_of(&json!({ "type": "Metaspace" })), None);
    }
}
