//! Pairs of a chosen and a rejected completion. Layer 6.
//!
//! Invariant: both sides of an example begin with the same `shared` tokens, none of which is a
//! target, so that a packed pair can compute them once.

use rayon::prelude::*;

use super::encode::{Encoder, Pair, pair};
use super::{OnTruncation, PreferenceOptions, PreferenceStats, TruncationMode};
use crate::data::chat::ChatTemplate;
use crate::data::feed::{Encoded, RowEncoder, encode_all};
use crate::data::format::Content;
use crate::data::masked::{MaskedSequence, common};
use crate::data::render::mixed;
use crate::data::rows::{Row, RowPlace, kind};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Which of TRL's trainers to match; their tokens differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PairStyle {
    /// DPOTrainer: the completion begins at the first token that differs between the prompt alone
    /// and the prompt with its answer; EOS ends plain texts; both truncation modes.
    Dpo,
    /// ORPOTrainer and CPOTrainer: no special tokens except BOS and EOS, which are added around
    /// every row, conversations included; at most the last token of the prompt may merge into the
    /// completion; truncated at the end.
    Orpo,
    /// RewardTrainer: whole sequences, no mask; a pair with a side longer than max_length is
    /// dropped, never truncated.
    Reward,
}

#[derive(Clone, Debug, PartialEq)]
pub struct PairExample {
    pub chosen: MaskedSequence,
    pub rejected: MaskedSequence,
    /// Number of leading tokens that both sides share and that are targets in neither.
    pub shared: usize,
    /// The row's `margin`; None if the rows have none.
    pub margin: Option<f32>,
    pub row: usize,
}

impl PairExample {
    pub fn new(
        chosen: MaskedSequence,
        rejected: MaskedSequence,
        margin: Option<f32>,
        row: usize,
    ) -> PairExample {
        let free = |s: &MaskedSequence| s.target_mask.iter().take_while(|t| !**t).count();
        let shared =
            common(&chosen.input_ids, &rejected.input_ids).min(free(&chosen)).min(free(&rejected));
        PairExample { chosen, rejected, shared, margin, row }
    }
}

/// A row before truncation.
struct Made {
    chosen: MaskedSequence,
    rejected: MaskedSequence,
    margin: Option<f32>,
    mismatch: Option<String>,
}

/// Tokenises preference rows. `vocab` is the number of rows of the model's embedding. If the first
/// row has a margin, every row must have one.
pub fn pairs(
    rows: &[Row],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    vocab: usize,
    style: PairStyle,
    options: &PreferenceOptions,
) -> Result<(Vec<PairExample>, PreferenceStats)> {
    encode_all(PairEncoder::new(tokenizer, template, vocab, style, options)?, rows)
}

/// Tokenises pairs in a stream.
pub struct PairEncoder<'a> {
    encoder: Encoder<'a>,
    style: PairStyle,
    options: &'a PreferenceOptions,
    /// Whether rows have a margin; the first row decides for all.
    margins: Option<bool>,
    stats: PreferenceStats,
}

