//! Training objectives: one file each, whose doc describes the method. Layer 7.
//!
//! A method is its options, a docs page, and a step: over fixed rows ([`offline`]) or over what the
//! policy generates ([`online`]). [`registry`] lists them; commands, help, docs tables and tests of
//! options are loops over it.
//!
//! Invariant: a method defines its normalisers by the *step batch* (all rows of one optimizer
//! step), never by the chunk of rows that fits in memory; it knows the model, never a kernel.

pub mod offline;
pub mod online;
pub mod reference;
pub mod registry;
pub mod teacher;

use std::borrow::Cow;
use std::path::Path;

use crate::autograd::Cx;
use crate::config::{self, PeftConfig, Section, TrainingConfig};
use crate::data::bad::OnBadRow;
use crate::data::cache::TokenisedRun;
use crate::data::chat::{ChatTemplate, TemplateSetup};
use crate::data::feed::{HeldRows, RowFeed};
use crate::data::rows::Row;
use crate::data::split::Split;
use crate::data::store::TokenStore;
use crate::data::tokenizer::Tokenizer;
use crate::digest::Digest;
use crate::error::Result;
use crate::model::decoder::Decoder;
use crate::model::layout::{ModelConfig, Task};
use crate::rewards::RewardFunction;

/// A metric's name (TRL's) and value.
pub type Metric = (Cow<'static, str>, f64);

/// A sequence, and which of its tokens are loss targets.
pub type MaskedIds = (Vec<u32>, Vec<bool>);

/// A training row in the form that a method trains on.
#[derive(Clone, Debug, Default)]
pub struct RowView {
    /// `file:line` of each source row; several for a pack.
    pub places: Vec<String>,
    pub parts: Vec<RowPart>,
    /// Training signals beside the sequences, such as labels.
    pub note: String,
}

/// A sequence of a row.
#[derive(Clone, Debug, Default)]
pub struct RowPart {
    /// The name of the part, if a row has several.
    pub name: &'static str,
    pub ids: Vec<u32>,
    /// True for loss targets. The first token has no predecessor and is never a target.
    pub mask: Vec<bool>,
}

/// How many sequences [`Method::masks`] returns.
pub const MASKS: usize = 4;

/// Files of a checkpoint: name and contents.
pub type StateFiles = Vec<(String, Vec<u8>)>;

/// The results of one optimizer step of a method.
#[derive(Default)]
pub struct StepReport {
    /// The step's loss, of which the gradient was taken.
    pub loss: f32,
    /// Tokens processed by the model.
    pub tokens: usize,
    /// One value per micro-batch; the log takes the plain mean, as TRL does.
    pub metrics: Vec<Metric>,
}

impl StepReport {
    /// Adds a micro-batch of the same step.
    pub fn add(&mut self, other: StepReport) {
        self.loss += other.loss;
        self.tokens += other.tokens;
        self.metrics.extend(other.metrics);
    }
}

/// The inputs that a method is built from.
#[derive(Clone, Copy)]
pub struct MethodInputs<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub model: &'a ModelConfig,
    pub train: &'a [Row],
    pub eval: &'a [Row],
    /// How to treat an unusable row.
    pub on_bad_row: OnBadRow,
    /// The run's folder, for data that is kept from one run to the next.
    pub output: &'a Path,
    /// Rewards of the calling program, in addition to those of the options.
    pub rewards: &'a [RewardFunction],
    /// The run's settings for chat templates, including those of reward models.
    pub setup: &'a TemplateSetup,
    /// The tokenised rows of both splits from an earlier run, for methods with
    /// [`BuildMethod::rows_are_stored`]. `train` and `eval` are then empty.
    pub stored: Option<&'a TokenisedRun>,
    /// The rows while they are read, for the same methods. Then `train` and `eval` are empty.
    pub feed: Option<&'a dyn RowFeed>,
}

impl MethodInputs<'_> {
    /// The rows, as they are read or as they are here.
    pub fn feed<T>(&self, take: impl FnOnce(&dyn RowFeed) -> T) -> T {
        match self.feed {
            Some(feed) => take(feed),
            None => take(&HeldRows { train: self.train, eval: self.eval }),
        }
    }
}

/// A method with its rows.
pub struct BuiltMethod {
    pub method: Box<dyn Method>,
    /// A summary of its data, to print.
    pub summary: String,
}

