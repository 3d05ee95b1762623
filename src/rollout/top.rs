//! The most probable tokens of a row of logits. Layer 6.
//!
//! Invariant: the log-prob of the known token has the bits that the device computed; that of
//! another token differs from it by the difference of their logits.

/// The ids and log-probs of the `n` largest logits, best first (of equal logits the lower id
/// first). `logp` is the log-prob of `token`, so the row needs no sum.
pub fn top_logps(logits: &[f32], token: u32, logp: f32, n: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    for (id, logit) in logits.iter().enumerate() {
        let enough = best.len() >= n;
        if n == 0 || (enough && best.last().is_some_and(|(_, last)| logit <= last)) {
            continue;
        }
        let at = best.partition_point(|(_, other)| other >= logit);
        best.insert(at, (id as u32, *logit));
        best.truncate(n);
    }
    let base = f64::from(logp) - f64::from(logits.get(token as usize).copied().unwrap_or(0.0));
    best.into_iter()
        .map(|(id, logit)| (id, if id == token { logp } else { (f64::from(logit) + base) as f32 }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::top_logps;

    #[test]
    fn the_largest_come_first_and_add_up() {
        let logits = [0.5f32, 2.0, -1.0, 2.0, 1.0];
        let lse = logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
        let logp = (1.0 - lse) as f32;
        let top = top_logps(&logits, 4, logp, 3);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 4]);
        assert_eq!(top[2].1, logp);
        let all = top_logps(&logits, 4, logp, 9);
        let sum: f64 = all.iter().map(|t| f64::from(t.1).exp()).sum();
        assert!(all.len() == 5 && (sum - 1.0).abs() < 1e-6, "{all:?}");
        assert_eq!(top_logps(&logits, 4, logp, 0), []);
    }
}
