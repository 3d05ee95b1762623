//! Objectives: one file each, whose doc is the method. Floor 5.
//!
//! Invariant: a method defines its normalisers by the *step batch* (all rows of one optimizer step), never by the chunk
//! of rows that fits in memory; it knows the model, never a kernel.

pub mod sft;

use crate::cx::Cx;
use crate::error::Result;
use crate::model::decoder::Decoder;

/// What one optimizer step of a method showed.
pub struct StepReport {
    /// The step's loss, as its gradient was taken.
    pub loss: f32,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Metrics under TRL's names: a value for each micro-batch, of which the log takes the plain mean, as TRL does.
    pub metrics: Vec<(&'static str, f64)>,
}

/// A training objective over a fixed set of rows.
pub trait Method {
    fn name(&self) -> &'static str;

    /// Rows of the training set.
    fn rows(&self) -> usize;

    /// Rows of the evaluation set.
    fn eval_rows(&self) -> usize;

    /// Forward and backward of one optimizer step over its micro-batches of rows; gradients add up in `cx.param_grads`.
    fn step(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        micro_batches: &[&[usize]],
        checkpoint: bool,
    ) -> Result<StepReport>;

    /// Loss and metrics over the whole evaluation set, `batch` rows at a time; names without the `eval_` in front.
    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<(&'static str, f64)>>;

    /// The loss of one training row alone, to find the rows behind a NaN.
    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32>;

    /// Where a training row comes from: `file:line`, for messages.
    fn row_source(&self, row: usize) -> String;
}