impl BuiltMethod {
    pub fn new(method: impl Method + 'static, summary: impl ToString) -> BuiltMethod {
        BuiltMethod { method: Box::new(method), summary: summary.to_string() }
    }
}

/// What the memory plan needs to know about a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Sequences per row: 2 for a pair.
    pub sequences: usize,
    /// Whether it compares the policy with a frozen copy: see [`Decoder::reference`].
    pub reference: bool,
}

/// The options of a method; they build the method.
pub trait BuildMethod: Section {
    /// The common options with this method's defaults.
    fn training(&self) -> TrainingConfig {
        TrainingConfig::default()
    }

    /// The kind of model that it trains. If that is a classifier, a language model gets a new score
    /// head.
    fn task(&self) -> Task {
        Task::CausalLm
    }

    /// The token that ends a row, if an option overrides the tokenizer's.
    fn eos_token(&self) -> Option<&str> {
        None
    }

    /// The memory that a micro-batch needs beside its rows, for the memory plan.
    fn footprint(&self) -> Footprint {
        Footprint { sequences: 1, reference: false }
    }

    /// Whether its rows are nothing but token sequences, which a file can keep from one run to the
    /// next: see [`Method::store`].
    fn rows_are_stored(&self) -> bool {
        false
    }

    /// Tokenises the rows and builds the method. Errors name file and line.
    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod>;
}

/// All options of a training command.
#[deny(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub struct MethodRun<M: ?Sized = dyn BuildMethod> {
    /// Options of every run.
    pub training: TrainingConfig,
    /// Options of adapters.
    pub peft: PeftConfig,
    /// Options of the method.
    pub method: M,
}

impl<M: BuildMethod + Default> Default for MethodRun<M> {
    fn default() -> Self {
        let method = M::default();
        MethodRun { training: method.training(), peft: PeftConfig::default(), method }
    }
}

#[deny(missing_docs)]
impl<M: BuildMethod + Default + 'static> MethodRun<M> {
    /// Loads the defaults, then a run file, then `key=value` overrides. Also returns notes to
    /// print.
    pub fn load(file: Option<&Path>, overrides: &[String]) -> Result<(Self, Vec<String>)> {
        let mut run = Self::default();
        let notes = config::load(
            &mut [&mut run.training, &mut run.peft, &mut run.method],
            file,
            overrides,
        )?;
        Ok((run, notes))
    }

    /// The same options with the method's type erased.
    pub fn erased(&self) -> &MethodRun {
        self
    }
}

#[deny(missing_docs)]
impl MethodRun {
    /// The three groups of options.
    pub fn sections(&self) -> [&dyn Section; 3] {
        [&self.training, &self.peft, &self.method]
    }

    /// The resolved run file, with `head` as a comment at the top.
    pub fn to_toml(&self, head: &str) -> String {
        config::to_toml(head, &self.sections())
    }

    /// Reads a run file, then `key=value` overrides, for a program that passes `reward_functions`
    /// rewards of its own. Returns notes to print.
    pub fn read(
        &mut self,
        file: Option<&Path>,
        overrides: &[String],
        reward_functions: usize,
    ) -> Result<Vec<String>> {
        let sections: &mut [&mut dyn Section] =
            &mut [&mut self.training, &mut self.peft, &mut self.method];
        config::load_with(sections, file, overrides, reward_functions)
    }
}

/// A training command.
pub struct MethodEntry {
    /// Name of the command.
    pub name: &'static str,
    /// Its line in the help.
    pub about: &'static str,
    /// Its page, `docs/methods/PAGE.md`.
    pub page: &'static str,
    /// All of its options at their defaults.
    pub run: fn() -> Box<MethodRun>,
    /// Whether a model folder without weights gets new random ones.
    pub from_scratch: bool,
}

impl MethodEntry {
    /// A method whose page has the name of its command.
    pub const fn new<M>(name: &'static str, about: &'static str) -> MethodEntry
    where
        M: BuildMethod + Default + 'static,
    {
        let run = || -> Box<MethodRun> { Box::new(MethodRun::<M>::default()) };
        MethodEntry { name, about, page: name, run, from_scratch: false }
    }

    /// The same method, documented on another method's page.
    pub const fn on_page(self, page: &'static str) -> MethodEntry {
        MethodEntry { page, ..self }
    }
}

