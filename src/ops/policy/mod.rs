//! The losses of online RL on log-probs: the GRPO family, RLOO and PPO's policy term in one op;
//! PPO's value loss; advantages on the device. Layer 4.
//!
//! Invariant: the gradient is computed in the forward, with the loss, and scaled by its upstream
//! later. The normaliser of a loss type is part of the tokens' weights, and a token of weight 0 is
//! masked. Math, numerics and sources: `kernels/policy.cu`.

mod advantage;
mod cases;
mod loss;
mod oracle;
mod term;

pub use advantage::{gae, whiten};
pub use cases::{cases, perf};
pub use loss::{PolicyInputs, PolicyOut, policy_loss, value_loss};
pub use term::{ImportanceLevel, PolicyLoss, Term};
