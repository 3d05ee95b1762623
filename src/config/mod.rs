//! Run files in TOML, YAML or JSON, any option of which can be given on the command line as
//! `key=value`. Layer 1.
//!
//! Invariant: an option is one documented field of a section. Its name, type, default and doc in
//! `--help-options`, in the parser and in the resolved file all come from that field, so they
//! cannot drift apart.
//!
//! A command has sections, all flat in one file: `temper sft` has [`TrainingConfig`] and the
//! section of its method. [`load`] reads file and command line, checks everything and reports all
//! problems at once.

mod best;
mod bounds;
mod data;
mod environment;
mod eval;
mod foreign;
mod generate;
mod muon;
mod paths;
mod peft;
mod resume;
mod reward_specs;
mod samples;
mod schedule;
mod serve;
mod shared;
mod sources;
mod template;
mod training;
mod trl;
pub mod value;
mod yaml;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use foreign::Fate;
use value::Given;

use crate::error::{Error, Result, nearest};
use crate::fsio;

pub use best::BestModelOptions;
pub use data::{ColumnMap, DataOptions, OnBadRow};
pub use environment::EnvironmentOptions;
pub use eval::{EvalConfig, ScoredChoice};
pub use foreign::{described, is_foreign};
pub use generate::GenerateConfig;
pub use muon::{MuonAdjust, MuonOptions};
pub use paths::PathText;
pub use peft::{LoraBias, PeftConfig, PeftType, Quantisation};
pub use resume::changes;
pub use reward_specs::{REWARD_NAMES, RewardSpecs};
pub use samples::{SampleOptions, SamplePrompts};
pub use schedule::{LearningRateSchedule, RampShape, ScheduleArguments};
pub use serve::ServeConfig;
pub use shared::{
    LengthOptions, OnTruncation, ReferenceOptions, ReferenceSyncOptions, RewardOptions,
    SamplingOptions, TruncationMode, TruncationOptions,
};
pub use sources::{DataFile, DataFiles, MixtureStop};
pub use template::{JsonObject, JsonObjects, TemplateOptions};
pub use training::{
    AttentionChoice, Compat, DeviceChoice, Dtype, GradientCheckpointing, MatmulChoice, Optim,
    SamplingStrategy, TrainingConfig, When,
};
pub use trl::{TrlFiles, has_trl_key, to_trl};
pub use value::Amount;

/// An option as `--help-options` prints it and the parser reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    pub name: &'static str,
    pub kind: String,
    pub value: toml::Value, // the section's value: for a default section, the default
    pub doc: String,
}

/// A struct whose fields are options, declared by the macro `section!`. Sections nest: a section
/// shared by several methods is a field of each.
pub trait Section {
    /// The title of its table: a command, or the topic of a shared section.
    fn name(&self) -> &'static str;
    /// Its own options with their values, in the order of the fields.
    fn own_keys(&self) -> Vec<Key>;
    /// Its own options with the section's defaults, which a method may have overridden.
    fn default_keys(&self) -> Vec<Key>;
    /// The nested sections.
    fn nested(&self) -> Vec<&dyn Section>;
    /// Sets an option. None if the option is not in this section; an error says what was expected.
    fn set(&mut self, key: &str, given: &Given) -> Option<Result<(), String>>;
    /// Reports values that are out of range or contradict each other.
    fn check(&self, report: &mut Report);

    /// All options: its own, then those of the nested sections.
    fn keys(&self) -> Vec<Key> {
        let nested = self.nested().into_iter().flat_map(|s| s.keys());
        self.own_keys().into_iter().chain(nested).collect()
    }
}

