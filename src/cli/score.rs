//! `temper score`: scores rows, one JSON line for each. Layer 9.
//!
//! Invariant: one line for each row that is not dropped, in the order of the rows.

use std::path::PathBuf;

use serde_json::json;

use crate::cli::args::{ModelArgs, OutputLines, part_keys, read_data, read_keys};
use crate::cli::parsers::count;
use crate::config::{DataOptions, TemplateOptions};
use crate::data::read::FolderSplit;
use crate::error::Result;
use crate::eval::{score, sequences};
use crate::methods::offline::sft::SftConfig;
use crate::observer::output::note_line;

/// Print the log-probs of every row's tokens, or a reward model's scores
///
/// A row has `input_ids`, `text`, `prompt` + `completion`, or `messages`.
#[derive(clap::Args)]
pub struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// files of rows, folders of them or patterns (docs/data.md)
    #[arg(long, num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// where the lines go; standard output if absent
    #[arg(long)]
    output: Option<PathBuf>,
    /// tokens in one forward
    #[arg(long, default_value_t = 4096, value_parser = count)]
    batch_tokens: usize,
    /// key=value: tools, chat_template_kwargs, columns, on_bad_row, max_row_bytes
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

pub fn run(mut args: ScoreArgs) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    let (mut keys, mut data) = (TemplateOptions::default(), DataOptions::default());
    read_keys(&mut [&mut keys, &mut data], &args.keys)?;
    let text = args.model.text(&keys)?;
    let rows = read_data(&args.data, FolderSplit::Eval, &data)?;
    let (mut cx, mut model) = args.model.open()?;
    let text_field = SftConfig::default().dataset_text_field;
    let vocab = model.config.vocab_size;
    let (sequences, bad) = sequences(&rows, &text, vocab, &text_field, data.on_bad_row)?;
    if bad.count > 0 {
        note_line(format_args!("note: {bad}"));
    }
    let mut out = OutputLines::open(&args.output)?;
    score(&mut cx, &mut model, &sequences, args.batch_tokens, &mut |row| {
        out.write(&json!(row).to_string())
    })
}
