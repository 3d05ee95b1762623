//! Methods that train on what the policy generates. Layer 7.
//!
//! Invariant: prompts and sampled tokens are a function of (data, seed, generation) and of the
//! policy's weights; the sampler's log-probs are the trainer's, bit for bit, so there is no
//! old-policy forward.

pub mod advantage;
pub mod env;
pub mod gkd;
pub mod grpo;
pub mod online_dpo;
pub mod policy;
pub mod ppo;
pub mod reinforce;
pub mod rloo;
pub mod weights;
