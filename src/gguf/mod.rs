//! GGUF files in and out: the format, the blocks of its types, and what a model's metadata and
//! tokenizer are there. Layer 6.
//!
//! Invariant: a file is believed only where it was checked, and what a format cannot say is an
//! error or a note, never a guess. The names of families are in `model::families::gguf`.

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
