//! `temper score`: what a model says of rows, one JSON line out for each row in. Layer 9.
//!
//! Invariant: one line out for each row in, in the order of the rows.

use std::path::PathBuf;

use serde_json::json;

use crate::cli::args::{ModelArgs, OutputLines};
use crate::cli::parsers::count;
use crate::data::rows::read_rows;
use crate::error::Result;
use crate::eval::{score, sequences};
use crate::methods::offline::sft::SftConfig;

/// Log-probs of every row's tokens, or a reward model's scores: a row has input_ids, text, prompt +
/// completion, or messages
#[derive(clap::Args)]
pub struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// .jsonl, .json or .parquet files
    #[arg(long, num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// where the lines go; standard output if absent
    #[arg(long)]
    output: Option<PathBuf>,
    /// tokens in one forward
    #[arg(long, default_value_t = 4096, value_parser = count)]
    batch_tokens: usize,
}

pub fn run(args: ScoreArgs) -> Result<()> {
    let dir = args.model.dir()?;
    let rows = read_rows(&args.data)?;
    let (mut cx, mut model) = args.model.open()?;
    let text_field = SftConfig::default().dataset_text_field;
    let sequences = sequences(&rows, &dir, model.config.vocab_size, &text_field)?;
    let mut out = OutputLines::open(&args.output)?;
    score(&mut cx, &mut model, &sequences, args.batch_tokens, &mut |row| {
        out.write(&json!(row).to_string())
    })
}
