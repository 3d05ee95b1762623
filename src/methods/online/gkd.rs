//! On-policy distillation (Agarwal et al., "On-Policy Distillation of Language Models", 2024): the
//! student learns the teacher's distribution at each token of completions that it wrote itself.
//!
//! For each micro-batch a random number is drawn from (seed, step, micro-batch): with probability
//! `lmbda` its completions are sampled from the student as it is at that step; otherwise they come
//! from the data or, with `seq_kd`, from the teacher. The loss is the mean over the completion
//! tokens of the step of the divergence defined in `methods::distill` (`beta`); no gradient flows
//! through the sampling.
//!
//! Names and defaults are TRL 1.16.0's. As there, `temperature` applies to the sampling alone.
//! Unlike TRL: the mean is over the tokens that are trained on; TRL divides by the tokens of the
//! data's completions even where it has replaced them.
//!
//! Layer 7. Invariant: no state is carried from one step to the next, so a checkpoint holds none;
//! neither model's logits are ever held whole.

use serde_json::{Value, json};

use super::buffer::RolloutBuffer;
use super::env::{EnvOptions, RolloutEnv};
use super::metrics::mean;
use super::options::RolloutOptions;
use super::rollout::Rollout;
use super::sampler::SampleRequest;
use super::{OnlineMethod, OnlineObjective, StepRows, env_field};
use crate::autograd::Cx;
use crate::config::{Report, SamplingOptions, TrainingConfig, TruncationOptions, section};
use crate::data::bad::BadRows;
use crate::data::render::Renderer;
use crate::data::rows::Row;
use crate::data::sft::{SftExample, SftOptions, prepare};
use crate::error::Result;
use crate::methods::offline::rows::Split;
use crate::methods::teacher::{Teacher, TeacherOptions, all_targets};
use crate::methods::{
    BuildMethod, BuiltMethod, MethodEntry, MethodInputs, Metric, RowPart, RowView, StepReport,
};
use crate::model::decoder::Decoder;
use crate::rng::{philox, tag, uniform};
use crate::rollout::Engine;

pub const METHOD: MethodEntry =
    MethodEntry::new::<GkdConfig>("gkd", "On-policy distillation from a teacher (GKD)");

section! {
    /// TRL's `GKDConfig`.
    pub struct GkdConfig = "gkd" {
        /// Probability that a micro-batch has completions sampled by the student instead of those
        /// of the data.
        pub lmbda: f64 = 0.5,
        /// Sampling temperature. As in TRL, the loss compares both distributions at temperature 1.
        pub temperature: f64 = 0.9,
        /// Longest generated completion in tokens.
        pub max_new_tokens: usize = 128,
        /// Use completions of the teacher instead of those of the data.
        pub seq_kd: bool = false,
        ..pub teacher: TeacherOptions = TeacherOptions::default(),
        ..pub truncation: TruncationOptions = TruncationOptions::default(),
        ..pub rollout: RolloutOptions = RolloutOptions::default(),
    }
}

impl GkdConfig {
    /// Whether a micro-batch may use the data's completions.
    fn uses_data(&self) -> bool {
        self.lmbda < 1.0 && !self.seq_kd
    }

    fn rules(&self, report: &mut Report) {
        report.must((0.0..=1.0).contains(&self.lmbda), || {
            format!("lmbda = {}: must be in [0, 1]", self.lmbda)
        });
        report.must(self.temperature > 0.0, || {
            format!("temperature = {}: must be above 0", self.temperature)
        });
        report.at_least("max_new_tokens", self.max_new_tokens, 1);
    }
}

impl BuildMethod for GkdConfig {
    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 2e-5, disable_dropout: true, ..Default::default() }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let (gkd, summary) = Gkd::new(self, training, inputs)?;
        Ok(BuiltMethod::new(OnlineMethod::new(gkd), summary))
    }
}

pub struct Gkd {
    env: RolloutEnv,
    options: GkdConfig,
    /// The data's completions by row; None for rows dropped for their length, and for all rows if
    /// none are used.
    data: Vec<Option<SftExample>>,
    eval: Vec<SftExample>,
    seed: u64,
    teacher: Teacher,
    /// The teacher's cache, with `seq_kd`.
    teacher_engine: Option<Engine>,
    /// The micro-batches of the current step.
    buffer: RolloutBuffer<Vec<SftExample>>,
}

/// The author of generated completions.
#[derive(Clone, Copy, PartialEq)]
enum Writer {
    Student,
    Teacher,
}

