//! Rewards of online RL: built-in verifiers, functions of the program, an external command, a
//! Python worker, and their weighted sum. Layer 6.
//!
//! Invariant: a reward gives one number or `None` (not applicable) for each completion, in the
//! order of the batch. If it fails, the error names the row. Aggregation and `None` follow TRL
//! 1.16.0.

mod batch;
mod environment;
mod function;
mod lines;
pub mod model;
mod numeric;
mod process;
mod reward;
mod schema;
mod spec;
mod text;
mod total;
mod worker;

pub use batch::{RewardBatch, said};
pub use environment::{Environment, EnvironmentAnswer, EnvironmentTurn};
pub use function::{RewardFunction, RewardRow};
pub use reward::Reward;
pub use schema::Schema;
pub use total::{Rewards, Scores};
pub use worker::Worker;
