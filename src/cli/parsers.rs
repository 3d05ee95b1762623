//! What the arguments of several commands may be. Layer 9.
//!
//! Invariant: a number that passes can be multiplied with another without an overflow.

use std::path::PathBuf;

use crate::autograd::Recompute;
use crate::error::{Error, Result};

/// The largest number that an argument may be, and the most tokens that a batch may have.
const MOST: usize = 1 << 20;
const MOST_TOKENS: usize = 1 << 26;

/// A number of rows, tokens, repetitions, GiB.
pub fn count(text: &str) -> std::result::Result<usize, String> {
    let number = text.replace('_', "").parse().ok().filter(|n| (1..=MOST).contains(n));
    number.ok_or_else(|| format!("must be a whole number from 1 to {MOST}"))
}

/// What a backward pass computes again.
pub fn recompute(text: &str) -> std::result::Result<Recompute, String> {
    match text {
        "light" => Ok(Recompute::Light),
        "layers" => Ok(Recompute::Layers),
        _ => Err("must be light or layers".into()),
    }
}

/// A file or folder that is replaced whole when it is written; standard output is none.
pub fn file(text: &str) -> std::result::Result<PathBuf, String> {
    match text {
        "-" | "" => Err("must name a file or a folder; give ./- for a file of that name".into()),
        _ => Ok(text.into()),
    }
}

/// A batch of random rows is made before anything else is: it must fit in memory.
pub fn check_tokens(batch: usize, length: usize) -> Result<()> {
    if batch * length > MOST_TOKENS {
        return Err(Error::Config(format!(
            "--batch {batch} times --length {length} is more than {MOST_TOKENS} tokens; lower one"
        )));
    }
    Ok(())
}
