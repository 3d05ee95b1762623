//! The levels: a matrix product in eight steps and attention in six, from the definition to the
//! speed of the engine's own kernels (`kernels/levels/`), for reading. No model uses them. Layer 4.
//!
//! Invariant: the list of levels is defined once, here; each is checked like an op of the engine.

mod attention;
mod matmul;

pub use attention::{AttentionLevel, HeadsShape};
pub use matmul::MatmulLevel;

use super::case::{Case, DEFAULT, PerfShape, Rng, TENSOR_CORE, Variant, WGMMA};
use super::registry::Entry;

/// One level of a path.
pub struct Level {
    /// The name of its op, such as `level_matmul_1`.
    pub name: &'static str,
    /// What it changes, in one line.
    pub idea: &'static str,
    /// Its `.cu` file.
    pub kernel: &'static str,
    pub cases: fn(&mut Rng) -> Vec<Case>,
    /// One case, large enough to show a GPU's throughput.
    pub perf: fn(&mut Rng, &PerfShape) -> Vec<Case>,
    /// Its dtypes and its requirements of a device.
    pub variant: &'static [Variant; 1],
}

const ANY: &[Variant; 1] = &[DEFAULT];
const MMA: &[Variant; 1] = &[TENSOR_CORE];
const HOPPER: &[Variant; 1] = &[WGMMA];

/// Level `N` of the matrix product.
const fn product<const N: usize>(
    (name, kernel): (&'static str, &'static str),
    idea: &'static str,
    variant: &'static [Variant; 1],
) -> Level {
    Level { name, idea, kernel, cases: matmul::cases::<N>, perf: matmul::perf::<N>, variant }
}

/// Level `N` of attention.
const fn attention<const N: usize>(
    (name, kernel): (&'static str, &'static str),
    idea: &'static str,
    variant: &'static [Variant; 1],
) -> Level {
    Level { name, idea, kernel, cases: attention::cases::<N>, perf: attention::perf::<N>, variant }
}

/// All levels, each path in reading order.
pub const LEVELS: &[Level] = &[
    product::<1>(("level_matmul_1", "levels/matmul_1"), "a thread for each element", ANY),
    product::<2>(("level_matmul_2", "levels/matmul_2"), "coalesced loads and stores", ANY),
    product::<3>(("level_matmul_3", "levels/matmul_3"), "tiles in shared memory", ANY),
    product::<4>(("level_matmul_4", "levels/matmul_4"), "8 x 8 of C in registers", ANY),
    product::<5>(("level_matmul_5", "levels/matmul_5"), "vector loads", ANY),
    product::<6>(("level_matmul_6", "levels/matmul_6"), "mma.sync, ldmatrix, cp.async", MMA),
    product::<7>(("level_matmul_7", "levels/matmul_7"), "wgmma and TMA", HOPPER),
    product::<8>(
        ("level_matmul_8", "levels/matmul_8"),
        "persistent, warp-specialised, overlapped epilogue",
        HOPPER,
    ),
    attention::<1>(("level_attention_1", "levels/attention_1"), "scores in memory", ANY),
    attention::<2>(("level_attention_2", "levels/attention_2"), "online softmax", ANY),
    attention::<3>(("level_attention_3", "levels/attention_3"), "tiles in shared memory", ANY),
    attention::<4>(("level_attention_4", "levels/attention_4"), "mma.sync", MMA),
    attention::<5>(("level_attention_5", "levels/attention_5"), "wgmma and TMA", HOPPER),
    attention::<6>(
        ("level_attention_6", "levels/attention_6"),
        "two consumers, products under the softmax",
        HOPPER,
    ),
];

impl Level {
    fn entry(&'static self) -> Entry {
        let Level { name, cases, perf, variant, .. } = *self;
        Entry { name, kernels: std::slice::from_ref(&self.kernel), cases, perf, variants: variant }
    }
}

/// The levels as entries of a separate registry: the self-check runs them after the engine's ops,
/// and nothing else treats them as ops of the engine.
pub fn entries() -> impl Iterator<Item = Entry> {
    LEVELS.iter().map(|level: &'static Level| level.entry())
}
