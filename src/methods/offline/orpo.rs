//! Odds-ratio preference optimisation: the likelihood of the chosen row and its odds against the
//! rejected one, in one loss and without a reference (Hong, Lee and Thorne, "ORPO", 2024).
//!
//! loss = NLL(chosen row) - beta mean log sigmoid(log odds), log odds = (p_w - p_l) - (log(1 -
//! e^{p_w}) - log(1 - e^{p_l})), with p a completion's mean log-prob. As in TRL 1.16.0
//! (`experimental/orpo`) the NLL is over prompt and completion, and its mean over a micro-batch's
//! tokens; the paper has the NLL of the completion. Unlike TRL: `logits/*` are means over
//! completion tokens (TRL: over all positions, padding included).
//!
//! Layer 7. Invariant: there is no reference; the chosen rows are trained on in full, so no prompt
//! is shared with the rejected.

use crate::autograd::Cx;
use crate::config::{LengthOptions, Report, TrainingConfig, section};
use crate::data::masked::MaskedSequence;
use crate::data::preference::PairStyle;
use crate::error::Result;
use crate::methods::offline::completions::{
    HeadPass, PairRows, forward, pair_metrics, sequences, sides, sums,
};
use crate::methods::offline::rows::RowSet;
use crate::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use crate::methods::{BuildMethod, BuiltMethod, Footprint, MethodEntry, MethodInputs};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::preference;

pub const METHOD: MethodEntry = MethodEntry::new::<OrpoConfig>(
    "orpo",
    "Odds-ratio preference optimisation: pairs, without a reference",
);

section! {
    /// TRL's `ORPOConfig`.
    pub struct OrpoConfig = "orpo" {
        /// Weight of the odds ratio beside the chosen row's likelihood (the paper's lambda).
        pub beta: f64 = 0.1,
        ..pub length: LengthOptions = LengthOptions::default(),
    }
}

impl OrpoConfig {
    fn rules(&self, report: &mut Report) {
        report.must(self.beta >= 0.0, || format!("beta = {}: must not be below 0", self.beta));
    }
}

impl BuildMethod for OrpoConfig {
    fn rows_are_stored(&self) -> bool {
        true
    }

    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-6, disable_dropout: true, ..Default::default() }
    }

    fn footprint(&self) -> Footprint {
        Footprint { sequences: 2, reference: false }
    }

    fn build(&self, _: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let (pairs, stats) = PairRows::new(inputs, PairStyle::Orpo, &(&self.length).into())?;
        let op = preference::Orpo { beta: self.beta as f32 };
        Ok(BuiltMethod::new(OfflineMethod(OrpoObjective { pairs, op }), stats))
    }
}

pub struct OrpoObjective {
    pairs: PairRows,
    op: preference::Orpo,
}

impl OfflineObjective for OrpoObjective {
    fn rows(&self) -> &dyn RowSet {
        &self.pairs.rows
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let of = self.pairs.open(cx, micro)?;
        let (mut completion, mut chosen) = (Vec::new(), Vec::new());
        for e in &of.pairs {
            completion.extend_from_slice(&e.chosen.target_mask[1..]);
            completion.extend(vec![true; e.rejected.targets()]);
            chosen.extend(vec![true; e.chosen.input_ids.len() - 1]);
            chosen.extend(vec![false; e.rejected.targets()]);
        }
        let rows: Vec<Sequence> = sequences(&of.pairs)
            .enumerate()
            .map(|(k, s)| {
                // The likelihood of a chosen row includes its prompt.
                let target = (k % 2 == 1).then_some(s.target_mask.as_slice());
                Sequence { ids: &s.input_ids, target }
            })
            .collect();
        let batch = Batch::new(cx, &rows, model.vocab())?;
        if batch.target_ids.is_empty() {
            return Ok(LossOutput::empty(of.tokens));
        }
        micro.record(cx);
        let weights: Vec<f32> = completion.iter().map(|c| f32::from(*c)).collect();
        let pass = HeadPass { squares: false, logits: true };
        let mut f = forward(cx, model, &batch, &weights, pass)?;
        f.completion = completion;
        let share = -1.0 / chosen.iter().filter(|c| **c).count().max(1) as f32;
        let shares: Vec<f32> = chosen.iter().map(|c| if *c { share } else { 0.0 }).collect();
        let nll = sums(cx, &f.out.logp, &shares, &[0, shares.len()])?;
        let logps = f.sums.reshape(&[of.pairs.len(), 2])?;
        let lens = of.sides(cx, MaskedSequence::targets)?;
        let [loss, rewards, odds] =
            preference::orpo(cx, self.op.clone(), [&logps, &lens, &of.weight, &nll])?;
        Ok(LossOutput::new(loss, of.tokens, move || {
            let lens = lens.to_f32()?;
            let means: Vec<f32> = logps.to_f32()?.iter().zip(&lens).map(|(l, n)| l / n).collect();
            let mut all = pair_metrics(&f, &rewards, &means)?;
            let [ratio, log_odds] = sides("", &odds.to_f32()?);
            all.push(("log_odds_ratio".into(), ratio.1));
            all.push(("log_odds_chosen".into(), log_odds.1));
            all.push(("nll_loss".into(), f64::from(nll.to_f32()?[0])));
            Ok(all)
        }))
    }
}
