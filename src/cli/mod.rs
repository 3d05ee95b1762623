//! The command line. Layer 9.
//!
//! Invariant: a command only parses arguments, calls the library and prints. Exit codes: 0 done, 1
//! a run failed, 2 bad usage or config, 130 interrupted after a clean checkpoint.

mod args;
mod bench;
mod bench_args;
mod bench_grpo;
mod bench_levels;
mod bench_measure;
mod bench_train;
mod chat;
mod check;
mod completions;
mod convert;
mod data;
mod eval;
mod export;
mod forms;
mod generate;
mod help;
mod inspect;
pub mod launches;
mod merge;
mod parsers;
mod quickstart;
mod report;
mod score;
mod serve;
mod train;

use std::ffi::OsString;

use clap::{Args as _, FromArgMatches, Subcommand};

use crate::config::{DataOptions, EvalConfig, GenerateConfig, Key, Section, ServeConfig};
use crate::device::start_threads;
use crate::error::Result;
use crate::methods::MethodEntry;
use crate::methods::offline::sft::METHOD as SFT;
use crate::methods::registry::{self, REGISTRY};
use crate::observer::output::{is_reader_gone, note_line};
use crate::signals::Stop;

// The commands that do not train; [`REGISTRY`] has the training commands. Not a doc comment: clap
// would show it as the description of the program.
#[derive(Subcommand)]
enum Command {
    Generate(generate::GenerateArgs),
    Chat(chat::ChatArgs),
    Score(score::ScoreArgs),
    Serve(serve::ServeArgs),
    Eval(eval::EvalArgs),
    Data(data::DataArgs),
    Check(check::CheckArgs),
    Bench(Box<bench_args::BenchArgs>),
    Inspect(inspect::InspectArgs),
    Merge(merge::MergeArgs),
    Convert(convert::ConvertArgs),
    Export(export::ExportArgs),
    Report(report::ReportArgs),
    Quickstart(quickstart::QuickstartArgs),
    Completions(completions::CompletionsArgs),
    Man(completions::ManArgs),
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
    help::add(Command::augment_subcommands(temper.subcommands(REGISTRY.iter().map(method))))
}

/// A parsed command line.
enum Parsed {
    Train(&'static MethodEntry, Box<train::TrainArgs>),
    Other(Box<Command>),
}

/// The options of a command besides its arguments. None: it has no options.
fn options(name: &str, args: &[String]) -> Option<Vec<Key>> {
    let method = REGISTRY.iter().copied().find(|e| e.name == name);
    let of = |entry: &MethodEntry| (entry.run)().sections().iter().flat_map(|s| s.keys()).collect();
    match name {
        _ if method.is_some() => method.map(of),
        "data" | "inspect" => Some(of(named_method(args))),
        "generate" | "chat" => Some(GenerateConfig::default().keys()),
        "serve" => Some(ServeConfig::default().keys()),
        "eval" => {
            let (eval, generate) = (EvalConfig::default(), GenerateConfig::default());
            Some([eval.keys(), generate.keys(), DataOptions::default().keys()].concat())
        }
        _ => None,
    }
}

/// The whole command line with its options, for completions and the manual.
fn described() -> clap::Command {
    completions::described(command(), |name| options(name, &[]))
}

/// The method that `--method` names, in either form; SFT without one. The command itself reports a
/// wrong name.
fn named_method(args: &[String]) -> &'static MethodEntry {
    let name = args.iter().enumerate().find_map(|(i, arg)| {
        let arg = arg.strip_prefix("--").unwrap_or(arg);
        match arg.split_once('=') {
            Some(("method", name)) => Some(name),
            None if arg == "method" => args.get(i + 1).map(String::as_str),
            _ => None,
        }
    });
    name.and_then(|name| registry::find(name).ok()).unwrap_or(&SFT)
}

/// The command line in one form: see [`forms::normal`]. Unchanged if it is not UTF-8.
fn arguments(temper: &clap::Command, given: Vec<OsString>) -> Vec<OsString> {
    let text: Option<Vec<String>> =
        given.iter().map(|arg| arg.to_str().map(String::from)).collect();
    let Some([program, name, rest @ ..]) = text.as_deref() else { return given };
    let Some(own) = temper.find_subcommand(name) else { return given };
    let normal = forms::normal(own, options(name, rest).as_deref(), rest);
    [program.clone(), name.clone()].into_iter().chain(normal).map(Into::into).collect()
}

fn parse(given: Vec<OsString>) -> std::result::Result<Parsed, clap::Error> {
    let temper = command();
    let arguments = arguments(&temper, given);
    let matches = temper.try_get_matches_from(arguments)?;
    if let Some((name, own)) = matches.subcommand()
        && let Some(entry) = REGISTRY.iter().find(|e| e.name == name)
    {
        return Ok(Parsed::Train(entry, Box::new(train::TrainArgs::from_arg_matches(own)?)));
    }
    Command::from_arg_matches(&matches).map(Box::new).map(Parsed::Other)
}

/// Turns a file-size limit into an error of the write, and starts the threads.
fn prepare(parsed: &Parsed) -> Result<()> {
    Stop::ignore_file_size_signal()?;
    match parsed {
        // Quickstart has an option for the number of threads.
        Parsed::Other(command) if matches!(**command, Command::Quickstart(_)) => Ok(()),
        _ => start_threads(None),
    }
}

/// Runs the command line and returns the exit code.
pub fn main() -> i32 {
    let parsed = match parse(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(e) => {
            let code = if e.use_stderr() { 2 } else { 0 };
            // The reader may have closed the pipe while help is printed; that is not an error.
            let _ = e.print();
            if e.kind() == clap::error::ErrorKind::InvalidSubcommand {
                let temper = command();
                let names: Vec<&str> =
                    temper.get_subcommands().map(clap::Command::get_name).collect();
                note_line(format_args!("The commands are: {}", names.join(", ")));
            }
            return code;
        }
    };
    if let Err(e) = prepare(&parsed) {
        note_line(format_args!("error: {e}"));
        return e.exit_code();
    }
    let result = match parsed {
        Parsed::Train(entry, args) => train::run(entry, *args),
        Parsed::Other(command) => match *command {
            Command::Generate(args) => generate::run(args),
            Command::Chat(args) => chat::run(args),
            Command::Score(args) => score::run(args),
            Command::Serve(args) => serve::run(args),
            Command::Eval(args) => eval::run(args),
            Command::Data(args) => data::run(args),
            Command::Check(args) => check::run(args),
            Command::Bench(args) => bench::run(*args),
            Command::Inspect(args) => inspect::run(args),
            Command::Merge(args) => merge::run(args),
            Command::Convert(args) => convert::run(args),
            Command::Export(args) => export::run(args),
            Command::Report(args) => report::run(args),
            Command::Quickstart(args) => quickstart::run(args),
            Command::Completions(args) => completions::completions(args, described()),
            Command::Man(args) => completions::man(args, described()),
        },
    };
    match result {
        Ok(()) => 0,
        // `temper data | head`: the output that was wanted was shown.
        Err(e) if is_reader_gone(&e) => 0,
        Err(e) => {
            note_line(format_args!("error: {e}"));
            e.exit_code()
        }
    }
}
