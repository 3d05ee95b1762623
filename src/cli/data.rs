//! `temper data`: shows how a method reads rows, before it trains on them. Layer 9.
//!
//! Invariant: rows, tokens and masks come from the method itself, which is built as in training;
//! every row that it would drop is named with its reason.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::cli::args::part_keys;
use crate::config::value::Given;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::methods::registry;
use crate::methods::{BuiltMethod, Method, MethodRun, RowPart, RowView};
use crate::model::hub::resolve_model;
use crate::observer::Terminal;
use crate::observer::output::{clean, note_line, print_line, shows_to_a_person};
use crate::rewards::RewardFunction;
use crate::train::rows::{RunFiles, RunRows};
use crate::train::setup::{RunSetup, Weights};
use crate::train::take_data;

/// Show what a method makes of rows: tokens, loss mask, lengths, EOS and BOS, what is cut or
/// dropped and why
#[derive(clap::Args)]
pub struct DataArgs {
    /// model folder (no weights needed), or a hub name in the local cache
    #[arg(long)]
    model: String,
    /// the training command that would read the rows
    #[arg(long, default_value = "sft")]
    method: String,
    /// files of rows, folders of them or patterns; with weights (a.jsonl:0.7 b.parquet:0.3) a mixture (docs/data.md)
    #[arg(long, num_args = 1.., required_unless_present = "config")]
    data: Vec<PathBuf>,
    /// number of rows to show
    #[arg(long, default_value_t = 3)]
    rows: usize,
    /// run file (TOML, YAML or JSON)
    #[arg(long)]
    config: Option<PathBuf>,
    /// any option of the training command
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

/// Most dropped rows that are named.
const NAMED: usize = 10;

pub fn run(mut args: DataArgs) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    let mut run = (registry::find(&args.method)?.run)();
    // Allows prompts to be shown without any reward.
    let none = [RewardFunction::new("none", |_| None)];
    for note in run.read(args.config.as_deref(), &args.keys, none.len())? {
        note_line(format_args!("note: {note}"));
    }
    take_data(&mut run, &args.data)?;
    let dir = resolve_model(&args.model)?;
    let setup = RunSetup::open(&run, &dir, None, Weights::NotNeeded, None)?;
    let files = RunFiles { train: run.training.data.clone(), eval: Vec::new() };
    let rows = RunRows::read(&run, &files, &Terminal::default())?;
    let given =
        option(&run, "reward_funcs").is_some_and(|v| v.as_array().is_some_and(|a| !a.is_empty()));
    let rewards = if given { &none[..0] } else { &none[..] };
    let nowhere = Path::new("");
    let inputs = setup.inputs(&run, &rows, None, nowhere, rewards);
    let build = |run: &MethodRun| run.method.build(&run.training, &inputs);
    let made = build(&run);
    // Without truncation and packing, to find lengths and which rows have a target at all.
    let limit = option(&run, "max_length").and_then(|v| v.as_integer()).map(|n| n as usize);
    let uncut = match limit {
        None => None,
        Some(_) => Some(build(&uncut(&args.method, &run)?)?),
    };
    let shown = match (&made, &uncut) {
        (Ok(made), _) | (Err(_), Some(made)) => made,
        (Err(_), None) => return made.map(drop),
    };
    let tokenizer = &setup.tokenizer;
    let colour = shows_to_a_person();
    let trains = !shown.method.generates();
    for row in 0..shown.method.rows().min(args.rows) {
        let view = shown.method.row_view(row);
        print_line(format_args!("{}", text_of(tokenizer, &view, trains, colour)?))?;
    }
    let all = uncut.as_ref().unwrap_or(shown);
    let lengths = Lengths::of(&*all.method);
    print_line(format_args!("{}", histogram(&lengths.sequences, limit)))?;
    print_line(format_args!("{}", ends(tokenizer, &*all.method, run.method.eos_token(), trains)?))?;
    let BuiltMethod { method, summary } = made?; // the error says why nothing is left to train on
    let kept: BTreeSet<String> = views(&*method).flat_map(|v| v.places).collect();
    let dropped = dropped(&run, &rows, &lengths, &kept, limit);
    print_line(format_args!("{dropped}"))?;
    print_line(format_args!("{summary}"))?;
    Ok(())
}

