//! On-policy distillation (Agarwal et al., "On-Policy Distillation of Language Models", 2024): the
//! student learns the teacher's distribution at each token of completions that it wrote itself.
//!
//! For each micro-batch a number is drawn by (seed, step, micro-batch): with probability `lmbda`
//! its completions are the student's, drawn as it is at the step; else those of the data, or with
//! `seq_kd` the teacher's. The loss is the mean over the completion tokens of the step of the
//! divergence that `methods::distill` states (`beta`); no gradient flows through the sampling.
//!
//! TRL 1.16.0's names and defaults. As there, `temperature` is of the sampling alone. Differs: the
//! mean goes over the tokens that are trained on; TRL divides by the tokens of the data's
//! completions, also where it has replaced them.
//!
//! Layer 7. Invariant: nothing is carried from one step to the next, so a checkpoint holds nothing;
//! neither model's logits are ever whole.

use std::time::Instant;

use serde_json::{Value, json};

use crate::autograd::{Cx, Tape};
use crate::config::{GkdConfig, TrainingConfig};
use crate::data::rows::Row;
use crate::data::sft::{SftExample, SftOptions, prepare};
use crate::error::{Error, Result};
use crate::methods::offline::completions::floats;
use crate::methods::online::env::{Rollout, Set, World};
use crate::methods::reference::load;
use crate::methods::{Method, Metric, Recipe, Source, StepReport};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::distill::{DistillIn, distill};
use crate::rng::{philox, uniform};
use crate::rollout::Engine;

/// Philox's stream of the choice between the student's completions and the others.
const STREAM: u32 = 0x676b_6400;

pub struct Gkd {
    world: World,
    keys: GkdConfig,
    /// The data's completions by row; none where a row was dropped for its length, or none are
    /// used.
    data: Vec<Option<SftExample>>,
    eval: Vec<SftExample>,
    seed: u64,
    number: u64,
    teacher: Option<Decoder>,
    /// The teacher's cache, with `seq_kd`.
    sampler: Option<Engine>,
    /// Of the step at hand.
    parts: Vec<Vec<SftExample>>,
}

impl Gkd {
    pub fn new(
        keys: &GkdConfig,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Gkd, String)> {
        let split = |rows: &[Row]| rows.iter().map(split).collect::<Result<Vec<Row>>>();
        let (train, eval) = (split(source.train)?, split(source.eval)?);
        let own = Source { train: &train, eval: &eval, ..*source };
        let world = World::new(&keys.online(), training, &own)?;
        let mut said = format!("{} prompts", train.len());
        let mut data = vec![None; train.len()];
        let mut examples = Vec::new();
        if keys.uses_data() {
            if let Some(row) = train.iter().chain(&eval).find(|r| !r.has("completion")) {
                return Err(row.error("has no completion; give one, or set lmbda=1 or seq_kd=true"));
            }
            let options = SftOptions {
                max_length: keys.max_length,
                truncation_mode: keys.truncation_mode,
                on_truncation: keys.on_truncation,
                ..SftOptions::default()
            };
            let make = |rows: &[Row]| {
                prepare(rows, own.tokenizer, own.template, own.model.vocab_size, &options)
            };
            let (rows, stats) = make(&train)?;
            said = stats.to_string();
            for example in rows {
                let row = example.row;
                data[row] = Some(example);
            }
            if !eval.is_empty() {
                examples = make(&eval)?.0;
            }
        }
        let seed = training.seed;
        let (teacher, sampler, parts) = (None, None, Vec::new());
        Ok((
            Gkd {
                world,
                keys: keys.clone(),
                data,
                eval: examples,
                seed,
                number: 0,
                teacher,
                sampler,
                parts,
            },
            said,
        ))
    }

    fn teacher(&self) -> Result<&Decoder> {
        self.teacher
            .as_ref()
            .ok_or_else(|| Error::op("gkd", "has no teacher; attach comes before the first step"))
    }

    /// Whether micro-batch `m` of the step has the student's completions.
    fn on_policy(&self, m: usize) -> bool {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let drawn = philox(key, [self.number as u32, m as u32, 0, STREAM]);
        f64::from(uniform(drawn[0])) < self.keys.lmbda
    }

