//! Direct preference optimisation: an implicit reward model in the policy, trained on pairs
//! (Rafailov et al., "Direct Preference Optimization", 2023), and the losses derived from it.
//!
//! With u = log pi(y|x) - log ref(y|x) summed over a completion, w the chosen and l the rejected
//! one, the reward is beta u and the loss of a pair is, for `sigmoid`, -log sigmoid(beta (u_w -
//! u_l)). All losses and their symbols are defined in `kernels/preference.cu`; they are TRL
//! 1.16.0's `loss_type`s: hinge (SLiC-HF, 2023), ipo (Azar et al., 2023; over the mean per token,
//! as its authors ran it), exo_pair (Ji et al., 2024, eq. 16), nca_pair (Chen et al., 2024), robust
//! (Chowdhury et al., 2024), bco_pair (Jung et al., 2024), sppo_hard (Wu et al., 2024), aot and
//! aot_unpaired (Melnyk et al., 2024), apo_zero and apo_down (D'Oosterlinck et al., 2024), discopop
//! (Lu et al., 2024), sigmoid_norm (length-normalised DPO of Tulu 3, 2024), sft (the chosen
//! completions' likelihood); lists of them with weights (MPO, Wang et al., 2024). Divergences other
//! than the reverse KL: f-DPO (Wang et al., 2023). `ld_alpha`: LD-DPO (Liu et al., 2024) weights
//! the tokens beyond the shorter completion's length. `use_weighting`: WPO (Zhou et al., 2024).
//! `sync_ref_model`: TR-DPO (Gorbatovski et al., 2024).
//!
//! As in TRL: ipo and sigmoid_norm divide by the completion's tokens, including a first token
//! without a log-prob; `sft`'s mean is over a micro-batch's tokens, and `aot` sorts within a
//! micro-batch, so both depend on how a step is cut into micro-batches. Unlike TRL: a pair is
//! weighted by the number of pairs of the whole step, which differs from a mean of means if the
//! last micro-batch of a step is smaller; `reference_free` and a reference folder are options; the
//! prompt that both sides share is computed once.
//!
//! Layer 7. Invariant: at the first step the policy is the reference, bit for bit, so the margins
//! are exactly 0.

use std::ops::Range;
use std::path::Path;

use crate::autograd::Cx;
use crate::config::{ReferenceOptions, Report, TrainingConfig, TruncationOptions, section};
use crate::data::masked::MaskedSequence;
use crate::data::preference::{PairExample, PairStyle, PreferenceOptions};
use crate::error::Result;
use crate::methods::offline::completions::{
    Forward, HeadPass, PairRows, chosen_nll, forward, pair_metrics, sums,
};
use crate::methods::offline::rows::{Example, RowSet, Rows};
use crate::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use crate::methods::reference::{Reference, ReferenceSetup, RowsDigest};
use crate::methods::{BuildMethod, BuiltMethod, Footprint, MethodEntry, MethodInputs, StateFiles};
use crate::model::decoder::Decoder;
use crate::ops::add::axpy;
use crate::ops::preference::{self, DpoIn, DpoLoss, FDivergence};
use crate::tensor::{Id, Tensor};

pub const METHOD: MethodEntry = MethodEntry::new::<DpoConfig>(
    "dpo",
    "Direct preference optimisation: pairs of a chosen and a rejected answer",
);

section! {
    /// TRL's `DPOConfig`.
    pub struct DpoConfig = "dpo" {
        /// How strongly the policy is held to the reference model. For ipo: the regulariser tau.
        pub beta: f64 = 0.1,
        /// A loss, or a list of losses summed with loss_weights.
        pub loss_type: Vec<DpoLoss> = vec![DpoLoss::Sigmoid],
        /// A weight for each loss of the list. none: 1 each.
        pub loss_weights: Option<Vec<f64>> = None,
        /// Assumed share of wrong labels. exo_pair needs more than 0; robust, aot and aot_unpaired
        /// less than 0.5. Other losses ignore it.
        pub label_smoothing: f64 = 0.0,
        /// The divergence from the reference model to penalise.
        pub f_divergence_type: FDivergence = FDivergence::ReverseKl,
        /// The alpha of alpha_divergence; at 1 it is reverse_kl.
        pub f_alpha_divergence_coef: f64 = 0.5,
        /// Temperature of discopop's blend.
        pub discopop_tau: f64 = 0.05,
        /// Weight of the tokens beyond the length of the shorter completion (LD-DPO). none: 1.
        pub ld_alpha: Option<f64> = None,
        /// Weight each pair by its likelihood under the policy (WPO).
        pub use_weighting: bool = false,
        /// Ours. No reference model: its log-probs count as 0.
        pub reference_free: bool = false,
        /// Ours. In conversations, count only the assistant's turns of a completion. TRL counts all
        /// that follows the prompt, also user messages in between.
        pub assistant_only_loss: bool = false,
        ..pub reference: ReferenceOptions = ReferenceOptions::default(),
        ..pub truncation: TruncationOptions = TruncationOptions::default(),
    }
}

