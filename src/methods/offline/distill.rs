//! Distillation from a teacher, over rows that are there: the student learns the teacher's whole
//! distribution at each target token, not the one token that stands there (Hinton, Vinyals and
//! Dean, 2015; Agarwal et al., "On-Policy Distillation of Language Models" (GKD), 2024).
//!
//! loss = mean over the target tokens of the step of D(teacher, student), both softened by
//! `temperature`: at beta 0 the forward KL, sum T log(T/S), which covers what the teacher does; at
//! 1 the reverse KL, sum S log(S/T), which keeps to what it does most; between, with M = (1 - beta)
//! S + beta T, beta KL(T, M) + (1 - beta) KL(S, M). TRL 1.16.0's GKDTrainer has the same
//! divergences; its student-made rows (`lmbda`, `seq_kd`) are not here: rows are what the data
//! holds.
//!
//! Layer 7. Invariant: neither model's logits are ever whole; see `ops::distill`.

use crate::autograd::Cx;
use crate::config::{DistillConfig, TrainingConfig};
use crate::data::sft::{SftExample, SftOptions, prepare};
use crate::error::{Error, Result};
use crate::methods::offline::completions::floats;
use crate::methods::offline::{Batched, Objective, Pass, Set, Shot};
use crate::methods::reference::load;
use crate::methods::{MASKS, MaskedIds, Method, Recipe, Source};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::distill::{DistillIn, distill};

pub struct Distill {
    sets: [Vec<SftExample>; 2],
    places: Vec<String>,
    vocab: usize,
    beta: f32,
    scale: f32,
    folder: String,
    teacher: Option<Decoder>,
}

impl Distill {
    pub fn new(config: &DistillConfig, source: &Source) -> Result<(Distill, String)> {
        let Source { tokenizer, template, model, .. } = *source;
        let Some(folder) = config.teacher_model_name_or_path.clone() else {
            return Err(Error::Config(
                "teacher_model_name_or_path: name the teacher's folder".into(),
            ));
        };
        let options = SftOptions {
            max_length: config.max_length,
            truncation_mode: config.truncation_mode,
            on_truncation: config.on_truncation,
            ..SftOptions::default()
        };
        let (train, stats) =
            prepare(source.train, tokenizer, template, model.vocab_size, &options)?;
        let eval = match source.eval {
            [] => Vec::new(),
            rows => prepare(rows, tokenizer, template, model.vocab_size, &options)?.0,
        };
        let places = train.iter().map(|e| source.train[e.row].place()).collect();
        let (beta, scale) = (config.beta as f32, (1.0 / config.temperature) as f32);
        let method = Distill {
            sets: [train, eval],
            places,
            vocab: model.vocab_size,
            beta,
            scale,
            folder,
            teacher: None,
        };
        Ok((method, stats.to_string()))
    }

    fn of(&self, set: Set) -> &[SftExample] {
        &self.sets[usize::from(set == Set::Eval)]
    }
}

impl Objective for Distill {
    fn rows(&self, set: Set) -> usize {
        self.of(set).len()
    }

    fn longest(&self) -> usize {
        self.sets.iter().flatten().map(|e| e.input_ids.len()).max().unwrap_or(1)
    }

    fn masks(&self) -> Vec<MaskedIds> {
        self.sets[0]
            .iter()
            .take(MASKS)
            .map(|e| (e.input_ids.clone(), e.target_mask.clone()))
            .collect()
    }

    fn source(&self, row: usize) -> String {
        self.places[row].clone()
    }

    fn weight(&self, set: Set, row: usize) -> f64 {
        self.of(set)[row].target_mask.iter().skip(1).filter(|t| **t).count() as f64
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        let longest = self.longest();
        self.teacher = Some(load(cx, model, &self.folder, "teacher_model_name_or_path", longest)?);
        Ok(())
    }

    fn shot(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        set: Set,
        rows: &[usize],
        total: f64,
        pass: Pass,
    ) -> Result<Option<Shot>> {
        let Some(teacher) = &self.teacher else {
            return Err(Error::op("distill", "has no teacher; attach comes before the first step"));
        };
        let examples = rows.iter().map(|r| &self.of(set)[*r]);
        let sequences: Vec<Sequence> = examples
            .map(|e| Sequence { ids: &e.input_ids, target: Some(&e.target_mask) })
            .collect();
        let batch = Batch::new(cx, &sequences, self.vocab)?;
        let n = batch.target_ids.len();
        if n == 0 {
            return Ok(None);
        }
        let theirs = teacher.target_hidden(cx, &batch)?;
        pass.begin(cx);
        let own = model.target_hidden(cx, &batch)?;
        let weight = floats(cx, &vec![(1.0 / total) as f32; n])?;
        let x = DistillIn {
            student: &own,
            student_head: &model.head,
            teacher: &theirs,
            teacher_head: &teacher.head,
            weight: &weight,
        };
        let (loss, _) = distill(cx, &x, self.beta, self.scale)?;
        Ok(Some(Shot { loss, tokens: batch.rows, metrics: Box::new(|| Ok(Vec::new())) }))
    }
}

impl Recipe for DistillConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.chat_template_path.as_deref()
    }

    fn disable_dropout(&self) -> bool {
        self.disable_dropout
    }

    fn method(
        &self,
        _training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let (method, stats) = Distill::new(self, source)?;
        Ok((Box::new(Batched(method)), stats))
    }
}
