//! Log-probs of prompts, for `echo` with `logprobs`. Layer 9.
//!
//! Invariant: they have the same bits as in `temper score`.

use crate::autograd::Cx;
use crate::error::Result;
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::head::head_logps;
use crate::rollout::top_logps;

/// Rows of logits that are computed at once.
const ROWS: usize = 64;

/// A prompt that waits to be scored.
pub(super) struct ScoreTask {
    /// Id of the request.
    pub id: u64,
    pub prompt: usize,
    pub model: usize,
    pub ids: Vec<u32>,
    /// Number of most probable tokens to report.
    pub top: usize,
}

/// Scores for each token of a prompt except the first.
pub(super) struct PromptScores {
    pub logps: Vec<f32>,
    pub top: Vec<Vec<(u32, f32)>>,
}

pub(super) fn score(
    cx: &mut Cx,
    model: &Decoder,
    tasks: &[ScoreTask],
) -> Result<Vec<PromptScores>> {
    let all: Vec<Sequence> =
        tasks.iter().map(|task| Sequence { ids: &task.ids, target: None }).collect();
    let batch = Batch::new(cx, &all, model.vocab())?;
    let targets = &batch.target_ids;
    if targets.is_empty() {
        let none = |_: &ScoreTask| PromptScores { logps: Vec::new(), top: Vec::new() };
        return Ok(tasks.iter().map(none).collect());
    }
    let hidden = model.target_hidden(cx, &batch)?;
    let logps = head_logps(cx, &hidden, &model.head, &batch.targets, 1.0)?.logp.to_f32()?;
    let mut scores = Vec::new();
    let mut first = 0;
    for (task, n) in tasks.iter().zip(&batch.targets_of) {
        let last = first + n;
        let mut top = Vec::new();
        for start in (first..last).step_by(ROWS).filter(|_| task.top > 0) {
            let end = last.min(start + ROWS);
            let logits = model.logits(cx, &hidden.rows(start, end)?)?.to_f32()?;
            let rows = logits.chunks(logits.len() / (end - start));
            top.extend(
                (start..end)
                    .zip(rows)
                    .map(|(i, row)| top_logps(row, targets[i], logps[i], task.top)),
            );
        }
        scores.push(PromptScores { logps: logps[first..last].to_vec(), top });
        first = last;
    }
    Ok(scores)
}