impl<'a> PairEncoder<'a> {
    pub fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        vocab: usize,
        style: PairStyle,
        options: &'a PreferenceOptions,
    ) -> Result<PairEncoder<'a>> {
        let mut stats = PreferenceStats::new(options)?;
        if style == PairStyle::Reward {
            stats.target_tokens = None;
        }
        let encoder = Encoder::new(tokenizer, template, vocab, options.eos_token.as_deref())?;
        Ok(PairEncoder { encoder, style, options, margins: None, stats })
    }

    fn make(&self, row: &Row, margins: bool) -> Result<Made> {
        let margin = if margins { Some(margin(row)?) } else { None };
        let (chosen, rejected, mismatch) = match self.style {
            PairStyle::Dpo => dpo(&self.encoder, row, self.options.assistant_only_loss)?,
            PairStyle::Orpo => orpo(&self.encoder, row)?,
            PairStyle::Reward => reward(&self.encoder, row)?,
        };
        Ok(Made { chosen, rejected, margin, mismatch })
    }

    /// Counts a row and truncates it. None: dropped.
    fn admit(&mut self, place: &RowPlace, made: Made, row: usize) -> Result<Option<PairExample>> {
        let PairEncoder { style, options, stats, .. } = self;
        let Made { mut chosen, mut rejected, margin, mismatch } = made;
        stats.mismatched(mismatch);
        let longest = chosen.input_ids.len().max(rejected.input_ids.len());
        let long = options.max_length.is_some_and(|limit| longest > limit);
        // a prompt that fills max_length leaves no completion if the start is kept
        let free = |s: &MaskedSequence| s.target_mask.iter().take_while(|t| !**t).count();
        let fills = |limit: usize| free(&chosen).max(free(&rejected)) >= limit;
        let mode = match style {
            PairStyle::Dpo => options.truncation_mode,
            PairStyle::Orpo | PairStyle::Reward => TruncationMode::KeepStart,
        };
        let full =
            long && mode == TruncationMode::KeepStart && options.max_length.is_some_and(fills);
        let cuts = *style != PairStyle::Reward;
        if full && cuts && options.on_truncation == OnTruncation::Truncate {
            stats.longest = stats.longest.max(longest);
            stats.dropped_no_target += 1;
            stats.dropped(place);
            return Ok(None);
        }
        if !stats.admit(place, longest, options, cuts)? {
            return Ok(None);
        }
        if let Some(limit) = options.max_length {
            chosen.cut(limit, mode);
            rejected.cut(limit, mode);
        }
        stats.count(&chosen);
        stats.count(&rejected);
        stats.examples += 1;
        Ok(Some(PairExample::new(chosen, rejected, margin, row)))
    }
}

impl RowEncoder for PairEncoder<'_> {
    type Example = PairExample;
    type Stats = PreferenceStats;

    fn encode(&mut self, rows: &[Row], examples: &mut Encoded<PairExample>) -> Result<()> {
        let Some(first) = rows.first() else { return Ok(()) };
        let margins = *self.margins.get_or_insert(first.has("margin"));
        let number = self.stats.rows;
        self.stats.read(rows, self.encoder.renderer.template.is_some());
        let made: Vec<Result<Made>> = rows.par_iter().map(|row| self.make(row, margins)).collect();
        for (i, made) in made.into_iter().enumerate() {
            let Some(made) = self.stats.bad.admit(made)? else { continue };
            let place = rows[i].at();
            let example = self.admit(&place, made, number + i)?;
            examples.extend(example.map(|example| (place, example)));
        }
        Ok(())
    }

    fn finish(self, _: &mut Encoded<PairExample>) -> Result<PreferenceStats> {
        self.stats.finish()
    }
}

fn margin(row: &Row) -> Result<f32> {
    let Some(value) = row.get("margin") else {
        return Err(row.error(
            "has no \"margin\", or one that is null or NaN, but the first row has a number; give \
             every row a margin, or none",
        ));
    };
    let number = value.as_f64().ok_or_else(|| {
        let found = value.as_str().map_or(kind(value).to_string(), |s| format!("the string {s:?}"));
        row.error(format!("field \"margin\" must be a finite number, found {found}"))
    })?;
    match (number as f32).is_finite() {
        true => Ok(number as f32),
        false => {
            Err(row.error(format!("margin {number} is not a finite number; give one below 3e38")))
        }
    }
}

type Sides = (MaskedSequence, MaskedSequence, Option<String>);

fn with_prompt(row: &Row) -> Result<(Pair, Content)> {
    let pair = pair(row, true)?;
    match pair.prompt.clone() {
        Some(prompt) => Ok((pair, prompt)),
        None => Err(row.error("has no prompt")),
    }
}

fn dpo(encoder: &Encoder, row: &Row, assistant_only: bool) -> Result<Sides> {
    let (pair, prompt) = with_prompt(row)?;
    let (ids, chosen) = encoder.prompt_and_whole(row, &pair.example, &prompt, &pair.chosen)?;
    let (_, rejected) = encoder.prompt_and_whole(row, &pair.example, &prompt, &pair.rejected)?;
    let (same, mismatch) = encoder.shared(row, &ids, &[&chosen, &rejected])?;
    let side = |answer: &Content, whole: &[u32]| {
        let content = (&prompt, answer);
        encoder.completion(row, &pair.example, content, whole, same, assistant_only)
    };
    Ok((side(&pair.chosen, &chosen)?, side(&pair.rejected, &rejected)?, mismatch))
}

