//! Single completions with a label, for KTO and BCO. Layer 6.
//!
//! Invariant: prompt and completion are stored separately and whole, because KTO's KL estimate
//! pairs a completion with another row's prompt; [`Labelled::sequence`] and [`mismatched`] join and
//! truncate them.

use rayon::prelude::*;

use super::encode::{Encoder, pair};
use super::{OnTruncation, PreferenceOptions, PreferenceStats, TruncationMode};
use crate::data::chat::ChatTemplate;
use crate::data::feed::{Encoded, RowEncoder, encode_all};
use crate::data::format::{Content, Format, ParsedRow, RowContent};
use crate::data::masked::MaskedSequence;
use crate::data::rows::{Row, RowPlace};
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;

#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    pub prompt: Vec<u32>,
    pub completion: Vec<u32>,
    /// Completion tokens that count in the loss.
    pub target_mask: Vec<bool>,
    pub label: bool,
    pub row: usize,
}

impl Labelled {
    /// Returns the row's own sequence, truncated at the end.
    pub fn sequence(&self, max_length: Option<usize>) -> MaskedSequence {
        joined(&self.prompt, self, max_length)
    }
}

/// Joins a prompt with an example's completion.
fn joined(prompt: &[u32], of: &Labelled, max_length: Option<usize>) -> MaskedSequence {
    let mut sequence = MaskedSequence::new(prompt, &of.completion);
    sequence.target_mask[prompt.len()..].copy_from_slice(&of.target_mask);
    sequence.cut(max_length.unwrap_or(usize::MAX), TruncationMode::KeepStart);
    sequence
}

/// Returns KTO's mismatched sequences: within each batch of `batch` examples, prompt i with
/// completion i - 1; the first prompt takes the last completion.
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

/// Encodes rows in a stream, each with its [`mismatched`] sequence.
pub struct CrossedEncoder<'a> {
    labelled: LabelledEncoder<'a>,
    /// Rows per batch. None: no mismatched sequences.
    batch: Option<usize>,
    waiting: Encoded<Labelled>,
}

impl<'a> CrossedEncoder<'a> {
    pub fn new(labelled: LabelledEncoder<'a>, batch: Option<usize>) -> CrossedEncoder<'a> {
        CrossedEncoder { labelled, batch: batch.map(|n| n.max(1)), waiting: Vec::new() }
    }

    /// Makes the mismatched sequences of the complete batches that are waiting; with `all`, of the
    /// rest too.
    fn cross(&mut self, all: bool, examples: &mut Encoded<CrossedExample>) {
        let limit = self.labelled.options.max_length;
        let whole = match self.batch {
            Some(batch) if !all => self.waiting.len() - self.waiting.len() % batch,
            _ => self.waiting.len(),
        };
        let (places, own): (Vec<RowPlace>, Vec<Labelled>) = self.waiting.drain(..whole).unzip();
        let crossed = self.batch.map(|batch| mismatched(&own, batch, limit)).unwrap_or_default();
        let mut crossed = crossed.into_iter();
        let pairs = own.into_iter().map(|own| (own, crossed.next()));
        examples.extend(places.into_iter().zip(pairs));
    }
}

/// An example, and its prompt with another example's completion.
pub type CrossedExample = (Labelled, Option<MaskedSequence>);

impl RowEncoder for CrossedEncoder<'_> {
    type Example = CrossedExample;
    type Stats = PreferenceStats;

    fn encode(&mut self, rows: &[Row], examples: &mut Encoded<CrossedExample>) -> Result<()> {
        self.labelled.encode(rows, &mut self.waiting)?;
        self.cross(false, examples);
        Ok(())
    }

    fn finish(mut self, examples: &mut Encoded<CrossedExample>) -> Result<PreferenceStats> {
        self.labelled.take_apart(true, &mut self.waiting)?;
        self.cross(true, examples);
        self.labelled.stats.finish()
    }
}

/// Number of rows that TRL unpairs at a time: the chosen completions of a batch come before its
/// rejected ones.
const UNPAIR: usize = 1000;

