//! A training job: from a model folder, rows and options to a trained folder. Layer 8.
//!
//! Invariant: every training command and every stage of the quickstart runs through here; they
//! differ only in the options of the method.

#![deny(missing_docs)]

use std::path::Path;
use std::sync::Arc;

use super::inputs::RunInputs;
use super::plan::{self, PlanRequest};
use super::row_cache::RowCache;
use super::rows::{FeedReport, RunFeed, RunFiles, RunRows};
use super::run::{Run, flops_per_token, peak_flops};
use super::samples::Samples;
use super::setup::{MethodRows, PlannedModel, RunSetup, Weights, build_again, plan_request};
use super::state::{parts_of, started};
use super::summary::Summary;
use super::tuning::{prepare, scheme};
use super::{StepPlan, Trainer};
use crate::autograd::Cx;
use crate::checkpoint::RunFolder;
use crate::config::DataFile;
use crate::data::cache::TokenisedRun;
use crate::data::split::Split;
use crate::data::token_file::TokenFile;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::methods::{BuiltMethod, MaskedIds, Method, MethodRun};
use crate::model::adapter::Adapter;
use crate::model::builder::InitialWeights;
use crate::model::decoder::Decoder;
use crate::observer::{Observer, number};
use crate::report::MaskRow;
use crate::rewards::RewardFunction;
use crate::signals::Stop;

/// The inputs of a run.
pub struct Job<'a> {
    /// All options.
    pub run: &'a MethodRun,
    /// The model's folder.
    pub model: &'a Path,
    /// An adapter folder to train further.
    pub adapter: Option<&'a Path>,
    /// Whether to use new weights, if the folder has none.
    pub fresh: bool,
    /// The rows for training and evaluation.
    pub rows: JobRows<'a>,
    /// Rewards that are functions of the program, in addition to those of the options.
    pub rewards: &'a [RewardFunction],
    /// The output folder.
    pub folder: &'a RunFolder,
    /// The command that started the run; recorded in config.toml.
    pub command: &'a str,
    /// Ends the run with a checkpoint when requested.
    pub stop: Stop,
}

