//! Weights and factors of tokens in a policy loss, on the host: normalisers, off-policy mask,
//! entropy mask. Layer 7.
//!
//! Invariant: values are TRL 1.16.0's; a weight is 0 exactly where the token is masked.

/// How a loss is averaged: TRL's `loss_type`. One *step batch* of sequences enters the loss at
/// once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Normalizer {
    /// grpo, sapo and RLOO: the mean over a sequence, then over sequences.
    Sequence,
    /// bnpo, PPO: the mean over the tokens of the batch.
    Token,
    /// dr_grpo: a constant divisor, `max_completion_length` per sequence.
    Constant { max_completion_length: usize },
    /// dapo, cispo, vespo: the mean over the tokens of an accumulation window, estimated as
    /// `num_items_in_batch / steps_per_generation` times the accumulation; already includes the
    /// accumulation.
    Window { num_items_in_batch: usize, steps_per_generation: usize },
    /// luspo: the sum over a sequence, then the mean over sequences.
    Sum,
}

/// The weight of each token of concatenated sequences: `mask` (true: it counts) times the
/// normaliser.
pub fn token_weights(
    how: Normalizer,
    lengths: &[usize],
    mask: &[bool],
    accumulation: usize,
) -> Vec<f32> {
    let (sequences, total) = (lengths.len() as f64, mask.iter().filter(|m| **m).count() as f64);
    let mut weights = Vec::with_capacity(mask.len());
    let mut from = 0;
    for len in lengths {
        let own = &mask[from..from + len];
        let count = own.iter().filter(|m| **m).count() as f64;
        let divide = match how {
            Normalizer::Sequence => count.max(1.0) * sequences,
            Normalizer::Token => total.max(1.0),
            Normalizer::Constant { max_completion_length } => {
                sequences * max_completion_length as f64
            }
            Normalizer::Window { num_items_in_batch, steps_per_generation } => {
                num_items_in_batch.max(1) as f64 / steps_per_generation as f64
            }
            Normalizer::Sum => sequences,
        };
        let weight = (1.0 / (divide * accumulation as f64)) as f32;
        weights.extend(own.iter().map(|m| if *m { weight } else { 0.0 }));
        from += len;
    }
    weights
}

/// DeepSeek-V3.2's off-policy mask: drops sequences with a negative advantage whose mean `sampled -
/// logp` exceeds `threshold`. One factor per token.
pub fn off_policy_mask(
    lengths: &[usize],
    mask: &[bool],
    sampled: &[f32],
    logp: &[f32],
    advantages: &[f64],
    threshold: f64,
) -> Vec<f32> {
    let mut keep = Vec::with_capacity(mask.len());
    let mut from = 0;
    for (len, advantage) in lengths.iter().zip(advantages) {
        let tokens = (from..from + len).filter(|t| mask[*t]);
        let count = tokens.clone().count().max(1) as f64;
        let known = tokens.map(|t| f64::from(sampled[t] - logp[t])).filter(|d| !d.is_nan());
        let kl = known.sum::<f64>() / count;
        let kept = *advantage >= 0.0 || kl <= threshold;
        keep.extend(std::iter::repeat_n(f32::from(u8::from(kept)), *len));
        from += len;
    }
    keep
}

/// TRL's `top_entropy_quantile`: 1 for tokens whose entropy is in the top `quantile` of the batch,
/// else 0.
pub fn top_entropy_mask(entropy: &[f32], mask: &[bool], quantile: f64) -> Vec<f32> {
    let mut seen: Vec<f32> =
        entropy.iter().zip(mask).filter(|(_, m)| **m).map(|(e, _)| *e).collect();
    if seen.is_empty() {
        return vec![0.0; mask.len()];
    }
    seen.sort_by(f32::total_cmp);
    // linear interpolation between ranks, as torch.quantile
    let rank = (1.0 - quantile) * (seen.len() - 1) as f64;
    let (low, high) = (seen[rank.floor() as usize], seen[rank.ceil() as usize]);
    let threshold = low + (high - low) * (rank.fract() as f32);
    entropy.iter().zip(mask).map(|(e, m)| if *m && *e >= threshold { 1.0 } else { 0.0 }).collect()
}
