//! Objectives: one file each, whose doc is the method. Layer 7.
//!
//! Invariant: a method defines its normalisers by the *step batch* (all rows of one optimizer
//! step), never by the chunk of rows that fits in memory; it knows the model, never a kernel.

pub mod offline;
pub mod online;
pub mod reference;

use std::borrow::Cow;
use std::path::Path;

use crate::autograd::Cx;
use crate::config::{MethodSection, TrainingConfig};
use crate::data::chat::ChatTemplate;
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::model::decoder::Decoder;
use crate::model::layout::{ModelConfig, Task};

/// A metric's name, TRL's, and its value.
pub type Metric = (Cow<'static, str>, f64);

/// A sequence, and which of its tokens are loss targets.
pub type MaskedIds = (Vec<u32>, Vec<bool>);

/// How many sequences [`Method::masks`] gives.
pub const MASKS: usize = 4;

/// What one optimizer step of a method showed.
pub struct StepReport {
    /// The step's loss, as its gradient was taken.
    pub loss: f32,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// A value for each micro-batch, of which the log takes the plain mean, as TRL does.
    pub metrics: Vec<Metric>,
}

/// What a method makes its rows of.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub model: &'a ModelConfig,
    pub train: &'a [Row],
    pub eval: &'a [Row],
    /// The run's folder, for what is worth keeping from one run to the next.
    pub output: &'a Path,
}

/// What the memory plan must know of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Sequences of a row: 2 of a pair.
    pub sequences: usize,
    /// It holds its policy against a model that stays as it was: see [`Decoder::reference`].
    pub reference: bool,
}

/// The keys of a method make the method.
pub trait Recipe: MethodSection {
    /// What the model must be; a folder of another task gets a new score.
    const TASK: Task = Task::CausalLm;

    /// A chat template to use in the place of the model's.
    fn chat_template_path(&self) -> Option<&str> {
        None
    }

    /// What a micro-batch takes beside its rows, for the memory plan.
    fn footprint(&self) -> Footprint {
        Footprint { sequences: 1, reference: false }
    }

    /// Whether dropout is off, also in an adapter that asks for it.
    fn disable_dropout(&self) -> bool {
        false
    }

    /// Tokenises the rows. Returns the method and what to print of its data. Errors name file and
    /// line.
    fn method(
        &self,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)>;
}

/// A training objective over a fixed set of rows.
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

    /// Called once, before the first step and before a checkpoint is read, with the model as it
    /// starts: for references.
    fn attach(&mut self, _cx: &mut Cx, _model: &Decoder) -> Result<()> {
        Ok(())
    }

    /// Where a method fills its micro-batches itself: how many an epoch has. Then a step's "rows"
    /// are their numbers.
    fn micro_batches(&self) -> Option<usize> {
        None
    }

    /// Called before [`Method::step`] with the step's number, from 0.
    fn begin(&mut self, _number: u64) -> Result<()> {
        Ok(())
    }

    /// Forward and backward of one optimizer step over its micro-batches of rows; gradients add up
    /// in `cx.param_grads`.
    fn step(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        micro_batches: &[&[usize]],
    ) -> Result<StepReport>;

    /// What was generated since it was last asked for, a line each for completions.jsonl.
    fn take_completions(&mut self) -> Vec<serde_json::Value> {
        Vec::new()
    }

    /// Some training sequences, true where the loss is: for the report. None where training rows
    /// are not sequences.
    fn masks(&self) -> Vec<MaskedIds> {
        Vec::new()
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

    /// What a run carries beside model and optimizer, as files of a checkpoint.
    fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
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
