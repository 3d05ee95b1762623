//! Odds-ratio preference optimisation: likelihood of the chosen row and its odds against the
//! rejected one, in one loss and without a reference (Hong, Lee and Thorne, "ORPO", 2024).
//!
//! loss = NLL(chosen row) - beta mean log sigmoid(log odds), log odds = (p_w - p_l) - (log(1 -
//! e^{p_w}) - log(1 - e^{p_l})), p a completion's mean log-prob. As in TRL 1.16.0
//! (`experimental/orpo`) the NLL is over prompt and completion, its mean over a micro-batch's
//! tokens; the paper writes the NLL of the completion. Other than TRL: `logits/*` are means over
//! completion tokens (TRL: over all positions, padding included).
//!
//! Layer 7. Invariant: there is no reference; the chosen rows are trained on in full, so no prompt
//! is shared with the rejected.

use crate::autograd::Cx;
use crate::config::{OrpoConfig, TrainingConfig};
use crate::data::preference::{PairStyle, PreferenceOptions};
use crate::error::Result;
use crate::methods::offline::completions::{
    Ask, PairRows, floats, forward, reward_figures, sides, sums, token_count,
};
use crate::methods::offline::{Batched, Objective, Pass, Set, Shot};
use crate::methods::{Footprint, MaskedIds, Method, Metric, Recipe, Source};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::preference;

pub struct Orpo {
    pub pairs: PairRows,
    op: preference::Orpo,
}

impl Orpo {
    pub fn new(config: &OrpoConfig, source: &Source) -> Result<(Orpo, String)> {
        let options = PreferenceOptions {
            max_length: config.max_length,
            on_truncation: config.on_truncation,
            ..PreferenceOptions::default()
        };
        let (pairs, stats) = PairRows::new(source, PairStyle::Orpo, &options)?;
        Ok((Orpo { pairs, op: preference::Orpo { beta: config.beta as f32 } }, stats.to_string()))
    }
}

impl Objective for Orpo {
    fn rows(&self, set: Set) -> usize {
        self.pairs.of(set).len()
    }

    fn longest(&self) -> usize {
        self.pairs.longest()
    }

    fn masks(&self) -> Vec<MaskedIds> {
        self.pairs.masks()
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
        let mut sequences = Vec::with_capacity(2 * n);
        let (mut completion, mut chosen, mut lens) = (Vec::new(), Vec::new(), Vec::new());
        for e in &pairs {
            sequences.push(Sequence { ids: &e.chosen.input_ids, target: None });
            sequences.push(Sequence {
                ids: &e.rejected.input_ids,
                target: Some(&e.rejected.target_mask),
            });
            completion.extend_from_slice(&e.chosen.target_mask[1..]);
            completion.extend(vec![true; e.rejected.targets()]);
            chosen.extend(vec![true; e.chosen.input_ids.len() - 1]);
            chosen.extend(vec![false; e.rejected.targets()]);
            lens.extend([e.chosen.targets() as f32, e.rejected.targets() as f32]);
        }
        let batch = Batch::new(cx, &sequences, model.vocab())?;
        if batch.target_ids.is_empty() {
            return Ok(None);
        }
        pass.begin(cx);
        let weights: Vec<f32> = completion.iter().map(|c| f32::from(*c)).collect();
        let ask = Ask { squares: false, figures: true };
        let mut f = forward(cx, model, &batch, &weights, ask)?;
        f.completion = completion;
        let share = -1.0 / chosen.iter().filter(|c| **c).count().max(1) as f32;
        let shares: Vec<f32> = chosen.iter().map(|c| if *c { share } else { 0.0 }).collect();
        let nll = sums(cx, &f.out.logp, &shares, &[0, shares.len()])?;
        let logps = f.sums.reshape(&[n, 2])?;
        let counts = floats(cx, &lens)?.reshape(&[n, 2])?;
        let weight = floats(cx, &vec![(1.0 / total) as f32; n])?;
        let [loss, rewards, odds] =
            preference::orpo(cx, self.op.clone(), [&logps, &counts, &weight, &nll])?;
        let metrics = move || -> Result<Vec<Metric>> {
            let mut all = f.figures(|k| k.is_multiple_of(2))?;
            all.extend(reward_figures(&rewards.to_f32()?));
            let means: Vec<f32> = logps.to_f32()?.iter().zip(&lens).map(|(l, n)| l / n).collect();
            all.extend(sides("logps", &means));
            let [ratio, log_odds] = sides("", &odds.to_f32()?);
            all.push(("log_odds_ratio".into(), ratio.1));
            all.push(("log_odds_chosen".into(), log_odds.1));
            all.push(("nll_loss".into(), f64::from(nll.to_f32()?[0])));
            Ok(all)
        };
        Ok(Some(Shot { loss, tokens, metrics: Box::new(metrics) }))
    }
}

impl Recipe for OrpoConfig {
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
        let (orpo, stats) = Orpo::new(self, source)?;
        Ok((Box::new(Batched(orpo)), stats))
    }
}
