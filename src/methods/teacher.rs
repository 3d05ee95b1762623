//! A frozen model that a student learns from: distillation's loss over given rows. Layer 7.
//!
//! Invariant: neither model's logits are ever held whole; see `ops::distill`.

use super::StepReport;
use super::offline::rows::targets;
use super::reference::{floats, load};
use crate::autograd::{Cx, Tape};
use crate::config::{PathText, Report, section};
use crate::data::sft::SftExample;
use crate::error::{Error, Result};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::distill::{DistillIn, distill};
use crate::tensor::Tensor;

section! {
    /// The model that a student learns from.
    pub struct TeacherOptions = "teacher" {
        /// Folder of the teacher, with the student's vocabulary.
        pub teacher_model_name_or_path: Option<PathText> = None,
        /// 0: forward KL, teacher to student. 1: reverse KL, student to teacher. Between:
        /// generalised Jensen-Shannon divergence.
        pub beta: f64 = 0.5,
    }
}

const NO_TEACHER: &str = "teacher_model_name_or_path is not set: give the teacher's folder";

impl TeacherOptions {
    fn rules(&self, report: &mut Report) {
        report.must((0.0..=1.0).contains(&self.beta), || {
            format!("beta = {}: must be in [0, 1]", self.beta)
        });
        report.must(self.teacher_model_name_or_path.is_some(), || NO_TEACHER.into());
    }
}

/// A frozen teacher.
pub struct Teacher {
    folder: String,
    pub beta: f32,
    model: Option<Decoder>,
}

impl Teacher {
    pub fn new(options: &TeacherOptions) -> Result<Teacher> {
        let folder = options.teacher_model_name_or_path.clone();
        let folder = folder.ok_or_else(|| Error::Config(NO_TEACHER.into()))?.0;
        Ok(Teacher { folder, beta: options.beta as f32, model: None })
    }

    /// Loads the teacher for sequences of at most `longest` tokens. Errors if its task or
    /// vocabulary differ.
    pub fn load(&mut self, cx: &Cx, student: &Decoder, longest: usize) -> Result<()> {
        let key = "teacher_model_name_or_path";
        self.model = Some(load(cx, student, &self.folder, key, longest)?);
        Ok(())
    }

    pub fn model(&self) -> Result<&Decoder> {
        self.model.as_ref().ok_or_else(|| {
            Error::op("distill", "has no teacher; attach comes before the first step")
        })
    }

    /// The divergence of teacher and student, summed over the target tokens of `examples` and
    /// divided by `total`; `scale` multiplies the logits of both. On the tape if `train`. None if
    /// there is no target.
    pub fn divergence(
        &self,
        cx: &mut Cx,
        student: &Decoder,
        examples: &[&SftExample],
        total: f64,
        scale: f32,
        train: bool,
    ) -> Result<Option<Divergence>> {
        let teacher = self.model()?;
        let sequences: Vec<Sequence> = examples
            .iter()
            .map(|e| Sequence { ids: &e.input_ids, target: Some(&e.target_mask) })
            .collect();
        let batch = Batch::new(cx, &sequences, student.vocab())?;
        let n = batch.target_ids.len();
        if n == 0 {
            return Ok(None);
        }
        // The teacher does not know the student's virtual tokens.
        let theirs = if student.vocab() == teacher.vocab() {
            teacher.target_hidden(cx, &batch)?
        } else {
            let plain = Batch::new(cx, &sequences, teacher.vocab())?;
            teacher.target_hidden(cx, &plain)?
        };
        let weight = floats(cx, &vec![(1.0 / total.max(1.0)) as f32; n])?;
        cx.tape = train.then(Tape::default);
        let own = student.target_hidden(cx, &batch)?;
        let x = DistillIn {
            student: &own,
            student_head: &student.head,
            teacher: &theirs,
            teacher_head: &teacher.head,
            weight: &weight,
        };
        let (loss, _) = distill(cx, &x, self.beta, scale)?;
        Ok(Some(Divergence { loss, tokens: batch.rows }))
    }

    /// The mean loss over examples, `batch` at a time.
    pub fn mean_loss(
        &self,
        cx: &mut Cx,
        student: &Decoder,
        examples: &[SftExample],
        batch: usize,
        scale: f32,
    ) -> Result<f64> {
        let (total, mut loss) = (all_targets(examples), 0f64);
        for some in examples.chunks(batch.max(1)) {
            loss += f64::from(self.update(cx, student, some, total, scale, false)?.loss);
        }
        Ok(loss)
    }

    /// One micro-batch of a step with `total` target tokens; with `train`, also its backward.
    pub fn update(
        &self,
        cx: &mut Cx,
        student: &Decoder,
        examples: &[SftExample],
        total: usize,
        scale: f32,
        train: bool,
    ) -> Result<StepReport> {
        let examples: Vec<&SftExample> = examples.iter().collect();
        let done = self.divergence(cx, student, &examples, total as f64, scale, train)?;
        let Some(Divergence { loss, tokens }) = done else { return Ok(StepReport::default()) };
        if train {
            let one = floats(cx, &[1.0])?;
            cx.backward(vec![(loss.clone(), one)])?;
        }
        Ok(StepReport { loss: loss.to_f32()?[0], tokens, metrics: Vec::new() })
    }
}

/// The outputs of a student's micro-batch, not yet read back.
pub struct Divergence {
    /// F32 `[1]`
    pub loss: Tensor,
    pub tokens: usize,
}

/// The number of loss targets of examples.
pub fn all_targets<'a>(examples: impl IntoIterator<Item = &'a SftExample>) -> usize {
    examples.into_iter().map(|e| targets(&e.target_mask)).sum()
}
