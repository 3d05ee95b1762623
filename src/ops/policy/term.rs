//! The configuration of a policy loss: its term, its ratio, its KL penalty. Layer 4.
//!
//! Invariant: the numbers of terms and levels are the kernel's.

use crate::config::value::words;
use crate::kernels::ratio_level;

/// The loss term of a token. TRL's `loss_type` grpo, bnpo, dr_grpo, dapo and luspo are all `Clip`:
/// they differ in the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Term {
    /// PPO's clipped ratio; `delta` bounds the ratio from above for both signs of the advantage
    /// (infinity: no bound).
    Clip {
        epsilon: f32,
        epsilon_high: f32,
        delta: f32,
    },
    /// The ratio as a constant factor, bounded by `epsilon_high` itself (not 1 + it).
    Cispo {
        epsilon_high: f32,
    },
    Sapo {
        temperature_pos: f32,
        temperature_neg: f32,
    },
    Vespo {
        k_pos: f32,
        lambda_pos: f32,
        k_neg: f32,
        lambda_neg: f32,
    },
}

words! {
    /// The level at which the ratio is taken: TRL's `importance_sampling_level`.
    pub enum ImportanceLevel {
        Token = "token" => ratio_level::TOKEN,
        /// The mean of the log-ratios.
        Sequence = "sequence" => ratio_level::SEQUENCE,
        /// Their sum, as in RLOO.
        SequenceSum = "sequence_sum" => ratio_level::SEQUENCE_SUM,
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyLoss {
    pub term: Term,
    pub level: ImportanceLevel,
    /// Coefficient of the KL divergence from `ref_logp`.
    pub beta: f32,
    /// TRL's `use_bias_correction_kl`: multiplies the divergence by the ratio.
    pub bias_correction_kl: bool,
}

impl PolicyLoss {
    /// The parameters for positive and for negative advantages: (temperature or k, lambda).
    pub(super) fn shapes(&self) -> [f32; 4] {
        match self.term {
            Term::Sapo { temperature_pos, temperature_neg } => {
                [temperature_pos, temperature_neg, 0.0, 0.0]
            }
            Term::Vespo { k_pos, lambda_pos, k_neg, lambda_neg } => {
                [k_pos, k_neg, lambda_pos, lambda_neg]
            }
            _ => [0.0; 4],
        }
    }
}
