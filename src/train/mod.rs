//! The training loop: the rows of a step, the step itself, logging, checkpoints and resuming.
//! Layer 8.
//!
//! Invariant: a run is a function of (binary, device model, config, data, seed). Its state is the
//! parameters, the optimizer, the step number and the method's own state; rows, random numbers and
//! learning rate follow from the step number. So a resumed run equals an uninterrupted one, bit for
//! bit.

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
