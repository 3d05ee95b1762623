//! Direct preference optimisation: a reward model inside of the policy, trained on pairs (Rafailov
//! et al., "Direct Preference Optimization", 2023), and the losses that grew out of it.
//!
//! With u = log pi(y|x) - log ref(y|x) summed over a completion, w the chosen and l the rejected
//! one, the reward is beta u and the loss of a pair, for `sigmoid`, -log sigmoid(beta (u_w - u_l)).
//! All losses and their symbols stand in `kernels/preference.cu`; they are TRL 1.16.0's
//! `loss_type`s: hinge (SLiC-HF, 2023), ipo (Azar et al., 2023; by the mean over tokens, as its
//! authors ran it), exo_pair (Ji et al., 2024, eq. 16), nca_pair (Chen et al., 2024), robust
//! (Chowdhury et al., 2024), bco_pair (Jung et al., 2024), sppo_hard (Wu et al., 2024), aot and
//! aot_unpaired (Melnyk et al., 2024), apo_zero and apo_down (D'Oosterlinck et al., 2024), discopop
//! (Lu et al., 2024), sigmoid_norm (length-normalised DPO of Tulu 3, 2024), sft (the chosen
//! completions' likelihood); lists of them with weights (MPO, Wang et al., 2024). Divergences other
//! than the reverse KL: f-DPO (Wang et al., 2023). `ld_alpha`: LD-DPO (Liu et al., 2024) weighs
//! tokens beyond the shorter completion's length. `use_weighting`: WPO (Zhou et al., 2024).
//! `sync_ref_model`: TR-DPO (Gorbatovski et al., 2024).
//!
//! As in TRL: ipo and sigmoid_norm divide by the completion's tokens, a first token without a
//! log-prob included; `sft`'s mean is over a micro-batch's tokens, and `aot` sorts inside of a
//! micro-batch, so both depend on how a step is cut into micro-batches. Other than TRL: a pair is
//! weighted by the pairs of the whole step, which differs from a mean of means where the last
//! micro-batch of a step is smaller; `reference_free` and a reference folder are keys; the prompt
//! that both sides share is computed once.
//!
//! Layer 7. Invariant: at the first step the policy is the reference, bit for bit, so the margins
//! are exactly 0.

use std::path::Path;

use crate::autograd::Cx;
use crate::config::{DpoConfig, DpoLoss, FDivergence, TrainingConfig};
use crate::data::preference::{PairExample, PairStyle, PreferenceOptions};
use crate::error::Result;
use crate::methods::offline::completions::{
    Ask, Forward, PairRows, floats, forward, reward_figures, sides, sums, token_count,
};
use crate::methods::offline::{Batched, Objective, Pass, Set, Shot};
use crate::methods::reference::{Reference, ReferenceKeys};
use crate::methods::{Footprint, MaskedIds, Method, Metric, Recipe, Source};
use crate::model::decoder::Decoder;
use crate::ops::add::axpy;
use crate::ops::preference::{self, Divergence, DpoIn};
use crate::tensor::{Id, Tensor};

pub struct Dpo {
    pub pairs: PairRows,
    op: preference::Dpo,
    ld_alpha: Option<f32>,
    use_weighting: bool,
    reference: Reference,
    /// Pairs in a batch while the reference's log-probs are computed beforehand.
    batch: usize,
}

impl Dpo {
    /// Tokenises the rows. Returns what to print of them, too.
    pub fn new(
        config: &DpoConfig,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Dpo, String)> {
        let options = PreferenceOptions {
            max_length: config.max_length,
            truncation_mode: config.truncation_mode,
            on_truncation: config.on_truncation,
            eos_token: None,
        };
        let (pairs, stats) = PairRows::new(source, PairStyle::Dpo, &options)?;
        let reference = Reference::new(ReferenceKeys {
            free: config.reference_free,
            folder: config.ref_model.clone(),
            precompute: config.precompute_ref_log_probs,
            sync: config
                .sync_ref_model
                .then_some((config.ref_model_mixup_alpha, config.ref_model_sync_steps as u64)),
            longest: pairs.longest(),
            output: source.output.to_path_buf(),
        });
        let op = preference::Dpo {
            losses: config.losses(),
            divergence: match config.f_divergence_type {
                FDivergence::ReverseKl => Divergence::ReverseKl,
                FDivergence::ForwardKl => Divergence::ForwardKl,
                FDivergence::Js => Divergence::Js,
                FDivergence::Alpha => Divergence::Alpha(config.f_alpha_divergence_coef as f32),
            },
            beta: config.beta as f32,
            label_smoothing: config.label_smoothing as f32,
            discopop_tau: config.discopop_tau as f32,
        };
        let (ld_alpha, use_weighting) = (config.ld_alpha.map(|a| a as f32), config.use_weighting);
        let batch =
            config.precompute_ref_batch_size.unwrap_or(training.per_device_train_batch_size);
        Ok((Dpo { pairs, op, ld_alpha, use_weighting, reference, batch }, stats.to_string()))
    }

    /// The weight of each target's log-prob in its completion's sum.
    fn token_weights(&self, pairs: &[&PairExample]) -> Vec<f32> {
        let mut weights = Vec::new();
        for e in pairs {
            let counts = [e.chosen.targets(), e.rejected.targets()];
            let shared = counts[0].min(counts[1]);
            for n in counts {
                weights.extend(
                    (0..n).map(|i| if i < shared { 1.0 } else { self.ld_alpha.unwrap_or(1.0) }),
                );
            }
        }
        weights
    }

