//! The order of rows as a function of (seed, epoch). Floor 4.
//!
//! Invariant: no state. The row at a position is known from (seed, epoch, position) alone, so a resumed run needs only
//! the position.

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits for a counter.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// TRL's `train_sampling_strategy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sampling {
    #[default]
    Random,
    Sequential,
}

/// Row numbers of one epoch, in the order they are trained on.
pub fn epoch_order(sampling: Sampling, rows: usize, seed: u64, epoch: u32) -> Vec<usize> {
    match sampling {
        Sampling::Sequential => (0..rows).collect(),
        Sampling::Random => permutation(rows, seed, epoch),
    }
}

/// A permutation of `0..n` by Fisher and Yates, its draws from Philox: key = seed, counter = (i, epoch, stream).
pub fn permutation(n: usize, seed: u64, epoch: u32) -> Vec<usize> {
    let key = [seed as u32, (seed >> 32) as u32];
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let r = philox4x32([i as u32, (i as u64 >> 32) as u32, epoch, STREAM], key);
        let r = u64::from(r[1]) << 32 | u64::from(r[0]);
        // r * (i + 1) / 2^64: uneven by less than one part in 2^64 / n
        order.swap(i, ((u128::from(r) * (i as u128 + 1)) >> 64) as usize);
    }
    order
}

/// Keeps these draws apart from others under the same key.
const STREAM: u32 = 0x6F72_6472; // "ordr"

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        let pi = ([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]);
        let all = u32::MAX;
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32([all; 4], [all; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(philox4x32(pi.0, pi.1), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn every_epoch_visits_every_row_once_in_its_own_order() {
        let mut orders: Vec<Vec<usize>> = (0..3).map(|epoch| epoch_order(Sampling::Random, 1000, 42, epoch)).collect();
        assert_eq!(orders[0], permutation(1000, 42, 0));
        assert_ne!(orders[0], orders[1]);
        assert_ne!(orders[0], permutation(1000, 43, 0));
        for order in &mut orders {
            order.sort();
            assert_eq!(*order, epoch_order(Sampling::Sequential, 1000, 42, 0));
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