    /// Rows as they are trained on: the prompt of `set`, then the completion, whose tokens are the
    /// targets.
    fn examples(&self, set: Set, rollouts: Vec<Rollout>) -> Vec<SftExample> {
        let prompts = if set == Set::Train { &self.world.train } else { &self.world.eval };
        let one = |r: Rollout| {
            let prompt = &prompts[r.prompt].ids;
            let mut target_mask = vec![false; prompt.len()];
            target_mask.resize(prompt.len() + r.ids.len(), true);
            SftExample {
                input_ids: [prompt.as_slice(), &r.ids].concat(),
                target_mask,
                row: r.prompt,
            }
        };
        rollouts.into_iter().map(one).collect()
    }

    /// Completions of `prompts` by the student, or by the teacher.
    fn generate(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        prompts: &[usize],
        own: bool,
    ) -> Result<Vec<Rollout>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        if own {
            return self.world.generate(cx, model, Set::Train, prompts, 1, self.number, false);
        }
        let Some(teacher) = self.teacher.take() else {
            return Err(Error::op("gkd", "has no teacher; attach comes before the first step"));
        };
        self.world.swap_sampler(&mut self.sampler);
        let rollouts =
            self.world.generate(cx, &teacher, Set::Train, prompts, 1, self.number | 1 << 48, false);
        self.world.swap_sampler(&mut self.sampler);
        self.teacher = Some(teacher);
        rollouts
    }

    /// What each micro-batch is trained on.
    fn fill(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<Vec<Metric>> {
        let own: Vec<bool> = (0..micro.len()).map(|m| self.on_policy(m)).collect();
        let prompts = |wanted: bool| -> Vec<usize> {
            micro
                .iter()
                .zip(&own)
                .filter(|(_, o)| **o == wanted)
                .flat_map(|(m, _)| m.iter().copied())
                .collect()
        };
        let students = self.generate(cx, model, &prompts(true), true)?;
        let teachers = if self.keys.seq_kd {
            self.generate(cx, model, &prompts(false), false)?
        } else {
            Vec::new()
        };
        let mut metrics: Vec<Metric> = vec![(
            "on_policy".into(),
            own.iter().filter(|o| **o).count() as f64 / own.len().max(1) as f64,
        )];
        if !students.is_empty() {
            let n = students.len() as f64;
            let tokens = students.iter().map(|r| r.ids.len()).sum::<usize>() as f64;
            let cut = students.iter().filter(|r| !r.finished).count() as f64;
            metrics.push(("completions/mean_length".into(), tokens / n));
            metrics.push(("completions/clipped_ratio".into(), cut / n));
        }
        for (by, rollouts) in [("student", &students), ("teacher", &teachers)] {
            let line = |r: &Rollout| {
                let prompt = &self.world.train[r.prompt].value;
                json!({ "prompt": prompt, "completion": r.text, "by": by, "finished": r.finished })
            };
            let lines: Vec<Value> = rollouts.iter().map(line).collect();
            self.world.log.extend(lines);
        }
        let mut students = self.examples(Set::Train, students).into_iter();
        let mut teachers = self.examples(Set::Train, teachers).into_iter();
        let mut parts = Vec::with_capacity(micro.len());
        for (rows, own) in micro.iter().zip(own) {
            parts.push(match (own, self.keys.seq_kd) {
                (true, _) => students.by_ref().take(rows.len()).collect(),
                (false, true) => teachers.by_ref().take(rows.len()).collect(),
                (false, false) => rows.iter().filter_map(|r| self.data[*r].clone()).collect(),
            });
        }
        self.parts = parts;
        Ok(metrics)
    }

    /// The loss of some rows, of `total` target tokens in the step; with `train`, the backward.
    fn update(
        &self,
        cx: &mut Cx,
        model: &Decoder,
        examples: &[SftExample],
        total: usize,
        train: bool,
    ) -> Result<(f32, usize)> {
        let teacher = self.teacher()?;
        let sequences: Vec<Sequence> = examples
            .iter()
            .map(|e| Sequence { ids: &e.input_ids, target: Some(&e.target_mask) })
            .collect();
        let batch = Batch::new(cx, &sequences, model.vocab())?;
        let n = batch.target_ids.len();
        if n == 0 {
            return Ok((0.0, 0));
        }
        // The teacher knows nothing of the student's virtual tokens.
        let theirs = match model.vocab() == teacher.vocab() {
            true => teacher.target_hidden(cx, &batch)?,
            false => {
                let plain = Batch::new(cx, &sequences, teacher.vocab())?;
                teacher.target_hidden(cx, &plain)?
            }
        };
        let (weight, one) =
            (floats(cx, &vec![(1.0 / total as f64) as f32; n])?, floats(cx, &[1.0])?);
        cx.tape = train.then(Tape::default);
        let own = model.target_hidden(cx, &batch)?;
        let x = DistillIn {
            student: &own,
            student_head: &model.head,
            teacher: &theirs,
            teacher_head: &teacher.head,
            weight: &weight,
        };
        let (loss, _) = distill(cx, &x, self.keys.beta as f32, 1.0)?;
        if train {
            cx.backward(vec![(loss.clone(), one)])?;
        }
        Ok((loss.to_f32()?[0], batch.rows))
    }
}

