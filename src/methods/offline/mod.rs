//! What every method over fixed rows does alike: the micro-batches of a step, evaluation, the row
//! behind a NaN. Layer 7.
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
pub mod sft;

use std::path::Path;

use crate::autograd::{Cx, Tape};
use crate::device::DType;
use crate::error::Result;
use crate::methods::{Averages, MaskedIds, Method, Metric, StepReport};
use crate::model::decoder::Decoder;
use crate::tensor::Tensor;

/// Which rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    Train,
    Eval,
}

/// How a micro-batch runs.
#[derive(Clone, Copy)]
pub struct Pass {
    /// With gradients: a step of training. Else the objective changes no state.
    pub train: bool,
}

impl Pass {
    const LOOK: Pass = Pass { train: false };

    /// From here on the policy is computed: call it once the references are done.
    pub fn begin(self, cx: &mut Cx) {
        cx.tape = self.train.then(Tape::default);
    }
}

/// A micro-batch as it was launched.
pub struct Shot {
    /// F32 [1]
    pub loss: Tensor,
    /// Of the rows' sequences, each in full: a prompt that two of them share counts twice, as in
    /// TRL.
    pub tokens: usize,
    /// Waits for the device; asked for once everything is launched.
    pub metrics: Box<dyn FnOnce() -> Result<Vec<Metric>>>,
}

/// A loss over micro-batches of rows; [`Batched`] makes a method of it.
pub trait Objective {
    fn rows(&self, set: Set) -> usize;

    /// Tokens of the longest sequence of either set.
    fn longest(&self) -> usize;

    /// `file:line` of a training row.
    fn source(&self, row: usize) -> String;

    /// What a row counts in the step's normaliser.
    fn weight(&self, _set: Set, _row: usize) -> f64 {
        1.0
    }

    /// See [`Method::masks`].
    fn masks(&self) -> Vec<MaskedIds>;

    fn attach(&mut self, _cx: &mut Cx, _model: &Decoder) -> Result<()> {
        Ok(())
    }

    /// The loss of `rows` divided by `total`, the weight of the step's rows. None: nothing of them
    /// counts.
    fn shot(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        set: Set,
        rows: &[usize],
        total: f64,
        pass: Pass,
    ) -> Result<Option<Shot>>;

    fn stepped(&mut self, _cx: &mut Cx, _model: &Decoder, _done: u64) -> Result<()> {
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _cx: &mut Cx, _dir: &Path) -> Result<()> {
        Ok(())
    }
}

pub struct Batched<O>(pub O);

impl<O: Objective> Method for Batched<O> {
    fn rows(&self) -> usize {
        self.0.rows(Set::Train)
    }

    fn eval_rows(&self) -> usize {
        self.0.rows(Set::Eval)
    }

    fn longest(&self) -> usize {
        self.0.longest()
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        self.0.attach(cx, model)
    }

    fn step(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        micro_batches: &[&[usize]],
    ) -> Result<StepReport> {
        let total: f64 = micro_batches
            .iter()
            .flat_map(|m| m.iter())
            .map(|r| self.0.weight(Set::Train, *r))
            .sum();
        let one = Tensor::from_host(&cx.pool, "loss", DType::F32, &[1], &[1f32])?;
        let mut shots = Vec::new();
        for rows in micro_batches {
            let pass = Pass { train: true };
            if let Some(shot) = self.0.shot(cx, model, Set::Train, rows, total, pass)? {
                cx.backward(vec![(shot.loss.clone(), one.clone())])?;
                shots.push(shot);
            }
        }
        // Everything was launched; only now wait for the figures.
        let mut report = StepReport { loss: 0.0, tokens: 0, metrics: Vec::new() };
        for shot in shots {
            report.loss += shot.loss.to_f32()?[0];
            report.tokens += shot.tokens;
            report.metrics.extend((shot.metrics)()?);
        }
        Ok(report)
    }

    fn stepped(&mut self, cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        self.0.stepped(cx, model, done)
    }

    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>> {
        let rows: Vec<usize> = (0..self.0.rows(Set::Eval)).collect();
        let total: f64 = rows.iter().map(|r| self.0.weight(Set::Eval, *r)).sum();
        let (mut loss, mut averages) = (0f64, Averages::default());
        for rows in rows.chunks(batch.max(1)) {
            if let Some(shot) = self.0.shot(cx, model, Set::Eval, rows, total, Pass::LOOK)? {
                loss += f64::from(shot.loss.to_f32()?[0]);
                averages.add((shot.metrics)()?);
            }
        }
        let mut all = vec![("loss".into(), loss)];
        all.extend(averages.take());
        Ok(all)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32> {
        let total = self.0.weight(Set::Train, row);
        match self.0.shot(cx, model, Set::Train, &[row], total, Pass::LOOK)? {
            Some(shot) => Ok(shot.loss.to_f32()?[0]),
            None => Ok(0.0),
        }
    }

    fn row_source(&self, row: usize) -> String {
        self.0.source(row)
    }

    fn masks(&self) -> Vec<MaskedIds> {
        self.0.masks()
    }

    fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
        self.0.state()
    }

    fn restore(&mut self, cx: &mut Cx, dir: &Path) -> Result<()> {
        self.0.restore(cx, dir)
    }
}
