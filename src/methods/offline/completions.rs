//! Completions through the model: packed batches of pairs, log-probs summed over each sequence, and
//! the metrics that all preference methods report. Layer 7.
//!
//! Invariant: a pair's two sides are adjacent, the chosen first, so sequence 2i + s of a batch is
//! side s of pair i.

use crate::autograd::Cx;
use crate::data::masked::MaskedSequence;
use crate::data::preference::{PairEncoder, PairExample, PairStyle, PreferenceOptions};
use crate::error::Result;
use crate::methods::offline::MicroBatch;
use crate::methods::offline::rows::Rows;
use crate::methods::reference::floats;
use crate::methods::{MethodInputs, Metric};
use crate::model::batch::{self, Batch, Group, Vocab};
use crate::model::decoder::Decoder;
use crate::ops::head::{HeadOut, head_rows, mean_logits};
use crate::ops::preference::segment_sums;
use crate::tensor::Tensor;

/// The pairs of a run.
pub struct PairRows {
    pub rows: Rows<PairExample>,
    /// Compute the prompt of a pair once. Without it: the same numbers up to rounding, but slower;
    /// for tests.
    pub share_prompts: bool,
}

/// The pairs of a micro-batch.
pub struct PairBatch {
    pub pairs: Vec<PairExample>,
    /// Tokens of both sides.
    pub tokens: usize,
    /// F32 `[pairs]`: the weight of each pair in the loss.
    pub weight: Tensor,
}

impl PairRows {
    /// Tokenises the rows. Also returns a summary to print.
    pub fn new(
        inputs: &MethodInputs,
        style: PairStyle,
        options: &PreferenceOptions,
    ) -> Result<(PairRows, String)> {
        let MethodInputs { tokenizer, template, model, on_bad_row, .. } = *inputs;
        let options = PreferenceOptions { on_bad_row, ..options.clone() };
        let encoder = |_| PairEncoder::new(tokenizer, template, model.vocab_size, style, &options);
        let (rows, stats) = Rows::tokenise(inputs, encoder, |pair| pair)?;
        Ok((PairRows { rows, share_prompts: true }, stats))
    }

    pub fn open(&self, cx: &Cx, micro: &MicroBatch) -> Result<PairBatch> {
        let pairs = self.rows.pick(micro.split, micro.rows)?;
        let weight = floats(cx, &vec![micro.share(); pairs.len()])?;
        let tokens = sequences(&pairs).map(|s| s.input_ids.len()).sum();
        Ok(PairBatch { pairs, tokens, weight })
    }

    /// The pairs as one packed batch for a model of `vocab`, and the row of each side's last token
    /// (without virtual tokens).
    pub fn batch(&self, cx: &Cx, vocab: Vocab, pairs: &[PairExample]) -> Result<(Batch, Vec<i32>)> {
        let (mut groups, mut ends): (Vec<Group>, Vec<i32>) = (Vec::new(), Vec::new());
        let mut row = 0;
        for e in pairs {
            // Without a shared beginning (truncated, or not requested) each side begins with its
            // own first token.
            let shared = if self.share_prompts { e.shared } else { 0 };
            let at = shared.max(1);
            let sides = [&e.chosen, &e.rejected];
            let parts: &[&[&MaskedSequence]] =
                if shared == 0 { &[&sides[..1], &sides[1..]] } else { &[&sides] };
            for part in parts {
                row += at - 1;
                for side in *part {
                    row += 1 + side.input_ids.len() - at;
                    ends.push(row as i32 - 1);
                }
                let completions = part.iter().map(|s| tail(s, at)).collect();
                groups.push(Group { prompt: &part[0].input_ids[..at], completions });
            }
        }
        Ok((Batch::grouped(cx, &groups, vocab)?, ends))
    }
}

impl PairBatch {
    /// A number of each side, F32 [pairs, 2].
    pub fn sides(&self, cx: &Cx, of: impl Fn(&MaskedSequence) -> usize) -> Result<Tensor> {
        let values: Vec<f32> = sequences(&self.pairs).map(|s| of(s) as f32).collect();
        floats(cx, &values)?.reshape(&[self.pairs.len(), 2])
    }
}

/// Both sides of each pair, the chosen first.
pub fn sequences(pairs: &[PairExample]) -> impl Iterator<Item = &MaskedSequence> {
    pairs.iter().flat_map(|e| [&e.chosen, &e.rejected])
}

fn tail(s: &MaskedSequence, at: usize) -> batch::Sequence<'_> {
    batch::Sequence { ids: &s.input_ids[at..], target: Some(&s.target_mask[at..]) }
}

/// The results of a batch's forward.
pub struct Forward {
    pub out: HeadOut,
    /// F32 `[sequences]`: sums of weight x log-prob.
    pub sums: Tensor,
    /// For each target, whether it is part of the completion. All are, unless a method sets this.
    pub completion: Vec<bool>,
    mean_logits: Option<Tensor>,
    starts: Vec<usize>,
    targets: Vec<u32>,
}

/// What a forward computes beside log-probs.
#[derive(Clone, Copy, Default)]
pub struct HeadPass {
    /// log sum p^2 of each target's distribution.
    pub squares: bool,
    /// The mean logits that [`Forward::metrics`] reports.
    pub logits: bool,
}

