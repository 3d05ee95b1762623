//! The rows of a run: files read, mixed by weights, split. Layer 8.
//!
//! Invariant: training and `temper data` read the same rows in the same order; an evaluation row is
//! never a training row.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{self, DataFile, DataFiles, MixtureStop};
use crate::data::mixture::draw;
use crate::data::read::{self, FolderSplit, WantedFields};
use crate::data::rows::Row;
use crate::error::{Error, Result};
use crate::methods::MethodRun;
use crate::observer::{Observer, number};

/// The files of a run.
#[derive(Clone, Debug, Default)]
pub struct RunFiles {
    pub train: DataFiles,
    pub eval: Vec<PathBuf>,
}

/// The rows of a run, and what was said while they were read.
#[derive(Clone, Debug, Default)]
pub struct RunRows {
    pub train: Vec<Row>,
    pub eval: Vec<Row>,
    pub notes: Vec<String>,
}

impl RunRows {
    /// Reads the files; everything worth knowing is told to `observer` at once.
    pub fn read(run: &MethodRun, files: &RunFiles, observer: &dyn Observer) -> Result<RunRows> {
        if let Some(problem) = files.train.problem() {
            return Err(Error::Config(problem));
        }
        let mut rows = RunRows::default();
        let fields = wanted_fields(run);
        let mut read = |paths: &[PathBuf], split: FolderSplit| -> Result<Vec<Row>> {
            let read = read::read(paths, split, &run.training.reading, &fields)?;
            for note in read.told() {
                observer.note(&note);
                rows.notes.push(note);
            }
            Ok(read.rows)
        };
        let eval = match files.eval.is_empty() {
            true => Vec::new(),
            false => read(&files.eval, FolderSplit::Eval)?,
        };
        if !files.train.is_mixture() {
            let paths: Vec<PathBuf> = files.train.0.iter().map(|f| f.path.clone()).collect();
            let mut train = read(&paths, FolderSplit::Train)?;
            let own = match files.eval.is_empty() {
                true => split_off(&mut [&mut train], run)?,
                false => eval,
            };
            return Ok(RunRows { train, eval: own, ..rows });
        }
        let mut sources = Vec::new();
        for file in &files.train.0 {
            sources.push(read(std::slice::from_ref(&file.path), FolderSplit::Train)?);
        }
        let own = match files.eval.is_empty() {
            true => split_off(&mut sources.iter_mut().collect::<Vec<_>>(), run)?,
            false => eval,
        };
        let (train, note) = mix(run, &files.train.0, sources)?;
        observer.info(&note);
        rows.notes.push(note);
        Ok(RunRows { train, eval: own, ..rows })
    }
}

/// All files that the rows come from, training files first.
pub fn files_of(files: &RunFiles) -> Result<Vec<Arc<Path>>> {
    let train: Vec<PathBuf> = files.train.0.iter().map(|f| f.path.clone()).collect();
    let mut all = read::files(&train, FolderSplit::Train)?;
    all.extend(read::files(&files.eval, FolderSplit::Eval)?);
    Ok(all.into_iter().map(Arc::from).collect())
}

/// Rewards may use any column, other methods only what they know.
pub fn wanted_fields(run: &MethodRun) -> WantedFields {
    let keys: Vec<config::Key> = run.sections().iter().flat_map(|section| section.keys()).collect();
    match keys.iter().any(|k| k.name == "reward_funcs") {
        true => WantedFields::All,
        false => {
            let field = keys.iter().find(|k| k.name == "dataset_text_field");
            let field = field.and_then(|k| k.value.as_str());
            WantedFields::Known(field.map(str::to_string).into_iter().collect())
        }
    }
}

/// The evaluation rows that `eval_rows` asks for: the last of each source, which loses them; of a
/// number of rows, each source gives its share.
fn split_off(sources: &mut [&mut Vec<Row>], run: &MethodRun) -> Result<Vec<Row>> {
    let eval_rows = run.training.eval_rows;
    let all: usize = sources.iter().map(|rows| rows.len()).sum();
    let n = eval_rows.of(all as u64) as usize;
    if n >= all && n > 0 {
        return Err(Error::Config(format!("eval_rows = {n} leaves no row of {all} to train on")));
    }
    let mut eval = Vec::new();
    let (mut seen, mut given) = (0, 0);
    for rows in sources {
        // By running sums, so that the shares add up to n.
        seen += rows.len();
        let until = (n as u128 * seen as u128 / all.max(1) as u128) as usize;
        eval.extend(rows.split_off(rows.len() - (until - given)));
        given = until;
    }
    Ok(eval)
}

/// The rows of a mixture, and what each source gave.
fn mix(run: &MethodRun, files: &[DataFile], sources: Vec<Vec<Row>>) -> Result<(Vec<Row>, String)> {
    let training = &run.training;
    let sizes: Vec<usize> = sources.iter().map(Vec::len).collect();
    let weights: Vec<f64> = files.iter().map(|f| f.weight.unwrap_or(1.0)).collect();
    let drawn = draw(&sizes, &weights, training.stopping_strategy, training.seed)?;
    let mut counts = vec![0usize; sizes.len()];
    drawn.iter().for_each(|(source, _)| counts[*source] += 1);
    let again = training.stopping_strategy == MixtureStop::AllExhausted;
    let mut sources: Vec<Vec<Option<Row>>> =
        sources.into_iter().map(|rows| rows.into_iter().map(Some).collect()).collect();
    let take = |(source, row): &(usize, usize)| {
        let slot = &mut sources[*source][*row];
        if again { slot.clone() } else { slot.take() }
    };
    let train: Vec<Row> = drawn.iter().filter_map(take).collect();
    let rule = if again { "all_exhausted" } else { "first_exhausted" };
    let mut note = format!("mixture, {rule}: {} rows an epoch", number::count(train.len() as f64));
    for ((file, count), size) in files.iter().zip(&counts).zip(&sizes) {
        let share = number::percent(*count as f64 / train.len().max(1) as f64);
        note += &format!(
            "\n  {}: {} of its {} rows{}, {share}",
            file.path.display(),
            number::count(*count as f64),
            number::count(*size as f64),
            if count > size { ", some again" } else { "" },
        );
    }
    Ok((train, note))
}
