//! Contrastive preference optimisation (Xu et al., 2024), SimPO (Meng, Xia and Chen, 2024), AlphaPO
//! (Gupta et al., 2025): pairs without a reference.
//!
//! r = log pi(y|x), summed (sigmoid, hinge) or a token's mean (ipo, simpo); alpha other than 0: (1
//! - p^-alpha) / alpha of that. d = r_w - r_l; the losses: -log sigmoid(beta d), max(0, 1 - beta
//!   d), (d - 1/(2 beta))^2, -log sigmoid(beta d - gamma); plus `cpo_alpha` times the mean NLL of
//!   the chosen completions' tokens. SimPO as published is loss_type=simpo with cpo_alpha=0;
//!   `alphapo` is simpo without the NLL. As in TRL 1.16.0 (`experimental/cpo`) the NLL's mean is
//!   over a micro-batch's tokens. Other than TRL: `logits/*` are means over completion tokens (TRL:
//!   over all positions, padding included).
//!
//! Layer 7. Invariant: there is no reference.

use crate::autograd::Cx;
use crate::config::{CpoConfig, CpoLossType, TrainingConfig};
use crate::data::preference::{PairStyle, PreferenceOptions};
use crate::error::Result;
use crate::methods::offline::completions::{
    Ask, PairRows, floats, forward, reward_figures, sides, token_count,
};
use crate::methods::offline::dpo::chosen_nll;
use crate::methods::offline::{Batched, Objective, Pass, Set, Shot};
use crate::methods::{Footprint, MaskedIds, Method, Metric, Recipe, Source};
use crate::model::decoder::Decoder;
use crate::ops::preference::{self, CpoLoss};

pub struct Cpo {
    pub pairs: PairRows,
    op: preference::Cpo,
}

impl Cpo {
    pub fn new(config: &CpoConfig, source: &Source) -> Result<(Cpo, String)> {
        let options = PreferenceOptions {
            max_length: config.max_length,
            on_truncation: config.on_truncation,
            ..PreferenceOptions::default()
        };
        let (pairs, stats) = PairRows::new(source, PairStyle::Orpo, &options)?;
        let op = preference::Cpo {
            loss: match config.loss_type {
                CpoLossType::Sigmoid => CpoLoss::Sigmoid,
                CpoLossType::Hinge => CpoLoss::Hinge,
                CpoLossType::Ipo => CpoLoss::Ipo,
                CpoLossType::Simpo | CpoLossType::Alphapo => CpoLoss::Simpo,
            },
            beta: config.beta as f32,
            label_smoothing: config.label_smoothing as f32,
            simpo_gamma: config.simpo_gamma as f32,
            alpha: config.alpha as f32,
            cpo_alpha: config.nll_weight() as f32,
        };
        Ok((Cpo { pairs, op }, stats.to_string()))
    }
}

impl Objective for Cpo {
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
        let (batch, _) = self.pairs.batch(cx, model.vocab(), &pairs)?;
        if batch.target_ids.is_empty() {
            return Ok(None);
        }
        pass.begin(cx);
        let ask = Ask { squares: false, figures: true };
        let f = forward(cx, model, &batch, &vec![1.0; batch.target_ids.len()], ask)?;
        let nll = chosen_nll(cx, &f)?;
        let lens: Vec<f32> = pairs
            .iter()
            .flat_map(|e| [e.chosen.targets() as f32, e.rejected.targets() as f32])
            .collect();
        let (logps, counts) = (f.sums.reshape(&[n, 2])?, floats(cx, &lens)?.reshape(&[n, 2])?);
        let weight = floats(cx, &vec![(1.0 / total) as f32; n])?;
        let (loss, rewards) =
            preference::cpo(cx, self.op.clone(), [&logps, &counts, &weight, &nll])?;
        let (mean, likely) =
            (matches!(self.op.loss, CpoLoss::Ipo | CpoLoss::Simpo), self.op.cpo_alpha != 0.0);
        let metrics = move || -> Result<Vec<Metric>> {
            let mut all = f.figures(|k| k.is_multiple_of(2))?;
            all.extend(reward_figures(&rewards.to_f32()?));
            let mut values = logps.to_f32()?;
            if mean {
                values.iter_mut().zip(&lens).for_each(|(l, n)| *l /= n);
            }
            all.extend(sides("logps", &values));
            all.push(("nll_loss".into(), if likely { f64::from(nll.to_f32()?[0]) } else { 0.0 }));
            Ok(all)
        };
        Ok(Some(Shot { loss, tokens, metrics: Box::new(metrics) }))
    }
}

impl Recipe for CpoConfig {
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
        let (cpo, stats) = Cpo::new(self, source)?;
        Ok((Box::new(Batched(cpo)), stats))
    }
}
