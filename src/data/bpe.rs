//! Trains a small byte-level BPE tokenizer and writes it as a folder that transformers can load.
//! Layer 6.
//!
//! Invariant: the same texts give the same files, byte for byte.

use std::path::Path;

use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use super::panics::caught;
use crate::error::{Error, Result};

/// A trained tokenizer, not yet written to a folder.
pub struct TrainedBpe {
    json: String,
}

/// Trains on `texts` up to `vocab_size` tokens: first the special tokens, then the 256 bytes, then
/// merges. With `split_digits` each digit is a separate token, as in most large families; without
/// it, frequent numbers become single tokens.
pub fn train_bpe<'a>(
    texts: impl Iterator<Item = &'a str>,
    vocab_size: usize,
    special_tokens: &[&str],
    split_digits: bool,
) -> Result<TrainedBpe> {
    if vocab_size < 256 + special_tokens.len() {
        let least = 256 + special_tokens.len();
        return Err(Error::Config(format!(
            "vocab_size={vocab_size} is below {least}: 256 bytes and the special tokens"
        )));
    }
    let texts: Vec<&str> = texts.collect();
    let special = special_tokens.iter().map(|t| AddedToken::from(t.to_string(), true)).collect();
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    // Both settings separate numbers from the surrounding text.
    let splits: Vec<PreTokenizerWrapper> =
        vec![Digits::new(split_digits).into(), ByteLevel::default().add_prefix_space(false).into()];
    let trained = caught(|| -> tokenizers::Result<String> {
        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer
            .with_pre_tokenizer(Some(Sequence::new(splits)))
            .with_decoder(Some(ByteLevel::default()))
            .train(&mut trainer, texts.into_iter())?;
        tokenizer.to_string(false)
    });
    match trained {
        Ok(Ok(json)) => Ok(TrainedBpe { json }),
        Ok(Err(e)) => Err(Error::Run(format!("training the tokenizer failed: {e}"))),
        Err(panic) => Err(Error::Run(format!("training the tokenizer failed: {panic}"))),
    }
}

impl TrainedBpe {
    /// The text of tokenizer.json.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Writes tokenizer.json, tokenizer_config.json and, if there is a template,
    /// chat_template.jinja into `dir`.
    pub fn write(
        &self,
        dir: &Path,
        eos: &str,
        pad: &str,
        chat_template: Option<&str>,
    ) -> Result<()> {
        let config = json!({
            "clean_up_tokenization_spaces": false,
            "eos_token": eos,
            "pad_token": pad,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let put = |name: &str, text: &str| {
            let path = dir.join(name);
            std::fs::write(&path, text).map_err(|e| Error::io(path, e))
        };
        put("tokenizer.json", &self.json)?;
        put("tokenizer_config.json", &format!("{config:#}\n"))?;
        chat_template.map_or(Ok(()), |source| put("chat_template.jinja", source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn training_twice_gives_the_same_bytes() {
        let texts: Vec<String> =
            (0..200).map(|i| format!("Tom has {i} apples and buys {} more.", i * 7 % 13)).collect();
        let train = || {
            train_bpe(texts.iter().map(String::as_str), 400, &["<|end|>"], true)
                .unwrap()
                .json()
                .to_string()
        };
        assert_eq!(train(), train());
        assert!(train_bpe(std::iter::empty(), 256, &["<|end|>"], true).is_err());
    }
}
