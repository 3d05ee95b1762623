//! Process reward models: a right-or-wrong label at the end of each step of a solution (Lightman et
//! al., "Let's Verify Step by Step", 2023; Uesato et al., 2022).
//!
//! A token classifier with two labels. The loss is the cross-entropy at the labelled tokens,
//! averaged over those of the step: with the scores s of a token, -log softmax(s)_y, which for two
//! labels is -log sigmoid(+-(s_1 - s_0)). TRL dropped its PRMTrainer before 1.16.0; rows are
//! tokenised as it did. Unlike TRL: the mean is over the whole step.
//!
//! Layer 7. Invariant: only labelled tokens reach the score.

use crate::autograd::Cx;
use crate::config::{LengthOptions, Report, TrainingConfig, section};
use crate::data::preference::{PreferenceOptions, StepEncoder, StepOptions};
use crate::error::Result;
use crate::methods::offline::completions::sums;
use crate::methods::offline::rows::{LabelledSteps, RowSet, Rows, Split};
use crate::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use crate::methods::reference::floats;
use crate::methods::{BuildMethod, BuiltMethod, MethodEntry, MethodInputs};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::ops::add::to_float;
use crate::ops::embedding::gather_rows;
use crate::ops::preference::{Unpaired, UnpairedLoss, unpaired};

pub const METHOD: MethodEntry = MethodEntry::new::<PrmConfig>(
    "prm",
    "A process reward model, of solutions with a label for each step",
)
.on_page("reward");

section! {
    /// TRL's former `PRMConfig` (1.16.0 has none).
    pub struct PrmConfig = "prm" {
        /// The text after each step; its last token carries the step's label.
        pub step_separator: String = "\n".into(),
        /// Train on the label of the last step only.
        pub train_on_last_step_only: bool = false,
        ..pub length: LengthOptions = LengthOptions::default(),
    }
}

impl PrmConfig {
    fn rules(&self, report: &mut Report) {
        report.must(!self.step_separator.is_empty(), || {
            "step_separator = \"\": a step is scored at its separator's \
             last token; give at least one character"
                .into()
        });
    }
}

impl BuildMethod for PrmConfig {
    fn rows_are_stored(&self) -> bool {
        true
    }

    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-5, disable_dropout: true, ..Default::default() }
    }

    fn task(&self) -> Task {
        Task::TokenClassification { labels: 2 }
    }

    fn build(&self, _: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let (tokenizer, vocab) = (inputs.tokenizer, inputs.model.vocab_size);
        let how = |last_step: bool| StepOptions {
            step_separator: self.step_separator.clone(),
            train_on_last_step_only: last_step,
        };
        let (train, eval) = (how(self.train_on_last_step_only), how(false));
        let options = PreferenceOptions { on_bad_row: inputs.on_bad_row, ..(&self.length).into() };
        let encoder = |split| {
            let how = if split == Split::Train { &train } else { &eval };
            StepEncoder::new(tokenizer, vocab, how, &options)
        };
        let (rows, stats) = Rows::tokenise(inputs, encoder, LabelledSteps::new)?;
        Ok(BuiltMethod::new(OfflineMethod(PrmObjective { rows, vocab }), stats))
    }
}

pub struct PrmObjective {
    rows: Rows<LabelledSteps>,
    vocab: usize,
}

impl OfflineObjective for PrmObjective {
    fn rows(&self) -> &dyn RowSet {
        &self.rows
    }

    fn weight(&self, split: Split, row: usize) -> Result<f64> {
        Ok(self.rows.labels(split, row).len() as f64)
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let examples = self.rows.pick(micro.split, micro.rows)?;
        let examples = examples.iter().map(|e| &e.example);
        let (mut at, mut tokens, mut labels) = (Vec::new(), 0, Vec::new());
        for e in examples.clone() {
            at.extend(e.labels.iter().map(|(t, _)| (tokens + t) as i32));
            labels.extend(e.labels.iter().map(|(_, y)| i32::from(*y)));
            tokens += e.input_ids.len();
        }
        let n = labels.len();
        if n == 0 {
            return Ok(LossOutput::empty(tokens));
        }
        let sequences: Vec<Sequence> =
            examples.map(|e| Sequence { ids: &e.input_ids, target: None }).collect();
        let batch = Batch::new(cx, &sequences, self.vocab)?;
        micro.record(cx);
        let hidden = model.hidden(cx, &batch)?;
        let steps = gather_rows(cx, &hidden, &cx.ints("steps", &at)?)?;
        let scores = model.scores(cx, &steps)?;
        let scores = to_float(cx, &scores)?.reshape(&[2 * n])?;
        let signs: Vec<f32> = (0..2 * n).map(|i| if i % 2 == 0 { -1.0 } else { 1.0 }).collect();
        let starts: Vec<usize> = (0..=n).map(|i| 2 * i).collect();
        let difference = sums(cx, &scores, &signs, &starts)?;
        // With beta 1, a reference of 0 and a baseline of 0, BCO's loss is the cross-entropy.
        let op = Unpaired {
            loss: UnpairedLoss::Bco,
            beta: 1.0,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
        };
        let (zeros, zero) = (floats(cx, &vec![0.0; n])?, floats(cx, &[0.0])?);
        let (label, weight) = (cx.ints("labels", &labels)?, floats(cx, &vec![micro.share(); n])?);
        let (loss, _) = unpaired(cx, op, [&difference, &zeros, &label, &weight, &zero])?;
        Ok(LossOutput::new(loss, tokens, move || {
            let signs = difference.to_f32()?;
            let right =
                signs.iter().zip(&labels).filter(|(d, y)| (**d > 0.0) == (**y == 1)).count();
            Ok(vec![("accuracy".into(), right as f64 / n as f64)])
        }))
    }
}
