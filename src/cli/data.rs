//! `temper data`: shows how a method reads rows, before it trains on them. Layer 9.
//!
//! Invariant: rows, tokens and masks come from the method itself, which is built as in training;
//! every row that it would drop is named with its reason.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::cli::args::part_keys;
use crate::config::value::Given;
use crate::data::feed::RowFeed;
use crate::data::read::TakeRows;
use crate::data::rows::Row;
use crate::data::split::Split;
use crate::data::store::Places;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::methods::registry;
use crate::methods::{BuiltMethod, Method, MethodRun, RowPart, RowView};
use crate::model::hub::resolve_model;
use crate::observer::output::{clean, note_line, print_line, shows_to_a_person};
use crate::observer::{Observer, Silent, Terminal};
use crate::rewards::RewardFunction;
use crate::train::rows::{RunFeed, RunFiles, RunRows};
use crate::train::setup::{MethodRows, RunSetup, Weights};
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
    let terminal = Terminal::default();
    let given =
        option(&run, "reward_funcs").is_some_and(|v| v.as_array().is_some_and(|a| !a.is_empty()));
    let rewards = if given { &none[..0] } else { &none[..] };
    let nowhere = Path::new("");
    let build = |run: &MethodRun, rows: MethodRows| {
        run.method.build(&run.training, &setup.inputs(run, rows, nowhere, rewards))
    };
    // Offline methods read the rows once for each of the two; no row is held for the other.
    let feed = NotedFeed::new(&run, &files, &terminal)?;
    let (again, held);
    let (rows, rows_again) = if run.method.rows_are_stored() {
        again = NotedFeed::new(&run, &files, &Silent)?;
        (MethodRows::Fed(&feed), MethodRows::Fed(&again))
    } else {
        held = RunRows::read(&run, &files, &terminal)?;
        (MethodRows::Held(&held), MethodRows::Held(&held))
    };
    let made = build(&run, rows);
    // Without truncation and packing, to find lengths and which rows have a target at all.
    let limit = option(&run, "max_length").and_then(|v| v.as_integer()).map(|n| n as usize);
    let uncut = match limit {
        None => None,
        Some(_) => Some(build(&*uncut(&args.method, &run)?, rows_again)?),
    };
    let shown = match (&made, &uncut) {
        (Ok(made), _) | (Err(_), Some(made)) => made,
        (Err(_), None) => return made.map(drop),
    };
    let tokenizer = &setup.tokenizer;
    let colour = shows_to_a_person();
    let trains = !shown.method.generates();
    for row in 0..shown.method.rows().min(args.rows) {
        let view = shown.method.row_view(row)?;
        print_line(format_args!("{}", text_of(tokenizer, &view, trains, colour)?))?;
    }
    let all = uncut.as_ref().unwrap_or(shown);
    let lengths = Lengths::of(&*all.method)?;
    print_line(format_args!("{}", histogram(&lengths.sequences, limit)))?;
    print_line(format_args!("{}", ends(tokenizer, &*all.method, run.method.eos_token(), trains)?))?;
    let BuiltMethod { method, summary } = made?; // the error says why nothing is left to train on
    let mut kept = BTreeSet::new();
    for view in views(&*method) {
        kept.extend(view?.places);
    }
    let places: Vec<String> = match rows {
        MethodRows::Held(rows) => rows.train.iter().map(Row::place).collect(),
        MethodRows::Fed(_) | MethodRows::Stored(_) => feed.lines(),
    };
    let dropped = dropped(&run, places, &lengths, &kept, limit);
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

fn views(method: &dyn Method) -> impl Iterator<Item = Result<RowView>> {
    (0..method.rows()).map(|row| method.row_view(row))
}

/// The rows of a run while they are read, with their places.
struct NotedFeed<'a> {
    feed: RunFeed<'a>,
    places: RefCell<Places>,
}

