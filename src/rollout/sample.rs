//! Drawing a token from a row of logits. Floor 4.
//!
//! Invariant: a draw is a function of (seed, sequence number, position, logits): no state, no dependence on neighbours.

use crate::rng::{philox, uniform};

/// Sampling keys under their usual names; they apply in transformers' order: temperature, top_k, top_p, min_p.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: the most likely token, always.
    pub temperature: f64,
    /// Keep the k most likely; 0: all.
    pub top_k: usize,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1: all.
    pub top_p: f64,
    /// Drop tokens less likely than this share of the most likely one; 0: none.
    pub min_p: f64,
    pub seed: u64,
}

impl Sampling {
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }

    /// The token drawn for position `position` of sequence `number`.
    pub fn draw(&self, logits: &[f32], number: usize, position: usize) -> u32 {
        if self.temperature == 0.0 {
            return best(logits);
        }
        let kept = self.truncated(logits);
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let u = f64::from(uniform(philox(key, [position as u32, number as u32, 0, 0x0400_0000])[0]));
        let mut sum = 0.0;
        for (token, p) in &kept {
            sum += p;
            if u < sum {
                return *token;
            }
        }
        kept.last().map_or(0, |(token, _)| *token)
    }

    /// The distribution that is drawn from: (token, probability), most likely first, summing to 1.
    pub fn truncated(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let top = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
        let weight = |l: f32| ((f64::from(l) - f64::from(top)) / self.temperature).exp();
        let mut all: Vec<(u32, f64)> = logits.iter().enumerate().map(|(i, l)| (i as u32, weight(*l))).collect();
        if self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0 {
            return normalised(all);
        }
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.top_k > 0 {
            all.truncate(self.top_k);
        }
        let mut all = normalised(all);
        if self.top_p < 1.0 {
            let mut before = 0.0;
            let keep = all.iter().take_while(|(_, p)| {
                let more = before < self.top_p;
                before += p;
                more
            });
            let n = keep.count().max(1);
            all.truncate(n);
            all = normalised(all);
        }
        if self.min_p > 0.0 {
            let least = self.min_p * all[0].1;
            all.retain(|(_, p)| *p >= least);
            all = normalised(all);
        }
        all
    }
}

/// The lowest of the most likely tokens.
fn best(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    best as u32
}

fn normalised(mut all: Vec<(u32, f64)>) -> Vec<(u32, f64)> {
    let sum: f64 = all.iter().map(|(_, p)| p).sum();
    all.iter_mut().for_each(|(_, p)| *p /= sum);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 2.5];

    #[test]
    fn draws_follow_the_truncated_distribution() {
        let cases = [
            Sampling { temperature: 1.0, seed: 7, ..Sampling::greedy() },
            Sampling { temperature: 0.7, top_k: 3, seed: 8, ..Sampling::greedy() },
            Sampling { temperature: 1.3, top_p: 0.8, seed: 9, ..Sampling::greedy() },
            Sampling { temperature: 1.0, min_p: 0.3, seed: 10, ..Sampling::greedy() },
        ];
        for sampling in cases {
            let expected = sampling.truncated(&LOGITS);
            let n = 100_000;
            let mut counts = [0f64; 5];
            for i in 0..n {
                counts[sampling.draw(&LOGITS, i % 100, i / 100) as usize] += 1.0;
            }
            let mut chi = 0.0;
            for (token, p) in &expected {
                chi += (counts[*token as usize] - p * n as f64).powi(2) / (p * n as f64);
                counts[*token as usize] = 0.0;
            }
            assert!(counts.iter().all(|c| *c == 0.0), "a token outside of the kept set was drawn");
            assert!(chi < 18.47, "chi-square {chi}: rejected at p = 0.001 with up to 4 degrees of freedom");
        }
    }

    #[test]
    fn truncation_keeps_what_transformers_keeps() {
        let kept = |s: Sampling| s.truncated(&LOGITS).iter().map(|(t, _)| *t).collect::<Vec<_>>();
        let plain = Sampling { temperature: 1.0, ..Sampling::greedy() };
        assert_eq!(kept(Sampling { top_k: 2, ..plain.clone() }), [1, 4]);
        // softmax: 0.479 (1), 0.290 (4), 0.176 (2), 0.065 (0), 0.009 (3)
        assert_eq!(kept(Sampling { top_p: 0.7, ..plain.clone() }), [1, 4]);
        assert_eq!(kept(Sampling { top_p: 0.4, ..plain.clone() }), [1]);
        assert_eq!(kept(Sampling { min_p: 0.3, ..plain }), [1, 4, 2]);
        assert_eq!(Sampling::greedy().draw(&LOGITS, 0, 0), 1);
    }
}
