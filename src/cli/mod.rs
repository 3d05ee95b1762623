//! The command line: thin. Layer 9.
//!
//! Invariant: a command parses, calls the library, prints. Exit codes: 0 done, 1 a run failed, 2
//! bad usage or config, 130 interrupted after a clean checkpoint.

mod args;
mod bench;
mod chat;
mod check;
mod data;
mod eval;
mod generate;
mod inspect;
mod launches;
mod merge;
mod quickstart;
mod report;
mod score;
mod train;

use clap::{Args as _, FromArgMatches, Subcommand};

use crate::device::start_threads;
use crate::error::Result;
use crate::methods::MethodEntry;
use crate::methods::registry::REGISTRY;
use crate::signals::Stop;

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

/// Makes a file-size limit an error of the write, and starts the threads.
fn prepare(parsed: &Parsed) -> Result<()> {
    Stop::ignore_file_size_signal()?;
    match parsed {
        Parsed::Other(Command::Quickstart(_)) => Ok(()), // it has an option for their number
        _ => start_threads(None),
    }
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
    if let Err(e) = prepare(&parsed) {
        eprintln!("error: {e}");
        return e.exit_code();
    }
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
