//! A whole training job: from a model folder, rows and keys to a trained folder. Layer 8.
//!
//! Invariant: every command and every stage of the quickstart goes through here; what differs is
//! the method's options.

#![deny(missing_docs)]

use std::path::Path;

use super::inputs::RunInputs;
use super::plan::{self, BuildOnline, PlanRequest};
use super::run::{Run, flops_per_token, peak_flops};
use super::samples::Samples;
use super::state::{parts_of, started};
use super::summary::Summary;
use super::tuning::{prepare, scheme};
use super::{StepPlan, Trainer};
use crate::autograd::Cx;
use crate::checkpoint::RunFolder;
use crate::config::TrainingConfig;
use crate::data::chat::ChatTemplate;
use crate::data::jinja::Clock;
use crate::data::render::template_setup;
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::methods::{BuildMethod, BuiltMethod, MaskedIds, Method, MethodInputs, MethodRun};
use crate::model::adapter::Adapter;
use crate::model::decoder::{Decoder, InitialWeights};
use crate::model::folder;
use crate::model::layout::{ModelConfig, Task};
use crate::observer::{Observer, number};
use crate::report::MaskRow;
use crate::rewards::RewardFunction;
use crate::signals::Stop;

/// What a run is made of.
pub struct Job<'a> {
    /// All options.
    pub run: &'a MethodRun,
    /// The model's folder.
    pub model: &'a Path,
    /// An adapter to train further.
    pub adapter: Option<&'a Path>,
    /// New weights where the folder has none.
    pub fresh: bool,
    /// Rows to train on.
    pub train: &'a [Row],
    /// Rows to evaluate on; may be empty.
    pub eval: &'a [Row],
    /// Rewards of the program itself, beside those of the options.
    pub rewards: &'a [RewardFunction],
    /// Where the run is written.
    pub folder: &'a RunFolder,
    /// The command that started the run, for config.toml.
    pub command: &'a str,
    /// Ends the run with a checkpoint.
    pub stop: Stop,
}

/// A job that has ended. The context comes back for the next.
pub struct FinishedJob {
    /// The context that the job ran on.
    pub cx: Cx,
    /// Optimizer steps of the run.
    pub total_steps: u64,
    /// Tokens and the last loss.
    pub summary: Summary,
    /// Bytes at the peak, as they were planned.
    pub planned: usize,
}