impl Gkd {
    fn new(
        options: &GkdConfig,
        training: &TrainingConfig,
        inputs: &MethodInputs,
    ) -> Result<(Gkd, String)> {
        let mut bad = BadRows::new(inputs.on_bad_row);
        let renderer = Renderer::new(inputs.tokenizer, inputs.template, inputs.model.vocab_size);
        let whole = |row: &Row| {
            let row = with_completion(row)?;
            if options.uses_data() && !row.has("completion") {
                return Err(row.error("has no completion; give one, or set lmbda=1 or seq_kd=true"));
            }
            renderer.prompt(&row)?;
            Ok(row)
        };
        let mut read = |rows: &[Row]| -> Result<Vec<Row>> {
            Ok(bad.filter(rows, whole)?.into_iter().map(|(_, row)| row).collect())
        };
        let (train, eval) = (read(inputs.train)?, read(inputs.eval)?);
        let own = MethodInputs { train: &train, eval: &eval, ..*inputs };
        let env = EnvOptions {
            sampling: SamplingOptions { temperature: options.temperature, ..Default::default() },
            max_completion_length: options.max_new_tokens,
            max_sequences: options.rollout.max_sequences,
            generation: training.per_device_train_batch_size * training.gradient_accumulation_steps,
            ..EnvOptions::default()
        };
        let mut gkd = Gkd {
            env: RolloutEnv::new(&env, training, &own)?,
            options: options.clone(),
            data: vec![None; train.len()],
            eval: Vec::new(),
            seed: training.seed,
            teacher: Teacher::new(&options.teacher)?,
            teacher_engine: None,
            buffer: RolloutBuffer::default(),
        };
        if !options.uses_data() {
            return Ok((gkd, told(format!("{} prompts", train.len()), &bad)));
        }
        let sft = SftOptions { on_bad_row: inputs.on_bad_row, ..(&options.truncation).into() };
        let make =
            |rows: &[Row]| prepare(rows, own.tokenizer, own.template, own.model.vocab_size, &sft);
        let (examples, stats) = make(&train)?;
        for example in examples {
            let row = example.row;
            gkd.data[row] = Some(example);
        }
        if !eval.is_empty() {
            gkd.eval = make(&eval)?.0;
        }
        Ok((gkd, told(stats.to_string(), &bad)))
    }

    /// Whether micro-batch `m` of a step uses the student's completions.
    fn on_policy(&self, step: u64, m: usize) -> bool {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let bits = philox(key, [step as u32, m as u32, 0, tag::ON_POLICY]);
        f64::from(uniform(bits[0])) < self.options.lmbda
    }

    /// Completions of `prompts`, one each.
    fn generate(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        prompts: &[usize],
        step: u64,
        writer: Writer,
    ) -> Result<Vec<Rollout>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        if writer == Writer::Student {
            let request = SampleRequest::new(1, step);
            return self.env.generate(cx, model, Split::Train, prompts, request);
        }
        let request = SampleRequest::new(1, step | 1 << 48);
        self.env.sampler.swap_engine(&mut self.teacher_engine);
        let teacher = self.teacher.model()?;
        let rollouts = self.env.generate(cx, teacher, Split::Train, prompts, request);
        self.env.sampler.swap_engine(&mut self.teacher_engine);
        rollouts
    }

    fn longest_example(&self) -> Option<&SftExample> {
        self.data.iter().flatten().max_by_key(|e| e.input_ids.len())
    }

    /// Fills the micro-batches of a step. Returns metrics.
    fn fill(&mut self, cx: &mut Cx, model: &Decoder, at: StepRows) -> Result<Vec<Metric>> {
        let longest = self.longest_example().filter(|_| !cx.device.computes()).cloned();
        let own: Vec<bool> = (0..at.micro.len())
            .map(|m| match (cx.device.computes(), &longest) {
                (true, _) => self.on_policy(at.step, m),
                // The memory plan takes the longest.
                (false, Some(data)) => {
                    self.options.lmbda > 0.0 && data.input_ids.len() <= self.env.longest()
                }
                (false, None) => self.options.lmbda > 0.0,
            })
            .collect();
        let prompts = |wanted: bool| -> Vec<usize> {
            let some = at.micro.iter().zip(&own).filter(|(_, o)| **o == wanted);
            some.flat_map(|(m, _)| m.iter().copied()).collect()
        };
        let students = self.generate(cx, model, &prompts(true), at.step, Writer::Student)?;
        let teachers = if self.options.seq_kd {
            self.generate(cx, model, &prompts(false), at.step, Writer::Teacher)?
        } else {
            Vec::new()
        };
        let share = mean(own.iter().map(|o| f64::from(u8::from(*o))));
        let mut metrics: Vec<Metric> = vec![("on_policy".into(), share)];
        if !students.is_empty() {
            let length = mean(students.iter().map(|r| r.ids.len() as f64));
            let cut = mean(students.iter().map(|r| f64::from(u8::from(!r.finished))));
            metrics.push(("completions/mean_length".into(), length));
            metrics.push(("completions/clipped_ratio".into(), cut));
        }
        for (by, rollouts) in [("student", &students), ("teacher", &teachers)] {
            self.env.record_written(by, rollouts);
        }
        let mut students = self.env.examples(Split::Train, students).into_iter();
        let mut teachers = self.env.examples(Split::Train, teachers).into_iter();
        let mut parts = Vec::with_capacity(at.micro.len());
        for (rows, own) in at.micro.iter().zip(own) {
            parts.push(match (own, self.options.seq_kd) {
                (true, _) => students.by_ref().take(rows.len()).collect(),
                (false, true) => teachers.by_ref().take(rows.len()).collect(),
                (false, false) => match &longest {
                    Some(data) => vec![data.clone(); rows.len()],
                    None => rows.iter().filter_map(|r| self.data[*r].clone()).collect(),
                },
            });
        }
        self.buffer.replace(at.step, parts);
        Ok(metrics)
    }
}

