//! temper: post-training of language models with one set of hand-written CUDA kernels, on a GPU or
//! on any CPU.
//!
//! The map of the code, by layers. A module uses its own layer and those below; no two files import
//! each other outside `autograd/`; a test checks both.
//!
//! | layer | module | what it gives |
//! |---|---|---|
//! | 0 | [`error`], [`fsio`], [`observer`], [`rng`], [`signals`] | errors that name the next step, durable files, what a run says, Philox, Ctrl-C |
//! | 1 | [`config`], [`device`], [`tensor`] | run files; the CPU (shim), CUDA and dry-run devices; views, safetensors |
//! | 2 | [`kernels`] | launchers and constants generated from `kernels/*.cu` |
//! | 3 | [`autograd`] | the context, the tape, the trait of an op, oracle arithmetic |
//! | 4 | [`ops`] | every op with its backward and its f64 oracle; the registry |
//! | 5 | [`model`] | Hugging Face folders, one decoder, parameters in one arena, adapters, the paged cache |
//! | 6 | [`data`], [`optim`], [`rollout`], [`rewards`], [`eval`] | rows to tokens and masks; AdamW; generation; scores; metrics of a model |
//! | 7 | [`methods`] | training objectives, one file each |
//! | 8 | [`train`], [`checkpoint`], [`log`], [`check`], [`report`] | the loop, durable state, the run log, the self-check, the page |
//! | 9 | [`cli`], [`quickstart`] | the commands; the pipeline on data and a model made from nothing |
//!
//! Two data paths. A training step: config -> `train` -> parameters (safetensors, mapped) -> `data`
//! (rows, template and mask, packing) -> `model::batch` -> `model::decoder` -> `ops::head` -> a
//! method's loss -> `tape` backward -> clip -> AdamW -> log, checkpoint. Generation: `rollout` ->
//! the same decoder over a page table, no tape -> sample.

pub mod autograd;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
pub mod fsio;
pub mod kernels;
pub mod log;
pub mod methods;
pub mod model;
pub mod observer;
pub mod ops;
pub mod optim;
pub mod quickstart;
pub mod report;
pub mod rewards;
pub mod rng;
pub mod rollout;
pub mod signals;
pub mod tensor;
pub mod train;
