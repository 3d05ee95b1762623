//! The training commands: one run each, from a model folder and rows to an output folder. Layer 9.
//!
//! Invariant: a command is a [`Training`] with the arguments that all methods have.

use std::path::PathBuf;

use crate::cli::args::part_keys;
use crate::cli::parsers::file;
use crate::config;
use crate::error::{Error, Result};
use crate::methods::MethodEntry;
use crate::observer::output::print;
use crate::signals::Stop;
use crate::train::Training;

/// One training run, from a model folder and rows to a model folder
#[derive(clap::Args)]
pub struct TrainArgs {
    /// model folder, or a hub name in the local cache
    #[arg(long, required_unless_present = "help_options")]
    model: Option<String>,
    /// an adapter folder to train further
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// files of rows, folders of them or patterns; with weights (a.jsonl:0.7 b.parquet:0.3) a mixture (docs/data.md)
    #[arg(long, num_args = 1.., required_unless_present_any = ["help_options", "config"])]
    data: Vec<PathBuf>,
    /// rows to evaluate on (else eval_rows splits some off the end of the data)
    #[arg(long, num_args = 1..)]
    eval_data: Vec<PathBuf>,
    /// where the run is written
    #[arg(long, required_unless_present = "help_options", value_parser = file)]
    output: Option<PathBuf>,
    /// run file (TOML, YAML or JSON; TRL's work too)
    #[arg(long)]
    config: Option<PathBuf>,
    /// continue from the newest valid checkpoint of --output
    #[arg(long)]
    resume: bool,
    /// replace the run that --output holds
    #[arg(long)]
    overwrite: bool,
    /// write the options to FILE, for `trl COMMAND --config FILE`, without training
    #[arg(long, value_name = "FILE")]
    write_trl: Option<PathBuf>,
    /// print every option with its type, default and meaning
    #[arg(long, alias = "help-keys")]
    help_options: bool,
    /// any option of the run file
    #[arg(value_name = "KEY=VALUE")]
    pub(super) keys: Vec<String>,
}

/// Runs `temper sft`, `temper dpo` and the others.
pub fn run(entry: &MethodEntry, mut args: TrainArgs) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    part_keys(&mut args.eval_data, &mut args.keys);
    if args.help_options {
        print(format_args!("{}", config::help(&(entry.run)().sections())))?;
        return Ok(());
    }
    let (Some(model), Some(output)) = (args.model, args.output) else {
        return Err(Error::Config("give --model, --data and --output".into()));
    };
    let mut training = Training::new(entry.name)?
        .options(args.keys)
        .model(model)
        .data(args.data)
        .eval_data(args.eval_data)
        .output(output)
        .overwrite(args.overwrite)
        .resume(args.resume)
        .stop(Stop::on_signals()?);
    if let Some(file) = args.config {
        training = training.config(file);
    }
    if let Some(dir) = args.adapter {
        training = training.adapter(dir);
    }
    match args.write_trl {
        Some(file) => training.write_trl(&file),
        None => training.run().map(drop),
    }
}
