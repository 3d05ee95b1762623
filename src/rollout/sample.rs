//! How tokens are drawn. Layer 6.
//!
//! Invariant: what is drawn, and what is known of it, is the op's ([`crate::ops::sample`]); nothing
//! is drawn on the host.

pub use crate::ops::sample::{Draw, Sampling};
