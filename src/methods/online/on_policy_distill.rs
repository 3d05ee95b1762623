//! On-policy distillation in its current form (Agarwal et al., "On-Policy Distillation of Language
//! Models", 2024; TRL 1.16.0's `DistillationTrainer`): the student samples a completion for every
//! prompt and learns the teacher's distribution at each of its tokens.
//!
//! loss = mean over the completion tokens of the step of D(teacher, student), both softened by the
//! sampling temperature; D is defined in `methods::offline::distill`, by default the reverse KL
//! (`beta` = 1). No gradient flows through the sampling, and there is no reference model.
//!
//! Names and defaults are TRL's. Unlike TRL: the rows of a step are its prompts, with one
//! completion each (TRL samples one generation for several steps, as steps_per_generation says).
//!
//! Layer 7. Invariant: no state is carried from one step to the next, so a checkpoint holds none.

use super::buffer::RolloutBuffer;
use super::env::{EnvOptions, RolloutEnv};
use super::metrics::{mean, sum};
use super::options::{RolloutOptions, explores};
use super::rollout::Rollout;
use super::sampler::SampleRequest;
use super::{OnlineMethod, OnlineObjective, StepRows, env_field};
use crate::autograd::Cx;
use crate::config::{Report, SamplingOptions, TrainingConfig, section};
use crate::data::sft::SftExample;
use crate::error::Result;
use crate::methods::offline::rows::Split;
use crate::methods::teacher::{Teacher, TeacherOptions, all_targets};
use crate::methods::{BuildMethod, BuiltMethod, MethodEntry, MethodInputs, Metric, StepReport};
use crate::model::decoder::Decoder;

pub const METHOD: MethodEntry = MethodEntry::new::<OnPolicyDistillConfig>(
    "on-policy-distill",
    "Distillation on completions that the student samples: prompts and a teacher",
);

section! {
    /// TRL's `DistillationConfig`.
    pub struct OnPolicyDistillConfig = "on-policy-distill" {
        /// Longest completion in tokens.
        pub max_completion_length: usize = 512,
        ..pub teacher: TeacherOptions = TeacherOptions { beta: 1.0, ..TeacherOptions::default() },
        ..pub sampling: SamplingOptions = SamplingOptions::default(),
        ..pub rollout: RolloutOptions = RolloutOptions::default(),
    }
}

impl OnPolicyDistillConfig {
    fn rules(&self, report: &mut Report) {
        report.at_least("max_completion_length", self.max_completion_length, 1);
        explores(&self.sampling, report);
    }
}

impl BuildMethod for OnPolicyDistillConfig {
    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-6, ..Default::default() }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let env = EnvOptions {
            sampling: self.sampling.clone(),
            max_completion_length: self.max_completion_length,
            max_sequences: self.rollout.max_sequences,
            generation: training.per_device_train_batch_size * training.gradient_accumulation_steps,
            ..EnvOptions::default()
        };
        let env = RolloutEnv::new(&env, training, inputs)?;
        let summary = format!("{} prompts, 1 completion each", env.prompts.train.len());
        let teacher = Teacher::new(&self.teacher)?;
        let method = OnPolicyDistill { env, teacher, buffer: RolloutBuffer::default() };
        Ok(BuiltMethod::new(OnlineMethod::new(method), summary))
    }
}

pub struct OnPolicyDistill {
    env: RolloutEnv,
    teacher: Teacher,
    /// The completions of the current step.
    buffer: RolloutBuffer<SftExample>,
}

/// The metrics of a step's completions.
fn metrics(rollouts: &[Rollout]) -> Vec<Metric> {
    let cut = rollouts.iter().filter(|r| !r.finished).count();
    let tokens = rollouts.iter().map(|r| r.ids.len()).sum::<usize>().max(1);
    let entropy = rollouts.iter().map(|r| sum(&r.entropies)).sum::<f64>() / tokens as f64;
    vec![
        ("entropy".into(), entropy),
        ("completions/mean_length".into(), mean(rollouts.iter().map(|r| r.ids.len() as f64))),
        ("completions/clipped_ratio".into(), cut as f64 / rollouts.len().max(1) as f64),
    ]
}

impl OnlineObjective for OnPolicyDistill {
    env_field!();

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        self.teacher.load(cx, model, self.env.longest())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, at: StepRows) -> Result<StepReport> {
        let (prompts, request) = (at.micro.concat(), SampleRequest::new(1, at.step));
        let rollouts = self.env.generate(cx, model, Split::Train, &prompts, request)?;
        let mut report = StepReport { metrics: metrics(&rollouts), ..Default::default() };
        self.env.record_written("student", &rollouts);
        self.buffer.replace(at.step, self.env.examples(Split::Train, rollouts));
        let total = all_targets(&self.buffer.samples);
        let mut rest = self.buffer.samples.as_slice();
        for rows in at.micro {
            let (own, tail) = rest.split_at(rows.len());
            report.add(self.teacher.update(cx, model, own, total, self.env.scale(), true)?);
            rest = tail;
        }
        Ok(report)
    }

    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>> {
        let rollouts = self.env.eval_rollouts(cx, model)?;
        let examples = self.env.examples(Split::Eval, rollouts);
        let loss = self.teacher.mean_loss(cx, model, &examples, batch, self.env.scale())?;
        Ok(vec![("loss".into(), loss)])
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, _: u64, row: usize) -> Result<f32> {
        let own: Vec<SftExample> =
            self.buffer.samples.iter().filter(|e| e.row == row).cloned().collect();
        let (total, scale) = (all_targets(&own), self.env.scale());
        Ok(self.teacher.update(cx, model, &own, total, scale, false)?.loss)
    }
}
