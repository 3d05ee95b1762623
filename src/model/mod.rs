//! Models: reads and checks Hugging Face folders, and runs them with one decoder. Layer 5.
//!
//! Invariant: every [`layout::ModelConfig`] is consistent: its numbers divide where they must, its
//! family is known, and its [`specs::expected_params`] name every tensor with its shape.

pub mod adapter;
pub mod batch;
pub mod builder;
pub mod config;
pub mod decoder;
pub mod families;
mod fields;
pub mod folder;
pub mod hub;
pub mod kv;
pub mod layout;
pub mod open;
pub mod params;
mod projection;
pub mod rope;
pub mod rope_config;
pub mod specs;
