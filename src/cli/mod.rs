//! The command line: thin. Layer 9.
//!
//! Invariant: a command parses, calls the library, prints. Exit codes: 0 done, 1 a run failed, 2
//! bad usage or config, 130 interrupted after a clean checkpoint.

mod bench;
mod chat;
mod check;
mod data;
mod eval;
mod generate;
mod inspect;
mod launches;
mod merge;
mod model_args;
mod quickstart;
mod report;
mod score;
mod train;

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args as _, FromArgMatches, Subcommand};

use crate::autograd::Cx;
use crate::config::value::{Given, Value};
use crate::config::{DeviceChoice, Dtype, TrainingConfig};
use crate::error::Result;
use crate::methods::MethodEntry;
use crate::methods::registry::REGISTRY;
use crate::observer::Terminal;

/// The commands that train nothing. The training commands are [`REGISTRY`]'s.
#[derive(Subcommand)]
enum Command {
    Generate(generate::GenerateArgs),
    Chat(chat::ChatArgs),
    Score(score::ScoreArgs),
    Eval(eval::EvalArgs),
    Data(data::DataArgs),
    Check(check::CheckArgs),
    Bench(bench::BenchArgs),
    Inspect(inspect::InspectArgs),
    Merge(merge::MergeArgs),
    Report(report::ReportArgs),
    Quickstart(quickstart::QuickstartArgs),
}

/// The whole command line: a subcommand for each method, then the others.
fn command() -> clap::Command {
    let temper = clap::Command::new("temper")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Post-training of language models, one set of CUDA kernels on a GPU or any CPU")
        .subcommand_required(true)
        .arg_required_else_help(true);
    let method = |entry: &&MethodEntry| {
        train::TrainArgs::augment_args(clap::Command::new(entry.name)).about(entry.about)
    };
    Command::augment_subcommands(temper.subcommands(REGISTRY.iter().map(method)))
}

/// Where to run and in which storage type.
#[derive(clap::Args, Clone)]
pub struct Where {
    /// auto, cuda or cpu; auto takes the GPU where there is one
    #[arg(long, default_value = "auto", value_parser = choice::<DeviceChoice>)]
    pub device: DeviceChoice,
    /// auto, float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU
    #[arg(long, default_value = "auto", value_parser = choice::<Dtype>)]
    pub dtype: Dtype,
}

impl Where {
    /// The same as options of a run.
    pub fn options(&self) -> TrainingConfig {
        TrainingConfig { device: self.device, dtype: self.dtype, ..TrainingConfig::default() }
    }

    /// A context on the device, which is announced on stderr.
    pub fn open(&self) -> Result<Cx> {
        Cx::open(&self.options(), Arc::new(Terminal::default()))
    }
}

/// An argument with the words of an option.
fn choice<T: Value>(text: &str) -> Result<T, String> {
    T::read(&Given::Text(text.into()))
}

/// A list of files takes every argument after it, options too: what has a `=` and is no file is
/// an option.
fn part_keys(files: &mut Vec<PathBuf>, keys: &mut Vec<String>) {
    let is_key =
        |path: &PathBuf| !path.exists() && path.to_str().is_some_and(|text| text.contains('='));
    let (found, rest): (Vec<PathBuf>, Vec<PathBuf>) =
        std::mem::take(files).into_iter().partition(is_key);
    *files = rest;
    keys.splice(0..0, found.iter().map(|key| key.display().to_string()));
}

/// What a command line asks for.
enum Parsed {
    Train(&'static MethodEntry, Box<train::TrainArgs>),
    Other(Command),
}

fn parse() -> std::result::Result<Parsed, clap::Error> {
    let matches = command().try_get_matches()?;
    if let Some((name, own)) = matches.subcommand()
        && let Some(entry) = REGISTRY.iter().find(|e| e.name == name)
    {
        return Ok(Parsed::Train(entry, Box::new(train::TrainArgs::from_arg_matches(own)?)));
    }
    Command::from_arg_matches(&matches).map(Parsed::Other)
}

/// Runs the command line and returns the exit code.
pub fn main() -> i32 {
    let parsed = match parse() {
        Ok(parsed) => parsed,
        Err(e) => {
            let code = if e.use_stderr() { 2 } else { 0 };
            // A closed pipe while help is printed is no error of ours.
            let _ = e.print();
            return code;
        }
    };
    let result = match parsed {
        Parsed::Train(entry, args) => train::run(entry, *args),
        Parsed::Other(command) => match command {
            Command::Generate(args) => generate::run(args),
            Command::Chat(args) => chat::run(args),
            Command::Score(args) => score::run(args),
            Command::Eval(args) => eval::run(args),
            Command::Data(args) => data::run(args),
            Command::Check(args) => check::run(args),
            Command::Bench(args) => bench::run(args),
            Command::Inspect(args) => inspect::run(args),
            Command::Merge(args) => merge::run(args),
            Command::Report(args) => report::run(args),
            Command::Quickstart(args) => quickstart::run(args),
        },
    };
    match result {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("error: {e}");
            e.exit_code()
        }
    }
}
