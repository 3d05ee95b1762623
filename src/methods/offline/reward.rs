//! Reward models: one score for a prompt and its answer, trained on pairs (Bradley and Terry, 1952;
//! Ouyang et al., 2022).
//!
//! loss of a pair = -log sigmoid(s_w - s_l - margin) + c (s_w + s_l)^2, averaged over the pairs of
//! the step; s is `score.weight` times the last hidden state of a sequence. `margin` is the row's
//! field, as in Llama 2 (Touvron et al., 2023); c = `center_rewards_coefficient` (Eisenstein et
//! al., 2023) keeps rewards near 0. TRL 1.16.0's RewardTrainer does the same. Unlike TRL: a new
//! score head is drawn from normal(0, initializer_range) with `seed` by this engine's generator;
//! the beginning that both sides share is computed once; the mean is over the pairs of the whole
//! step, not of micro-batches.
//!
//! Layer 7. Invariant: a sequence is never truncated; its last token is scored, which the template
//! or EOS provides.

use crate::autograd::Cx;
use crate::config::{LengthOptions, OnTruncation, Report, TrainingConfig, section};
use crate::data::preference::{PairStyle, PreferenceOptions};
use crate::error::Result;
use crate::methods::offline::completions::PairRows;
use crate::methods::offline::rows::RowSet;
use crate::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use crate::methods::reference::floats;
use crate::methods::{
    BuildMethod, BuiltMethod, Footprint, MaskedIds, MethodEntry, MethodInputs, Metric, RowView,
};
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::ops::add::to_float;
use crate::ops::embedding::gather_rows;
use crate::ops::preference::{BradleyTerry, bradley_terry};
use crate::rewards::model::one_score;

pub const METHOD: MethodEntry = MethodEntry::new::<RewardConfig>(
    "reward",
    "A reward model, of pairs; starts from a language model",
);

section! {
    /// TRL's `RewardConfig`. A pair longer than max_length is dropped, whether on_truncation says
    /// truncate or drop: a cut answer has another worth.
    pub struct RewardConfig = "reward" {
        /// Weight of (chosen + rejected)^2, which keeps rewards near 0. 0.01 is usual. none: off.
        pub center_rewards_coefficient: Option<f64> = None,
        /// The token that ends a row. none: the tokenizer's.
        pub eos_token: Option<String> = None,
        ..pub length: LengthOptions =
            LengthOptions { on_truncation: OnTruncation::Drop, ..LengthOptions::default() },
    }
}

impl RewardConfig {
    fn rules(&self, report: &mut Report) {
        if let Some(c) = self.center_rewards_coefficient {
            report.must(c >= 0.0, || {
                format!("center_rewards_coefficient = {c}: must not be below 0")
            });
        }
    }
}

impl BuildMethod for RewardConfig {
    fn rows_are_stored(&self) -> bool {
        true
    }

    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-4, disable_dropout: true, ..Default::default() }
    }

    fn task(&self) -> Task {
        Task::SequenceClassification { labels: 1 }
    }

    fn footprint(&self) -> Footprint {
        Footprint { sequences: 2, reference: false }
    }

    fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }

    fn build(&self, _: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        one_score(inputs.model)?;
        let eos_token = self.eos_token.clone();
        let options = PreferenceOptions { eos_token, ..(&self.length).into() };
        let (pairs, stats) = PairRows::new(inputs, PairStyle::Reward, &options)?;
        let center_rewards_coefficient = self.center_rewards_coefficient.unwrap_or(0.0) as f32;
        let op = BradleyTerry { center_rewards_coefficient };
        Ok(BuiltMethod::new(OfflineMethod(RewardObjective { pairs, op }), stats))
    }
}

pub struct RewardObjective {
    pairs: PairRows,
    op: BradleyTerry,
}

impl OfflineObjective for RewardObjective {
    fn rows(&self) -> &dyn RowSet {
        &self.pairs.rows
    }

    fn masks(&self) -> Result<Vec<MaskedIds>> {
        let last = |(ids, _): MaskedIds| {
            let mask = scored(&ids);
            (ids, mask)
        };
        Ok(self.rows().masks()?.into_iter().map(last).collect())
    }

    fn row_view(&self, row: usize) -> Result<RowView> {
        let mut view = self.rows().view(row)?;
        view.parts.iter_mut().for_each(|part| part.mask = scored(&part.ids));
        Ok(view)
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let of = self.pairs.open(cx, micro)?;
        let n = of.pairs.len();
        let (batch, ends) = self.pairs.batch(cx, model.vocab(), &of.pairs)?;
        micro.record(cx);
        let hidden = model.hidden(cx, &batch)?;
        let last = gather_rows(cx, &hidden, &cx.ints("last tokens", &ends)?)?;
        let scores = model.scores(cx, &last)?;
        let scores = to_float(cx, &scores)?.reshape(&[n, 2])?;
        let margins: Vec<f32> = of.pairs.iter().filter_map(|e| e.margin).collect();
        let margin = if margins.len() == n { Some(floats(cx, &margins)?) } else { None };
        let loss = bradley_terry(cx, self.op.clone(), &scores, &of.weight, margin.as_ref())?;
        Ok(LossOutput::new(loss, of.tokens, move || Ok(metrics(&scores.to_f32()?))))
    }
}

/// Marks the last token, which is scored.
fn scored(ids: &[u32]) -> Vec<bool> {
    (1..=ids.len()).map(|i| i == ids.len()).collect()
}

/// TRL's metrics of the scores [n, 2].
fn metrics(scores: &[f32]) -> Vec<Metric> {
    let n = (scores.len() / 2).max(1) as f64;
    let fold =
        |f: fn(f32, f32) -> f32| f64::from(scores.iter().copied().reduce(f).unwrap_or(f32::NAN));
    let mean = scores.iter().map(|s| f64::from(*s)).sum::<f64>() / (2.0 * n);
    let won = scores.chunks_exact(2).filter(|s| s[0] > s[1]).count() as f64;
    let margin = scores.chunks_exact(2).map(|s| f64::from(s[0] - s[1])).sum::<f64>();
    vec![
        ("min_reward".into(), fold(f32::min)),
        ("mean_reward".into(), mean),
        ("max_reward".into(), fold(f32::max)),
        ("accuracy".into(), won / n),
        ("margin".into(), margin / n),
    ]
}
