//! A mixture of sources by weights. Layer 6.
//!
//! Invariant: the sampled rows and their order are a function of the sizes, the weights, the
//! stopping rule and the seed.
//!
//! Each row comes from source i with probability weight_i / sum of the weights. A source yields its
//! rows in a random order without replacement. `first_exhausted` stops when the first source is
//! exhausted, so no row is repeated; `all_exhausted` stops when every source has been exhausted
//! once, and sources that finish earlier start again in a new order.

use crate::config::MixtureStop;
use crate::data::order::permutation;
use crate::error::{Error, Result};
use crate::rng::{philox, seed, tag};

/// Upper bound on the rows of a mixture: the length with `all_exhausted` grows with 1 / weight.
const MOST: f64 = 1e9;

/// Returns the rows of a mixture as (source, row), in order. Errors: a source without rows; weights
/// so far apart that the mixture would exceed the bound.
pub fn draw(
    sizes: &[usize],
    weights: &[f64],
    stop: MixtureStop,
    run_seed: u64,
) -> Result<Vec<(usize, usize)>> {
    let total: f64 = weights.iter().sum();
    if sizes.contains(&0) {
        return Err(Error::Config("a source of the mixture has no rows; leave it out".into()));
    }
    let expected = sizes.iter().zip(weights).map(|(n, w)| *n as f64 * total / w);
    let expected = match stop {
        MixtureStop::FirstExhausted => expected.fold(f64::INFINITY, f64::min),
        MixtureStop::AllExhausted => expected.fold(0.0, f64::max),
    };
    if expected.is_nan() || expected >= MOST {
        return Err(Error::Config(format!(
            "the mixture would have about {expected:.1e} rows; bring the weights closer together, \
             or set stopping_strategy=first_exhausted"
        )));
    }
    let key = [run_seed as u32, (run_seed >> 32) as u32];
    let order = |source: usize, pass: usize| {
        let stream = (pass * sizes.len() + source) as u32;
        permutation(sizes[source], run_seed ^ seed::MIXTURE, stream)
    };
    let mut orders: Vec<Vec<usize>> = (0..sizes.len()).map(|s| order(s, 0)).collect();
    let (mut taken, mut passes) = (vec![0; sizes.len()], vec![0; sizes.len()]);
    let mut rows = Vec::new();
    for i in 0u64.. {
        let bits = philox(key, [i as u32, (i >> 32) as u32, 0, tag::MIXTURE]);
        let source = pick(weights, total, u64::from(bits[1]) << 32 | u64::from(bits[0]));
        if taken[source] == sizes[source] {
            passes[source] += 1;
            taken[source] = 0;
            orders[source] = order(source, passes[source]);
        }
        rows.push((source, orders[source][taken[source]]));
        taken[source] += 1;
        let used_up = |s: usize| passes[s] > 0 || taken[s] == sizes[s];
        let done = match stop {
            MixtureStop::FirstExhausted => used_up(source),
            MixtureStop::AllExhausted => (0..sizes.len()).all(used_up),
        };
        if done {
            break;
        }
    }
    Ok(rows)
}

/// Returns the source that 64 random bits select.
fn pick(weights: &[f64], total: f64, bits: u64) -> usize {
    let at = (bits >> 11) as f64 / (1u64 << 53) as f64 * total;
    let mut sum = 0.0;
    let found = weights.iter().position(|w| {
        sum += w;
        at < sum
    });
    found.unwrap_or(weights.len() - 1) // after rounding `at` may equal the sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_row_is_drawn_twice_and_the_first_source_to_end_ends_it() {
        let rows = draw(&[100, 1000], &[0.7, 0.3], MixtureStop::FirstExhausted, 7).unwrap();
        let of = |s: usize| rows.iter().filter(|r| r.0 == s).count();
        assert_eq!((of(0), rows.last().unwrap().0), (100, 0));
        assert!((25..70).contains(&of(1)), "{}", of(1)); // 43 expected
        let mut distinct = rows.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), rows.len());
        assert_eq!(rows, draw(&[100, 1000], &[7.0, 3.0], MixtureStop::FirstExhausted, 7).unwrap());
        assert_ne!(rows, draw(&[100, 1000], &[0.7, 0.3], MixtureStop::FirstExhausted, 8).unwrap());
    }

    #[test]
    fn every_row_is_drawn_where_all_sources_are_used_up() {
        let rows = draw(&[10, 100], &[0.5, 0.5], MixtureStop::AllExhausted, 1).unwrap();
        let mut counts = [vec![0; 10], vec![0; 100]];
        rows.iter().for_each(|(s, r)| counts[*s][*r] += 1);
        assert!(counts[1].iter().all(|n| *n == 1));
        let (least, most) = (counts[0].iter().min().unwrap(), counts[0].iter().max().unwrap());
        assert!(*least >= 5 && most - least <= 1, "{:?}", counts[0]);
    }

    #[test]
    fn sources_are_drawn_by_their_weights() {
        let rows = draw(&[50_000, 50_000], &[1.0, 3.0], MixtureStop::FirstExhausted, 3).unwrap();
        let share = rows.iter().filter(|r| r.0 == 0).count() as f64 / rows.len() as f64;
        assert!((0.24..0.26).contains(&share), "{share}"); // five standard deviations
    }

    #[test]
    fn a_mixture_without_an_end_in_sight_is_refused() {
        let e = draw(&[1000, 10], &[1e-9, 1.0], MixtureStop::AllExhausted, 1).unwrap_err();
        assert!(e.to_string().contains("stopping_strategy=first_exhausted"), "{e}");
        assert!(draw(&[1, 0], &[1.0, 1.0], MixtureStop::AllExhausted, 1).is_err());
    }
}
