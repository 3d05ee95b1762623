//! The training loop: which rows a step takes, the step itself, what is logged, saved and resumed.
//! Layer 8.
//!
//! Invariant: a run is a function of (binary, device model, config, data, seed), and its whole
//! state is the parameters, the optimizer and the step number: rows, random numbers and learning
//! rate follow from the number. So a resumed run equals an uninterrupted one, bit for bit.

pub mod best;
pub mod inputs;
pub mod job;
pub mod plan;
mod row_cache;
pub mod rows;
pub mod run;
pub mod samples;
pub mod setup;
pub mod state;
mod step;
pub mod summary;
mod training;
pub mod tuning;
mod watch;

pub use step::{Means, Step, StepPlan, Trainer};
pub use training::{Training, take_data};
