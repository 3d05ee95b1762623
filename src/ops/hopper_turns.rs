//! Launches of products whose tiles two consumers take in turn (`kernels/common/hopper_turns.cuh`).
//! Layer 4.
//!
//! Invariant: the height of tiles changes no bits, so it may depend on the number of rows.

use crate::autograd::Cx;
use crate::device::Launch;

/// Rows of a tile in units of [`BOX`], and the time of a product of each height relative to the
/// other: a low tile reads more for the same product.
const HEIGHTS: [(usize, f64); 2] = [(2, 1.12), (3, 1.0)];
/// Columns of a tile's product.
pub(super) const WIDTH: usize = 128;
/// Rows and columns of a box of operands, k of a step.
pub(super) const BOX: usize = 64;
/// Rows of a box that a warp stores.
pub(super) const WARP_ROWS: usize = 16;

/// The height of tiles of m rows, `across` of them side by side, that takes the least time: rounds
/// of tiles over the multiprocessors, times the time of a tile.
pub(super) fn height((m, across): (usize, usize), multiprocessors: usize) -> usize {
    let time = |&(height, per_row): &(usize, f64)| {
        let tiles = m.div_ceil(height * BOX) * across;
        tiles.div_ceil(multiprocessors) as f64 * height as f64 * per_row
    };
    HEIGHTS.iter().min_by(|a, b| time(a).total_cmp(&time(b))).map_or(2, |h| h.0)
}

/// A block for each multiprocessor, or for each tile.
pub(super) fn grid(cx: &Cx, tiles: usize) -> Launch {
    Launch::grid([tiles.min(cx.device.capabilities().multiprocessors), 1, 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_rows_take_high_tiles_and_few_rows_low_ones() {
        let across = 4864usize.div_ceil(WIDTH / 2);
        let heights = [65, 128, 256, 512, 16_384].map(|m| height((m, across), 132));
        assert_eq!(heights, [2, 2, 2, 3, 3]);
    }
}
