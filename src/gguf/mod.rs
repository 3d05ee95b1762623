//! Reads and writes GGUF files: the format, the blocks of its types, and the metadata of models and
//! tokenizers. Layer 6.
//!
//! Invariant: everything read from a file is checked first. What the format cannot represent is an
//! error or a note, never a guess. `model::families::gguf` has the names of the families.

pub mod blocks;
pub mod config;
pub mod convert;
pub mod entries;
pub mod export;
pub mod pieces;
pub mod pre;
pub mod read;
pub mod rope;
pub mod same;
pub mod tokenizer;
pub mod tokens;
pub mod values;
pub mod write;
