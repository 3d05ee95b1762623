//! Completions through the model: packed batches of pairs, log-probs summed over each sequence, and
//! the figures that all preference methods show. Layer 7.
//!
//! Invariant: a pair's two sides stand side by side, the chosen first, so sequence 2i + s of a
//! batch is side s of pair i.

use crate::autograd::Cx;
use crate::data::masked::MaskedSequence;
use crate::data::preference::{PairExample, PairStyle, PreferenceOptions, PreferenceStats, pairs};
use crate::device::DType;
use crate::error::Result;
use crate::methods::offline::Set;
use crate::methods::{MASKS, MaskedIds, Metric, Source};
use crate::model::batch::{self, Batch, Group, Vocab};
use crate::model::decoder::Decoder;
use crate::ops::head::{HeadOut, head_logps, head_squares, mean_logits};
use crate::ops::preference::segment_sums;
use crate::tensor::Tensor;

/// The pairs of a run.
pub struct PairRows {
    train: Vec<PairExample>,
    eval: Vec<PairExample>,
    places: Vec<String>,
    /// Compute the prompt of a pair once. Off: the same numbers up to rounding, slower; for tests.
    pub share_prompts: bool,
}

impl PairRows {
    pub fn new(
        source: &Source,
        style: PairStyle,
        options: &PreferenceOptions,
    ) -> Result<(PairRows, PreferenceStats)> {
        let Source { tokenizer, template, model, .. } = *source;
        let (train, stats) =
            pairs(source.train, tokenizer, template, model.vocab_size, style, options)?;
        let eval = match source.eval {
            [] => Vec::new(),
            rows => pairs(rows, tokenizer, template, model.vocab_size, style, options)?.0,
        };
        let places = train.iter().map(|e| source.train[e.row].place()).collect();
        Ok((PairRows { train, eval, places, share_prompts: true }, stats))
    }

    pub fn of(&self, set: Set) -> &[PairExample] {
        match set {
            Set::Train => &self.train,
            Set::Eval => &self.eval,
        }
    }

    pub fn pick(&self, set: Set, rows: &[usize]) -> Vec<&PairExample> {
        rows.iter().map(|r| &self.of(set)[*r]).collect()
    }

    pub fn place(&self, row: usize) -> String {
        self.places[row].clone()
    }

    /// Of the first pairs: chosen, then rejected.
    pub fn masks(&self) -> Vec<MaskedIds> {
        let sides = self.train.iter().flat_map(|e| [&e.chosen, &e.rejected]);
        sides.take(MASKS).map(|s| (s.input_ids.clone(), s.target_mask.clone())).collect()
    }

    pub fn longest(&self) -> usize {
        let sides = self.train.iter().chain(&self.eval).flat_map(|e| [&e.chosen, &e.rejected]);
        sides.map(|s| s.input_ids.len()).max().unwrap_or(1)
    }

    /// The pairs as one packed batch for a model of `vocab`, and the row of each side's last token
    /// (without virtual tokens).
    pub fn batch(
        &self,
        cx: &Cx,
        vocab: Vocab,
        pairs: &[&PairExample],
    ) -> Result<(Batch, Vec<i32>)> {
        let (mut groups, mut ends): (Vec<Group>, Vec<i32>) = (Vec::new(), Vec::new());
        let mut row = 0;
        for e in pairs {
            // Without a common beginning (cut away, or not asked for) each side stands behind its
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

fn tail(s: &MaskedSequence, at: usize) -> batch::Sequence<'_> {
    batch::Sequence { ids: &s.input_ids[at..], target: Some(&s.target_mask[at..]) }
}

/// A batch through the model.
pub struct Forward {
    pub out: HeadOut,
    /// F32 [sequences]: sums of weight x log-prob.
    pub sums: Tensor,
    /// By target: whether it is the completion's. All are, unless a method says otherwise.
    pub completion: Vec<bool>,
    mean_logits: Option<Tensor>,
    starts: Vec<usize>,
    targets: Vec<u32>,
}

/// What a forward is asked for beside log-probs.
#[derive(Clone, Copy, Default)]
pub struct Ask {
    /// log sum p^2 of each target's distribution.
    pub squares: bool,
    /// What [`Forward::figures`] needs.
    pub figures: bool,
}

/// Log-probs of the batch's targets and their sums under `weights`, one a target. On the tape if
/// there is one.
pub fn forward(
    cx: &mut Cx,
    model: &Decoder,
    batch: &Batch,
    weights: &[f32],
    ask: Ask,
) -> Result<Forward> {
    let hidden = model.target_hidden(cx, batch)?;
    let head = if ask.squares { head_squares } else { head_logps };
    let out = head(cx, &hidden, &model.head, &batch.targets, 1.0)?;
    let mean_logits = if ask.figures { Some(mean_logits(cx, &hidden, &model.head)?) } else { None };
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

/// `weights x values`, summed from each of `starts` to the next.
pub fn sums(cx: &mut Cx, values: &Tensor, weights: &[f32], starts: &[usize]) -> Result<Tensor> {
    let weights = floats(cx, weights)?;
    let starts: Vec<i32> = starts.iter().map(|s| *s as i32).collect();
    let starts = cx.ints("sequence starts", &starts)?;
    segment_sums(cx, values, &weights, &starts)
}

pub fn floats(cx: &Cx, values: &[f32]) -> Result<Tensor> {
    Tensor::from_host(&cx.pool, "loss weights", DType::F32, &[values.len()], values)
}

impl Forward {
    /// Where each sequence's targets begin, and the end.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// Means over the completion tokens: entropy of all, token accuracy of the sequences that
    /// `chosen` says, and the mean logit of those and of the others.
    pub fn figures(&self, chosen: impl Fn(usize) -> bool) -> Result<Vec<Metric>> {
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

/// Of pairs' numbers [n, 2]: the means of both sides, as `name/chosen` and `name/rejected`.
pub fn sides(name: &str, values: &[f32]) -> [Metric; 2] {
    let n = (values.len() / 2).max(1) as f64;
    let mean =
        |side: usize| values.iter().skip(side).step_by(2).map(|v| f64::from(*v)).sum::<f64>() / n;
    [(format!("{name}/chosen").into(), mean(0)), (format!("{name}/rejected").into(), mean(1))]
}

/// TRL's four figures of rewards [n, 2].
pub fn reward_figures(rewards: &[f32]) -> Vec<Metric> {
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

/// Tokens of both sides.
pub fn token_count(pairs: &[&PairExample]) -> usize {
    pairs.iter().map(|e| e.chosen.input_ids.len() + e.rejected.input_ids.len()).sum()
}
