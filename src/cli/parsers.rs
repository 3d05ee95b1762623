//! Parsers of arguments that several commands have. Layer 9.
//!
//! Invariant: the product of two accepted numbers does not overflow.

use std::path::PathBuf;

use crate::autograd::Recompute;
use crate::error::{Error, Result};

/// The largest number that an argument accepts, and the most tokens of a batch.
const MOST: usize = 1 << 20;
const MOST_TOKENS: usize = 1 << 26;

/// Parses a number of rows, tokens, repetitions or GiB.
pub fn count(text: &str) -> std::result::Result<usize, String> {
    let number = text.replace('_', "").parse().ok().filter(|n| (1..=MOST).contains(n));
    number.ok_or_else(|| format!("must be a whole number from 1 to {MOST}"))
}

/// Parses what the backward pass recomputes.
pub fn recompute(text: &str) -> std::result::Result<Recompute, String> {
    match text {
        "light" => Ok(Recompute::Light),
        "layers" => Ok(Recompute::Layers),
        _ => Err("must be light or layers".into()),
    }
}

/// Parses a file or folder that is replaced as a whole when it is written, so not standard output.
pub fn file(text: &str) -> std::result::Result<PathBuf, String> {
    match text {
        "-" | "" => Err("must be a file or a folder; give ./- for a file named -".into()),
        _ => Ok(text.into()),
    }
}

/// Error: a batch of random rows, which is made before anything else, would be too large for
/// memory.
pub fn check_tokens(batch: usize, length: usize) -> Result<()> {
    if batch * length > MOST_TOKENS {
        return Err(Error::Config(format!(
            "--batch {batch} times --length {length} is more than {MOST_TOKENS} tokens; lower one"
        )));
    }
    Ok(())
}