/// Tokenises rows of prompt, completion and label; each row of a pair becomes two examples, in
/// TRL's order.
pub fn labelled(
    rows: &[Row],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    vocab: usize,
    options: &PreferenceOptions,
) -> Result<(Vec<Labelled>, PreferenceStats)> {
    encode_all(LabelledEncoder::new(tokenizer, template, vocab, options)?, rows)
}

/// Tokenises labelled rows or pairs in a stream.
pub struct LabelledEncoder<'a> {
    maker: Maker<'a>,
    options: &'a PreferenceOptions,
    /// Whether rows are pairs; the first row decides for all.
    paired: Option<bool>,
    /// Good rows waiting to be unpaired, each with its number.
    good: Vec<(RowPlace, usize, Vec<Made>)>,
    stats: PreferenceStats,
}

impl<'a> LabelledEncoder<'a> {
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        vocab: usize,
        options: &'a PreferenceOptions,
    ) -> Result<LabelledEncoder<'a>> {
        let stats = PreferenceStats::new(options)?;
        let encoder = Encoder::new(tokenizer, template, vocab, options.eos_token.as_deref())?;
        let maker = Maker { encoder, assistant_only: options.assistant_only_loss };
        Ok(LabelledEncoder { maker, options, paired: None, good: Vec::new(), stats })
    }

    /// Makes examples of the good rows, in TRL's batches; with `all`, of the rest too.
    fn take_apart(&mut self, all: bool, examples: &mut Encoded<Labelled>) -> Result<()> {
        let good = std::mem::take(&mut self.good);
        let mut rest = good.into_iter();
        while rest.len() >= UNPAIR || (all && rest.len() > 0) {
            let part: Vec<_> = rest.by_ref().take(UNPAIR).collect();
            let sides = if self.paired == Some(true) { 2 } else { 1 };
            for side in 0..sides {
                for (place, number, made) in &part {
                    let example = self.admit(place, made[side].clone(), *number)?;
                    examples.extend(example.map(|example| (place.clone(), example)));
                }
            }
        }
        self.good = rest.collect();
        Ok(())
    }

    /// Counts the outcome of one side. None: dropped.
    fn admit(&mut self, place: &RowPlace, made: Made, row: usize) -> Result<Option<Labelled>> {
        let LabelledEncoder { options, stats, .. } = self;
        stats.mismatched(made.mismatch);
        let n = made.prompt.len() + made.completion.len();
        let full = options.max_length.is_some_and(|limit| made.prompt.len() >= limit);
        if full && options.on_truncation == OnTruncation::Truncate {
            stats.longest = stats.longest.max(n);
            stats.dropped_no_target += 1;
            stats.dropped(place);
            return Ok(None);
        }
        if !stats.admit(place, n, options, true)? {
            return Ok(None);
        }
        let Made { prompt, completion, target_mask, label, .. } = made;
        let example = Labelled { prompt, completion, target_mask, label, row };
        stats.count(&example.sequence(options.max_length));
        stats.examples += 1;
        Ok(Some(example))
    }
}

impl RowEncoder for LabelledEncoder<'_> {
    type Example = Labelled;
    type Stats = PreferenceStats;

    fn encode(&mut self, rows: &[Row], examples: &mut Encoded<Labelled>) -> Result<()> {
        let Some(first) = rows.first() else { return Ok(()) };
        let is_pair = first.has("chosen") || first.has("rejected");
        let paired = *self.paired.get_or_insert(is_pair);
        let number = self.stats.rows;
        self.stats.read(rows, self.maker.encoder.renderer.template.is_some());
        let make = |row: &Row| match paired {
            true => both(&self.maker, row),
            false => Ok(vec![single(&self.maker, row)?]),
        };
        let made: Vec<Result<Vec<Made>>> = rows.par_iter().map(make).collect();
        for (i, made) in made.into_iter().enumerate() {
            let made = self.stats.bad.admit(made)?;
            self.good.extend(made.map(|made| (rows[i].at(), number + i, made)));
        }
        self.take_apart(false, examples)
    }

    fn finish(mut self, examples: &mut Encoded<Labelled>) -> Result<PreferenceStats> {
        self.take_apart(true, examples)?;
        self.stats.finish()
    }
}

/// Settings that all rows share.
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
