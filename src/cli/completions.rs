//! `temper completions` and `temper man`: shell completions and manual pages. Layer 9.
//!
//! Invariant: both are generated from the parser's own definitions, both of arguments and of
//! options of run files, so they stay consistent.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Arg, Command, ValueEnum, ValueHint};

use crate::config::{Key, one_line};
use crate::error::{Error, Result};
use crate::fsio;
use crate::observer::output::{note_line, print};

/// Print a shell script that completes commands, options and their values
#[derive(clap::Args)]
#[command(
    after_help = "bash: temper completions bash > ~/.local/share/bash-completion/completions/temper
zsh:  temper completions zsh > DIR/_temper, for a DIR in $fpath
fish: temper completions fish > ~/.config/fish/completions/temper.fish"
)]
pub struct CompletionsArgs {
    /// the shell
    shell: Shell,
}

/// Shells with completions.
#[derive(Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Print the manual page (roff) of temper or of one command
#[derive(clap::Args)]
pub struct ManArgs {
    /// a command; none: temper itself
    command: Option<String>,
    /// write the pages of temper and of every command into this folder, temper.1 and
    /// temper-COMMAND.1
    #[arg(long, conflicts_with = "command")]
    output: Option<PathBuf>,
}

/// The command line with the options of run files as arguments of their commands. `options_of`
/// returns the options of a command by name.
pub fn described(temper: Command, options_of: fn(&str) -> Option<Vec<Key>>) -> Command {
    let names: Vec<String> =
        temper.get_subcommands().map(|command| command.get_name().to_string()).collect();
    names.iter().fold(temper, |temper, name| {
        let keys = options_of(name).unwrap_or_default();
        temper.mut_subcommand(name, |own| keys.into_iter().fold(own, with_option))
    })
}

/// Adds an option to the command, unless it has an argument of this name.
fn with_option(own: Command, key: Key) -> Command {
    let long = key.name.replace('_', "-");
    let is_there =
        |arg: &Arg| arg.get_long() == Some(long.as_str()) || arg.get_id().as_str() == key.name;
    if own.get_arguments().any(is_there) {
        return own;
    }
    let arg = Arg::new(key.name).long(long).help_heading("Options of the run file");
    let arg = arg.help(format!("{} [default: {}]", key.doc, one_line(&key.value)));
    own.arg(match key.kind.as_str() {
        "true or false" => arg.num_args(0..=1).value_parser(["true", "false"]),
        kind if kind.contains(" | ") && !kind.contains(" or ") => {
            let words: Vec<String> = kind.split(" | ").map(String::from).collect();
            arg.value_name(key.name.to_uppercase()).value_parser(PossibleValuesParser::new(words))
        }
        kind => {
            let hint = if kind.contains("path") { ValueHint::AnyPath } else { ValueHint::Other };
            arg.value_name(kind.to_uppercase()).value_hint(hint)
        }
    })
}

/// Runs `temper completions`; `temper` is the whole command line.
pub fn completions(args: CompletionsArgs, mut temper: Command) -> Result<()> {
    let shell = match args.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut temper, "temper", &mut script);
    print(String::from_utf8_lossy(&script))
}

/// Runs `temper man`; `temper` is the whole command line.
pub fn man(args: ManArgs, mut temper: Command) -> Result<()> {
    temper.build();
    if let Some(dir) = &args.output {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let mut pages = vec![("temper".to_string(), page(temper.clone())?)];
        for command in temper.get_subcommands().filter(|c| c.get_name() != "help") {
            pages.push((format!("temper-{}", command.get_name()), page(command.clone())?));
        }
        for (name, page) in &pages {
            fsio::atomic_write(dir.join(format!("{name}.1")), page)?;
        }
        note_line(format_args!("{} pages in {}", pages.len(), dir.display()));
        return Ok(());
    }
    let shown = match &args.command {
        None => temper,
        Some(name) => temper.find_subcommand(name).cloned().ok_or_else(|| {
            let names = temper.get_subcommands().map(Command::get_name);
            let near = crate::error::nearest(name, names);
            let hint = near.map(|n| format!("; did you mean {n}?")).unwrap_or_default();
            Error::Config(format!("unknown command {name}{hint}"))
        })?,
    };
    print(String::from_utf8_lossy(&page(shown)?))
}

fn page(command: Command) -> Result<Vec<u8>> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_string();
    let mut out = Vec::new();
    let page = clap_mangen::Man::new(command.disable_help_subcommand(true)).title(name);
    page.render(&mut out).map_err(|e| Error::Run(format!("the manual: {e}")))?;
    Ok(out)
}
