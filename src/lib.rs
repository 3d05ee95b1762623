//! temper: post-training of language models with one set of hand-written CUDA kernels, on a GPU or
//! on any CPU.
//!
//! ```
//! # fn main() -> temper::Result<()> {
//! # let folder = tempfile::tempdir().map_err(|e| temper::Error::io("tmp", e))?;
//! # let out = folder.path().join("out");
//! use temper::{Silent, Training};
//!
//! let finished = Training::new("grpo")?
//!     .option("max_steps", 2)
//!     .option("num_generations", 4)
//!     .option("max_completion_length", 8)
//!     .reward("short", |row| Some(-(row.ids().len() as f64)))
//!     .model("tests/fixtures/sft/model") // a folder, or a hub name in the local cache
//!     .data(["tests/fixtures/sft/prompt_completion.jsonl"])
//!     .output(&out)
//!     .observer(Silent)
//!     .run()?;
//! assert_eq!(finished.total_steps, 2);
//! assert!(out.join("model.safetensors").exists());
//! # Ok(())
//! # }
//! ```
//!
//! [`Training`] runs any method from files; below it, [`Cx`], [`Decoder`] and [`train::Trainer`]
//! are the parts. `examples/` has a program for each.
//!
//! The map of the code, by layers. A module uses its own layer and those below; no two files import
//! each other outside `autograd/`; a test checks both.
//!
//! | layer | module | what it gives |
//! |---|---|---|
//! | 0 | [`digest`], [`error`], [`fsio`], [`observer`], [`rng`], [`signals`] | digests of contents, errors that name the next step, durable files, what a run says, Philox, Ctrl-C |
//! | 1 | [`config`], [`device`], [`tensor`] | run files; the CPU (shim), CUDA and dry-run devices; views, safetensors |
//! | 2 | [`kernels`] | launchers and constants generated from `kernels/*.cu` |
//! | 3 | [`autograd`] | the context, the tape, the trait of an op, oracle arithmetic |
//! | 4 | [`ops`] | every op with its backward and its f64 oracle; the registry |
//! | 5 | [`model`] | Hugging Face folders, one decoder, parameters in one arena, adapters, the paged cache |
//! | 6 | [`data`], [`optim`], [`rollout`], [`rewards`], [`eval`], [`gguf`] | rows to tokens and masks; AdamW; generation; scores; metrics of a model; GGUF files |
//! | 7 | [`methods`] | training objectives, one file each |
//! | 8 | [`train`], [`checkpoint`], [`log`], [`check`], [`report`] | the loop, durable state, the run log, the self-check, the page |
//! | 9 | [`cli`], [`quickstart`], [`serve`] | the commands; the pipeline on data and a model made from nothing; OpenAI's API over HTTP |
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
pub mod digest;
pub mod error;
pub mod eval;
pub mod fsio;
pub mod gguf;
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
#[cfg(feature = "serve")]
pub mod serve;
pub mod signals;
pub mod tensor;
pub mod train;

pub use autograd::Cx;
pub use config::TrainingConfig;
pub use data::tokenizer::Tokenizer;
pub use error::{Error, Result};
pub use methods::MethodRun;
pub use model::decoder::Decoder;
pub use observer::{Observer, Silent, Terminal};
pub use rewards::{RewardFunction, RewardRow};
pub use signals::Stop;
pub use train::Training;