/// Log-probs of the batch's targets and their sums under `weights`, one per target. On the tape, if
/// there is one.
pub fn forward(
    cx: &mut Cx,
    model: &Decoder,
    batch: &Batch,
    weights: &[f32],
    pass: HeadPass,
) -> Result<Forward> {
    let hidden = model.target_hidden(cx, batch)?;
    let out = head_rows(cx, &hidden, &model.head, &batch.targets, 1.0, pass.squares)?;
    let mean_logits = if pass.logits { Some(mean_logits(cx, &hidden, &model.head)?) } else { None };
    let starts: Vec<usize> = std::iter::once(0)
        .chain(batch.targets_of.iter().scan(0, |at, n| {
            *at += n;
            Some(*at)
        }))
        .collect();
    let sums = sums(cx, &out.logp, weights, &starts)?;
    let completion = vec![true; batch.target_ids.len()];
    Ok(Forward { out, sums, completion, mean_logits, starts, targets: batch.target_ids.clone() })
}

/// Sums of `weights x values` from each of `starts` to the next.
pub fn sums(cx: &mut Cx, values: &Tensor, weights: &[f32], starts: &[usize]) -> Result<Tensor> {
    let weights = floats(cx, weights)?;
    let starts: Vec<i32> = starts.iter().map(|s| *s as i32).collect();
    let starts = cx.ints("sequence starts", &starts)?;
    segment_sums(cx, values, &weights, &starts)
}

impl Forward {
    /// Where each sequence's targets begin, and where the last ones end.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// Means over the completion tokens: the entropy over all; token accuracy and mean logit over
    /// the sequences for which `chosen` is true; the mean logit over the others.
    pub fn metrics(&self, chosen: impl Fn(usize) -> bool) -> Result<Vec<Metric>> {
        let (entropy, best) = (self.out.entropy.to_f32()?, self.out.best.to_vec::<i32>()?);
        let logits = self.mean_logits.as_ref().map(Tensor::to_f32).transpose()?.unwrap_or_default();
        let right: Vec<f32> =
            best.iter().zip(&self.targets).map(|(b, t)| f32::from(*b as u32 == *t)).collect();
        let mean = |values: &[f32], pick: &dyn Fn(usize) -> bool| -> Option<f64> {
            let sequences = self.starts.windows(2).enumerate().filter(|(k, _)| pick(*k));
            let tokens = sequences.flat_map(|(_, w)| w[0]..w[1]).filter(|t| self.completion[*t]);
            let (sum, n) = tokens.fold((0f64, 0), |(s, n), t| (s + f64::from(values[t]), n + 1));
            (n > 0).then(|| sum / n as f64)
        };
        let mut all: Vec<Metric> = Vec::new();
        let mut push =
            |name: &'static str, value: Option<f64>| all.extend(value.map(|v| (name.into(), v)));
        push("entropy", mean(&entropy, &|_| true));
        push("mean_token_accuracy", mean(&right, &chosen));
        if !logits.is_empty() {
            push("logits/chosen", mean(&logits, &chosen));
            push("logits/rejected", mean(&logits, &|k| !chosen(k)));
        }
        Ok(all)
    }
}

/// The means of both sides of pairs' numbers [n, 2], as `name/chosen` and `name/rejected`.
pub fn sides(name: &str, values: &[f32]) -> [Metric; 2] {
    let n = (values.len() / 2).max(1) as f64;
    let mean =
        |side: usize| values.iter().skip(side).step_by(2).map(|v| f64::from(*v)).sum::<f64>() / n;
    [(format!("{name}/chosen").into(), mean(0)), (format!("{name}/rejected").into(), mean(1))]
}

/// TRL's four metrics of rewards [n, 2].
pub fn reward_metrics(rewards: &[f32]) -> Vec<Metric> {
    let n = (rewards.len() / 2).max(1) as f64;
    let won = rewards.chunks_exact(2).filter(|r| r[0] > r[1]).count();
    let margin = rewards.chunks_exact(2).map(|r| f64::from(r[0] - r[1])).sum::<f64>();
    let mut all = Vec::from(sides("rewards", rewards));
    all.extend([
        ("rewards/accuracies".into(), won as f64 / n),
        ("rewards/margins".into(), margin / n),
    ]);
    all
}

/// The metrics of every method over pairs, from a forward over both sides, the rewards [n, 2], and
/// the log-probs [n, 2] that the method compares.
pub fn pair_metrics(f: &Forward, rewards: &Tensor, logps: &[f32]) -> Result<Vec<Metric>> {
    let mut all = f.metrics(|k| k.is_multiple_of(2))?;
    all.extend(reward_metrics(&rewards.to_f32()?));
    all.extend(sides("logps", logps));
    Ok(all)
}

/// The mean NLL of the chosen completions' tokens, F32 `[1]`. `f` has two sequences per pair.
pub fn chosen_nll(cx: &mut Cx, f: &Forward) -> Result<Tensor> {
    let lengths = || f.starts.windows(2).map(|w| w[1] - w[0]).enumerate();
    let count: usize = lengths().filter(|(k, _)| k.is_multiple_of(2)).map(|(_, n)| n).sum();
    let share = -1.0 / count.max(1) as f32;
    let weight = |k: usize| if k.is_multiple_of(2) { share } else { 0.0 };
    let weights: Vec<f32> = lengths().flat_map(|(k, n)| vec![weight(k); n]).collect();
    sums(cx, &f.out.logp, &weights, &[0, weights.len()])
}
