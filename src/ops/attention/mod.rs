//! Causal attention over packed sequences with shared prompts, and over a paged KV cache. Layer 4.
//!
//! Invariant: a row's bits depend on its own sequence alone, and are the same in training, prefill
//! and decode. Math, numerics and source: `kernels/attention.cu` (any dtype),
//! `kernels/attention_mma.cu` (bf16, tensor cores) and `kernels/attention_hopper.cu` (the forward
//! of the latter with TMA and wgmma, with the same bits) and
//! `kernels/attention_decode.cu` (a decoding step, with the same bits).

mod cases;
mod decode;
mod launch;
pub mod oracle;
mod packed;
mod paged;
mod plan;
mod rows;
mod shape;

pub use cases::{cases, paged_cases, paged_perf, perf};
pub use decode::{AttentionDecode, attention_decode, decode_cases, decode_perf};
pub use packed::{Attention, attention};
pub use paged::{AttentionPaged, attention_paged};
pub use plan::{AttnPlan, Segment};
pub use rows::PagedRows;
pub use shape::{AttnShape, PAGE};