impl DpoConfig {
    /// The losses with their weights.
    pub fn losses(&self) -> Vec<(DpoLoss, f32)> {
        let weights = self.loss_weights.clone().unwrap_or_else(|| vec![1.0; self.loss_type.len()]);
        self.loss_type.iter().zip(weights).map(|(loss, weight)| (*loss, weight as f32)).collect()
    }

    fn op(&self) -> preference::Dpo {
        preference::Dpo {
            losses: self.losses(),
            divergence: self.f_divergence_type,
            f_alpha: self.f_alpha_divergence_coef as f32,
            beta: self.beta as f32,
            label_smoothing: self.label_smoothing as f32,
            discopop_tau: self.discopop_tau as f32,
        }
    }

    fn rules(&self, report: &mut Report) {
        let has = |loss| self.loss_type.contains(&loss);
        report.must(self.beta > 0.0, || format!("beta = {}: must be above 0", self.beta));
        report.must(!self.loss_type.is_empty(), || "loss_type = []: give at least one loss".into());
        if let Some(weights) = &self.loss_weights {
            report.must(weights.len() == self.loss_type.len(), || {
                let (n, losses) = (weights.len(), self.loss_type.len());
                format!("loss_weights has {n} numbers for {losses} losses in loss_type; give one for each")
            });
        }
        let e = self.label_smoothing;
        report
            .must((0.0..1.0).contains(&e), || format!("label_smoothing = {e}: must be in [0, 1)"));
        report.must(!has(DpoLoss::ExoPair) || e > 0.0, || {
            "loss_type exo_pair takes the logarithm of label_smoothing: set it above 0 (the paper: 1e-3)".into()
        });
        report.must(!has(DpoLoss::Robust) || e < 0.5, || {
            format!("label_smoothing = {e} and loss_type robust: it must be below 0.5")
        });
        let smoothed = [DpoLoss::ExoPair, DpoLoss::Robust, DpoLoss::Aot, DpoLoss::AotUnpaired];
        if !smoothed.into_iter().any(has) {
            report.idle("label_smoothing", "loss_type", "no loss of loss_type uses it");
        }
        report.must(!has(DpoLoss::Discopop) || self.discopop_tau > 0.0, || {
            format!("discopop_tau = {}: must be above 0", self.discopop_tau)
        });
        if !has(DpoLoss::Discopop) {
            report.idle("discopop_tau", "loss_type", "discopop is not in loss_type");
        }
        if self.f_divergence_type != FDivergence::Alpha {
            report.idle(
                "f_alpha_divergence_coef",
                "f_divergence_type",
                "f_divergence_type is not alpha_divergence",
            );
        }
        if let Some(alpha) = self.ld_alpha {
            report.must((0.0..=1.0).contains(&alpha), || {
                format!("ld_alpha = {alpha}: must be in [0, 1]")
            });
        }
        report.must(!(self.reference_free && self.reference.ref_model.is_some()), || {
            "reference_free = true and ref_model cannot be combined: give only one".into()
        });
        if self.reference_free {
            for key in ["precompute_ref_log_probs", "sync_ref_model"] {
                report.idle(key, "reference_free", "reference_free is true");
            }
        }
    }
}

impl BuildMethod for DpoConfig {
    fn rows_are_stored(&self) -> bool {
        true
    }

    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 1e-6, disable_dropout: true, ..Default::default() }
    }

    fn footprint(&self) -> Footprint {
        let reference = !self.reference_free && !self.reference.precompute_ref_log_probs;
        Footprint { sequences: 2, reference }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let (dpo, stats) = DpoObjective::new(self, training, inputs)?;
        Ok(BuiltMethod::new(OfflineMethod(dpo), stats))
    }
}

pub struct DpoObjective {
    pub pairs: PairRows,
    op: preference::Dpo,
    ld_alpha: Option<f32>,
    use_weighting: bool,
    reference: Reference,
}

impl DpoObjective {
    /// Tokenises the rows. Also returns a summary to print.
    pub fn new(
        config: &DpoConfig,
        training: &TrainingConfig,
        inputs: &MethodInputs,
    ) -> Result<(DpoObjective, String)> {
        let options = PreferenceOptions {
            assistant_only_loss: config.assistant_only_loss,
            ..(&config.truncation).into()
        };
        let (pairs, stats) = PairRows::new(inputs, PairStyle::Dpo, &options)?;
        let longest = pairs.rows.longest();
        let reference = Reference::of(&config.reference, training, inputs, longest);
        let dpo = DpoObjective {
            pairs,
            op: config.op(),
            ld_alpha: config.ld_alpha.map(|a| a as f32),
            use_weighting: config.use_weighting,
            reference: reference.free(config.reference_free),
        };
        Ok((dpo, stats))
    }

