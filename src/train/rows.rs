//! The rows of a run: files read, mixed by weights, split. Layer 8.
//!
//! Invariant: training and `temper data` read the same rows in the same order; an evaluation row is
//! never a training row.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{self, DataFile, DataFiles, MixtureStop};
use crate::data::feed::RowFeed;
use crate::data::format::is_conversation;
use crate::data::mixture::draw;
use crate::data::read::{self, FolderSplit, RowBatch, TakeRows, WantedFields};
use crate::data::rows::Row;
use crate::data::spill::KeptRows;
use crate::data::split::Split;
use crate::data::store::TokenStore;
use crate::data::token_file::TokenFile;
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
        let feed = RunFeed::new(run, files, None, observer)?;
        let mut rows = RunRows::default();
        feed.each(Split::Eval, &mut |batch: Vec<Row>| {
            rows.eval.extend(batch);
            Ok(())
        })?;
        feed.each(Split::Train, &mut |batch: Vec<Row>| {
            rows.train.extend(batch);
            Ok(())
        })?;
        rows.notes = feed.told().notes;
        Ok(rows)
    }

    /// The report on them.
    pub fn report(&self) -> FeedReport {
        FeedReport {
            notes: self.notes.clone(),
            read: [self.train.len(), self.eval.len()],
            conversations: self.train.first().is_some_and(is_conversation),
        }
    }
}

/// A report on the rows that were read.
#[derive(Clone, Debug, Default)]
pub struct FeedReport {
    pub notes: Vec<String>,
    /// Rows to train on and to evaluate on.
    pub read: [usize; 2],
    /// The first training row is a conversation.
    pub conversations: bool,
}

/// Reads the rows of a run. If evaluation rows are split off the end, or rows are drawn by weights,
/// all rows must be known before the first: they are then spilled to a file beside the cache, or
/// kept in memory without one.
pub struct RunFeed<'a> {
    run: &'a MethodRun,
    files: &'a RunFiles,
    fields: WantedFields,
    /// The cache file being written.
    cache: Option<Arc<TokenFile>>,
    observer: &'a dyn Observer,
    report: RefCell<FeedReport>,
    kept: RefCell<Option<Sources>>,
}

/// Spilled rows: those of each source, and how many of its first rows are trained on.
struct Sources {
    rows: Vec<KeptRows>,
    train: Vec<usize>,
}

impl<'a> RunFeed<'a> {
    pub fn new(
        run: &'a MethodRun,
        files: &'a RunFiles,
        cache: Option<Arc<TokenFile>>,
        observer: &'a dyn Observer,
    ) -> Result<RunFeed<'a>> {
        if let Some(problem) = files.train.problem() {
            return Err(Error::Config(problem));
        }
        let (fields, report) = (wanted_fields(run), RefCell::default());
        Ok(RunFeed { run, files, fields, cache, observer, report, kept: RefCell::new(None) })
    }

    /// The report so far.
    pub fn told(&self) -> FeedReport {
        self.report.borrow().clone()
    }

    fn note(&self, note: String) {
        self.report.borrow_mut().notes.push(note);
    }

    /// Whether evaluation rows are split off the training files.
    fn splits_off(&self) -> bool {
        self.files.eval.is_empty() && !self.run.training.eval_rows.is_zero()
    }

    fn read(&self, paths: &[PathBuf], split: FolderSplit, take: &mut TakeRows) -> Result<()> {
        let reading = &self.run.training.reading;
        let mut hand_on = |rows: Vec<Row>| take(rows);
        for note in read::each(paths, split, reading, &self.fields, &mut hand_on)? {
            self.observer.note(&note);
            self.note(note);
        }
        Ok(())
    }

    /// Reads all sources and spills their rows.
    fn keep_aside(&self) -> Result<Sources> {
        let files = &self.files.train.0;
        let all: Vec<PathBuf> = files.iter().map(|f| f.path.clone()).collect();
        let sources: Vec<&[PathBuf]> = match self.files.train.is_mixture() {
            true => all.iter().map(std::slice::from_ref).collect(),
            false => vec![&all],
        };
        let mut rows = Vec::new();
        for paths in sources {
            let mut kept = KeptRows::new(self.cache.as_ref().map(|file| file.folder()));
            self.read(paths, FolderSplit::Train, &mut |batch: Vec<Row>| kept.extend(batch))?;
            rows.push(kept);
        }
        let sizes: Vec<usize> = rows.iter().map(KeptRows::len).collect();
        let train = match self.splits_off() {
            true => left_to_train(&sizes, self.run)?,
            false => sizes,
        };
        Ok(Sources { rows, train })
    }

    /// Passes on spilled rows, given as source and row.
    fn hand_on(
        &self,
        sources: &mut Sources,
        rows: impl Iterator<Item = (usize, usize)>,
        last: bool,
        take: &mut TakeRows,
    ) -> Result<()> {
        let mut batch = RowBatch::default();
        for (source, row) in rows {
            batch.push(sources.rows[source].take(row, last)?);
            if batch.is_full() {
                batch.hand_on(take)?;
            }
        }
        batch.hand_on(take)
    }
}