/// Runs a job to its end. Errors: see [`Run::train`]; also
/// everything that does not fit together, before the first step.
pub fn execute(mut cx: Cx, job: &Job) -> Result<FinishedJob> {
    let (run, dir) = (job.run, job.model);
    let observer = cx.observer.clone();
    cx.stop = job.stop.clone();
    let mut tokenizer = Tokenizer::of_model(dir, job.adapter)?;
    if let Some(path) = &run.training.chat_template_path {
        tokenizer.take_template(Path::new(&**path))?;
    }
    if let Some(token) = run.method.eos_token() {
        tokenizer.take_eos(token)?;
    }
    // A resumed run shows its templates the date of its start.
    let began = job.folder.resume().map(|found| started(&found.path)).transpose()?.flatten();
    let began = began.unwrap_or_else(Clock::now);
    let setup = template_setup(&run.training.template, began);
    let template = ChatTemplate::of_run(&tokenizer, &setup)?;
    let mut config = if job.fresh { ModelConfig::load(dir)? } else { folder::load_config(dir)? };
    let dtype = config.dtype;
    config.task = task(dir, &run.method, config.task)?;
    if config.attention_dropout > 0.0 {
        let p = config.attention_dropout;
        observer.note(&format!(
            "config.json has attention_dropout {p}; temper trains without dropout on attention weights"
        ));
    }
    let own = config.clone();
    let inputs = MethodInputs {
        tokenizer: &tokenizer,
        template: template.as_ref(),
        model: &own,
        train: job.train,
        eval: job.eval,
        on_bad_row: run.training.data.on_bad_row,
        output: job.folder.path(),
        rewards: job.rewards,
        setup: &setup,
    };
    let BuiltMethod { mut method, summary } = run.method.build(&run.training, &inputs)?;
    // The plan takes a step of a method of its own: what a step leaves behind is not the run's.
    let build = |training: &TrainingConfig| -> Result<Box<dyn Method>> {
        Ok(run.method.build(training, &inputs)?.method)
    };
    observer.info(&summary);
    let read =
        RunInputs::of(run, dir, job.adapter, &tokenizer, template.as_ref(), &*method, job.rewards)?;
    same_inputs(&read, job, &*observer)?;
    let mut parts = parts_of(&tokenizer, &mut config, dtype)?;
    parts.started = Some(began);
    let samples = Samples::of(&run.training, &tokenizer, template.as_ref(), &config, job.train)?;
    let longest = method.longest();
    let footprint = run.method.footprint();
    let mut peft = run.peft.clone();
    if run.training.disable_dropout {
        peft.lora_dropout = 0.0;
    }
    let ask = PlanRequest {
        model: &config,
        dir,
        adapter: job.adapter,
        peft,
        training: run.training.clone(),
        length: longest,
        tokens: method.widest(run.training.per_device_train_batch_size) * footprint.sequences,
        reference: footprint.reference,
        online: method.generates().then_some(&build as &BuildOnline),
        sequences: method.planned_sequences(),
        samples: samples.as_ref(),
    };
    let available = plan::available(&cx)?;
    let plan = plan::fit(&cx, &ask, available)?;
    observer.info(&plan.table(&ask, available));
    if let Some(n) = plan.sequences {
        method.set_sequences(n);
    }
    let weights = if job.fresh {
        observer.info(&format!(
            "{} holds no weights: they are made at random from seed {}",
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
    let facts = facts(job, &cx, &parameters);
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
            .masks()
            .iter()
            .map(|row| mask_row(&tokenizer, row))
            .collect::<Result<Vec<_>>>()?,
        facts,
    };
    let summary = whole.train(&mut trainer, &mut *method)?;
    let total_steps = trainer.plan.total_steps;
    Ok(FinishedJob { cx: trainer.cx, total_steps, summary, planned: plan.peak })
}

/// A resumed run must read what the run read that it continues. Error: it does not, and
/// `resume_with_changes` is not set.
fn same_inputs(inputs: &RunInputs, job: &Job, observer: &dyn Observer) -> Result<()> {
    let Some(found) = job.folder.resume() else { return Ok(()) };
    let name = found.path.display();
    let Some(old) = RunInputs::read(&found.path)? else {
        observer.warn(&format!(
            "{name} does not say which rows and models it was made from; they are not compared"
        ));
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

/// What the page says of a run before its curves.
fn facts(job: &Job, cx: &Cx, parameters: &str) -> Vec<(String, String)> {
    let mut files: Vec<String> = Vec::new();
    for row in job.train {
        let file = row.file.display().to_string();
        if files.last() != Some(&file) && !files.contains(&file) {
            files.push(file);
        }
    }
    let mut rows = number::count(job.train.len() as f64);
    if !job.eval.is_empty() {
        rows += &format!(", and {} to evaluate on", number::count(job.eval.len() as f64));
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

/// Tokens of a row that the report shows, at most.
const SHOWN: usize = 2048;

fn mask_row(tokenizer: &Tokenizer, (ids, mask): &MaskedIds) -> Result<MaskRow> {
    let n = ids.len().min(SHOWN);
    // nothing stands before the first token: it is never a target
    let mut row = MaskRow { tokens: tokenizer.pieces(&ids[..n])?, mask: mask[..n].to_vec() };
    row.mask.iter_mut().take(1).for_each(|first| *first = false);
    if n < ids.len() {
        row.tokens.push(format!(" [{} more tokens]", ids.len() - n));
        row.mask.push(false);
    }
    Ok(row)
}

/// The task that the method trains for, on a folder of task `own`.
fn task(dir: &Path, method: &dyn BuildMethod, own: Task) -> Result<Task> {
    match (method.task(), own) {
        (wanted, own) if wanted == own => Ok(own),
        // A language model becomes a classifier: its score is new.
        (wanted, Task::CausalLm) => Ok(wanted),
        (Task::SequenceClassification { labels: 1 }, Task::SequenceClassification { labels }) => {
            let message = format!(
                "has {labels} labels (num_labels, the names in id2label); a reward model has 1: start from a language model, \
                 or from a reward model"
            );
            Err(Error::model(dir.join("config.json"), message))
        }
        (wanted, own) => {
            let message =
                format!("temper {} trains {wanted:?}, the folder holds {own:?}", method.name());
            Err(Error::model(dir, message))
        }
    }
}
