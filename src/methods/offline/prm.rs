//! Process reward models: a right-or-wrong label at the end of each step of a solution (Lightman et
//! al., "Let's Verify Step by Step", 2023; Uesato et al., 2022).
//!
//! A token classifier with two labels; the loss is the cross-entropy at the labelled tokens, its
//! mean over those of the step: with the scores s of a token, -log softmax(s)_y, which for two
//! labels is -log sigmoid(+-(s_1 - s_0)). TRL has dropped its PRMTrainer before 1.16.0; rows become
//! tokens as it made them. Other than that: the mean is over the whole step.
//!
//! Layer 7. Invariant: only labelled tokens reach the score.

use crate::autograd::Cx;
use crate::config::{PrmConfig, TrainingConfig};
use crate::data::preference::{PreferenceOptions, StepExample, StepOptions, steps};
use crate::error::Result;
use crate::methods::offline::completions::{floats, sums};
use crate::methods::offline::{Batched, Objective, Pass, Set, Shot};
use crate::methods::{MASKS, MaskedIds, Method, Metric, Recipe, Source};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::ops::add::to_float;
use crate::ops::embedding::gather_rows;
use crate::ops::preference::{Unpaired, UnpairedLoss, unpaired};

pub struct Prm {
    sets: [Vec<StepExample>; 2],
    places: Vec<String>,
    vocab: usize,
}

impl Prm {
    pub fn new(config: &PrmConfig, source: &Source) -> Result<(Prm, String)> {
        let Source { tokenizer, model, .. } = *source;
        let options = PreferenceOptions {
            max_length: config.max_length,
            on_truncation: config.on_truncation,
            ..PreferenceOptions::default()
        };
        let how = StepOptions {
            step_separator: config.step_separator.clone(),
            train_on_last_step_only: config.train_on_last_step_only,
        };
        let (train, stats) = steps(source.train, tokenizer, model.vocab_size, &how, &options)?;
        let eval = match source.eval {
            [] => Vec::new(),
            rows => {
                let all = StepOptions { train_on_last_step_only: false, ..how };
                steps(rows, tokenizer, model.vocab_size, &all, &options)?.0
            }
        };
        let places = train.iter().map(|e| source.train[e.row].place()).collect();
        Ok((Prm { sets: [train, eval], places, vocab: model.vocab_size }, stats.to_string()))
    }

    fn of(&self, set: Set) -> &[StepExample] {
        &self.sets[usize::from(set == Set::Eval)]
    }
}

impl Objective for Prm {
    fn rows(&self, set: Set) -> usize {
        self.of(set).len()
    }

    fn longest(&self) -> usize {
        self.sets.iter().flatten().map(|e| e.input_ids.len()).max().unwrap_or(1)
    }

    fn masks(&self) -> Vec<MaskedIds> {
        let mask = |e: &StepExample| {
            (0..e.input_ids.len()).map(|i| e.labels.iter().any(|l| l.0 == i)).collect()
        };
        self.sets[0].iter().take(MASKS).map(|e| (e.input_ids.clone(), mask(e))).collect()
    }

    fn source(&self, row: usize) -> String {
        self.places[row].clone()
    }

    fn weight(&self, set: Set, row: usize) -> f64 {
        self.of(set)[row].labels.len() as f64
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
        let examples: Vec<&StepExample> = rows.iter().map(|r| &self.of(set)[*r]).collect();
        let sequences: Vec<Sequence> =
            examples.iter().map(|e| Sequence { ids: &e.input_ids, target: None }).collect();
        let (mut at, mut tokens, mut labels) = (Vec::new(), 0, Vec::new());
        for e in &examples {
            at.extend(e.labels.iter().map(|(t, _)| (tokens + t) as i32));
            labels.extend(e.labels.iter().map(|(_, y)| i32::from(*y)));
            tokens += e.input_ids.len();
        }
        let n = labels.len();
        if n == 0 {
            return Ok(None);
        }
        let batch = Batch::new(cx, &sequences, self.vocab)?;
        pass.begin(cx);
        let hidden = model.hidden(cx, &batch)?;
        let steps = gather_rows(cx, &hidden, &cx.ints("steps", &at)?)?;
        let scores = model.scores(cx, &steps)?;
        let scores = to_float(cx, &scores)?.reshape(&[2 * n])?;
        let signs: Vec<f32> = (0..2 * n).map(|i| if i % 2 == 0 { -1.0 } else { 1.0 }).collect();
        let starts: Vec<usize> = (0..=n).map(|i| 2 * i).collect();
        let difference = sums(cx, &scores, &signs, &starts)?;
        let op = Unpaired {
            loss: UnpairedLoss::Bco,
            beta: 1.0,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
        };
        let (zeros, zero) = (floats(cx, &vec![0.0; n])?, floats(cx, &[0.0])?);
        let (label, weight) =
            (cx.ints("labels", &labels)?, floats(cx, &vec![(1.0 / total) as f32; n])?);
        let (loss, _) = unpaired(cx, op, [&difference, &zeros, &label, &weight, &zero])?;
        let metrics = move || -> Result<Vec<Metric>> {
            let right = difference
                .to_f32()?
                .iter()
                .zip(&labels)
                .filter(|(d, y)| (**d > 0.0) == (**y == 1))
                .count();
            Ok(vec![("accuracy".into(), right as f64 / n as f64)])
        };
        Ok(Some(Shot { loss, tokens, metrics: Box::new(metrics) }))
    }
}

impl Recipe for PrmConfig {
    const TASK: Task = Task::TokenClassification { labels: 2 };

    fn disable_dropout(&self) -> bool {
        self.disable_dropout
    }

    fn method(
        &self,
        _training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let (prm, stats) = Prm::new(self, source)?;
        Ok((Box::new(Batched(prm)), stats))
    }
}