    /// The reference's sums of the pairs, F32 [n, 2].
    fn reference_sums(
        &self,
        cx: &mut Cx,
        set: Set,
        rows: &[usize],
        pairs: &[&PairExample],
    ) -> Result<Tensor> {
        let shape = [rows.len(), 2];
        if let Some(stored) = self.reference.stored() {
            let start = if set == Set::Train { 0 } else { 2 * self.pairs.of(Set::Train).len() };
            let values: Vec<f32> = rows
                .iter()
                .flat_map(|r| stored[start + 2 * r..start + 2 * r + 2].to_vec())
                .collect();
            return floats(cx, &values)?.reshape(&shape);
        }
        match self.reference.model() {
            Some(model) => self.sums(cx, model, pairs)?.reshape(&shape),
            None => floats(cx, &vec![0.0; 2 * rows.len()])?.reshape(&shape),
        }
    }

    fn sums(&self, cx: &mut Cx, model: &Decoder, pairs: &[&PairExample]) -> Result<Tensor> {
        let (batch, _) = self.pairs.batch(cx, model.vocab(), pairs)?;
        Ok(forward(cx, model, &batch, &self.token_weights(pairs), Ask::default())?.sums)
    }
}

/// What the log-probs of pairs follow from, beside the model.
fn digest(pairs: &[&PairExample], weights: &[f32]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    for side in pairs.iter().flat_map(|e| [&e.chosen, &e.rejected]) {
        crc.update(&(side.input_ids.len() as u64).to_le_bytes());
        crc.update(bytemuck::cast_slice(&side.input_ids));
        crc.update(&side.target_mask.iter().map(|m| u8::from(*m)).collect::<Vec<u8>>());
    }
    crc.update(bytemuck::cast_slice(weights));
    crc.finalize()
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

/// The mean NLL of the chosen completions' tokens, F32 [1]. `f` has two sequences a pair.
pub(super) fn chosen_nll(cx: &mut Cx, f: &Forward) -> Result<Tensor> {
    let starts = f.starts();
    let total = starts[starts.len() - 1];
    let chosen = |k: usize| k.is_multiple_of(2);
    let count: usize =
        starts.windows(2).enumerate().filter(|(k, _)| chosen(*k)).map(|(_, w)| w[1] - w[0]).sum();
    let share = -1.0 / count.max(1) as f32;
    let mut weights = Vec::with_capacity(total);
    for (k, w) in starts.windows(2).enumerate() {
        weights.extend(vec![if chosen(k) { share } else { 0.0 }; w[1] - w[0]]);
    }
    sums(cx, &f.out.logp, &weights, &[0, total])
}

impl Objective for Dpo {
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

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        let mut reference = std::mem::take(&mut self.reference);
        let all: Vec<&PairExample> =
            self.pairs.of(Set::Train).iter().chain(self.pairs.of(Set::Eval)).collect();
        let rows = digest(&all, &self.token_weights(&all));
        let attached = reference.attach(cx, model, rows, |cx, model| {
            let mut values = Vec::with_capacity(2 * all.len());
            for pairs in all.chunks(self.batch.max(1)) {
                values.extend(self.sums(cx, model, pairs)?.to_f32()?);
            }
            Ok(values)
        });
        self.reference = reference;
        attached
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
        let reference = self.reference_sums(cx, set, rows, &pairs)?;
        pass.begin(cx);
        let ask = Ask { squares: self.use_weighting, figures: true };
        let f = forward(cx, model, &batch, &self.token_weights(&pairs), ask)?;
        let logps = f.sums.reshape(&[n, 2])?;
        let lens: Vec<f32> = pairs
            .iter()
            .flat_map(|e| {
                [e.chosen.completion_tokens() as f32, e.rejected.completion_tokens() as f32]
            })
            .collect();
        let (lens, weight) =
            (floats(cx, &lens)?.reshape(&[n, 2])?, floats(cx, &vec![(1.0 / total) as f32; n])?);
        let sft = self.op.losses.iter().any(|(l, _)| *l == DpoLoss::Sft);
        let nll = if sft { Some(chosen_nll(cx, &f)?) } else { None };
        let aligned = aligned(cx, &f, n)?;
        let x = DpoIn {
            logps: &logps,
            reference: &reference,
            lens: &lens,
            weight: &weight,
            nll: nll.as_ref(),
            aligned: aligned.as_ref(),
        };
        let (loss, rewards) = preference::dpo(cx, self.op.clone(), &x)?;
        let metrics = move || -> Result<Vec<Metric>> {
            let mut all = f.figures(|k| k.is_multiple_of(2))?;
            all.extend(reward_figures(&rewards.to_f32()?));
            all.extend(sides("logps", &logps.to_f32()?));
            Ok(all)
        };
        Ok(Some(Shot { loss, tokens, metrics: Box::new(metrics) }))
    }

    fn stepped(&mut self, _cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        self.reference.stepped(model, done)
    }

    fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
        self.reference.state()
    }

    fn restore(&mut self, _cx: &mut Cx, dir: &Path) -> Result<()> {
        self.reference.restore(dir)
    }
}

impl Recipe for DpoConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.chat_template_path.as_deref()
    }

    fn footprint(&self) -> Footprint {
        Footprint {
            sequences: 2,
            reference: !self.reference_free && !self.precompute_ref_log_probs,
        }
    }

    fn disable_dropout(&self) -> bool {
        self.disable_dropout
    }

    fn method(
        &self,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let (dpo, stats) = Dpo::new(self, training, source)?;
        Ok((Box::new(Batched(dpo)), stats))
    }
}