/// The source of a job's rows.
#[derive(Clone, Copy)]
pub enum JobRows<'a> {
    /// Files to read, unless an earlier run has cached their tokenised rows.
    Files(&'a RunFiles),
    /// Rows in memory.
    Given(&'a RunRows),
}

/// The result of a finished job. The context can be reused for the next job.
pub struct FinishedJob {
    /// The context that the job ran on.
    pub cx: Cx,
    /// Optimizer steps of the run.
    pub total_steps: u64,
    /// Counters, times and final metrics.
    pub summary: Summary,
    /// The planned peak memory in bytes.
    pub planned: usize,
}

/// Runs a job to its end. Errors: see [`Run::train`]; inconsistent options, files and data are
/// errors before the first step.
pub fn execute(mut cx: Cx, job: &Job) -> Result<FinishedJob> {
    let (run, dir) = (job.run, job.model);
    let observer = cx.observer.clone();
    cx.stop = job.stop.clone();
    // The templates of a resumed run show the date of the original start.
    let began = job.folder.resume().map(|found| started(&found.path)).transpose()?.flatten();
    let weights = if job.fresh { Weights::NotNeeded } else { Weights::Needed };
    let setup = RunSetup::open(run, dir, job.adapter, weights, began)?;
    let mut config = setup.config.clone();
    if config.attention_dropout > 0.0 {
        let p = config.attention_dropout;
        observer.note(&format!(
            "config.json has attention_dropout {p}; temper trains without dropout on attention weights"
        ));
    }
    let rows = JobData::open(job, &setup, &*observer)?;
    let inputs = setup.inputs(run, rows.rows(), job.folder.path(), job.rewards);
    let BuiltMethod { mut method, summary } = run.method.build(&run.training, &inputs)?;
    observer.info(&summary);
    rows.keep(&*method, &summary, &*observer);
    let read = RunInputs::of(
        run,
        dir,
        job.adapter,
        &setup.tokenizer,
        setup.template.as_ref(),
        &*method,
        job.rewards,
    )?;
    same_inputs(&read, job, &*observer)?;
    let dtype = config.dtype;
    let mut parts = parts_of(&setup.tokenizer, &mut config, dtype)?;
    parts.started = Some(setup.began);
    let samples = Samples::of(
        &run.training,
        &setup.tokenizer,
        setup.template.as_ref(),
        &config,
        rows.report().conversations,
    )?;
    let longest = method.longest();
    let plan = {
        // The plan runs a step of a separate instance of the method, so that the step leaves no
        // state in the run's own.
        let build = build_again(run, &inputs);
        let planned = PlannedModel { config: &config, dir, adapter: job.adapter };
        let ask = PlanRequest {
            samples: samples.as_ref(),
            ..plan_request(run, planned, &*method, &build)
        };
        let available = plan::available(&cx)?;
        let plan = plan::fit(&cx, &ask, available)?;
        observer.info(&plan.table(&ask, available));
        plan
    };
    if let Some(n) = plan.sequences {
        method.set_sequences(n);
    }
    let weights = if job.fresh {
        observer.info(&format!(
            "{} has no weights: random weights are drawn from seed {}",
            dir.display(),
            run.training.seed
        ));
        InitialWeights::Random { seed: run.training.seed }
    } else {
        InitialWeights::Folder(dir)
    };
    let model = Decoder::builder(config)
        .weights(weights)
        .storage(scheme(&run.peft))
        .positions(longest)
        .build(&cx)?;
    let mut model = prepare(&cx, model, &run.peft, job.adapter, dir, run.training.seed)?;
    if run.training.disable_dropout
        && let Some(mut adapter) = model.adapter.take()
    {
        adapter.disable_dropout();
        model = model.with_adapter(Some(adapter))?;
    }
    let training = &run.training;
    let flops = flops_per_token(&model.config, model.params.count(), longest);
    let peak = peak_flops(&cx.device.name());
    let (trained, base) = (model.trained().trained_count(), model.params.count());
    let all = base + model.adapter.as_ref().map_or(0, Adapter::count);
    let parameters = format!(
        "{} of {} ({})",
        number::count(trained as f64),
        number::count(all as f64),
        number::percent(trained as f64 / all.max(1) as f64)
    );
    observer.info(&format!(
        "parameters trained: {parameters}; {} rows a step",
        training.per_device_train_batch_size * training.gradient_accumulation_steps
    ));
    let facts = facts(job, &rows, &cx, &parameters);
    drop(rows); // the method has copied what it needs
    let steps = match method.micro_batches() {
        Some(n) => StepPlan::online(training, n)?,
        None => StepPlan::new(training, method.rows())?,
    };
    cx.recompute = plan.recompute;
    let mut trainer = Trainer::with_plan(cx, model, training.clone(), steps)?;
    method.attach(&mut trainer.cx, &trainer.model)?;
    let whole = Run {
        folder: job.folder,
        parts,
        stop: job.stop.clone(),
        inputs: read,
        config_toml: run.to_toml(job.command),
        peak_flops: peak,
        flops_per_token: flops,
        samples,
        masks: method
            .masks()?
            .iter()
            .map(|row| mask_row(&setup.tokenizer, row))
            .collect::<Result<Vec<_>>>()?,
        facts,
    };
    let summary = whole.train(&mut trainer, &mut *method)?;
    let total_steps = trainer.plan.total_steps;
    Ok(FinishedJob { cx: trainer.cx, total_steps, summary, planned: plan.peak })
}

/// Error: a resumed run would read other rows or models than the run that it continues, and
/// `resume_with_changes` is not set.
fn same_inputs(inputs: &RunInputs, job: &Job, observer: &dyn Observer) -> Result<()> {
    let Some(found) = job.folder.resume() else { return Ok(()) };
    let name = found.path.display();
    let Some(old) = RunInputs::read(&found.path)? else {
        observer
            .warn(&format!("{name} does not record its rows and models, so they are not compared"));
        return Ok(());
    };
    let changes = inputs.changes_from(&old);
    for change in &changes.rewards {
        observer.warn(&format!("a reward has changed since {name}: {change}"));
    }
    if changes.inputs.is_empty() {
        return Ok(());
    }
    let changes = changes.inputs.join("\n  ");
    if job.run.training.resume_with_changes {
        observer.warn(&format!("changed since {name}, resume_with_changes=true:\n  {changes}"));
        return Ok(());
    }
    Err(Error::Config(format!(
        "--resume continues the run of {name}, but its inputs have changed:\n  {changes}\nGive the \
         same inputs, start another run in another --output, or set resume_with_changes=true."
    )))
}

/// The rows of a job, and where they come from.
struct JobData<'a> {
    job: &'a Job<'a>,
    rows: JobDataRows<'a>,
    cache: Option<RowCache>,
    /// The cache file being written.
    file: Option<Arc<TokenFile>>,
}