fn told(stats: String, bad: &BadRows) -> String {
    if bad.count > 0 { format!("{stats} {bad}") } else { stats }
}

/// A row with `prompt` and `completion`. Of `messages` the last one is the completion, as in TRL.
fn with_completion(row: &Row) -> Result<Row> {
    let mut row = row.clone();
    if row.has("prompt") {
        return Ok(row);
    }
    let Some(Value::Array(mut messages)) = row.value.remove("messages") else {
        return Err(row.error("has neither a prompt nor messages"));
    };
    match messages.pop() {
        Some(last) if last["role"] == "assistant" && !messages.is_empty() => {
            row.value.insert("prompt".into(), Value::Array(messages));
            row.value.insert("completion".into(), json!([last]));
            Ok(row)
        }
        _ => {
            Err(row
                .error("its messages must end with the assistant's answer to the turns before it"))
        }
    }
}

impl OnlineObjective for Gkd {
    env_field!();

    fn row_view(&self, row: usize) -> RowView {
        let mut view = self.env.prompts.view(row);
        view.note.clear(); // rewards do not see the columns
        if let Some(Some(data)) = self.data.get(row) {
            let (ids, mask) = (data.input_ids.clone(), data.target_mask.clone());
            view.parts.push(RowPart { name: "with the data's completion", ids, mask });
        }
        view
    }

    fn longest(&self) -> usize {
        let data = self.data.iter().flatten().chain(&self.eval).map(|e| e.input_ids.len());
        data.max().unwrap_or(1).max(self.env.longest())
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        self.teacher.load(cx, model, self.longest())?;
        if self.options.seq_kd && self.options.lmbda < 1.0 {
            let (teacher, longest) = (self.teacher.model()?, self.env.longest());
            self.teacher_engine = Some(self.env.sampler.engine(cx, teacher, longest)?);
        }
        Ok(())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, at: StepRows) -> Result<StepReport> {
        let mut report = StepReport { metrics: self.fill(cx, model, at)?, ..Default::default() };
        let total = all_targets(self.buffer.samples.iter().flatten());
        for part in &self.buffer.samples {
            report.add(self.teacher.update(cx, model, part, total, 1.0, true)?);
        }
        Ok(report)
    }

    /// Evaluates on the data's completions or, if none are used, on completions sampled from the
    /// student.
    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>> {
        let examples = if self.options.uses_data() {
            self.eval.clone()
        } else {
            let rollouts = self.env.eval_rollouts(cx, model)?;
            self.env.examples(Split::Eval, rollouts)
        };
        let loss = self.teacher.mean_loss(cx, model, &examples, batch, 1.0)?;
        Ok(vec![("loss".into(), loss)])
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, _: u64, row: usize) -> Result<f32> {
        let rows = self.buffer.samples.iter().flatten();
        let own: Vec<SftExample> = rows.filter(|e| e.row == row).cloned().collect();
        Ok(self.teacher.update(cx, model, &own, all_targets(&own), 1.0, false)?.loss)
    }
}