fn option(run: &MethodRun, name: &str) -> Option<toml::Value> {
    let keys = run.sections().into_iter().flat_map(|s| s.keys());
    keys.filter(|k| k.name == name).map(|k| k.value).next()
}

/// The same run without truncation, packing or dropping by length.
fn uncut(method: &str, run: &MethodRun) -> Result<Box<MethodRun>> {
    let mut whole = (registry::find(method)?.run)();
    whole.training = run.training.clone();
    for key in run.method.keys() {
        let value = match key.name {
            "max_length" => Given::Text("none".into()),
            "packing" => Given::Text("false".into()),
            _ => Given::File(key.value),
        };
        // The values were valid before, so setting them again cannot fail.
        let _ = whole.method.set(key.name, &value);
    }
    Ok(whole)
}

fn views(method: &dyn Method) -> impl Iterator<Item = RowView> {
    (0..method.rows()).map(|row| method.row_view(row))
}

/// The lengths of rows before truncation.
struct Lengths {
    sequences: Vec<usize>,
    /// The longest sequence of each row, by its place.
    rows: BTreeMap<String, usize>,
}

impl Lengths {
    fn of(method: &dyn Method) -> Lengths {
        let mut lengths = Lengths { sequences: Vec::new(), rows: BTreeMap::new() };
        for view in views(method) {
            let own: Vec<usize> = view.parts.iter().map(|part| part.ids.len()).collect();
            let longest = own.iter().copied().max().unwrap_or(0);
            for place in view.places {
                let known = lengths.rows.entry(place).or_default();
                *known = longest.max(*known);
            }
            lengths.sequences.extend(own);
        }
        lengths
    }
}

/// A row as text: its place and its sequences.
fn text_of(tokenizer: &Tokenizer, view: &RowView, trains: bool, colour: bool) -> Result<String> {
    let mut text = String::new();
    let mut place = view.places.clone();
    place.dedup();
    let place = place.join(" + ");
    let note = if view.note.is_empty() { String::new() } else { format!("; {}", view.note) };
    for (i, part) in view.parts.iter().enumerate() {
        let name = match part.name {
            "" if view.parts.len() > 1 => format!("{} of {}, ", i + 1, view.parts.len()),
            "" => String::new(),
            name => format!("{name}, "),
        };
        let targets = part.mask.iter().skip(1).filter(|t| **t).count();
        let targets = match trains || targets > 0 {
            true => format!(", {targets} loss targets"),
            false => String::new(),
        };
        text += &format!(
            "{place}: {name}{} tokens{targets}{note}\n{}\n",
            part.ids.len(),
            marked(tokenizer, part, colour)?
        );
    }
    Ok(text)
}

/// The text of a sequence, with loss targets in colour or in [[ ]].
fn marked(tokenizer: &Tokenizer, part: &RowPart, colour: bool) -> Result<String> {
    let (on, off) = if colour { ("\x1b[1;32m", "\x1b[0m") } else { ("[[", "]]") };
    let pieces = tokenizer.pieces(&part.ids)?;
    let (mut text, mut inside) = (String::new(), false);
    for (i, (piece, target)) in pieces.iter().zip(&part.mask).enumerate() {
        let target = *target && i > 0; // nothing predicts the first token
        if target != inside {
            text.push_str(if target { on } else { off });
            inside = target;
        }
        text.push_str(&if colour { clean(piece) } else { piece.clone() });
    }
    if inside {
        text.push_str(off);
    }
    Ok(text)
}

