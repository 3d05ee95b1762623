//! How much of the next weights a kernel fetches into the L2 cache. Layer 4.
//!
//! Invariant: a prefetch changes no result; the blocks of a launch together fetch no more than the
//! cache holds beside what they read.

use crate::device::Capabilities;

/// The most bytes of weights that a kernel prefetches: what the cache holds beside the rest, 20 of an
/// H100's 50 MiB.
pub(super) fn most_prefetched(device: &Capabilities) -> usize {
    device.cache / 5 * 2
}

/// Bytes that a prefetch brings.
pub(super) const LINE: usize = 128;

/// Bytes of each of a block's `rows` rows of k bf16 values that it prefetches, and how many of `blocks`
/// blocks do: those that start while the kernel before ends, `at_once` on a multiprocessor.
pub(super) fn prefetch(
    k: usize,
    rows: usize,
    blocks: usize,
    at_once: usize,
    device: &Capabilities,
) -> (usize, usize) {
    let wave = blocks.min(at_once * device.multiprocessors);
    let whole = |bytes: usize| bytes / LINE * LINE;
    (whole(2 * k).min(whole(most_prefetched(device) / (wave * rows).max(1))), wave)
}