/// Declares a section: the struct, its defaults and options, then the nested sections, each after
/// two dots. The struct implements `fn rules(&self, &mut Report)` itself.
macro_rules! section {
    ($(#[$meta:meta])* pub struct $name:ident = $title:literal {
        $($(#[doc = $doc:literal])+ pub $key:ident: $ty:ty = $default:expr,)*
        $(.. pub $part:ident: $part_ty:ty = $part_default:expr,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name { $($(#[doc = $doc])+ pub $key: $ty,)* $(#[doc = concat!("The options of ", $title, " in `", stringify!($part), "`.")] pub $part: $part_ty,)* }
        impl Default for $name {
            fn default() -> Self { Self { $($key: $default,)* $($part: $part_default,)* } }
        }
        impl $crate::config::Section for $name {
            fn name(&self) -> &'static str { $title }
            fn own_keys(&self) -> Vec<$crate::config::Key> {
                vec![$($crate::config::key(stringify!($key), concat!($($doc),+), &self.$key)),*]
            }
            fn default_keys(&self) -> Vec<$crate::config::Key> { Self::default().own_keys() }
            fn nested(&self) -> Vec<&dyn $crate::config::Section> { vec![$(&self.$part),*] }
            fn set(&mut self, key: &str, given: &$crate::config::value::Given) -> Option<Result<(), String>> {
                match key {
                    $(stringify!($key) => Some($crate::config::value::Value::read(given).map(|v| self.$key = v)),)*
                    _ => { $(if let set @ Some(_) = self.$part.set(key, given) { return set; })* None }
                }
            }
            fn check(&self, report: &mut $crate::config::Report) {
                self.rules(report);
                $(self.$part.check(report);)*
            }
        }
    };
}
pub(crate) use section;

pub(crate) fn key<T: value::Value>(name: &'static str, doc: &str, value: &T) -> Key {
    Key { name, kind: T::kind(), value: value.written(), doc: doc.trim().to_string() }
}

/// Where an option was given.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    File(String), // path:line
    CommandLine,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::File(place) => f.write_str(place),
            Source::CommandLine => f.write_str("command line"),
        }
    }
}

/// The findings while a configuration is read: problems are reported together, notes are printed.
#[derive(Debug, Default)]
pub struct Report {
    given: BTreeMap<String, Source>,
    problems: Vec<String>,
    notes: Vec<String>,
    idle: BTreeMap<&'static str, &'static str>, // key, why it has no effect
    overruled: BTreeSet<&'static str>,
    at_default: BTreeSet<&'static str>,
    no_effect: BTreeMap<&'static str, Vec<String>>, // why, "key = value" ...
    /// Rewards that the calling program or an environment gives in addition to the options.
    reward_functions: usize,
}

impl Report {
    pub fn problem(&mut self, message: String) {
        self.problems.push(message);
    }

    pub fn note(&mut self, message: String) {
        self.notes.push(message);
    }

    pub fn must(&mut self, holds: bool, message: impl FnOnce() -> String) {
        if !holds {
            self.problem(message());
        }
    }

    pub fn at_least(&mut self, key: &str, value: usize, least: usize) {
        self.must(value >= least, || format!("{key} = {value}: must be at least {least}"));
    }

    pub fn was_given(&self, key: &str) -> bool {
        self.given.contains_key(key)
    }

    /// Records that `key` has no effect because of the value of the option `cause`. If `key` was
    /// given nevertheless, that is a contradiction; but if a command line overrides a file, or the
    /// value is the default, it is only a note.
    pub fn idle(&mut self, key: &'static str, cause: &str, why: &'static str) {
        self.idle.insert(key, why);
        match (self.given.get(key), self.given.get(cause)) {
            (Some(Source::File(place)), Some(Source::CommandLine)) => {
                self.notes.push(format!("{place}: {key} has no effect: {why} (command line)"));
                self.overruled.insert(key);
            }
            (Some(place), _) if self.at_default.contains(key) => {
                self.notes.push(format!("{place}: {key} has no effect: {why}"));
            }
            (Some(place), _) => {
                self.problems.push(format!("{place}: {key} is given but has no effect: {why}"))
            }
            (None, _) => {}
        }
    }
}

/// Reads `file` (if any), then `overrides` (`key=value`), into `sections`, and checks them. Returns
/// notes to print. Errors: an unreadable file; otherwise one [`Error::Config`] with every problem,
/// one per line.
pub fn load(
    sections: &mut [&mut dyn Section],
    file: Option<&Path>,
    overrides: &[String],
) -> Result<Vec<String>> {
    load_with(sections, file, overrides, 0)
}

/// [`load`] for a program that gives `reward_functions` rewards itself.
pub fn load_with(
    sections: &mut [&mut dyn Section],
    file: Option<&Path>,
    overrides: &[String],
    reward_functions: usize,
) -> Result<Vec<String>> {
    let mut report = Report { reward_functions, ..Report::default() };
    let defaults: Vec<Key> = sections.iter().flat_map(|s| s.keys()).collect();
    let mut items = Vec::new();
    if let Some(path) = file {
        read_file(path, &mut items)?;
    }
    for text in overrides {
        match text.split_once('=') {
            Some((key, value)) => {
                items.push((
                    key.trim().replace('-', "_"),
                    Given::Text(value.trim().into()),
                    Source::CommandLine,
                ));
            }
            None => report.problem(format!("command line: {text:?} is not of the form key=value")),
        }
    }
    let mut meant = Vec::new();
    let folder = file.map(fsio::parent);
    for (key, given, source) in items {
        let kind = defaults.iter().find(|k| k.name == key).map_or("", |k| k.kind.as_str());
        let folder = folder.filter(|_| source != Source::CommandLine);
        let given = paths::placed(kind, &key, given, folder);
        apply(sections, &defaults, key, given, source, &mut meant, &mut report);
    }
    for (key, given, source, why) in meant {
        stand_in(sections, key, given, source, why, &mut report);
    }
    let now = sections.iter().flat_map(|s| s.keys());
    report.at_default =
        now.zip(&defaults).filter(|(k, d)| k.value == d.value).map(|(k, _)| k.name).collect();
    let beyond = sections
        .iter()
        .flat_map(|s| s.keys())
        .filter_map(|k| bounds::problem(k.name, &k.kind, &k.value));
    let beyond: Vec<String> = beyond.collect();
    if beyond.is_empty() {
        sections.iter().for_each(|section| section.check(&mut report));
    }
    report.problems.extend(beyond);
    if !report.problems.is_empty() {
        return Err(Error::Config(report.problems.join("\n")));
    }
    for key in report.overruled {
        if let Some(default) = defaults.iter().find(|k| k.name == key) {
            let given = Given::File(default.value.clone());
            sections.iter_mut().for_each(|s| {
                s.set(key, &given);
            });
        }
    }
    report.notes.extend(
        report
            .no_effect
            .iter()
            .map(|(why, keys)| format!("no effect: {} ({why})", keys.join(", "))),
    );
    Ok(report.notes)
}

/// The resolved file: every option, so that loading it gives the same values. `head` precedes it as
/// a comment.
pub fn to_toml(head: &str, sections: &[&dyn Section]) -> String {
    let mut report = Report::default();
    sections.iter().for_each(|s| s.check(&mut report));
    let mut out: String = head.lines().map(|line| format!("# {line}\n")).collect();
    for key in sections.iter().flat_map(|s| s.keys()) {
        match report.idle.get(key.name) {
            Some(why) => out += &format!("# {} = {}  # no effect: {why}\n", key.name, key.value),
            None => out += &format!("{} = {}\n", key.name, key.value),
        }
    }
    out
}

/// The text of `--help-options`: name, type, default and doc of every option.
pub fn help(sections: &[&dyn Section]) -> String {
    let keys = sections.iter().flat_map(|s| s.keys());
    keys.map(|k| format!("{} = {}    ({})\n    {}\n", k.name, one_line(&k.value), k.kind, k.doc))
        .collect()
}

/// A Markdown table of options, for the docs.
pub fn markdown(keys: &[Key]) -> String {
    let row = |k: &Key| {
        let kind = k.kind.replace('|', "\\|");
        format!("| `{}` | {kind} | `{}` | {} |\n", k.name, one_line(&k.value), k.doc)
    };
    let head = "| option | type | default | |\n|---|---|---|---|\n";
    std::iter::once(head.to_string()).chain(keys.iter().map(row)).collect()
}

/// A value in the syntax in which it can be given; TOML itself would write a text with line breaks
/// over several lines.
pub fn one_line(value: &toml::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), |text| format!("{text:?}"))
}

type Item = (String, Given, Source);

fn read_file(path: &Path, items: &mut Vec<Item>) -> Result<()> {
    let bytes = fsio::read(path)?;
    let shown = path.display();
    let text = std::str::from_utf8(&bytes)
        .map_err(|e| Error::Config(format!("{shown}: is not UTF-8 text ({e})")))?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let given: Vec<(String, Given)> = match extension {
        "yaml" | "yml" | "json" => {
            yaml::items(text).map_err(|e| Error::Config(format!("{shown}: {e}")))?
        }
        _ => {
            let table: toml::Table = toml::from_str(text)
                .map_err(|e| Error::Config(format!("{shown}: {}", e.to_string().trim_end())))?;
            table.into_iter().map(|(key, value)| (key, Given::File(value))).collect()
        }
    };
    for (key, given) in given {
        let line = text.lines().position(|line| is_line_of(line, &key));
        let place = line.map_or_else(|| shown.to_string(), |n| format!("{shown}:{}", n + 1));
        items.push((key, given, Source::File(place)));
    }
    Ok(())
}

/// Whether a line of a run file sets `key`. Only top-level options are searched for, so this is
/// exact except inside multi-line strings, where it can name a wrong line in a message.
fn is_line_of(line: &str, key: &str) -> bool {
    let line = line.trim_start().trim_start_matches(['[', '{', '"', '\'']);
    line.strip_prefix(key).is_some_and(|rest| {
        rest.trim_start_matches(['"', '\'', ' ', '\t']).starts_with(['=', ':', ']', '.'])
    })
}

fn apply(
    sections: &mut [&mut dyn Section],
    known: &[Key],
    key: String,
    given: Given,
    source: Source,
    meant: &mut Vec<(&'static str, Given, Source, &'static str)>,
    report: &mut Report,
) {
    let shown = given.shown();
    let online = known.iter().any(|key| key.name == "num_generations");
    match sections.iter_mut().find_map(|s| s.set(&key, &given)) {
        Some(Ok(())) => {
            report.given.insert(key, source);
        }
        Some(Err(expected)) => {
            report.problem(format!("{source}: {key} = {shown}: expected {expected}"))
        }
        None => match foreign::fate(&key, &given, online) {
            Some(Fate::Means(ours, value, why)) => {
                meant.push((ours, Given::Text(value), source, why))
            }
            Some(Fate::NoEffect(why)) => {
                report.no_effect.entry(why).or_default().push(format!("{key} = {shown}"))
            }
            Some(Fate::Refused(message)) => {
                report.problem(format!("{source}: {key} = {shown}: {message}"))
            }
            None if matches!(given, Given::File(toml::Value::Table(_))) => {
                report.problem(format!(
                    "{source}: [{key}]: a run file has no tables; write its options at the top level"
                ));
            }
            None => {
                let near = nearest(&key.replace('-', "_"), known.iter().map(|k| k.name));
                let hint = near.map_or_else(
                    || "--help-options lists the options".into(),
                    |n| format!("did you mean {n}?"),
                );
                report.problem(format!("{source}: unknown option {key}; {hint}"));
            }
        },
    }
}

/// Sets our option that a foreign one stands for, unless that was given too: then they must agree.
fn stand_in(
    sections: &mut [&mut dyn Section],
    key: &'static str,
    given: Given,
    source: Source,
    why: &str,
    report: &mut Report,
) {
    let value_now = |sections: &[&mut dyn Section]| {
        sections.iter().flat_map(|s| s.keys()).find(|k| k.name == key).map(|k| k.value)
    };
    let before = value_now(sections);
    match sections.iter_mut().find_map(|s| s.set(key, &given)) {
        Some(Ok(())) => {
            let after = value_now(sections);
            let shown = |value: &Option<toml::Value>| {
                value.as_ref().map(|v| v.to_string()).unwrap_or_default()
            };
            match report.given.get(key) {
                Some(_) if before == after => {}
                Some(Source::CommandLine) if source != Source::CommandLine => {
                    let message = format!(
                        "{source}: {why} has no effect: {key} = {} (command line)",
                        shown(&before)
                    );
                    report.note(message);
                    let given = before.map(Given::File);
                    sections.iter_mut().zip(given.iter().cycle()).for_each(|(s, given)| {
                        s.set(key, given);
                    });
                }
                Some(other) if *other == source || source != Source::CommandLine => {
                    let (now, was) = (shown(&after), shown(&before));
                    report.problem(format!(
                        "{source}: {why} means {key} = {now}, but {other} means {key} = {was}"
                    ));
                }
                _ => {
                    report.note(format!("{source}: {key} = {} ({why})", shown(&after)));
                    report.given.insert(key.into(), source);
                }
            }
        }
        Some(Err(expected)) => {
            report.problem(format!(
                "{source}: {key} = {}: expected {expected} ({why})",
                given.shown()
            ));
        }
        None => {
            report.note(format!("{source}: {why} has no effect: this command has no option {key}"))
        }
    }
}
