//! Scores of given tokens: log-probs, rewards, perplexity. Layer 6.
//!
//! Invariant: a language model gives log-probs of tokens, a reward model one score per row, and a
//! process reward model, for each token, the probability that a step ending there is right.

use serde::Serialize;

use super::result::{EvalMetric, EvalRow, Evaluation};
use crate::autograd::Cx;
use crate::data::bad::{BadRows, OnBadRow};
use crate::data::masked::MaskedSequence;
use crate::data::packing::token_batches;
use crate::data::render::ModelText;
use crate::data::rows::Row;
use crate::data::sft::{SftOptions, prepare};
use crate::error::{Error, Result};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::rewards::model::{one_score, sequence_scores};

/// The score of one row.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum RowScore {
    /// The log-prob of each target, and their sum.
    Tokens { logps: Vec<f32>, sum: f64 },
    /// The score of a reward model.
    Reward { score: f32 },
    /// The scores of a process reward model, one per token.
    Steps { scores: Vec<f32> },
}

/// The sequences of rows. If every row has `input_ids`, these are used and all tokens but the first
/// are targets; else rows are tokenised as in SFT, without truncation. `vocab` is the number of
/// rows of the model's embedding.
pub fn sequences(
    rows: &[Row],
    text: &ModelText,
    vocab: usize,
    text_field: &str,
    on_bad_row: OnBadRow,
) -> Result<(Vec<MaskedSequence>, BadRows)> {
    if rows.iter().all(|r| r.has("input_ids")) {
        let sequence = |row: &Row| {
            let ids = row.input_ids(vocab)?;
            Ok(MaskedSequence::new(&ids[..1], &ids[1..]))
        };
        let mut bad = BadRows::new(on_bad_row);
        let good = bad.filter(rows, sequence)?;
        return Ok((good.into_iter().map(|(_, made)| made).collect(), bad));
    }
    let (tokenizer, template) = (&text.tokenizer, text.template.as_ref());
    let options = SftOptions {
        max_length: None,
        dataset_text_field: text_field.into(),
        on_bad_row,
        ..SftOptions::default()
    };
    let (examples, stats) = prepare(rows, tokenizer, template, vocab, &options)?;
    let left = rows.len() - stats.bad.count;
    if examples.len() != left {
        return Err(Error::Run(format!(
            "{} of {} rows have no tokens to score; {stats}",
            left - examples.len(),
            rows.len()
        )));
    }
    let masked = examples
        .into_iter()
        .map(|e| MaskedSequence { input_ids: e.input_ids, target_mask: e.target_mask });
    Ok((masked.collect(), stats.bad))
}

/// Calls `each` with the score of every sequence, in order, as soon as it is known. At most
/// `budget` tokens, or one sequence, go through the model at once. Error: the model is a classifier
/// with several labels.
pub fn score(
    cx: &mut Cx,
    model: &mut Decoder,
    sequences: &[MaskedSequence],
    budget: usize,
    each: &mut dyn FnMut(RowScore) -> Result<()>,
) -> Result<()> {
    if let Task::SequenceClassification { .. } = model.config.task {
        one_score(&model.config)?;
    }
    let lengths: Vec<usize> = sequences.iter().map(|s| s.input_ids.len()).collect();
    model.ensure_positions(cx, lengths.iter().copied().max().unwrap_or(1))?;
    for range in token_batches(&lengths, budget) {
        let batch: Vec<Sequence> = sequences[range]
            .iter()
            .map(|s| Sequence { ids: &s.input_ids, target: Some(&s.target_mask) })
            .collect();
        scores(cx, model, &batch)?.into_iter().try_for_each(&mut *each)?;
    }
    Ok(())
}

fn scores(cx: &mut Cx, model: &mut Decoder, sequences: &[Sequence]) -> Result<Vec<RowScore>> {
    match model.config.task {
        Task::CausalLm => {
            let row = |logps: Vec<f32>| {
                let sum = logps.iter().map(|l| f64::from(*l)).sum();
                RowScore::Tokens { logps, sum }
            };
            Ok(model.logps(cx, sequences)?.into_iter().map(row).collect())
        }
        Task::SequenceClassification { .. } => {
            let ids: Vec<&[u32]> = sequences.iter().map(|s| s.ids).collect();
            let scores = sequence_scores(cx, model, &ids, usize::MAX)?;
            Ok(scores.into_iter().map(|score| RowScore::Reward { score }).collect())
        }
        Task::TokenClassification { .. } => {
            let batch = Batch::new(cx, sequences, model.config.vocab_size)?;
            let hidden = model.hidden(cx, &batch)?;
            let scores = model.scores(cx, &hidden)?.to_f32()?;
            let right: Vec<f32> =
                scores.chunks_exact(2).map(|s| 1.0 / (1.0 + (s[0] - s[1]).exp())).collect();
            let mut rest = right.as_slice();
            let row = |s: &Sequence| {
                let (own, tail) = rest.split_at(s.ids.len());
                rest = tail;
                RowScore::Steps { scores: own.to_vec() }
            };
            Ok(sequences.iter().map(row).collect())
        }
    }
}

/// The mean negative log-likelihood of the targets of all sequences, and its exponential. Error:
/// there is no target.
pub fn perplexity(
    cx: &mut Cx,
    model: &mut Decoder,
    sequences: &[MaskedSequence],
    budget: usize,
) -> Result<Evaluation> {
    let (mut nats, mut tokens, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    score(cx, model, sequences, budget, &mut |row| {
        let RowScore::Tokens { logps, sum } = row else {
            return Err(Error::Run("a classifier has no perplexity; use a language model".into()));
        };
        nats.push(-sum);
        tokens.push(logps.len() as f64);
        rows.push(EvalRow::Likelihood { nll: -sum, tokens: logps.len() });
        Ok(())
    })?;
    let total: f64 = tokens.iter().sum();
    if total == 0.0 {
        return Err(Error::Run(
            "no row has a token to predict; give rows of at least two tokens".into(),
        ));
    }
    let loss = EvalMetric::ratio("loss", &nats, &tokens);
    // To first order, the error of exp(x) is exp(x) times the error of x.
    let perplexity = EvalMetric {
        name: "perplexity".into(),
        value: loss.value.exp(),
        stderr: loss.stderr.map(|e| e * loss.value.exp()),
        ..loss.clone()
    };
    let count = EvalMetric { name: "tokens".into(), value: total, stderr: None, rows: rows.len() };
    let metrics = vec![loss, perplexity, count];
    Ok(Evaluation { metrics, rows, skipped: Vec::new(), bad: BadRows::default() })
}
