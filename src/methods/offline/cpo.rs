//! Contrastive preference optimisation (Xu et al., 2024), SimPO (Meng, Xia and Chen, 2024), AlphaPO
//! (Gupta et al., 2025): pairs without a reference.
//!
//! r = log pi(y|x), summed (sigmoid, hinge) or averaged over tokens (ipo, simpo); with alpha other
//! than 0, r = (1 - p^-alpha) / alpha for p = e^r. d = r_w - r_l; the losses are -log sigmoid(beta
//! d), max(0, 1 - beta d), (d - 1/(2 beta))^2, -log sigmoid(beta d - gamma), plus `cpo_alpha` times
//! the mean NLL of the chosen completions' tokens. SimPO as published is loss_type=simpo with
//! cpo_alpha=0; `alphapo` is simpo without the NLL. As in TRL 1.16.0 (`experimental/cpo`) the NLL's
//! mean is over a micro-batch's tokens. Unlike TRL: `logits/*` are means over completion tokens
//! (TRL: over all positions, padding included).
//!
//! Layer 7. Invariant: there is no reference.

use crate::autograd::Cx;
use crate::config::{LengthOptions, Report, TrainingConfig, section};
use crate::data::masked::MaskedSequence;
use crate::data::preference::PairStyle;
use crate::error::Result;
use crate::methods::offline::completions::{HeadPass, PairRows, chosen_nll, forward, pair_metrics};
use crate::methods::offline::rows::RowSet;
use crate::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use crate::methods::{BuildMethod, BuiltMethod, Footprint, MethodEntry, MethodInputs};
use crate::model::decoder::Decoder;
use crate::ops::preference::{self, CpoLoss};

pub const METHOD: MethodEntry = MethodEntry::new::<CpoConfig>(
    "cpo",
    "Contrastive preference optimisation, SimPO, AlphaPO: pairs, without a reference",
);

section! {
    /// TRL's `CPOConfig`.
    pub struct CpoConfig = "cpo" {
        /// alphapo: simpo without the likelihood term; alpha sets its shape.
        pub loss_type: CpoLoss = CpoLoss::Sigmoid,
        /// Scale of the difference in log-probs. For ipo: the regulariser tau.
        pub beta: f64 = 0.1,
        /// Assumed share of wrong labels, for sigmoid and simpo.
        pub label_smoothing: f64 = 0.0,
        /// Weight of the likelihood of the chosen completions. 0 with simpo: SimPO as published.
        pub cpo_alpha: f64 = 1.0,
        /// Target margin of simpo.
        pub simpo_gamma: f64 = 0.5,
        /// Shape of the reward, (1 - p^-alpha) / alpha; 0: log p.
        pub alpha: f64 = 0.0,
        ..pub length: LengthOptions = LengthOptions::default(),
    }
}

impl CpoConfig {
    fn rules(&self, report: &mut Report) {
        report.must(self.beta > 0.0, || format!("beta = {}: must be above 0", self.beta));
        let e = self.label_smoothing;
        report
            .must((0.0..1.0).contains(&e), || format!("label_smoothing = {e}: must be in [0, 1)"));
        if matches!(self.loss_type, CpoLoss::Hinge | CpoLoss::Ipo) {
            let why = "hinge and ipo have no label smoothing";
            report.idle("label_smoothing", "loss_type", why);
        }
        if !matches!(self.loss_type, CpoLoss::Simpo | CpoLoss::Alphapo) {
            report.idle("simpo_gamma", "loss_type", "only simpo and alphapo have a margin");
        }
        if self.loss_type == CpoLoss::Alphapo {
            report.idle("cpo_alpha", "loss_type", "alphapo has no likelihood term");
        }
    }
}

impl BuildMethod for CpoConfig {
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
        let likelihood = if self.loss_type == CpoLoss::Alphapo { 0.0 } else { self.cpo_alpha };
        let op = preference::Cpo {
            loss: self.loss_type,
            beta: self.beta as f32,
            label_smoothing: self.label_smoothing as f32,
            simpo_gamma: self.simpo_gamma as f32,
            alpha: self.alpha as f32,
            cpo_alpha: likelihood as f32,
        };
        Ok(BuiltMethod::new(OfflineMethod(CpoObjective { pairs, op }), stats))
    }
}

pub struct CpoObjective {
    pairs: PairRows,
    op: preference::Cpo,
}

impl OfflineObjective for CpoObjective {
    fn rows(&self) -> &dyn RowSet {
        &self.pairs.rows
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let of = self.pairs.open(cx, micro)?;
        let (batch, _) = self.pairs.batch(cx, model.vocab(), &of.pairs)?;
        let targets = batch.target_ids.len();
        if targets == 0 {
            return Ok(LossOutput::empty(of.tokens));
        }
        micro.record(cx);
        let pass = HeadPass { squares: false, logits: true };
        let f = forward(cx, model, &batch, &vec![1.0; targets], pass)?;
        let nll = chosen_nll(cx, &f)?;
        let (logps, lens) =
            (f.sums.reshape(&[of.pairs.len(), 2])?, of.sides(cx, MaskedSequence::targets)?);
        let inputs = [&logps, &lens, &of.weight, &nll];
        let (loss, rewards) = preference::cpo(cx, self.op.clone(), inputs)?;
        let (mean, likelihood) = (self.op.loss.averages(), self.op.cpo_alpha != 0.0);
        Ok(LossOutput::new(loss, of.tokens, move || {
            let mut values = logps.to_f32()?;
            if mean {
                values.iter_mut().zip(lens.to_f32()?).for_each(|(l, n)| *l /= n);
            }
            let mut all = pair_metrics(&f, &rewards, &values)?;
            let nll = if likelihood { f64::from(nll.to_f32()?[0]) } else { 0.0 };
            all.push(("nll_loss".into(), nll));
            Ok(all)
        }))
    }
}
