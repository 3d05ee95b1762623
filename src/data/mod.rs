//! From a folder and a data file to token rows. Layer 6.
//!
//! Invariant: the same files, options and seed give the same examples in the same order on every
//! machine; a row that cannot be used is an error or a counted drop, never a silent change.
//!
//! | module | content |
//! |---|---|
//! | [`tokenizer`] | text to ids and back, special tokens, the files that a model writer copies |
//! | [`bpe`] | trains a small byte-level BPE and writes it as a folder |
//! | [`chat`] | renders a model's chat template, with the spans of `{% generation %}` |
//! | [`jinja`] | features of Python and Jinja2 that minijinja lacks |
//! | `template` | reads a template like Jinja2 and bounds the work it may do |
//! | [`row`] | a row, with its file and line |
//! | [`rows`] | rows of files at the default options |
//! | [`read`] | rows of files: JSON, csv, parquet, arrow, compressed, in folders |
//! | [`bad`] | bad rows: an error, or counted and dropped |
//! | [`mod@format`] | TRL's dataset types, detected and checked |
//! | [`render`] | conversations, prompts and end tokens to ids, shared by all commands |
//! | [`continuation`] | the tokens of the template between one turn of the model and the next |
//! | [`sft`] | rows to ids and loss masks, as TRL's SFTTrainer does |
//! | [`preference`] | preference rows to ids and masks, as TRL's other trainers do |
//! | [`masked`] | a sequence with its loss targets, cut to a length |
//! | [`mixture`] | samples the rows of a run from weighted sources |
//! | [`feed`] | passes rows from their files to the encoder in batches |
//! | [`spill`] | rows kept on disk until all have been read |
//! | [`store`] | tokenised rows in flat arrays |
//! | [`token_file`] | a file of their tokens, written as they are produced |
//! | [`cache`] | a file of tokenised rows for the next start |
//! | [`split`] | training rows or evaluation rows |
//! | [`packing`] | which sequences share a row |
//! | `turns` | finds the assistant's turns for templates that do not mark them |
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
