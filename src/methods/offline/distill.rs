//! Distillation from a teacher over given rows: the student learns the teacher's whole distribution
//! at each target token instead of the token itself (Hinton, Vinyals and Dean, 2015; Agarwal et
//! al., "On-Policy Distillation of Language Models" (GKD), 2024).
//!
//! loss = mean over the target tokens of the step of D(teacher, student), both softened by
//! `temperature`: at beta 0 the forward KL, sum T log(T/S), which covers all that the teacher does;
//! at 1 the reverse KL, sum S log(S/T), which concentrates on what it does most; between, with M =
//! (1 - beta) S + beta T, beta KL(T, M) + (1 - beta) KL(S, M). TRL 1.16.0's GKDTrainer has the same
//! divergences; its rows written by the student or the teacher (`lmbda`, `seq_kd`) are not
//! supported here: rows come from the data.
//!
//! Layer 7. Invariant: neither model's logits are ever held whole; see `ops::distill`.

use crate::autograd::Cx;
use crate::config::{Report, TrainingConfig, TruncationOptions, section};
use crate::data::sft::{SftEncoder, SftExample, SftOptions};
use crate::error::Result;
use crate::methods::offline::rows::{RowSet, Rows, Split, targets};
use crate::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use crate::methods::teacher::{Divergence, Teacher, TeacherOptions};
use crate::methods::{BuildMethod, BuiltMethod, MethodEntry, MethodInputs};
use crate::model::decoder::Decoder;

pub const METHOD: MethodEntry =
    MethodEntry::new::<DistillConfig>("distill", "Distillation from a teacher's distributions");

section! {
    /// What TRL's `GKDConfig` has for rows that are there.
    pub struct DistillConfig = "distill" {
        /// Temperature of both distributions.
        pub temperature: f64 = 0.9,
        /// Compare on the completion only. none: yes for prompt-completion rows, no for others.
        pub completion_only_loss: Option<bool> = None,
        /// Compare on the assistant's turns only: what the chat template marks with
        /// {% generation %}, else what follows its generation prompt.
        pub assistant_only_loss: bool = false,
        ..pub teacher: TeacherOptions = TeacherOptions::default(),
        ..pub truncation: TruncationOptions = TruncationOptions::default(),
    }
}

impl DistillConfig {
    fn rules(&self, report: &mut Report) {
        report.must(self.temperature > 0.0, || {
            format!("temperature = {}: must be above 0", self.temperature)
        });
    }
}

impl BuildMethod for DistillConfig {
    fn rows_are_stored(&self) -> bool {
        true
    }

    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 2e-5, disable_dropout: true, ..Default::default() }
    }

    fn build(&self, _: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let MethodInputs { tokenizer, template, model, on_bad_row, .. } = *inputs;
        let options = SftOptions {
            completion_only_loss: self.completion_only_loss,
            assistant_only_loss: self.assistant_only_loss,
            on_bad_row,
            ..(&self.truncation).into()
        };
        let encoder = |_| SftEncoder::new(tokenizer, template, model.vocab_size, &options);
        let (rows, stats) = Rows::tokenise(inputs, encoder, |example| example)?;
        let teacher = Teacher::new(&self.teacher)?;
        let scale = (1.0 / self.temperature) as f32;
        let method = DistillObjective { rows, scale, teacher };
        Ok(BuiltMethod::new(OfflineMethod(method), stats))
    }
}

pub struct DistillObjective {
    rows: Rows<SftExample>,
    scale: f32,
    teacher: Teacher,
}

impl OfflineObjective for DistillObjective {
    fn rows(&self) -> &dyn RowSet {
        &self.rows
    }

    fn weight(&self, split: Split, row: usize) -> Result<f64> {
        Ok(targets(&self.rows.example(split, row)?.target_mask) as f64)
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        self.teacher.load(cx, model, self.rows.longest())
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let examples = self.rows.pick(micro.split, micro.rows)?;
        let examples: Vec<&SftExample> = examples.iter().collect();
        let (total, train) = (micro.total, micro.train);
        Ok(match self.teacher.divergence(cx, model, &examples, total, self.scale, train)? {
            Some(Divergence { loss, tokens }) => LossOutput::new(loss, tokens, || Ok(Vec::new())),
            None => LossOutput::empty(examples.iter().map(|e| e.input_ids.len()).sum()),
        })
    }
}
