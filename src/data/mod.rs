//! From a folder and a data file to token rows. Layer 6.
//!
//! Invariant: the same files, options and seed give the same examples in the same order on every
//! machine, and a row that cannot be used is an error or a counted drop, never a silent change.
//!
//! | module | what it gives |
//! |---|---|
//! | [`tokenizer`] | text to ids and back, special tokens, the files a model writer copies |
//! | [`bpe`] | trains a small byte-level BPE and writes it as a folder |
//! | [`chat`] | renders a model's chat template, with the spans of `{% generation %}` |
//! | [`jinja`] | what Python and Jinja2 do and minijinja does not |
//! | `template` | reads a template as Jinja2 does and bounds what it may do |
//! | [`row`] | a row, with its file and line |
//! | [`rows`] | rows of files at the default options |
//! | [`read`] | rows of files: JSON, csv, parquet, arrow, compressed, in folders |
//! | [`bad`] | rows that cannot be used: an error, or counted and dropped |
//! | [`mod@format`] | TRL's dataset types, detected and checked |
//! | [`render`] | conversations, prompts and end tokens to ids: one function each for all commands |
//! | [`continuation`] | what the template writes from the end of one turn to the model's next |
//! | [`sft`] | rows to ids and loss masks, as TRL's SFTTrainer does |
//! | [`preference`] | preference rows to ids and masks, as TRL's other trainers do |
//! | [`masked`] | a sequence with its loss targets, cut to a length |
//! | [`mixture`] | which rows of weighted sources a run has |
//! | [`feed`] | rows from their files to what tokenises them, a batch at a time |
//! | [`spill`] | rows that must be known in full first |
//! | [`store`] | tokenised rows, flat |
//! | [`token_file`] | their tokens in a file, as they are made |
//! | [`cache`] | the file for the next start |
//! | [`split`] | training rows or evaluation rows |
//! | [`packing`] | which sequences share a row |
//! | `turns` | where the assistant speaks, for templates that do not say it |
//! | [`order`] | the order of rows as a function of (seed, epoch) |

pub mod bad;
pub mod bpe;
pub mod cache;
pub mod chat;
pub mod continuation;
pub mod feed;
mod folder;
pub mod format;
pub mod jinja;
pub mod masked;
pub mod mixture;
pub mod order;
pub mod packing;
mod panics;
pub mod preference;
pub mod read;
pub mod render;
pub mod row;
pub mod rows;
pub mod sft;
pub mod spill;
pub mod split;
pub mod store;
mod template;
pub mod token_file;
pub mod tokenizer;
pub mod turns;
