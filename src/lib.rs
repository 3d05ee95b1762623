//! temper: post-training of language models with one set of hand-written CUDA kernels, on a GPU or on any CPU.
//!
//! The map of the house, by floors. A module uses its own floor and those below; a test reads `use crate::` and fails
//! otherwise.
//!
//! | floor | module | what it gives |
//! |---|---|---|
//! | 0 | [`error`], [`config`], [`fsio`], [`rng`], [`signals`] | errors that say the next step, run files, durable files, Philox |
//! | 1 | [`device`], [`tensor`] | the CPU (shim) and CUDA devices, named memory, views, safetensors |
//! | 2 | [`ops`], [`tape`], [`cx`] | every op with its backward and its f64 reference; recording; the context |
//! | 3 | [`model`] | Hugging Face folders, one decoder, parameters in one arena, the paged cache |
//! | 4 | [`data`], [`optim`], [`rollout`], [`rewards`] | rows to tokens and masks; AdamW and schedules; generation; scores |
//! | 5 | [`methods`] | objectives, one file each |
//! | 6 | [`train`], [`checkpoint`], [`log`], [`check`], [`report`] | the loop, durable state, the run log, the self-check, the page |
//! | 7 | [`cli`], [`quickstart`] | the commands; the ladder on data and a model made on the spot |
//!
//! Two data paths. A training step: config -> `train` -> parameters (safetensors, mapped) -> `data` (rows, template and
//! mask, packing) -> `model::batch` -> `model::decoder` -> `ops::head` -> a method's loss -> `tape` backward -> clip ->
//! AdamW -> log, checkpoint. Generation: `rollout` -> the same decoder over a page table, no tape -> sample.

pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod cx;
pub mod data;
pub mod device;
pub mod error;
pub mod fsio;
pub mod log;
pub mod methods;
pub mod model;
pub mod ops;
pub mod optim;
pub mod quickstart;
pub mod report;
pub mod rewards;
pub mod rng;
pub mod rollout;
pub mod signals;
pub mod tape;
pub mod tensor;
pub mod train;
