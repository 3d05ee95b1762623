//! `temper data`: what SFT makes of rows, before it trains on them. Layer 9.
//!
//! Invariant: tokens, masks and counts are those of `temper sft` with the same keys; every row that
//! it would drop is named with its reason.

use std::path::PathBuf;

use crate::cli::args::{part_keys, read_data};
use crate::data::chat::ChatTemplate;
use crate::data::read::FolderSplit;
use crate::data::rows::Row;
use crate::data::sft::{OnTruncation, SftExample, SftOptions, prepare};
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::methods::offline::sft::SftRun;
use crate::model::hub::resolve_model;
use crate::model::layout::ModelConfig;
use crate::observer::output::{clean, note_line, print_line, shows_to_a_person};

/// What `temper sft` would make of rows: loss mask, lengths, EOS and BOS, what is cut or dropped
/// and why
#[derive(clap::Args)]
pub struct DataArgs {
    /// model folder (no weights needed), or a hub name in the local cache
    #[arg(long)]
    model: String,
    /// files of rows, folders of them or patterns (docs/data.md)
    #[arg(long, num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// rows that are shown token by token
    #[arg(long, default_value_t = 3)]
    rows: usize,
    /// run file (TOML, YAML or JSON)
    #[arg(long)]
    config: Option<PathBuf>,
    /// any key of `temper sft`
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

/// Dropped rows that are named.
const NAMED: usize = 10;

pub fn run(mut args: DataArgs) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    let (run, notes) = SftRun::load(args.config.as_deref(), &args.keys)?;
    for note in notes {
        note_line(format_args!("note: {note}"));
    }
    let dir = resolve_model(&args.model)?;
    let tokenizer = Tokenizer::load(&dir)?;
    let template = ChatTemplate::choose(run.training.chat_template_path.as_deref(), &tokenizer)?;
    let vocab = ModelConfig::load(&dir)?.vocab_size;
    let rows = read_data(&args.data, FolderSplit::Train, &run.training.data)?;
    let on_bad_row = run.training.data.on_bad_row;
    let options = SftOptions { on_bad_row, ..run.method.options() };
    // As if nothing were cut or packed: lengths, and which rows have a target at all.
    let whole = SftOptions { max_length: None, packing: None, ..options.clone() };
    let (uncut, _) = prepare(&rows, &tokenizer, template.as_ref(), vocab, &whole)?;
    let made = prepare(&rows, &tokenizer, template.as_ref(), vocab, &options);

    let colour = shows_to_a_person();
    let shown = made.as_ref().map_or(&uncut, |(kept, _)| kept);
    for example in shown.iter().take(args.rows) {
        let place = rows[example.row].place();
        let targets = example.target_mask.iter().skip(1).filter(|t| **t).count();
        print_line(format_args!(
            "{place}: {} tokens, {targets} loss targets\n{}\n",
            example.input_ids.len(),
            marked(&tokenizer, example, colour)?
        ))?;
    }
    print_line(format_args!("{}", histogram(&uncut, options.max_length)))?;
    print_line(format_args!("{}", ends(&tokenizer, &uncut, options.eos_token.as_deref())?))?;
    let (kept, stats) = made?; // its error says what leaves nothing to train on
    print_line(format_args!("{}", dropped(&rows, &uncut, &kept, &options)))?;
    print_line(format_args!("{stats}"))?;
    Ok(())
}

/// The text of a row: loss targets in colour, or in [[ ]].
fn marked(tokenizer: &Tokenizer, example: &SftExample, colour: bool) -> Result<String> {
    let (on, off) = if colour { ("\x1b[1;32m", "\x1b[0m") } else { ("[[", "]]") };
    let pieces = tokenizer.pieces(&example.input_ids)?;
    let (mut text, mut inside) = (String::new(), false);
    for (i, (piece, target)) in pieces.iter().zip(&example.target_mask).enumerate() {
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

/// Rows by length, before anything is cut, in steps of two; and what `max_length` cuts off.
fn histogram(examples: &[SftExample], max_length: Option<usize>) -> String {
    let mut lengths: Vec<usize> = examples.iter().map(|e| e.input_ids.len()).collect();
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

/// Whether rows begin and end as a model of this tokenizer has them.
fn ends(tokenizer: &Tokenizer, examples: &[SftExample], eos: Option<&str>) -> Result<String> {
    let n = examples.len();
    let count = |holds: &dyn Fn(&SftExample) -> bool| examples.iter().filter(|e| holds(e)).count();
    let mut text = String::new();
    match eos.or(tokenizer.eos_token()).map(|token| (token, tokenizer.token_to_id(token))) {
        Some((token, Some(id))) => {
            let learnt = |e: &SftExample| {
                e.input_ids.iter().zip(&e.target_mask).skip(1).any(|(i, t)| *t && *i == id)
            };
            let twice = |e: &SftExample| e.input_ids.windows(2).any(|w| w == [id, id]);
            text += &format!("EOS {token:?}: a loss target in {} of {n} rows", count(&learnt));
            match count(&twice) {
                0 => {}
                doubled => {
                    text +=
                        &format!("; twice in a row in {doubled}: the data has it, and it is added")
                }
            }
        }
        _ => text += "EOS: the tokenizer names none; a model does not learn to stop",
    }
    text.push('\n');
    let Some((token, id)) = tokenizer.bos_token().zip(tokenizer.bos_id()) else {
        return Ok(text + "BOS: the tokenizer names none");
    };
    let begins = count(&|e| e.input_ids.first() == Some(&id));
    text += &format!("BOS {token:?}: begins {begins} of {n} rows");
    if begins < n && tokenizer.encode("", true)?.first() == Some(&id) {
        text += "; the tokenizer puts it before plain text, so rows without it look other than in pretraining: let the \
                 chat template write it";
    }
    Ok(text)
}

/// The rows that are not trained on, each with its reason.
fn dropped(
    rows: &[Row],
    uncut: &[SftExample],
    kept: &[SftExample],
    options: &SftOptions,
) -> String {
    let mut lengths = vec![None; rows.len()];
    uncut.iter().for_each(|e| lengths[e.row] = Some(e.input_ids.len()));
    let mut there = vec![false; rows.len()];
    kept.iter().for_each(|e| there[e.row] = true);
    let gone: Vec<usize> = (0..rows.len()).filter(|i| !there[*i]).collect();
    let mut text = format!("{} of {} rows are dropped", gone.len(), rows.len());
    for i in gone.iter().take(NAMED) {
        let why = match (lengths[*i], options.max_length) {
            (None, _) => "no token of it is a loss target".to_string(),
            (Some(n), Some(limit)) if options.on_truncation == OnTruncation::Drop && n > limit => {
                format!("{n} tokens, more than max_length={limit}, and on_truncation=drop")
            }
            (Some(n), Some(limit)) => {
                format!("{n} tokens: cut at max_length={limit}, no loss target is left")
            }
            (Some(n), None) => format!("{n} tokens, none of them a loss target"),
        };
        text += &format!("\n  {}: {why}", rows[*i].place());
    }
    if gone.len() > NAMED {
        text += &format!("\n  and {} more", gone.len() - NAMED);
    }
    text
}
