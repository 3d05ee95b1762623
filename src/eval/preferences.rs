//! How often a reward model scores the chosen completion above the rejected one. Layer 6.
//!
//! Invariant: pairs are tokenised as in `temper reward`, but not truncated, so no pair is dropped.

use super::options::EvalOptions;
use super::result::{EvalMetric, EvalRow, Evaluation};
use crate::autograd::Cx;
use crate::data::preference::{PairStyle, PreferenceOptions, pairs};
use crate::data::render::ModelText;
use crate::data::rows::Row;
use crate::error::Result;
use crate::model::decoder::Decoder;
use crate::rewards::model::sequence_scores;

/// Accuracy and margin on rows with chosen and rejected, not truncated. At most `batch_tokens`
/// tokens go through the model at once.
pub fn preferences(
    cx: &mut Cx,
    model: &mut Decoder,
    text: &ModelText,
    rows: &[Row],
    options: &EvalOptions,
) -> Result<Evaluation> {
    let (tokenizer, template) = (&text.tokenizer, text.template.as_ref());
    let budget = options.batch_tokens;
    let on_bad_row = options.data.on_bad_row;
    let options =
        PreferenceOptions { max_length: None, on_bad_row, ..PreferenceOptions::default() };
    let vocab = model.config.vocab_size;
    let (examples, stats) = pairs(rows, tokenizer, template, vocab, PairStyle::Reward, &options)?;
    let sides: Vec<&[u32]> = examples
        .iter()
        .flat_map(|e| [e.chosen.input_ids.as_slice(), e.rejected.input_ids.as_slice()])
        .collect();
    let scores = sequence_scores(cx, model, &sides, budget)?;
    let pairs = scores.chunks_exact(2);
    let won: Vec<f64> = pairs.clone().map(|s| f64::from(u8::from(s[0] > s[1]))).collect();
    let margins: Vec<f64> = pairs.clone().map(|s| f64::from(s[0]) - f64::from(s[1])).collect();
    Ok(Evaluation {
        metrics: vec![EvalMetric::mean("accuracy", &won), EvalMetric::mean("margin", &margins)],
        rows: pairs.map(|s| EvalRow::Preference { chosen: s[0], rejected: s[1] }).collect(),
        skipped: Vec::new(),
        bad: stats.bad,
    })
}