impl RowFeed for RunFeed<'_> {
    fn each(&self, split: Split, take: &mut TakeRows) -> Result<()> {
        let at = split as usize;
        let mut take = |rows: Vec<Row>| {
            let mut report = self.report.borrow_mut();
            if let (Split::Train, 0, Some(first)) = (split, report.read[at], rows.first()) {
                report.conversations = is_conversation(first);
            }
            report.read[at] += rows.len();
            drop(report);
            take(rows)
        };
        let mixture = self.files.train.is_mixture();
        if split == Split::Eval && !self.files.eval.is_empty() {
            return self.read(&self.files.eval, FolderSplit::Eval, &mut take);
        }
        if split == Split::Eval && !self.splits_off() {
            return Ok(());
        }
        if !mixture && !self.splits_off() {
            let files = self.files.train.0.iter();
            let paths: Vec<PathBuf> = files.map(|f| f.path.clone()).collect();
            return self.read(&paths, FolderSplit::Train, &mut take);
        }
        let mut kept = self.kept.borrow_mut();
        let sources = match &mut *kept {
            Some(sources) => sources,
            none => none.insert(self.keep_aside()?),
        };
        let (sizes, training): (Vec<usize>, Vec<usize>) =
            (sources.rows.iter().map(KeptRows::len).collect(), sources.train.clone());
        if split == Split::Eval {
            let ends = training.iter().zip(&sizes).enumerate();
            let ends = ends.flat_map(|(source, (from, to))| (*from..*to).map(move |r| (source, r)));
            return self.hand_on(sources, ends, true, &mut take);
        }
        if !mixture {
            return self.hand_on(sources, (0..training[0]).map(|row| (0, row)), true, &mut take);
        }
        let (drawn, note) = mix(self.run, &self.files.train.0, &training)?;
        self.observer.info(&note);
        self.note(note);
        let once = self.run.training.stopping_strategy == MixtureStop::FirstExhausted;
        self.hand_on(sources, drawn.into_iter(), once, &mut take)
    }

    fn store(&self) -> TokenStore {
        self.cache.clone().map(TokenStore::in_file).unwrap_or_default()
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

/// How many rows of each source are trained on, where `eval_rows` takes the last of each: of a number
/// of rows, each source gives its share.
fn left_to_train(sizes: &[usize], run: &MethodRun) -> Result<Vec<usize>> {
    let all: usize = sizes.iter().sum();
    let n = run.training.eval_rows.of(all as u64) as usize;
    if n >= all && n > 0 {
        return Err(Error::Config(format!(
            "eval_rows = {n} leaves none of the {all} rows to train on; lower it"
        )));
    }
    let (mut seen, mut given) = (0, 0);
    let left = |size: &usize| {
        // By running sums, so that the shares add up to n.
        seen += size;
        let until = (n as u128 * seen as u128 / all.max(1) as u128) as usize;
        let left = size - (until - given);
        given = until;
        left
    };
    Ok(sizes.iter().map(left).collect())
}

/// The rows of a mixture, as source and row, and what each source gave.
fn mix(
    run: &MethodRun,
    files: &[DataFile],
    sizes: &[usize],
) -> Result<(Vec<(usize, usize)>, String)> {
    let training = &run.training;
    let weights: Vec<f64> = files.iter().map(|f| f.weight.unwrap_or(1.0)).collect();
    let drawn = draw(sizes, &weights, training.stopping_strategy, training.seed)?;
    let mut counts = vec![0usize; sizes.len()];
    drawn.iter().for_each(|(source, _)| counts[*source] += 1);
    let again = training.stopping_strategy == MixtureStop::AllExhausted;
    let rule = if again { "all_exhausted" } else { "first_exhausted" };
    let mut note = format!("mixture, {rule}: {} rows an epoch", number::count(drawn.len() as f64));
    for ((file, count), size) in files.iter().zip(&counts).zip(sizes) {
        let share = number::percent(*count as f64 / drawn.len().max(1) as f64);
        note += &format!(
            "\n  {}: {} of its {} rows{}, {share}",
            file.path.display(),
            number::count(*count as f64),
            number::count(*size as f64),
            if count > size { ", some again" } else { "" },
        );
    }
    Ok((drawn, note))
}
