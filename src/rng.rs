//! Philox4x32-10 on the host: the twin of `kernels/prim/rng.cuh`. Layer 0.
//!
//! Invariant: a random number is a function of a key and a counter; there is no state to
//! checkpoint. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

// The tags of `kernels/prim/rng.cuh`: the last word of a kernel's counter says what the draw is
// for.
include!(concat!(env!("OUT_DIR"), "/rng_tags.rs"));

/// The last word of the counter of draws on the host. The tags of kernels differ from these and
/// from each other in the top byte; a test checks this.
pub mod tag {
    /// The order of free cache pages. Results do not depend on it.
    pub const PAGE_ORDER: u32 = 0;
    /// Normal numbers for a new parameter.
    pub const INIT_NORMAL: u32 = 0x0300_0000;
    /// Uniform numbers for a new parameter.
    pub const INIT_UNIFORM: u32 = 0x0301_0000;
    /// The rows of the quickstart.
    pub const QUICKSTART: u32 = 0x0500_0000;
    /// The operands with which a library product is checked ("gemm").
    pub const PRODUCT_CHECK: u32 = 0x6765_6d6d;
    /// The seed of an environment's episode ("env").
    pub const ENVIRONMENT: u32 = 0x656e_7600;
    /// The source of each row of a mixture ("mixt").
    pub const MIXTURE: u32 = 0x6d69_7874;
    /// GKD: whether a micro-batch is on-policy ("gkd").
    pub const ON_POLICY: u32 = 0x676b_6400;
    /// The order of rows in an epoch ("ordr").
    pub const ROW_ORDER: u32 = 0x6F72_6472;
}

/// XOR-ed with the seed of a run where one tag needs several independent streams.
pub mod seed {
    /// The row order of a mixture's sources ("mix").
    pub const MIXTURE: u64 = 0x6d_69_78;
    /// The order of rollouts in a pass over them ("roll").
    pub const ROLLOUTS: u64 = 0x726f_6c6c;
    /// The additional prompts of dynamic sampling ("dyna").
    pub const DYNAMIC: u64 = 0x6479_6e61;
    /// The order of PPO's sequences ("ppo").
    pub const PPO: u64 = 0x70_70_6f;
    /// The few-shot examples of a multiple-choice question ("shot").
    pub const SHOTS: u64 = 0x7368_6f74;
}

/// Four 32-bit random numbers from a key (two words) and a counter (four words).
pub fn philox(mut key: [u32; 2], mut c: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(c[0]) * 0xD251_1F53;
        let p1 = u64::from(c[2]) * 0xCD9E_8D57;
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// A uniform number in (0, 1) from the upper 24 bits, as in the kernels.
pub fn uniform(bits: u32) -> f32 {
    ((bits >> 8) as f32 + 0.5) * 5.960_464_5e-8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_uses_of_random_numbers_share_a_tag_or_a_seed() {
        let kernels = [DROPOUT_TAG, WEIGHT_NOISE_TAG, SAMPLE_TAG, M_NOISE_TAG, V_NOISE_TAG];
        let mut tags = vec![tag::PAGE_ORDER, tag::INIT_NORMAL, tag::INIT_UNIFORM];
        tags.extend([tag::QUICKSTART, tag::ON_POLICY, tag::ROW_ORDER, tag::PRODUCT_CHECK]);
        tags.push(tag::ENVIRONMENT);
        // The site of a dropout fills the low bits of its tag.
        for kernel in kernels {
            assert!(tags.iter().all(|t| t >> 24 != kernel >> 24), "{kernel:#010x} is taken");
            assert_eq!(kernel << 8, 0, "{kernel:#010x} has more than its top byte");
        }
        tags.extend(kernels);
        let seeds = [0, seed::ROLLOUTS, seed::DYNAMIC, seed::PPO, seed::SHOTS].map(|s| s as u32);
        for mut numbers in [tags, seeds.to_vec()] {
            let count = numbers.len();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), count);
        }
    }

    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            philox([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        let pi = philox([0xa4093822, 0x299f31d0], [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]);
        assert_eq!(pi, [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }
}
