//! The part of a run before its rows are read (tokenizer, chat template, config of the model), and
//! its request for a memory plan. Layer 8.
//!
//! Invariant: training, `temper data` and `temper inspect memory` use this module, so they render
//! the same rows and plan the same run.

use std::path::Path;

use super::plan::{BuildOnline, PlanRequest};
use super::rows::RunRows;
use crate::config::TrainingConfig;
use crate::data::cache::TokenisedRun;
use crate::data::chat::{ChatTemplate, TemplateSetup};
use crate::data::feed::RowFeed;
use crate::data::jinja::Clock;
use crate::data::render::template_setup;
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::methods::{BuildMethod, BuiltMethod, Method, MethodInputs, MethodRun};
use crate::model::folder;
use crate::model::layout::{ModelConfig, Task};
use crate::rewards::RewardFunction;

/// Whether a folder must have weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// The weights say more than the config: whether the head is tied.
    Needed,
    /// As `Needed` if they are there.
    Optional,
    NotNeeded,
}

/// The rows that a method is built from.
#[derive(Clone, Copy)]
pub enum MethodRows<'a> {
    /// They are here.
    Held(&'a RunRows),
    /// They are read while they are tokenised: for methods over fixed rows.
    Fed(&'a dyn RowFeed),
    /// An earlier run has tokenised them.
    Stored(&'a TokenisedRun),
}

/// A run before its rows are read.
pub struct RunSetup {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub templates: TemplateSetup,
    /// When the run began, for `strftime_now` in templates.
    pub began: Clock,
    /// With the task of the method.
    pub config: ModelConfig,
}

impl RunSetup {
    /// Opens a model folder, with an adapter on it. `began`: the start of the run that is resumed.
    pub fn open(
        run: &MethodRun,
        dir: &Path,
        adapter: Option<&Path>,
        weights: Weights,
        began: Option<Clock>,
    ) -> Result<RunSetup> {
        let mut tokenizer = Tokenizer::of_model(dir, adapter)?;
        if let Some(path) = &run.training.chat_template_path {
            tokenizer.take_template(Path::new(&**path))?;
        }
        if let Some(token) = run.method.eos_token() {
            tokenizer.take_eos(token)?;
        }
        let began = began.unwrap_or_else(Clock::now);
        let templates = template_setup(&run.training.template, began);
        let template = ChatTemplate::of_run(&tokenizer, &templates)?;
        let mut config = match weights {
            Weights::Needed => folder::load_config(dir)?,
            Weights::Optional => folder::inspect_config(dir)?,
            Weights::NotNeeded => ModelConfig::load(dir)?,
        };
        config.task = task(dir, &run.method, config.task)?;
        Ok(RunSetup { tokenizer, template, templates, began, config })
    }

    /// What the method is built from.
    pub fn inputs<'a>(
        &'a self,
        run: &MethodRun,
        rows: MethodRows<'a>,
        output: &'a Path,
        rewards: &'a [RewardFunction],
    ) -> MethodInputs<'a> {
        let none: &[Row] = &[];
        let (train, eval, feed, stored) = match rows {
            MethodRows::Held(rows) => (&*rows.train, &*rows.eval, None, None),
            MethodRows::Fed(rows) => (none, none, Some(rows), None),
            MethodRows::Stored(rows) => (none, none, None, Some(rows)),
        };
        MethodInputs {
            tokenizer: &self.tokenizer,
            template: self.template.as_ref(),
            model: &self.config,
            train,
            eval,
            on_bad_row: run.training.reading.on_bad_row,
            output,
            rewards,
            setup: &self.templates,
            stored,
            feed,
        }
    }
}

/// The model of a memory plan.
#[derive(Clone, Copy)]
pub struct PlannedModel<'a> {
    pub config: &'a ModelConfig,
    pub dir: &'a Path,
    pub adapter: Option<&'a Path>,
}

/// The request for the memory plan of a run over the rows of `method`. `build` makes another
/// instance of the method, to run a step of it.
pub fn plan_request<'a>(
    run: &MethodRun,
    model: PlannedModel<'a>,
    method: &dyn Method,
    build: &'a BuildOnline<'a>,
) -> PlanRequest<'a> {
    let footprint = run.method.footprint();
    let tokens = method.widest(run.training.per_device_train_batch_size) * footprint.sequences;
    PlanRequest {
        online: method.generates().then_some(build),
        sequences: method.planned_sequences(),
        ..row_request(run, model, method.longest(), tokens)
    }
}

/// The request for the memory plan of a run over rows, with at most `length` tokens per sequence
/// and `tokens` per micro-batch.
pub fn row_request<'a>(
    run: &MethodRun,
    model: PlannedModel<'a>,
    length: usize,
    tokens: usize,
) -> PlanRequest<'a> {
    let mut peft = run.peft.clone();
    if run.training.disable_dropout {
        peft.lora_dropout = 0.0;
    }
    PlanRequest {
        model: model.config,
        dir: model.dir,
        adapter: model.adapter,
        peft,
        training: run.training.clone(),
        length,
        tokens,
        reference: run.method.footprint().reference,
        online: None,
        sequences: None,
        samples: None,
    }
}

/// Makes another instance of the method from the same inputs.
pub fn build_again<'a>(
    run: &'a MethodRun,
    inputs: &'a MethodInputs<'a>,
) -> impl Fn(&TrainingConfig) -> Result<Box<dyn Method>> + 'a {
    |training: &TrainingConfig| {
        let BuiltMethod { method, .. } = run.method.build(training, inputs)?;
        Ok(method)
    }
}

/// The task for which the method trains, given a folder of task `own`.
pub fn task(dir: &Path, method: &dyn BuildMethod, own: Task) -> Result<Task> {
    match (method.task(), own) {
        (wanted, own) if wanted == own => Ok(own),
        // A language model becomes a classifier with a new score head.
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
                format!("temper {} trains {wanted:?}, but the folder holds {own:?}", method.name());
            Err(Error::model(dir, message))
        }
    }
}
