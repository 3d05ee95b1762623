//! One integration-test crate: one link, one binary that can be copied to a GPU machine.

mod config;
mod model_folder;
mod ops;