impl<'a> NotedFeed<'a> {
    fn new(
        run: &'a MethodRun,
        files: &'a RunFiles,
        observer: &'a dyn Observer,
    ) -> Result<NotedFeed<'a>> {
        let feed = RunFeed::new(run, files, None, observer)?;
        Ok(NotedFeed { feed, places: RefCell::default() })
    }

    /// `file:line` of each row.
    fn lines(&self) -> Vec<String> {
        let places = self.places.borrow();
        (0..places.count()).map(|row| places.text(row)).collect()
    }
}

impl RowFeed for NotedFeed<'_> {
    fn each(&self, split: Split, take: &mut TakeRows) -> Result<()> {
        self.feed.each(split, &mut |rows: Vec<Row>| {
            let mut places = self.places.borrow_mut();
            if split == Split::Train {
                rows.iter().for_each(|row| places.push_row(&row.at()));
            }
            drop(places);
            take(rows)
        })
    }
}

/// How long rows are before anything is cut.
struct Lengths {
    sequences: Vec<usize>,
    /// The longest sequence of each row, by its place.
    rows: BTreeMap<String, usize>,
}

impl Lengths {
    fn of(method: &dyn Method) -> Result<Lengths> {
        let mut lengths = Lengths { sequences: Vec::new(), rows: BTreeMap::new() };
        for view in views(method) {
            let view = view?;
            let own: Vec<usize> = view.parts.iter().map(|part| part.ids.len()).collect();
            let longest = own.iter().copied().max().unwrap_or(0);
            for place in view.places {
                let known = lengths.rows.entry(place).or_default();
                *known = longest.max(*known);
            }
            lengths.sequences.extend(own);
        }
        Ok(lengths)
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
    let eos = eos.or(tokenizer.eos_token()).map(|token| (token, tokenizer.token_to_id(token)));
    let (eos_id, bos_id) = (eos.and_then(|(_, id)| id), tokenizer.bos_id());
    let (mut n, mut learnt, mut doubled, mut begins, mut one_each) = (0, 0, 0, 0, true);
    for view in views(method) {
        let parts = view?.parts;
        one_each &= parts.len() == 1;
        n += parts.len();
        for e in &parts {
            let mut targets = e.ids.iter().zip(&e.mask).skip(1);
            let is_eos = |id: u32| Some(id) == eos_id;
            learnt += usize::from(targets.any(|(id, target)| *target && is_eos(*id)));
            doubled += usize::from(e.ids.windows(2).any(|w| is_eos(w[0]) && is_eos(w[1])));
            begins += usize::from(bos_id.is_some() && e.ids.first().copied() == bos_id);
        }
    }
    let what = if one_each { "rows" } else { "sequences" };
    let mut text = String::new();
    match eos {
        _ if !trains => {}
        Some((token, Some(_))) => {
            text += &format!("EOS {token:?}: a loss target in {learnt} of {n} {what}");
            if doubled > 0 {
                text +=
                    &format!("; doubled in {doubled}: the data contains it and it is added again");
            }
            text.push('\n');
        }
        _ => text += "EOS: the tokenizer has none, so the model does not learn to stop\n",
    }
    let Some((token, id)) = tokenizer.bos_token().zip(bos_id) else {
        return Ok(text + "BOS: the tokenizer has none");
    };
    text += &format!("BOS {token:?}: begins {begins} of {n} {what}");
    if begins < n && tokenizer.encode("", true)?.first() == Some(&id) {
        text += "; the tokenizer puts it before plain text, so rows without it differ from those \
                 of pretraining; make the chat template write it";
    }
    Ok(text)
}

/// The rows that are not trained on, each with its reason.
fn dropped(
    run: &MethodRun,
    places: Vec<String>,
    lengths: &Lengths,
    kept: &BTreeSet<String>,
    limit: Option<usize>,
) -> String {
    let mut gone = places;
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
                format!(
                    "{n} tokens, and no loss target is left after truncation to max_length={limit}"
                )
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
