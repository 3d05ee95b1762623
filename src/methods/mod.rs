//! Training objectives: one file each, whose doc is the method. Layer 7.
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

/// A metric's name, TRL's, and its value.
pub type Metric = (Cow<'static, str>, f64);

/// A sequence, and which of its tokens are loss targets.
pub type MaskedIds = (Vec<u32>, Vec<bool>);

/// A training row as a method has it.
#[derive(Clone, Debug, Default)]
pub struct RowView {
    /// `file:line` of each row that it comes from: several of a pack.
    pub places: Vec<String>,
    pub parts: Vec<RowPart>,
    /// What it teaches beside its sequences.
    pub note: String,
}

/// A sequence of a row.
#[derive(Clone, Debug, Default)]
pub struct RowPart {
    /// What it is, where a row has several.
    pub name: &'static str,
    pub ids: Vec<u32>,
    /// True where the loss is. The first token has nothing before it and is never a target.
    pub mask: Vec<bool>,
}

/// How many sequences [`Method::masks`] gives.
pub const MASKS: usize = 4;

/// Files of a checkpoint: name and contents.
pub type StateFiles = Vec<(String, Vec<u8>)>;

/// What one optimizer step of a method showed.
#[derive(Default)]
pub struct StepReport {
    /// The step's loss, as its gradient was taken.
    pub loss: f32,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// A value for each micro-batch; the log takes the plain mean, as TRL does.
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

/// What a method is built from.
#[derive(Clone, Copy)]
pub struct MethodInputs<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub model: &'a ModelConfig,
    pub train: &'a [Row],
    pub eval: &'a [Row],
    /// What happens to a row that cannot be used.
    pub on_bad_row: OnBadRow,
    /// The run's folder, for what is worth keeping from one run to the next.
    pub output: &'a Path,
    /// Rewards of the program itself, beside those of the options.
    pub rewards: &'a [RewardFunction],
    /// What the run gives chat templates, those of reward models too.
    pub setup: &'a TemplateSetup,
    /// The rows of both splits, tokenised by an earlier run: for methods with
    /// [`BuildMethod::rows_are_stored`]. Then `train` and `eval` are empty.
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

/// A method over its rows.
pub struct BuiltMethod {
    pub method: Box<dyn Method>,
    /// What to print about its data.
    pub summary: String,
}

impl BuiltMethod {
    pub fn new(method: impl Method + 'static, summary: impl ToString) -> BuiltMethod {
        BuiltMethod { method: Box::new(method), summary: summary.to_string() }
    }
}

/// What the memory plan must know about a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Sequences of a row: 2 of a pair.
    pub sequences: usize,
    /// It compares its policy with a frozen copy: see [`Decoder::reference`].
    pub reference: bool,
}

/// The options of a method; they build the method.
pub trait BuildMethod: Section {
    /// The common options at this method's defaults.
    fn training(&self) -> TrainingConfig {
        TrainingConfig::default()
    }

    /// What the model must be; a language model gets a new score where a classifier is wanted.
    fn task(&self) -> Task {
        Task::CausalLm
    }

    /// The token that ends a row, where an option says another than the tokenizer's.
    fn eos_token(&self) -> Option<&str> {
        None
    }

    /// What a micro-batch takes beside its rows, for the memory plan.
    fn footprint(&self) -> Footprint {
        Footprint { sequences: 1, reference: false }
    }

    /// Whether its rows are token sequences and nothing else, which a file can keep from one run to
    /// the next: see [`Method::store`].
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
    /// The defaults, then a run file, then `key=value` overrides. Returns notes to print, too.
    pub fn load(file: Option<&Path>, overrides: &[String]) -> Result<(Self, Vec<String>)> {
        let mut run = Self::default();
        let notes = config::load(
            &mut [&mut run.training, &mut run.peft, &mut run.method],
            file,
            overrides,
        )?;
        Ok((run, notes))
    }

    /// The same options, whatever the method.
    pub fn erased(&self) -> &MethodRun {
        self
    }
}

#[deny(missing_docs)]
impl MethodRun {
    /// Its three groups of options.
    pub fn sections(&self) -> [&dyn Section; 3] {
        [&self.training, &self.peft, &self.method]
    }

    /// The resolved run file; `head` goes in front as a comment.
    pub fn to_toml(&self, head: &str) -> String {
        config::to_toml(head, &self.sections())
    }

    /// Reads a run file, then `key=value` overrides, for a program that gives `reward_functions`
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
    /// The command.
    pub name: &'static str,
    /// Its line in the help.
    pub about: &'static str,
    /// Its page, `docs/methods/PAGE.md`.
    pub page: &'static str,
    /// All of its options at their defaults.
    pub run: fn() -> Box<MethodRun>,
    /// A folder without weights gets new ones, drawn at random.
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

    /// The same on another method's page.
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

    /// Tokens of the widest micro-batch of `rows` rows, as one sequence of each.
    fn widest(&self, rows: usize) -> usize {
        rows * self.longest()
    }

    /// Called once, before the first step and before a checkpoint is read, with the initial model:
    /// for references.
    fn attach(&mut self, _cx: &mut Cx, _model: &Decoder) -> Result<()> {
        Ok(())
    }

    /// Where a method fills its micro-batches itself: how many an epoch has. Then a step's "rows"
    /// are their numbers.
    fn micro_batches(&self) -> Option<usize> {
        None
    }

    /// Whether its rows are generated: then a step of it is its memory plan.
    fn generates(&self) -> bool {
        false
    }

    /// Where the memory plan says how many sequences are generated at once: how many would be at
    /// most.
    fn planned_sequences(&self) -> Option<usize> {
        None
    }

    /// Takes what the memory plan says; before [`Method::attach`].
    fn set_sequences(&mut self, _n: usize) {}

    /// Called before [`Method::step`] with the step's number, from 0.
    fn begin(&mut self, _number: u64) -> Result<()> {
        Ok(())
    }

    /// Forward and backward of one optimizer step over its micro-batches of rows; gradients add up
    /// in `cx.param_grads`.
    fn step(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<StepReport>;

    /// What was generated since the last call, a line each for completions.jsonl.
    fn take_completions(&mut self) -> Vec<serde_json::Value> {
        Vec::new()
    }

    /// Completions to show beside a log line, where the options ask for them: those of the last
    /// generation since the call before.
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
    /// `eval_` in front.
    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>>;

    /// The loss of one training row alone, to find the rows behind a NaN.
    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32>;

    /// Where a training row comes from: `file:line`, for messages.
    fn row_source(&self, row: usize) -> String;

    /// Adds what a split trains on, in order: tokens, masks, labels and columns that rewards see,
    /// but no file name. Error: as of [`Method::row_view`].
    fn digest_rows(&self, split: Split, digest: &mut Digest) -> Result<()>;

    /// What a run carries beside model and optimizer, as files of a checkpoint.
    fn state(&self) -> Result<StateFiles> {
        Ok(Vec::new())
    }

    /// Takes up what [`Method::state`] gave, from a checkpoint's folder.
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