/// Target tokens.
fn targets(examples: &[SftExample]) -> usize {
    examples.iter().map(|e| e.target_mask.iter().skip(1).filter(|t| **t).count()).sum()
}

/// A row with `prompt` and `completion`: of `messages` the last is the completion, as in TRL.
fn split(row: &Row) -> Result<Row> {
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
                .error("its messages must end with the assistant's answer to what stands before"))
        }
    }
}

impl Recipe for GkdConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.chat_template_path.as_deref()
    }

    fn disable_dropout(&self) -> bool {
        true
    }

    fn method(
        &self,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let (gkd, said) = Gkd::new(self, training, source)?;
        Ok((Box::new(gkd), said))
    }
}

impl Method for Gkd {
    fn rows(&self) -> usize {
        self.world.train.len()
    }

    fn eval_rows(&self) -> usize {
        self.world.eval.len()
    }

    fn longest(&self) -> usize {
        let data = self.data.iter().flatten().chain(&self.eval).map(|e| e.input_ids.len());
        data.max().unwrap_or(1).max(self.world.longest())
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        self.world.attach(cx, model, false)?;
        let name = self.keys.teacher_model_name_or_path.clone().unwrap_or_default();
        let teacher = load(cx, model, &name, "teacher_model_name_or_path", self.longest())?;
        if self.keys.seq_kd && self.keys.lmbda < 1.0 {
            self.sampler = Some(self.world.sampler(cx, &teacher)?);
        }
        self.teacher = Some(teacher);
        Ok(())
    }

    fn begin(&mut self, number: u64) -> Result<()> {
        self.number = number;
        Ok(())
    }

    fn step(&mut self, cx: &mut Cx, model: &Decoder, micro: &[&[usize]]) -> Result<StepReport> {
        let mut report = StepReport { loss: 0.0, tokens: 0, metrics: self.fill(cx, model, micro)? };
        let begin = Instant::now();
        let total = self.parts.iter().map(|p| targets(p)).sum();
        for part in &self.parts {
            let (loss, tokens) = self.update(cx, model, part, total, true)?;
            report.loss += loss;
            report.tokens += tokens;
        }
        self.world.seconds.train += begin.elapsed().as_secs_f64();
        report.metrics.extend(self.world.take_seconds());
        Ok(report)
    }

    /// Over the data's completions; where none are used, over completions that the student writes.
    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>> {
        let examples = if self.keys.uses_data() {
            self.eval.clone()
        } else {
            let prompts: Vec<usize> = (0..self.world.eval.len()).collect();
            let rollouts =
                self.world.generate(cx, model, Set::Eval, &prompts, 1, u64::MAX - 1, false)?;
            self.world.seconds = Default::default();
            self.examples(Set::Eval, rollouts)
        };
        let (total, mut loss) = (targets(&examples), 0f64);
        for some in examples.chunks(batch.max(1)) {
            loss += f64::from(self.update(cx, model, some, total, false)?.0);
        }
        Ok(vec![("loss".into(), loss)])
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32> {
        let own: Vec<SftExample> =
            self.parts.iter().flatten().filter(|e| e.row == row).cloned().collect();
        Ok(self.update(cx, model, &own, targets(&own), false)?.0)
    }

    fn row_source(&self, row: usize) -> String {
        self.world.train[row].source.clone()
    }

    fn take_completions(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.world.log)
    }
}
