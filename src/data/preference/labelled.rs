//! Single completions with a label, for KTO and BCO. Layer 6.
//!
//! Invariant: prompt and completion are kept apart and whole, because KTO's KL estimate puts a
//! completion behind another row's prompt; [`Labelled::sequence`] and [`mismatched`] cut what they
//! put together.

use rayon::prelude::*;

use super::encode::{Encoder, pair};
use super::{OnTruncation, PreferenceOptions, PreferenceStats, TruncationMode};
use crate::data::chat::ChatTemplate;
use crate::data::format::{Content, Format, ParsedRow, RowContent};
use crate::data::masked::MaskedSequence;
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;

#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    pub prompt: Vec<u32>,
    pub completion: Vec<u32>,
    /// Which tokens of the completion count.
    pub target_mask: Vec<bool>,
    pub label: bool,
    pub row: usize,
}

impl Labelled {
    /// The row's own sequence, cut at the end.
    pub fn sequence(&self, max_length: Option<usize>) -> MaskedSequence {
        joined(&self.prompt, self, max_length)
    }
}

/// A prompt with an example's completion.
fn joined(prompt: &[u32], of: &Labelled, max_length: Option<usize>) -> MaskedSequence {
    let mut sequence = MaskedSequence::new(prompt, &of.completion);
    sequence.target_mask[prompt.len()..].copy_from_slice(&of.target_mask);
    sequence.cut(max_length.unwrap_or(usize::MAX), TruncationMode::KeepStart);
    sequence
}

/// KTO's mismatched sequences: inside each batch of `batch` examples, prompt i with completion i -
/// 1, the first with the last.
pub fn mismatched(
    examples: &[Labelled],
    batch: usize,
    max_length: Option<usize>,
) -> Vec<MaskedSequence> {
    let rotate = |chunk: &[Labelled]| -> Vec<MaskedSequence> {
        let before = |i: usize| &chunk[(i + chunk.len() - 1) % chunk.len()];
        (0..chunk.len()).map(|i| joined(&chunk[i].prompt, before(i), max_length)).collect()
    };
    examples.chunks(batch.max(1)).flat_map(rotate).collect()
}

/// Rows that TRL takes apart at once when it unpairs: the chosen of so many rows come before their
/// rejected.
const UNPAIR: usize = 1000;

/// Tokenises rows of prompt, completion and label; rows of pairs become two examples each, in TRL's
/// order.
pub fn labelled(
    rows: &[Row],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    vocab: usize,
    options: &PreferenceOptions,
) -> Result<(Vec<Labelled>, PreferenceStats)> {
    let mut stats = PreferenceStats::new(rows, options)?;
    let encoder = Encoder::new(tokenizer, template, vocab, options.eos_token.as_deref())?;
    let maker = Maker { encoder, assistant_only: options.assistant_only_loss };
    let paired = rows[0].has("chosen") || rows[0].has("rejected");
    let made: Vec<Result<Vec<Made>>> = rows
        .par_iter()
        .map(|row| if paired { both(&maker, row) } else { Ok(vec![single(&maker, row)?]) })
        .collect();
    let mut good: Vec<(usize, Vec<Made>)> = Vec::with_capacity(rows.len());
    for (row, made) in made.into_iter().enumerate() {
        good.extend(stats.bad.admit(made)?.map(|made| (row, made)));
    }
    let mut order: Vec<(usize, Made)> = Vec::new();
    for made in good.chunks(UNPAIR) {
        let sides = if paired { 2 } else { 1 };
        for side in 0..sides {
            order.extend(made.iter().map(|(row, sides)| (*row, sides[side].clone())));
        }
    }
    let mut examples = Vec::with_capacity(order.len());
    for (row, made) in order {
        stats.mismatched(made.mismatch);
        let n = made.prompt.len() + made.completion.len();
        let full = options.max_length.is_some_and(|limit| made.prompt.len() >= limit);
        if full && options.on_truncation == OnTruncation::Truncate {
            stats.longest = stats.longest.max(n);
            stats.dropped_no_target += 1;
            stats.dropped(&rows[row]);
            continue;
        }
        if !stats.admit(&rows[row], n, options, true)? {
            continue;
        }
        let Made { prompt, completion, target_mask, label, .. } = made;
        let example = Labelled { prompt, completion, target_mask, label, row };
        stats.count(&example.sequence(options.max_length));
        examples.push(example);
    }
    let stats = stats.finish(examples.len(), rows)?;
    Ok((examples, stats))
}

/// What is the same for all rows.
struct Maker<'a> {
    encoder: Encoder<'a>,
    assistant_only: bool,
}

#[derive(Clone)]
struct Made {
    prompt: Vec<u32>,
    completion: Vec<u32>,
    target_mask: Vec<bool>,
    label: bool,
    mismatch: Option<String>,
}

fn single(maker: &Maker, row: &Row) -> Result<Made> {
    for field in ["prompt", "completion", "label"] {
        row.need(field)?;
    }
    let example = Format::Unpaired.parse(row, "text")?;
    match &example.content {
        RowContent::Unpaired { prompt, completion, label } => {
            made(maker, row, &example, prompt, completion, *label)
        }
        _ => {
            Err(row
                .error("is not a row with a label; give \"prompt\", \"completion\" and \"label\""))
        }
    }
}

fn both(maker: &Maker, row: &Row) -> Result<Vec<Made>> {
    let pair = pair(row, true)?;
    let Some(prompt) = &pair.prompt else { return Err(row.error("has no prompt")) };
    Ok(vec![
        made(maker, row, &pair.example, prompt, &pair.chosen, true)?,
        made(maker, row, &pair.example, prompt, &pair.rejected, false)?,
    ])
}

fn made(
    maker: &Maker,
    row: &Row,
    example: &ParsedRow,
    prompt: &Content,
    completion: &Content,
    label: bool,
) -> Result<Made> {
    let Maker { encoder, assistant_only } = maker;
    let (ids, whole) = encoder.prompt_and_whole(row, example, prompt, completion)?;
    let (same, mismatch) = encoder.shared(row, &ids, &[&whole])?;
    let content = (prompt, completion);
    let sequence = encoder.completion(row, example, content, &whole, same, *assistant_only)?;
    Ok(Made {
        prompt: whole[..same].to_vec(),
        completion: whole[same..].to_vec(),
        target_mask: sequence.target_mask[same..].to_vec(),
        label,
        mismatch,
    })
}