/// A training objective.
pub trait Method {
    /// Rows of the training set.
    fn rows(&self) -> usize;

    /// Rows of the evaluation set.
    fn eval_rows(&self) -> usize;

    /// Tokens of the longest sequence of either set.
    fn longest(&self) -> usize;

    /// Tokens of the widest micro-batch of `rows` rows, one sequence per row.
    fn widest(&self, rows: usize) -> usize {
        rows * self.longest()
    }

    /// Called once with the initial model, before the first step and before a checkpoint is read,
    /// to set up references.
    fn attach(&mut self, _cx: &mut Cx, _model: &Decoder) -> Result<()> {
        Ok(())
    }

    /// For a method that fills its micro-batches itself: their number in an epoch. The "rows" of a
    /// step are then numbers of micro-batches.
    fn micro_batches(&self) -> Option<usize> {
        None
    }

    /// Whether its rows are generated; one of its steps then serves as the memory plan.
    fn generates(&self) -> bool {
        false
    }

    /// If the memory plan chooses how many sequences are generated at once: their upper limit.
    fn planned_sequences(&self) -> Option<usize> {
        None
    }

    /// Sets the number that the memory plan chose; called before [`Method::attach`].
    fn set_sequences(&mut self, _n: usize) {}

    /// Called before [`Method::step`] with the step's number, from 0.
    fn begin(&mut self, _number: u64) -> Result<()> {
        Ok(())
    }

    /// Forward and backward of one optimizer step over its micro-batches of rows; gradients add up
    /// in `cx.param_grads`.
    fn step(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<StepReport>;

    /// Everything generated since the last call, one line each for completions.jsonl.
    fn take_completions(&mut self) -> Vec<serde_json::Value> {
        Vec::new()
    }

    /// Completions to show beside a log line, if the options ask for them: those of the last
    /// generation since the previous call.
    fn shown_completions(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Some training sequences, true where the loss is: for the report. None where training rows
    /// are not sequences. Error: as of [`Method::row_view`].
    fn masks(&self) -> Result<Vec<MaskedIds>> {
        Ok(Vec::new())
    }

    /// A training row as it is trained on: for `temper data`. Error: the file that holds its tokens
    /// cannot be read.
    fn row_view(&self, row: usize) -> Result<RowView>;

    /// The tokenised rows of a split; None where [`BuildMethod::rows_are_stored`] is false.
    fn store(&self, _split: Split) -> Option<&TokenStore> {
        None
    }

    /// Called after the parameters have changed, with the number of steps done.
    fn stepped(&mut self, _cx: &mut Cx, _model: &Decoder, _done: u64) -> Result<()> {
        Ok(())
    }

    /// Loss and metrics over the whole evaluation set, `batch` rows at a time; names without the
    /// prefix `eval_`.
    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>>;

    /// The loss of one training row alone, to find the rows behind a NaN.
    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32>;

    /// The source of a training row, `file:line`, for messages.
    fn row_source(&self, row: usize) -> String;

    /// Adds what a split trains on, in order: tokens, masks, labels and columns that rewards see,
    /// but no file name. Error: as of [`Method::row_view`].
    fn digest_rows(&self, split: Split, digest: &mut Digest) -> Result<()>;

    /// The state of a run beside model and optimizer, as files of a checkpoint.
    fn state(&self) -> Result<StateFiles> {
        Ok(Vec::new())
    }

    /// Restores the state written by [`Method::state`] from a checkpoint's folder.
    fn restore(&mut self, _cx: &mut Cx, _dir: &Path) -> Result<()> {
        Ok(())
    }
}

/// Plain means over batches of an evaluation, by name.
#[derive(Default)]
pub struct Averages(Vec<(Cow<'static, str>, f64, usize)>);

impl Averages {
    pub fn add(&mut self, metrics: impl IntoIterator<Item = Metric>) {
        for (name, value) in metrics {
            match self.0.iter_mut().find(|s| s.0 == name) {
                Some(s) => (s.1, s.2) = (s.1 + value, s.2 + 1),
                None => self.0.push((name, value, 1)),
            }
        }
    }

    pub fn take(self) -> Vec<Metric> {
        self.0.into_iter().map(|(name, sum, n)| (name, sum / n as f64)).collect()
    }
}
