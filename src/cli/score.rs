//! `temper score`: what a model says of rows, one JSON line out for each row in. Layer 9.
//!
//! Invariant: a language model gives log-probs of tokens, a reward model one score of the row, a
//! process reward model the probability that a step which ended at the token is right, for each
//! token.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::autograd::Cx;
use crate::cli::{Where, sink};
use crate::data::chat::ChatTemplate;
use crate::data::rows::{Row, read_rows};
use crate::data::sft::{SftOptions, prepare};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::methods::offline::reward::one_score;
use crate::methods::offline::sft::SftConfig;
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::model::hub::resolve_model;
use crate::model::layout::Task;
use crate::model::open::open_model;
use crate::ops::embedding::gather_rows;

/// Log-probs of every row's tokens, or a reward model's scores: a row has input_ids, text, prompt +
/// completion, or messages
#[derive(clap::Args)]
pub struct Args {
    /// model folder, or a hub name in the local cache
    #[arg(long)]
    model: String,
    /// adapter folder
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// .jsonl, .json or .parquet files
    #[arg(long, num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// where the lines go; standard output if absent
    #[arg(long)]
    output: Option<PathBuf>,
    /// tokens in one forward
    #[arg(long, default_value_t = 4096)]
    batch_tokens: usize,
    #[command(flatten)]
    on: Where,
}

pub fn run(args: Args) -> Result<()> {
    let dir = resolve_model(&args.model)?;
    let rows = read_rows(&args.data)?;
    let mut cx = args.on.open()?;
    let mut model = open_model(&cx, &dir, args.adapter.as_deref())?;
    if let Task::SequenceClassification { .. } = model.config.task {
        one_score(&model.config)?;
    }
    let vocab = model.config.vocab_size;
    let examples = tokenise(&rows, &dir, vocab, &SftConfig::default().dataset_text_field)?;
    model.ensure_positions(&cx, examples.iter().map(|e| e.0.len()).max().unwrap_or(1))?;
    let mut out = sink(&args.output)?;
    let lengths: Vec<usize> = examples.iter().map(|e| e.0.len()).collect();
    for range in batches(&lengths, args.batch_tokens) {
        let sequences: Vec<Sequence> = examples[range]
            .iter()
            .map(|(ids, mask)| Sequence { ids, target: mask.as_deref() })
            .collect();
        for line in lines(&mut cx, &model, &sequences)? {
            writeln!(out, "{line}")
                .map_err(|e| Error::io(args.output.clone().unwrap_or("stdout".into()), e))?;
        }
    }
    Ok(())
}

/// Ranges of sequences that go through the model at once: at most `limit` tokens, or one sequence.
pub(super) fn batches(lengths: &[usize], limit: usize) -> Vec<Range<usize>> {
    let (mut all, mut start) = (Vec::new(), 0);
    while start < lengths.len() {
        let (mut end, mut tokens) = (start + 1, lengths[start]);
        while end < lengths.len() && tokens + lengths[end] <= limit {
            tokens += lengths[end];
            end += 1;
        }
        all.push(start..end);
        start = end;
    }
    all
}

/// A reward model's score of each sequence, read at its last token.
pub(super) fn sequence_scores(
    cx: &mut Cx,
    model: &Decoder,
    sequences: &[Sequence],
) -> Result<Vec<f32>> {
    let batch = Batch::new(cx, sequences, model.config.vocab_size)?;
    let hidden = model.hidden(cx, &batch)?;
    let last: Vec<i32> = ends(sequences).iter().map(|end| *end as i32 - 1).collect();
    let last = gather_rows(cx, &hidden, &cx.ints("last tokens", &last)?)?;
    model.scores(cx, &last)?.to_f32()
}

/// Where each sequence ends in the batch.
fn ends(sequences: &[Sequence]) -> Vec<usize> {
    let ends = sequences.iter().scan(0, |end, s| {
        *end += s.ids.len();
        Some(*end)
    });
    ends.collect()
}

fn lines(cx: &mut Cx, model: &Decoder, sequences: &[Sequence]) -> Result<Vec<Value>> {
    if model.config.task == Task::CausalLm {
        let line = |logps: Vec<f32>| {
            let sum: f64 = logps.iter().map(|l| f64::from(*l)).sum();
            json!({ "logps": logps, "sum": sum })
        };
        return Ok(model.logps(cx, sequences)?.into_iter().map(line).collect());
    }
    if let Task::SequenceClassification { .. } = model.config.task {
        return Ok(sequence_scores(cx, model, sequences)?
            .into_iter()
            .map(|score| json!({ "score": score }))
            .collect());
    }
    let batch = Batch::new(cx, sequences, model.config.vocab_size)?;
    let hidden = model.hidden(cx, &batch)?;
    let scores = model.scores(cx, &hidden)?.to_f32()?;
    let right: Vec<f32> =
        scores.chunks_exact(2).map(|s| 1.0 / (1.0 + (s[0] - s[1]).exp())).collect();
    let row = |(s, end): (&Sequence, usize)| json!({ "scores": right[end - s.ids.len()..end] });
    Ok(sequences.iter().zip(ends(sequences)).map(row).collect())
}

type Ids = (Vec<u32>, Option<Vec<bool>>);

/// Rows with `input_ids` as they are (all tokens but the first are targets); others as SFT would
/// tokenise them.
pub(super) fn tokenise(
    rows: &[Row],
    dir: &Path,
    vocab: usize,
    text_field: &str,
) -> Result<Vec<Ids>> {
    if rows.iter().all(|r| r.has("input_ids")) {
        return rows.iter().map(|row| Ok((input_ids(row, vocab)?, None))).collect();
    }
    let tokenizer = Tokenizer::load(dir)?;
    let template = tokenizer.chat_template().map(|_| ChatTemplate::of(&tokenizer)).transpose()?;
    let options = SftOptions {
        max_length: None,
        dataset_text_field: text_field.into(),
        ..SftOptions::default()
    };
    let (examples, stats) = prepare(rows, &tokenizer, template.as_ref(), vocab, &options)?;
    if examples.len() != rows.len() {
        return Err(Error::Run(format!(
            "{} of {} rows have no tokens to score; {stats}",
            rows.len() - examples.len(),
            rows.len()
        )));
    }
    Ok(examples.into_iter().map(|e| (e.input_ids, Some(e.target_mask))).collect())
}

/// The token ids of a row's `input_ids`, checked against the vocabulary.
pub fn input_ids(row: &Row, vocab: usize) -> Result<Vec<u32>> {
    let Value::Array(items) = row.need("input_ids")? else {
        return Err(row.error("field \"input_ids\" must be a list of token ids"));
    };
    let id = |v: &Value| v.as_u64().filter(|id| *id < vocab as u64).map(|id| id as u32);
    let ids: Option<Vec<u32>> = items.iter().map(id).collect();
    match ids {
        Some(ids) if !ids.is_empty() => Ok(ids),
        Some(_) => Err(row.error("field \"input_ids\" is empty")),
        None => {
            Err(row
                .error(format!("field \"input_ids\" must hold token ids from 0 to {}", vocab - 1)))
        }
    }
}
