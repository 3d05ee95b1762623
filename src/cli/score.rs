//! `temper score`: per-token log-probs, one JSON line out for each row in. Floor 7.

use std::io::Write;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::cli::{Where, sink};
use crate::config::SftConfig;
use crate::data::chat::ChatTemplate;
use crate::data::rows::{Row, read_rows};
use crate::data::sft::{SftOptions, prepare};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::batch::Sequence;
use crate::model::decoder::Decoder;
use crate::model::hub::resolve_model;

/// Log-probs of every row's tokens: a row has input_ids, text, prompt + completion, or messages
#[derive(clap::Args)]
pub struct Args {
    /// model folder, or a hub name in the local cache
    #[arg(long)]
    model: String,
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
    let mut model = Decoder::load(&cx, 0, &dir, 1)?;
    let vocab = model.config.vocab_size;
    let examples = tokenise(&rows, &dir, vocab)?;
    model.ensure_positions(&cx, examples.iter().map(|e| e.0.len()).max().unwrap_or(1))?;
    let mut out = sink(&args.output)?;
    let mut start = 0;
    while start < examples.len() {
        let mut end = start + 1;
        let mut tokens = examples[start].0.len();
        while end < examples.len() && tokens + examples[end].0.len() <= args.batch_tokens {
            tokens += examples[end].0.len();
            end += 1;
        }
        let sequences: Vec<Sequence> =
            examples[start..end].iter().map(|(ids, mask)| Sequence { ids, target: mask.as_deref() }).collect();
        for logps in model.logps(&mut cx, &sequences)? {
            let sum: f64 = logps.iter().map(|l| f64::from(*l)).sum();
            let line = json!({ "logps": logps, "sum": sum });
            writeln!(out, "{line}").map_err(|e| Error::io(args.output.clone().unwrap_or("stdout".into()), e))?;
        }
        start = end;
    }
    Ok(())
}

type Ids = (Vec<u32>, Option<Vec<bool>>);

/// Rows with `input_ids` as they are (all tokens but the first are targets); others as SFT would tokenise them.
fn tokenise(rows: &[Row], dir: &std::path::Path, vocab: usize) -> Result<Vec<Ids>> {
    if rows.iter().all(|r| r.has("input_ids")) {
        return rows.iter().map(|row| Ok((input_ids(row, vocab)?, None))).collect();
    }
    let tokenizer = Tokenizer::load(dir)?;
    let template = tokenizer.chat_template().map(|_| ChatTemplate::of(&tokenizer)).transpose()?;
    let options = SftOptions {
        max_length: None,
        dataset_text_field: SftConfig::default().dataset_text_field,
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
        None => Err(row.error(format!("field \"input_ids\" must hold token ids from 0 to {}", vocab - 1))),
    }
}
