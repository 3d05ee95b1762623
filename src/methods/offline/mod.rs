//! Methods over fixed rows, and the one loop that they share: the micro-batches of a step,
//! evaluation, the row behind a NaN. Layer 7.
//!
//! Invariant: a micro-batch's loss is a sum over its rows divided by the weight of the whole step,
//! so the losses and gradients of a step's micro-batches add up.

pub mod completions;
pub mod cpo;
pub mod distill;
pub mod dpo;
pub mod kto;
pub mod orpo;
pub mod prm;
pub mod reward;
pub mod rows;
pub mod sft;

use std::path::Path;

use rows::{RowSet, Split};

use crate::autograd::{Cx, Tape};
use crate::data::store::TokenStore;
use crate::device::DType;
use crate::digest::Digest;
use crate::error::Result;
use crate::methods::{Averages, MaskedIds, Method, Metric, RowView, StateFiles, StepReport};
use crate::model::decoder::Decoder;
use crate::tensor::Tensor;

/// Rows that are computed together.
pub struct MicroBatch<'a> {
    pub split: Split,
    pub rows: &'a [usize],
    /// The weight of all rows of the step.
    pub total: f64,
    /// With gradients. Else the objective changes no state.
    pub train: bool,
}

impl MicroBatch<'_> {
    /// The share of one unit of weight in the step's loss.
    pub fn share(&self) -> f32 {
        (1.0 / self.total.max(1.0)) as f32
    }

    /// From here on the policy is computed: call it once the references are done.
    pub fn record(&self, cx: &mut Cx) {
        cx.tape = self.train.then(Tape::default);
    }
}

/// What a micro-batch gave, as it was launched.
pub struct LossOutput {
    /// F32 `[1]`. None: nothing in the micro-batch counts.
    pub loss: Option<Tensor>,
    /// Of the rows' sequences, each in full: a prompt that two of them share counts twice, as in
    /// TRL.
    pub tokens: usize,
    /// Waits for the device; called once everything is launched.
    pub metrics: Box<dyn FnOnce() -> Result<Vec<Metric>>>,
}

impl LossOutput {
    pub fn new(
        loss: Tensor,
        tokens: usize,
        metrics: impl FnOnce() -> Result<Vec<Metric>> + 'static,
    ) -> LossOutput {
        LossOutput { loss: Some(loss), tokens, metrics: Box::new(metrics) }
    }

    /// Of a micro-batch without a loss target.
    pub fn empty(tokens: usize) -> LossOutput {
        LossOutput { loss: None, tokens, metrics: Box::new(|| Ok(Vec::new())) }
    }

    fn value(&self) -> Result<f32> {
        self.loss.as_ref().map_or(Ok(0.0), |loss| Ok(loss.to_f32()?[0]))
    }
}

/// A loss over micro-batches of rows; [`OfflineMethod`] makes a method of it.
pub trait OfflineObjective {
    fn rows(&self) -> &dyn RowSet;

    /// What a row counts in the step's normaliser.
    fn weight(&self, _split: Split, _row: usize) -> Result<f64> {
        Ok(1.0)
    }

    /// See [`Method::masks`].
    fn masks(&self) -> Result<Vec<MaskedIds>> {
        self.rows().masks()
    }

    /// See [`Method::row_view`].
    fn row_view(&self, row: usize) -> Result<RowView> {
        self.rows().view(row)
    }

    fn attach(&mut self, _cx: &mut Cx, _model: &Decoder) -> Result<()> {
        Ok(())
    }

    /// The loss of the micro-batch's rows divided by `micro.total`.
    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput>;

    fn stepped(&mut self, _cx: &mut Cx, _model: &Decoder, _done: u64) -> Result<()> {
        Ok(())
    }

    fn state(&self) -> Result<StateFiles> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _cx: &mut Cx, _dir: &Path) -> Result<()> {
        Ok(())
    }
}

pub struct OfflineMethod<O>(pub O);

impl<O: OfflineObjective> OfflineMethod<O> {
    fn total<'a>(&self, split: Split, rows: impl IntoIterator<Item = &'a usize>) -> Result<f64> {
        rows.into_iter().map(|r| self.0.weight(split, *r)).sum()
    }
}

impl<O: OfflineObjective> Method for OfflineMethod<O> {
    fn rows(&self) -> usize {
        self.0.rows().count(Split::Train)
    }

    fn eval_rows(&self) -> usize {
        self.0.rows().count(Split::Eval)
    }

    fn longest(&self) -> usize {
        self.0.rows().longest()
    }

    fn widest(&self, rows: usize) -> usize {
        self.0.rows().widest(rows)
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        self.0.attach(cx, model)
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<StepReport> {
        let total = self.total(Split::Train, micro.iter().copied().flatten())?;
        let one = Tensor::from_host(&cx.pool, "loss", DType::F32, &[1], &[1f32])?;
        let mut outputs = Vec::new();
        for rows in micro {
            let micro = MicroBatch { split: Split::Train, rows, total, train: true };
            let output = self.0.loss(cx, model, &micro)?;
            if let Some(loss) = &output.loss {
                cx.backward(vec![(loss.clone(), one.clone())])?;
            }
            outputs.push(output);
        }
        // Everything was launched; only now wait for the numbers.
        let mut report = StepReport::default();
        for output in outputs {
            report.loss += output.value()?;
            report.tokens += output.tokens;
            report.metrics.extend((output.metrics)()?);
        }
        Ok(report)
    }

    fn masks(&self) -> Result<Vec<MaskedIds>> {
        self.0.masks()
    }

    fn row_view(&self, row: usize) -> Result<RowView> {
        self.0.row_view(row)
    }

    fn store(&self, split: Split) -> Option<&TokenStore> {
        self.0.rows().store(split)
    }

    fn stepped(&mut self, cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        self.0.stepped(cx, model, done)
    }

    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>> {
        let rows: Vec<usize> = (0..self.eval_rows()).collect();
        let total = self.total(Split::Eval, &rows)?;
        let (mut loss, mut averages) = (0f64, Averages::default());
        for rows in rows.chunks(batch.max(1)) {
            let micro = MicroBatch { split: Split::Eval, rows, total, train: false };
            let output = self.0.loss(cx, model, &micro)?;
            loss += f64::from(output.value()?);
            averages.add((output.metrics)()?);
        }
        let mut all = vec![("loss".into(), loss)];
        all.extend(averages.take());
        Ok(all)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32> {
        let rows = &[row];
        let total = self.total(Split::Train, rows)?;
        self.0
            .loss(cx, model, &MicroBatch { split: Split::Train, rows, total, train: false })?
            .value()
    }

    fn digest_rows(&self, split: Split, digest: &mut Digest) -> Result<()> {
        self.0.rows().digest(split, digest)
    }

    fn row_source(&self, row: usize) -> String {
        self.0.rows().source(row)
    }

    fn state(&self) -> Result<StateFiles> {
        self.0.state()
    }

    fn restore(&mut self, cx: &mut Cx, dir: &Path) -> Result<()> {
        self.0.restore(cx, dir)
    }
}