enum JobDataRows<'a> {
    Given(&'a RunRows),
    /// Read while they are tokenised.
    Fed(RunFeed<'a>),
    /// Read in full, because rewards need their columns.
    Read(RunRows),
    /// Tokenised by an earlier run.
    Stored(Box<TokenisedRun>),
}

impl<'a> JobData<'a> {
    fn open(job: &'a Job, setup: &RunSetup, observer: &'a dyn Observer) -> Result<JobData<'a>> {
        let (run, (cache, file)) = (job.run, (None, None));
        let files = match job.rows {
            JobRows::Given(rows) => {
                return Ok(JobData { job, rows: JobDataRows::Given(rows), cache, file });
            }
            JobRows::Files(files) => files,
        };
        if !run.method.rows_are_stored() {
            let rows = JobDataRows::Read(RunRows::read(run, files, observer)?);
            return Ok(JobData { job, rows, cache, file });
        }
        let cache = RowCache::of(run, setup, files, observer);
        if let Some(stored) = cache.as_ref().and_then(|cache| cache.read(observer)) {
            return Ok(JobData { job, rows: JobDataRows::Stored(Box::new(stored)), cache, file });
        }
        let file = cache.as_ref().and_then(|cache| cache.begin(observer));
        let rows = JobDataRows::Fed(RunFeed::new(run, files, file.clone(), observer)?);
        Ok(JobData { job, rows, cache, file })
    }

    fn rows(&self) -> MethodRows<'_> {
        match &self.rows {
            JobDataRows::Given(rows) => MethodRows::Held(rows),
            JobDataRows::Read(rows) => MethodRows::Held(rows),
            JobDataRows::Fed(feed) => MethodRows::Fed(feed),
            JobDataRows::Stored(stored) => MethodRows::Stored(stored),
        }
    }

    /// The report on the rows, complete once the method is built.
    fn report(&self) -> FeedReport {
        match &self.rows {
            JobDataRows::Given(rows) => rows.report(),
            JobDataRows::Read(rows) => rows.report(),
            JobDataRows::Fed(feed) => feed.told(),
            JobDataRows::Stored(stored) => FeedReport {
                notes: stored.notes.clone(),
                read: stored.read,
                conversations: stored.conversations,
            },
        }
    }

    /// Keeps what was tokenised for the next start.
    fn keep(&self, method: &dyn Method, summary: &str, observer: &dyn Observer) {
        let (Some(cache), Some(file)) = (&self.cache, &self.file) else { return };
        let (train, eval) = (method.store(Split::Train), method.store(Split::Eval));
        let (Some(train), Some(eval)) = (train, eval) else { return };
        let FeedReport { notes, read, conversations } = self.report();
        let (train, eval) = (train.clone(), eval.clone());
        let run = TokenisedRun { summary: summary.into(), notes, read, conversations, train, eval };
        cache.finish(file, &run, observer);
    }

    /// The training files, as they were given.
    fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = Vec::new();
        let given = match self.job.rows {
            JobRows::Given(rows) => rows,
            JobRows::Files(given) => {
                files.extend(given.train.0.iter().map(DataFile::to_string));
                return files;
            }
        };
        for row in &given.train {
            let file = row.file.display().to_string();
            if files.last() != Some(&file) && !files.contains(&file) {
                files.push(file);
            }
        }
        files
    }
}

/// The facts about a run that its page shows before the curves.
fn facts(job: &Job, data: &JobData, cx: &Cx, parameters: &str) -> Vec<(String, String)> {
    let (files, [train, eval]) = (data.files(), data.report().read);
    let mut rows = number::count(train as f64);
    if eval > 0 {
        rows += &format!(", and {} to evaluate on", number::count(eval as f64));
    }
    let adapter = job.adapter.map(|dir| format!(" with {}", dir.display())).unwrap_or_default();
    [
        ("method", job.run.method.name().to_string()),
        ("model", format!("{}{adapter}", job.model.display())),
        ("parameters", format!("{parameters} trained")),
        ("data", files.join(", ")),
        ("rows", rows),
        ("device", cx.device.name()),
        ("dtype", cx.dtype.name().to_string()),
        ("command", job.command.to_string()),
    ]
    .map(|(name, value)| (name.to_string(), value))
    .to_vec()
}

/// Most tokens of a row that the report shows.
const SHOWN: usize = 2048;

fn mask_row(tokenizer: &Tokenizer, (ids, mask): &MaskedIds) -> Result<MaskRow> {
    let n = ids.len().min(SHOWN);
    // Nothing predicts the first token, so it is never a target.
    let mut row = MaskRow { tokens: tokenizer.pieces(&ids[..n])?, mask: mask[..n].to_vec() };
    row.mask.iter_mut().take(1).for_each(|first| *first = false);
    if n < ids.len() {
        row.tokens.push(format!(" [{} more tokens]", ids.len() - n));
        row.mask.push(false);
    }
    Ok(row)
}
