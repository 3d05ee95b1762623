//! Reward models: one score of a prompt and its answer, trained on pairs (Bradley and Terry, 1952;
//! Ouyang et al., 2022).
//!
//! loss of a pair = -log sigmoid(s_w - s_l - margin) + c (s_w + s_l)^2, its mean over the pairs of
//! the step; s is `score.weight` times the last hidden state of a sequence. `margin`: the row's
//! field, as in Llama 2 (Touvron et al., 2023); c = `center_rewards_coefficient` (Eisenstein et
//! al., 2023) holds rewards around 0. TRL 1.16.0's RewardTrainer does the same. Other than TRL: a
//! new score starts from `seed`'s normal(0, initializer_range) by this engine's generator; the
//! beginning that both sides share is computed once; the pairs of the whole step are averaged, not
//! micro-batches.
//!
//! Layer 7. Invariant: a sequence is never cut; what is scored is its last token, which the
//! template or EOS gives.

use crate::autograd::Cx;
use crate::config::{RewardConfig, TrainingConfig};
use crate::data::preference::{PairStyle, PreferenceOptions};
use crate::error::Result;
use crate::methods::offline::completions::{PairRows, floats, token_count};
use crate::methods::offline::{Batched, Objective, Pass, Set, Shot};
use crate::methods::{Footprint, MaskedIds, Method, Metric, Recipe, Source};
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::ops::add::to_float;
use crate::ops::embedding::gather_rows;
use crate::ops::preference::{BradleyTerry, bradley_terry};
use crate::rewards::model::one_score;

pub struct Reward {
    pub pairs: PairRows,
    op: BradleyTerry,
}

impl Reward {
    /// Tokenises the rows. Returns what to print of them, too.
    pub fn new(config: &RewardConfig, source: &Source) -> Result<(Reward, String)> {
        one_score(source.model)?;
        let options = PreferenceOptions {
            max_length: config.max_length,
            on_truncation: config.on_truncation,
            eos_token: config.eos_token.clone(),
            ..PreferenceOptions::default()
        };
        let (pairs, stats) = PairRows::new(source, PairStyle::Reward, &options)?;
        let center_rewards_coefficient = config.center_rewards_coefficient.unwrap_or(0.0) as f32;
        Ok((Reward { pairs, op: BradleyTerry { center_rewards_coefficient } }, stats.to_string()))
    }
}

impl Objective for Reward {
    fn rows(&self, set: Set) -> usize {
        self.pairs.of(set).len()
    }

    fn longest(&self) -> usize {
        self.pairs.longest()
    }

    fn masks(&self) -> Vec<MaskedIds> {
        // what is scored is the last token
        let last = |(ids, _): MaskedIds| {
            let mask = (1..=ids.len()).map(|i| i == ids.len()).collect();
            (ids, mask)
        };
        self.pairs.masks().into_iter().map(last).collect()
    }

    fn source(&self, row: usize) -> String {
        self.pairs.place(row)
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
        let pairs = self.pairs.pick(set, rows);
        let (n, tokens) = (pairs.len(), token_count(&pairs));
        let (batch, ends) = self.pairs.batch(cx, model.vocab(), &pairs)?;
        pass.begin(cx);
        let hidden = model.hidden(cx, &batch)?;
        let last = gather_rows(cx, &hidden, &cx.ints("last tokens", &ends)?)?;
        let scores = model.scores(cx, &last)?;
        let scores = to_float(cx, &scores)?.reshape(&[n, 2])?;
        let weight = floats(cx, &vec![(1.0 / total) as f32; n])?;
        let margins: Vec<f32> = pairs.iter().filter_map(|e| e.margin).collect();
        let margin = if margins.len() == n { Some(floats(cx, &margins)?) } else { None };
        let loss = bradley_terry(cx, self.op.clone(), &scores, &weight, margin.as_ref())?;
        let metrics = move || Ok(figures(&scores.to_f32()?));
        Ok(Some(Shot { loss, tokens, metrics: Box::new(metrics) }))
    }
}

/// TRL's figures of the scores [n, 2].
fn figures(scores: &[f32]) -> Vec<Metric> {
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

impl Recipe for RewardConfig {
    const TASK: Task = Task::SequenceClassification { labels: 1 };

    fn chat_template_path(&self) -> Option<&str> {
        self.chat_template_path.as_deref()
    }

    fn footprint(&self) -> Footprint {
        Footprint { sequences: 2, reference: false }
    }

    fn disable_dropout(&self) -> bool {
        self.disable_dropout
    }

    fn method(
        &self,
        _training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let (reward, stats) = Reward::new(self, source)?;
        Ok((Box::new(Batched(reward)), stats))
    }
}