/// A histogram of lengths before truncation, in powers of two, and what `max_length` cuts off.
fn histogram(lengths: &[usize], max_length: Option<usize>) -> String {
    let mut lengths = lengths.to_vec();
    lengths.sort_unstable();
    let Some(longest) = lengths.last().copied() else { return String::new() };
    let at = |share: f64| lengths[((lengths.len() - 1) as f64 * share).round() as usize];
    let mut text = format!(
        "tokens a row: median {}, 90% at most {}, 99% at most {}, longest {longest}\n",
        at(0.5),
        at(0.9),
        at(0.99)
    );
    let count =
        |low: usize, high: usize| lengths.iter().filter(|n| (low..=high).contains(*n)).count();
    let mut bars = Vec::new();
    let (mut low, mut high) = (0, 8);
    while low <= longest {
        bars.push((low, high, count(low, high)));
        (low, high) = (high + 1, high * 2);
    }
    let most = bars.iter().map(|b| b.2).max().unwrap_or(1).max(1);
    let first = bars.iter().position(|b| b.2 > 0).unwrap_or(0);
    for (low, high, n) in &bars[first..] {
        let cut =
            max_length.is_some_and(|limit| (*low..=*high).contains(&limit) && limit < longest);
        let mark = if cut { "  <- max_length" } else { "" };
        text += &format!(
            "{low:>8} to {high:>7} {n:>8} {}{mark}\n",
            "#".repeat((n * 40).div_ceil(most))
        );
    }
    if let Some(limit) = max_length {
        let over: Vec<usize> = lengths.iter().filter(|n| **n > limit).map(|n| n - limit).collect();
        let (lost, all) = (over.iter().sum::<usize>(), lengths.iter().sum::<usize>().max(1));
        let percent = 100.0 * lost as f64 / all as f64;
        text += &format!(
            "max_length={limit}: {} rows are longer, by {lost} tokens ({percent:.1}%)\n",
            over.len()
        );
    }
    text
}

/// Reports whether sequences begin and end as models with this tokenizer expect.
fn ends(
    tokenizer: &Tokenizer,
    method: &dyn Method,
    eos: Option<&str>,
    trains: bool,
) -> Result<String> {
    let parts = || views(method).flat_map(|view| view.parts);
    let n = parts().count();
    let what = if views(method).all(|view| view.parts.len() == 1) { "rows" } else { "sequences" };
    let mut text = String::new();
    match eos.or(tokenizer.eos_token()).map(|token| (token, tokenizer.token_to_id(token))) {
        _ if !trains => {}
        Some((token, Some(id))) => {
            let learnt = |e: &RowPart| {
                e.ids.iter().zip(&e.mask).skip(1).any(|(i, target)| *target && *i == id)
            };
            let learnt = parts().filter(learnt).count();
            text += &format!("EOS {token:?}: a loss target in {learnt} of {n} {what}");
            match parts().filter(|e| e.ids.windows(2).any(|w| w == [id, id])).count() {
                0 => {}
                doubled => {
                    text +=
                        &format!("; twice in a row in {doubled}: the data has it, and it is added")
                }
            }
            text.push('\n');
        }
        _ => text += "EOS: the tokenizer has none, so the model does not learn to stop\n",
    }
    let Some((token, id)) = tokenizer.bos_token().zip(tokenizer.bos_id()) else {
        return Ok(text + "BOS: the tokenizer has none");
    };
    let begins = parts().filter(|e| e.ids.first() == Some(&id)).count();
    text += &format!("BOS {token:?}: begins {begins} of {n} {what}");
    if begins < n && tokenizer.encode("", true)?.first() == Some(&id) {
        text += "; the tokenizer puts it before plain text, so rows without it look different from those of pretraining: let the \
                 chat template write it";
    }
    Ok(text)
}

/// The rows that are not trained on, each with its reason.
fn dropped(
    run: &MethodRun,
    rows: &RunRows,
    lengths: &Lengths,
    kept: &BTreeSet<String>,
    limit: Option<usize>,
) -> String {
    let mut gone: Vec<String> = rows.train.iter().map(|row| row.place()).collect();
    let all = gone.len();
    gone.retain(|place| !kept.contains(place));
    let drops = option(run, "on_truncation").is_some_and(|v| v.as_str() == Some("drop"));
    let mut text = format!("{} of {all} rows are dropped", gone.len());
    for place in gone.iter().take(NAMED) {
        let why = match (lengths.rows.get(place), limit) {
            (None, _) => "nothing to train on (no loss target, or a bad row)".into(),
            (Some(n), Some(limit)) if drops && *n > limit => {
                format!("{n} tokens, more than max_length={limit}, and on_truncation=drop")
            }
            (Some(n), Some(limit)) => {
                format!("{n} tokens: cut at max_length={limit}, no loss target is left")
            }
            (Some(n), None) => format!("{n} tokens, none of them a loss target"),
        };
        text += &format!("\n  {place}: {why}");
    }
    if gone.len() > NAMED {
        text += &format!("\n  and {} more", gone.len() - NAMED);
    }
    text
}