fn reward(encoder: &Encoder, row: &Row) -> Result<Sides> {
    let pair = pair(row, false)?;
    let whole = |answer: &Content| -> Result<MaskedSequence> {
        // Without a prompt, an answer is a whole conversation or a whole text.
        let none = match answer {
            Content::Text(_) => Content::Text(String::new()),
            Content::Chat(_) => Content::Chat(Vec::new()),
        };
        let prompt = pair.prompt.as_ref().unwrap_or(&none);
        let ids = encoder.renderer.whole(row, &pair.example, prompt, answer, Some(encoder.eos))?;
        Ok(MaskedSequence { target_mask: vec![false; ids.len()], input_ids: ids })
    };
    Ok((whole(&pair.chosen)?, whole(&pair.rejected)?, None))
}

/// Returns prompt and answers as texts; in a conversation, the prompt is the common prefix of the
/// three renderings.
fn texts(encoder: &Encoder, row: &Row, pair: &Pair, prompt: &Content) -> Result<[String; 3]> {
    match (prompt, &pair.chosen, &pair.rejected) {
        (Content::Text(prompt), Content::Text(chosen), Content::Text(rejected)) => {
            Ok([prompt.clone(), chosen.clone(), rejected.clone()])
        }
        (Content::Chat(prompt), Content::Chat(chosen), Content::Chat(rejected)) => {
            if prompt.last().and_then(|m| m.get("role")?.as_str()) == Some("assistant") {
                return Err(row.error(
                    "its prompt ends with the assistant's turn; end prompts with the user's (or a tool's) message",
                ));
            }
            let before: Vec<char> =
                encoder.renderer.render(row, &pair.example, prompt, true)?.text.chars().collect();
            let whole = |answer: &[serde_json::Value]| -> Result<Vec<char>> {
                let talk = [prompt.as_slice(), answer].concat();
                let text = encoder.renderer.render(row, &pair.example, &talk, false)?.text;
                Ok(text.chars().collect())
            };
            let (chosen, rejected) = (whole(chosen)?, whole(rejected)?);
            let at = common(&before, &chosen).min(common(&before, &rejected));
            let text = |c: &[char]| c.iter().collect::<String>();
            Ok([text(&before[..at]), text(&chosen[at..]), text(&rejected[at..])])
        }
        _ => Err(mixed(row)),
    }
}

fn orpo(encoder: &Encoder, row: &Row) -> Result<Sides> {
    let (pair, prompt) = with_prompt(row)?;
    let [prompt, chosen, rejected] = texts(encoder, row, &pair, &prompt)?;
    let ids = encoder.text(row, &prompt, false)?;
    let side = |answer: &str| -> Result<(Vec<u32>, Vec<u32>)> {
        let whole = encoder.text(row, &format!("{prompt}{answer}"), false)?;
        if whole.len() < ids.len() {
            return Err(no_prefix(row));
        }
        // a last prompt token that merges with the answer's first belongs to the answer
        let at = if whole[..ids.len()] == ids[..] { ids.len() } else { ids.len() - 1 };
        Ok((whole[..at].to_vec(), whole[at..].to_vec()))
    };
    let (chosen, rejected) = (side(&chosen)?, side(&rejected)?);
    let differ = chosen.0.iter().zip(&rejected.0).filter(|(a, b)| a != b).count();
    if differ > 1 {
        return Err(no_prefix(row));
    }
    let merged = chosen.0.len().min(rejected.0.len()) < ids.len();
    let mismatch = match merged {
        true => Some(encoder.renderer.tokenizer.decode(&ids[ids.len() - 1..], false)?),
        false => None,
    };
    let finish = |(mut prompt, mut answer): (Vec<u32>, Vec<u32>)| {
        if let Some(bos) = encoder.renderer.tokenizer.bos_id()
            && prompt.first() != Some(&bos)
        {
            prompt.insert(0, bos);
        }
        if answer.last() != Some(&encoder.eos.id) {
            answer.push(encoder.eos.id);
        }
        MaskedSequence::new(&prompt, &answer)
    };
    Ok((finish(chosen), finish(rejected), mismatch))
}

fn no_prefix(row: &Row) -> Error {
    row.error(
        "the tokens of the prompt are not a prefix of the tokens of prompt and completion; end \
         the prompt where a token ends",
    )
}
