//! `temper eval`: the quality of a model on rows. Layer 9.
//!
//! Invariant: it trains nothing and writes nothing except the requested report.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::cli::args::{ModelArgs, part_keys, read_data, read_keys};
use crate::cli::parsers::{count, file};
use crate::config::{DataOptions, EvalConfig, GenerateConfig, Section};
use crate::data::bad::BadRows;
use crate::data::format::Format;
use crate::data::read::FolderSplit;
use crate::error::Result;
use crate::eval::{EvalMetric, EvalOptions, are_questions, evaluate, evaluate_questions};
use crate::fsio;
use crate::observer::output::{note_line, print_line};

/// Measure a model: right answers (pass@k) on prompts, accuracy on multiple-choice questions,
/// perplexity on texts, accuracy of a reward model on pairs
#[derive(clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// files of rows, folders of them or patterns (docs/data.md): prompt and an answer column; question, choices and answer;
    /// text, messages or prompt and completion; chosen and rejected
    #[arg(long, num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// a JSON file with the metrics and what each row gave
    #[arg(long, value_parser = file)]
    output: Option<PathBuf>,
    /// sequences decoded at once
    #[arg(long, default_value_t = 32, value_parser = count)]
    batch: usize,
    /// tokens in one forward, where nothing is generated
    #[arg(long, default_value_t = 4096, value_parser = count)]
    batch_tokens: usize,
    /// key=value: reward_funcs, pass_score, question_format, num_fewshot, fewshot_data, n, temperature (0, the default: greedy),
    /// max_new_tokens, and generate's others
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

pub fn run(mut args: EvalArgs) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    let mut eval = EvalConfig::default();
    let mut generate = GenerateConfig::default();
    generate.sampling.temperature = 0.0;
    let mut data = DataOptions::default();
    read_keys(&mut [&mut eval, &mut generate, &mut data], &args.keys)?;
    let options =
        EvalOptions { eval, generate, data, batch: args.batch, batch_tokens: args.batch_tokens };
    options.check()?;
    let text = args.model.text(&options.generate.template)?;
    let rows = read_data(&args.data, FolderSplit::Eval, &options.data)?;
    let found = if are_questions(&rows) {
        let file = options.eval.fewshot_data.as_ref().map(|path| PathBuf::from(&path.0));
        let files: Vec<PathBuf> = file.into_iter().collect();
        let shots = match files.is_empty() {
            true => Vec::new(),
            false => read_data(&files, FolderSplit::Train, &options.data)?,
        };
        let (mut cx, mut model) = args.model.open()?;
        evaluate_questions(&mut cx, &mut model, &text, &rows, &shots, &options)?
    } else {
        let text_field = &options.eval.dataset_text_field;
        let mut bad = BadRows::new(options.data.on_bad_row);
        let kinds = bad.filter(&rows, |row| Format::detect(row, text_field))?;
        let format = kinds[0].1;
        let (mut cx, mut model) = args.model.open()?;
        evaluate(&mut cx, &mut model, &text, &rows, format, &options)?
    };
    if found.bad.count > 0 {
        note_line(format_args!("note: {}", found.bad));
    }
    for skipped in &found.skipped {
        let (name, n, all) = (&skipped.reward, skipped.rows, rows.len());
        note_line(format_args!("note: {name} skipped {n} of {all} rows (no answer in them)"));
    }
    let width = found.metrics.iter().map(|m| m.name.len()).max().unwrap_or(0);
    for m in &found.metrics {
        let error = m.stderr.map(|e| format!(" ± {e:.4}")).unwrap_or_default();
        print_line(format_args!("{:<width$}  {:>9.4}{error}  ({} rows)", m.name, m.value, m.rows))?;
    }
    let Some(path) = &args.output else { return Ok(()) };
    let metric = |m: &EvalMetric| {
        (m.name.clone(), json!({ "value": m.value, "stderr": m.stderr, "rows": m.rows }))
    };
    let given = |section: &dyn Section| -> Map<String, Value> {
        section.keys().into_iter().map(|k| (k.name.to_string(), json!(k.value))).collect()
    };
    let mut all = given(&options.eval);
    all.extend(given(&options.generate));
    let report = json!({
        "model": args.model.model, "adapter": args.model.adapter, "data": args.data, "options": all,
        "metrics": found.metrics.iter().map(metric).collect::<Map<_, _>>(), "rows": found.rows,
    });
    fsio::atomic_write(path, format!("{report:#}\n").as_bytes()).map(drop)
}