    /// Over pairs that are tokenised already, against the initial weights or, under an adapter, the
    /// base: for benches and tests.
    pub fn from_pairs(
        config: &DpoConfig,
        pairs: &[PairExample],
    ) -> Result<OfflineMethod<DpoObjective>> {
        let rows = Rows::of_examples(pairs, |row| format!("row {}", row + 1))?;
        let longest = rows.longest();
        let setup = ReferenceSetup { batch: 1, longest, ..Default::default() };
        Ok(OfflineMethod(DpoObjective {
            pairs: PairRows { rows, share_prompts: true },
            op: config.op(),
            ld_alpha: config.ld_alpha.map(|a| a as f32),
            use_weighting: config.use_weighting,
            reference: Reference::new(setup).free(config.reference_free),
        }))
    }

    /// The weight of each target's log-prob in its completion's sum.
    fn token_weights(&self, pairs: &[PairExample]) -> Vec<f32> {
        let beyond = self.ld_alpha.unwrap_or(1.0);
        let mut weights = Vec::new();
        for e in pairs {
            let counts = [e.chosen.targets(), e.rejected.targets()];
            let shared = counts[0].min(counts[1]);
            let weight = |i| if i < shared { 1.0 } else { beyond };
            weights.extend(counts.into_iter().flat_map(|n| (0..n).map(weight)));
        }
        weights
    }

    fn sums(&self, cx: &mut Cx, model: &Decoder, pairs: &[PairExample]) -> Result<Tensor> {
        let (batch, _) = self.pairs.batch(cx, model.vocab(), pairs)?;
        Ok(forward(cx, model, &batch, &self.token_weights(pairs), HeadPass::default())?.sums)
    }
}

/// WPO's means of log p - log sum p^2 over each completion, F32 [n, 2]; no gradient flows through
/// them.
fn aligned(cx: &mut Cx, f: &Forward, n: usize) -> Result<Option<Tensor>> {
    let Some(square) = &f.out.log_square else { return Ok(None) };
    let shares: Vec<f32> =
        f.starts().windows(2).flat_map(|w| vec![1.0 / (w[1] - w[0]) as f32; w[1] - w[0]]).collect();
    let logp = f.out.logp.clone().with_id(Id::Constant);
    let mean = sums(cx, &logp, &shares, f.starts())?;
    let squares = sums(cx, &square.clone().with_id(Id::Constant), &shares, f.starts())?;
    axpy(cx, &mean, &squares, -1.0)?;
    mean.reshape(&[n, 2]).map(Some)
}

impl OfflineObjective for DpoObjective {
    fn rows(&self) -> &dyn RowSet {
        &self.pairs.rows
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        let rows = &self.pairs.rows;
        let digest = || {
            let mut digest = RowsDigest::default();
            for row in 0..rows.total() {
                rows.nth(row)?.sequences().into_iter().for_each(|s| digest.sequence(s));
            }
            for row in 0..rows.total() {
                digest.weights(&self.token_weights(&[rows.nth(row)?]));
            }
            Ok(digest.finish())
        };
        let compute = |cx: &mut Cx, model: &Decoder, range: Range<usize>| {
            self.sums(cx, model, &range.map(|row| rows.nth(row)).collect::<Result<Vec<_>>>()?)
        };
        self.reference = self.reference.attached(cx, model, rows.total(), digest, compute)?;
        Ok(())
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let of = self.pairs.open(cx, micro)?;
        let n = of.pairs.len();
        let (batch, _) = self.pairs.batch(cx, model.vocab(), &of.pairs)?;
        if batch.target_ids.is_empty() {
            return Ok(LossOutput::empty(of.tokens));
        }
        let index = |r: &usize| self.pairs.rows.index(micro.split, *r);
        let stored: Vec<usize> =
            micro.rows.iter().map(index).flat_map(|i| [2 * i, 2 * i + 1]).collect();
        let compute = |cx: &mut Cx, model: &Decoder| self.sums(cx, model, &of.pairs);
        let reference = self.reference.values(cx, &stored, compute)?.reshape(&[n, 2])?;
        micro.record(cx);
        let pass = HeadPass { squares: self.use_weighting, logits: true };
        let f = forward(cx, model, &batch, &self.token_weights(&of.pairs), pass)?;
        let logps = f.sums.reshape(&[n, 2])?;
        let lens = of.sides(cx, MaskedSequence::completion_tokens)?;
        let sft = self.op.losses.iter().any(|(l, _)| *l == DpoLoss::Sft);
        let nll = if sft { Some(chosen_nll(cx, &f)?) } else { None };
        let aligned = aligned(cx, &f, n)?;
        let x = DpoIn {
            logps: &logps,
            reference: &reference,
            lens: &lens,
            weight: &of.weight,
            nll: nll.as_ref(),
            aligned: aligned.as_ref(),
        };
        let (loss, rewards) = preference::dpo(cx, self.op.clone(), &x)?;
        Ok(LossOutput::new(loss, of.tokens, move || pair_metrics(&f, &rewards, &logps.to_f32()?)))
    }

    fn stepped(&mut self, _cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        self.reference.stepped(model, done)
    }

    fn state(&self) -> Result<StateFiles> {
        self.reference.state()
    }

    fn restore(&mut self, _cx: &mut Cx, dir: &Path) -> Result<()> {
        self.reference.restore(dir)
    }
}
