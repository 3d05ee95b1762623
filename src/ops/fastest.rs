//! Finds the fastest of several products with the same bits. Layer 4.
//!
//! Invariant: the clock chooses among equal results, so it changes none.

use crate::autograd::Cx;
use crate::error::Result;

/// Timed runs of a contender, after one that is not timed.
const RUNS: usize = 3;
/// How much slower a favoured contender may be, as a share of its time.
const MARGIN: f32 = 0.03;
/// Microseconds that a favoured contender saves where kernels are launched early: the start of a
/// kernel behind the end of another, which a timed run, alone between two marks, does not show.
const EARLY_START: f32 = 1.0;

/// The row count that a step of `n` rows is padded to where steps are recorded: a power of two or
/// 1.5 times one, so that at most a third is padding.
pub fn padded_rows(n: usize) -> usize {
    let power = n.next_power_of_two();
    let between = power / 4 * 3;
    if between >= n { between } else { power }
}

/// Microseconds of each of [`RUNS`] runs. `clear` runs before each, so that operands come from
/// memory instead of a cache.
pub(super) fn timed(
    cx: &Cx,
    clear: &dyn Fn() -> Result<()>,
    run: &dyn Fn() -> Result<()>,
) -> Result<Vec<f32>> {
    run()?; // loads its code and allocates its memory
    let one = |_| {
        clear()?;
        let from = cx.device.mark()?;
        run()?;
        Ok(1000.0 * cx.device.elapsed_ms(from, cx.device.mark()?)?)
    };
    (0..RUNS).map(one).collect()
}

/// None: there are no times.
pub(crate) fn median(times: &[f32]) -> Option<f32> {
    let mut sorted = times.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

/// The indices of the contenders, from the fastest to the slowest by the median of their times.
/// Ties keep their order; contenders without times are left out. A favoured one wins if it is at
/// most [`MARGIN`] slower and, with `early` launches, [`EARLY_START`] besides.
pub(super) fn by_time(
    times: &[Vec<f32>],
    early: bool,
    favoured: impl Fn(usize) -> bool,
) -> Vec<usize> {
    let start = if early { EARLY_START } else { 0.0 };
    let weighed = |(i, times): (usize, &Vec<f32>)| {
        let time = median(times)?;
        Some((i, if favoured(i) { time * (1.0 - MARGIN) - start } else { time }))
    };
    let mut all: Vec<(usize, f32)> = times.iter().enumerate().filter_map(weighed).collect();
    all.sort_by(|x, y| x.1.total_cmp(&y.1));
    all.into_iter().map(|(i, _)| i).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_decides_and_not_the_best_run() {
        let times = [vec![9.0, 1.0, 9.0], vec![8.0, 30.0, 8.0], vec![]];
        assert_eq!(by_time(&times, false, |_| false), [1, 0]);
        assert_eq!(by_time(&[vec![], vec![]], true, |_| true), [0; 0]);
    }

    #[test]
    fn equals_stay_in_order_and_a_favoured_one_may_be_a_little_slower() {
        let times = [vec![10.0], vec![10.0], vec![10.2], vec![10.4]];
        assert_eq!(by_time(&times, true, |_| false), [0, 1, 2, 3]);
        assert_eq!(by_time(&times, false, |i| i == 2), [2, 0, 1, 3]);
        assert_eq!(by_time(&times, false, |i| i == 3), [0, 1, 3, 2]);
        assert_eq!(by_time(&times, true, |i| i == 3), [3, 0, 1, 2]);
    }

    #[test]
    fn at_most_a_third_of_a_step_is_padding() {
        let all: Vec<usize> = (1..=9).map(padded_rows).collect();
        assert_eq!(all, [1, 2, 3, 4, 6, 6, 8, 8, 12]);
        assert_eq!([256, 257, 513].map(padded_rows), [256, 384, 768]);
        for n in 1..2000 {
            let rows = padded_rows(n);
            assert!(rows >= n && 3 * (rows - n) <= rows, "{n} {rows}");
        }
    }
}
