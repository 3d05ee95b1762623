//! The order of rows as a function of (seed, epoch). Layer 6.
//!
//! Invariant: stateless. The row at a position depends on (seed, epoch, position) alone, so a
//! resumed run needs only the position.

use crate::rng::{philox, tag};

pub use crate::config::SamplingStrategy;

/// Returns the row numbers of one epoch, in training order.
pub fn epoch_order(sampling: SamplingStrategy, rows: usize, seed: u64, epoch: u32) -> Vec<usize> {
    match sampling {
        SamplingStrategy::Sequential => (0..rows).collect(),
        SamplingStrategy::Random => permutation(rows, seed, epoch),
    }
}

/// Returns a Fisher-Yates permutation of `0..n` with random numbers from Philox: key = seed,
/// counter = (i, epoch, stream).
pub fn permutation(n: usize, seed: u64, epoch: u32) -> Vec<usize> {
    let key = [seed as u32, (seed >> 32) as u32];
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let r = philox(key, [i as u32, (i as u64 >> 32) as u32, epoch, tag::ROW_ORDER]);
        let r = u64::from(r[1]) << 32 | u64::from(r[0]);
        // r * (i + 1) / 2^64: biased by less than n / 2^64
        order.swap(i, ((u128::from(r) * (i as u128 + 1)) >> 64) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_visits_every_row_once_in_its_own_order() {
        let mut orders: Vec<Vec<usize>> =
            (0..3).map(|epoch| epoch_order(SamplingStrategy::Random, 1000, 42, epoch)).collect();
        assert_eq!(orders[0], permutation(1000, 42, 0));
        assert_ne!(orders[0], orders[1]);
        assert_ne!(orders[0], permutation(1000, 43, 0));
        for order in &mut orders {
            order.sort();
            assert_eq!(*order, epoch_order(SamplingStrategy::Sequential, 1000, 42, 0));
        }
        assert!(permutation(0, 1, 1).is_empty());
    }

    #[test]
    fn each_place_is_equally_likely() {
        let mut counts = [[0u32; 5]; 5];
        for seed in 0..20_000 {
            for (place, row) in permutation(5, seed, 0).into_iter().enumerate() {
                counts[place][row] += 1;
            }
        }
        assert!(counts.iter().flatten().all(|c| (3_700..4_300).contains(c)), "{counts:?}");
    }
}
