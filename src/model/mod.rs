//! Model folders: what a Hugging Face folder says, checked, as one decoder needs it. Layer 5.
//!
//! Invariant: a [`layout::ModelConfig`] that exists is consistent: its numbers divide where they
//! must, its family is known, and [`specs::expected_params`] of it names every tensor with its
//! shape.

pub mod adapter;
pub mod batch;
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
pub mod rope;
pub mod rope_config;
pub mod specs;
