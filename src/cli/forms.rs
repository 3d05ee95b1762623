//! The two forms of an option: `--learning-rate 1e-4` and `learning_rate=1e-4`. Layer 9.
//!
//! Invariant: every argument of a command can be given in either form, with `-` or `_`. Unknown
//! words stay unchanged, so that the parser that owns them reports the error.

use clap::ArgAction;

use crate::config::{Key, is_foreign};
use crate::error::nearest;

/// TRL's names for arguments of this program.
const SAME: [(&str, &str); 2] = [("model-name-or-path", "model"), ("output-dir", "output")];

/// Rewrites a command line: each argument of `command` becomes `--name`, and each of `options`
/// becomes `name=value` at the end. `args` are the words after the command's name. None: the
/// command has no options.
pub fn normal(command: &clap::Command, options: Option<&[Key]>, args: &[String]) -> Vec<String> {
    let (mut rest, mut keys) = (Vec::new(), Vec::new());
    let mut args = args.iter().map(String::as_str).peekable();
    while let Some(arg) = args.next() {
        if arg == "--" {
            keys.extend(args.map(String::from));
            break;
        }
        if let Some(text) = arg.strip_prefix("--").filter(|text| *text != "help") {
            let (name, value) =
                text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
            if let Some(long) = argument(command, name) {
                rest.push(value.map_or_else(|| long.clone(), |v| format!("{long}={v}")));
                if value.is_none()
                    && takes_value(command, &long)
                    && let Some(next) = args.next()
                {
                    rest.push(next.into()); // any word: a prompt may look like an option
                }
                continue;
            }
            let Some(key) = option(command, options, name) else {
                rest.push(arg.into());
                continue;
            };
            let mut values: Vec<&str> = value.into_iter().collect();
            if value.is_none() {
                while let Some(next) = args.next_if(|next| key.takes(next, values.len())) {
                    values.push(next);
                }
            }
            keys.push(key.given(&values));
            continue;
        }
        match arg.split_once('=') {
            Some((name, value)) if !std::path::Path::new(arg).exists() => {
                match argument(command, name) {
                    Some(long) => rest.extend(as_argument(command, long, value)),
                    None if options.is_some() => {
                        keys.push(format!("{}={value}", name.replace('-', "_")))
                    }
                    None => rest.push(arg.into()),
                }
            }
            _ => rest.push(arg.into()),
        }
    }
    if !keys.is_empty() {
        rest.push("--".into());
        rest.extend(keys);
    }
    rest
}

/// How an option of a run file is written on the command line.
struct Form {
    name: String,
    switch: bool,
    list: bool,
    /// `--no-NAME`
    off: bool,
}

impl Form {
    fn takes(&self, next: &str, taken: usize) -> bool {
        let word = matches!(next, "true" | "false" | "True" | "False");
        let free = !next.starts_with("--") && !is_assignment(next);
        if self.switch {
            !self.off && taken == 0 && word
        } else {
            free && (taken == 0 || self.list)
        }
    }

    fn given(&self, values: &[&str]) -> String {
        let value = match (values.is_empty(), self.off) {
            (true, off) => (!off).to_string(),
            (false, _) => values.join(","),
        };
        format!("{}={value}", self.name)
    }
}

/// Whether the word is `name=value`. A value may contain `=` after a `:` (`length:min=1`).
fn is_assignment(text: &str) -> bool {
    text.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
    })
}

fn known<'a>(options: Option<&'a [Key]>, name: &str) -> Option<&'a Key> {
    let name = name.replace('-', "_");
    options?.iter().find(|key| key.name == name)
}

/// The option that `--name` stands for. None: clap reports it and suggests the nearest name.
fn option(command: &clap::Command, options: Option<&[Key]>, name: &str) -> Option<Form> {
    let form = |key: &Key, off| Form {
        name: key.name.into(),
        switch: ["true or false", "auto | true | false"].contains(&key.kind.as_str()),
        list: key.kind.starts_with("list of"),
        off,
    };
    if let Some(key) = known(options, name) {
        return Some(form(key, false));
    }
    let off = name.strip_prefix("no-").or_else(|| name.strip_prefix("no_"));
    if let Some(key) =
        off.and_then(|name| known(options, name)).filter(|k| k.kind == "true or false")
    {
        return Some(form(key, true));
    }
    let name = name.replace('-', "_");
    let longs = command.get_arguments().filter_map(|arg| arg.get_long());
    let is_option = options.is_some()
        && (is_foreign(&name) || nearest(&name.replace('_', "-"), longs).is_none());
    // Reported as an unknown option with the nearest known one.
    is_option.then_some(Form { name, switch: false, list: false, off: false })
}

/// The command's argument for `--name`, in clap's spelling.
fn argument(command: &clap::Command, name: &str) -> Option<String> {
    let name = name.replace('_', "-");
    let name = SAME.iter().find(|(theirs, _)| *theirs == name).map_or(&*name, |(_, ours)| ours);
    let is = |arg: &clap::Arg| {
        arg.get_long() == Some(name)
            || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    };
    command.get_arguments().any(is).then(|| format!("--{name}"))
}

fn takes_value(command: &clap::Command, long: &str) -> bool {
    let arg = command.get_arguments().find(|arg| arg.get_long() == long.strip_prefix("--"));
    arg.is_some_and(|arg| arg.get_action().takes_values())
}

/// `name=value` as an argument. A flag is present or omitted.
fn as_argument(command: &clap::Command, long: String, value: &str) -> Option<String> {
    let arg = command.get_arguments().find(|arg| arg.get_long() == long.strip_prefix("--"));
    match (arg.map(clap::Arg::get_action), value) {
        (Some(ArgAction::SetTrue), "true" | "True") => Some(long),
        (Some(ArgAction::SetTrue), "false" | "False") => None,
        _ => Some(format!("{long}={value}")),
    }
}
