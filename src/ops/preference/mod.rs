//! The preference losses: from log-probs summed over sequences to one loss. Layer 4.
//!
//! Invariant: everything here is F32 in every build, and a loss is a weighted sum over pairs (or
//! sequences) whose weights the caller gives (1 / pairs, over gradient accumulation): no loss knows
//! how many micro-batches a step has. A pair's numbers are adjacent: [n, 2], chosen first. Math:
//! `kernels/preference.cu`.
//!
//! The computation of a loss: the head's log-probs `[tokens]` -> [`segment_sums`] -> `[sequences]`
//! -> one of the ops below. Rewards and other metrics come with the loss and carry no gradient.

mod dpo;
mod oracle;
mod pair_loss;
mod pairs;
mod segments;
mod unpaired;

use crate::ops::case::{Case, Rng};

pub use dpo::{Dpo, DpoIn, DpoLoss, FDivergence, dpo, perf};
pub use pairs::{BradleyTerry, Cpo, CpoLoss, Orpo, bradley_terry, cpo, orpo};
pub use segments::{SegmentSums, segment_cases, segment_perf, segment_sums};
pub use unpaired::{RunningMean, Unpaired, UnpairedLoss, kl_baseline, running_mean, unpaired};

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    [dpo::cases(rng), unpaired::cases(rng), pairs::cases(rng)].into_iter().flatten().collect()
}
