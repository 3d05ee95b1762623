//! KTO: single completions, each labelled desirable or undesirable (Ethayarajh et al., "Model
//! Alignment as Prospect Theoretic Optimization", 2024); its unpaired APO-zero (D'Oosterlinck et
//! al., 2024); BCO (Jung et al., "Binary Classifier Optimization", 2024).
//!
//! With u = log pi(y|x) - log ref(y|x): kto is 1 - sigmoid(beta (u - z)) for a desirable and 1 -
//! sigmoid(beta (z - u)) for an undesirable completion, with z = max(0, mean u) over mismatched
//! completions of the micro-batch, without a gradient; apo_zero_unpaired is 1 - sigmoid(beta u) and
//! sigmoid(beta u); bco is -log sigmoid(+-(beta u - delta)), with delta the running mean of the
//! batches' mean rewards, including this batch's. The two labels are weighted by `desirable_weight`
//! and `undesirable_weight`. As in TRL 1.16.0's KTOTrainer, the mismatched completions are made
//! once, within batches of the rows in file order, so z is an estimate from a micro-batch's rows.
//! Unlike TRL: the mean is over the rows of the whole step; bco is a loss here, not a trainer
//! (1.16.0 has none), without the density ratio for a shifted prompt distribution (its
//! `prompt_sample_size`).
//!
//! Layer 7. Invariant: a reference and its policy see the same sequences; evaluation never changes
//! delta.

use std::ops::Range;
use std::path::Path;

use crate::autograd::Cx;
use crate::config::{
    LengthOptions, ReferenceOptions, Report, SamplingStrategy, TrainingConfig, section,
};
use crate::data::masked::MaskedSequence;
use crate::data::preference::{CrossedEncoder, LabelledEncoder, PreferenceOptions};
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::offline::completions::{HeadPass, forward};
use crate::methods::offline::rows::{Example, LabelledPair, RowSet, Rows, Split};
use crate::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use crate::methods::reference::{Reference, RowsDigest, floats};
use crate::methods::{
    BuildMethod, BuiltMethod, Footprint, MASKS, MaskedIds, MethodEntry, MethodInputs, StateFiles,
};
use crate::model::batch::{self, Batch, Vocab};
use crate::model::decoder::Decoder;
use crate::ops::preference::{Unpaired, UnpairedLoss, kl_baseline, running_mean, unpaired};
use crate::tensor::{Id, Tensor};

pub const METHOD: MethodEntry =
    MethodEntry::new::<KtoConfig>("kto", "KTO and BCO: single answers labelled good or bad");

section! {
    /// TRL's `KTOConfig`, and what BCO adds.
    pub struct KtoConfig = "kto" {
        /// kto: rewards relative to an estimate of the KL. apo_zero_unpaired: without it. bco (not
        /// in TRL 1.16.0): relative to the running mean reward.
        pub loss_type: UnpairedLoss = UnpairedLoss::Kto,
        /// Strength of the pull to the reference model.
        pub beta: f64 = 0.1,
        /// Weight of the completions labelled true.
        pub desirable_weight: f64 = 1.0,
        /// Weight of the completions labelled false.
        pub undesirable_weight: f64 = 1.0,
        /// Ours. In conversations, count only the assistant's turns of a completion. TRL counts all
        /// that follows the prompt, also user messages in between.
        pub assistant_only_loss: bool = false,
        ..pub reference: ReferenceOptions = ReferenceOptions::default(),
        ..pub length: LengthOptions = LengthOptions::default(),
    }
}

impl KtoConfig {
    fn rules(&self, report: &mut Report) {
        report.must(self.beta > 0.0, || format!("beta = {}: must be above 0", self.beta));
        for (key, weight) in [
            ("desirable_weight", self.desirable_weight),
            ("undesirable_weight", self.undesirable_weight),
        ] {
            report.must(weight >= 0.0, || format!("{key} = {weight}: must not be below 0"));
        }
    }
}

impl BuildMethod for KtoConfig {
    fn rows_are_stored(&self) -> bool {
        true
    }

    fn training(&self) -> TrainingConfig {
        TrainingConfig {
            learning_rate: 1e-6,
            disable_dropout: true,
            train_sampling_strategy: SamplingStrategy::Sequential,
            ..Default::default()
        }
    }

    fn footprint(&self) -> Footprint {
        // A row and, for KTO's baseline, one with another row's completion.
        Footprint { sequences: 2, reference: !self.reference.precompute_ref_log_probs }
    }

    fn build(&self, training: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let (kto, stats) = KtoObjective::new(self, training, inputs)?;
        Ok(BuiltMethod::new(OfflineMethod(kto), stats))
    }
}

const STATE: &str = "bco.f32";

pub struct KtoObjective {
    rows: Rows<LabelledPair>,
    op: Unpaired,
    reference: Reference,
    /// State of bco, F32 [2]: mean and count.
    delta: Option<Tensor>,
}

/// The baseline of a micro-batch's loss.
struct Baseline {
    /// F32 `[1]`
    value: Tensor,
    /// Its name in the log.
    name: &'static str,
}

impl KtoObjective {
    fn new(
        config: &KtoConfig,
        training: &TrainingConfig,
        inputs: &MethodInputs,
    ) -> Result<(KtoObjective, String)> {
        let cross = config.loss_type == UnpairedLoss::Kto;
        if cross && training.per_device_train_batch_size < 2 {
            return Err(Error::Config(
                "loss_type = \"kto\" estimates its KL within a batch: \
                 per_device_train_batch_size must be at least 2 (loss_type=apo_zero_unpaired needs \
                 no estimate)"
                    .into(),
            ));
        }
        let limit = config.length.max_length;
        let MethodInputs { tokenizer, template, model, on_bad_row, .. } = *inputs;
        let assistant_only_loss = config.assistant_only_loss;
        let options =
            PreferenceOptions { assistant_only_loss, on_bad_row, ..(&config.length).into() };
        let encoder = |split| {
            let batch = match split {
                Split::Train => training.per_device_train_batch_size,
                Split::Eval => training.per_device_eval_batch_size,
            };
            let labelled = LabelledEncoder::new(tokenizer, template, model.vocab_size, &options)?;
            Ok(CrossedEncoder::new(labelled, cross.then_some(batch)))
        };
        let pair = |(own, crossed)| LabelledPair::new(&own, limit, crossed);
        let (rows, mut stats) = Rows::tokenise(inputs, encoder, pair)?;
        if inputs.stored.is_none() {
            // After a list of bad rows a sentence must begin on a new line.
            stats += &imbalance(&rows, config).map(|said| format!("\n{said}")).unwrap_or_default();
        }
        let reference = Reference::of(&config.reference, training, inputs, rows.longest());
        let op = Unpaired {
            loss: config.loss_type,
            beta: config.beta as f32,
            desirable_weight: config.desirable_weight as f32,
            undesirable_weight: config.undesirable_weight as f32,
        };
        Ok((KtoObjective { rows, op, reference, delta: None }, stats))
    }

    /// Sequences of a row: its own and, for KTO's estimate, the crossed one.
    fn each(&self) -> usize {
        1 + usize::from(self.op.loss == UnpairedLoss::Kto)
    }

    /// Of all sequences that the reference is asked for, the one with number `i`.
    fn sequence(&self, i: usize) -> Result<MaskedSequence> {
        let LabelledPair { own, crossed, .. } = self.rows.nth(i / self.each())?;
        match (i % self.each(), crossed) {
            (1, Some(crossed)) => Ok(crossed),
            _ => Ok(own),
        }
    }

    /// The reference's sums, F32 `[n]`, of the own or the crossed sequences of the micro-batch.
    fn reference_sums(
        &self,
        cx: &mut Cx,
        micro: &MicroBatch,
        crossed: bool,
        sequences: &[&MaskedSequence],
    ) -> Result<Tensor> {
        let index =
            |r: &usize| self.each() * self.rows.index(micro.split, *r) + usize::from(crossed);
        let indices: Vec<usize> = micro.rows.iter().map(index).collect();
        self.reference.values(cx, &indices, |cx, model| sums(cx, model, sequences))
    }

    /// The baseline of a micro-batch, from the (policy, reference) sums of its own sequences and of
    /// the crossed ones.
    fn baseline(
        &self,
        cx: &mut Cx,
        own: (&Tensor, &Tensor),
        crossed: Option<&(Tensor, Tensor)>,
        train: bool,
    ) -> Result<Baseline> {
        let baseline = |value, name| Ok(Baseline { value, name });
        match (self.op.loss, crossed, &self.delta) {
            (UnpairedLoss::Kto, Some((policy, reference)), _) => {
                baseline(kl_baseline(cx, policy, reference)?, "kl")
            }
            (UnpairedLoss::Bco, _, Some(state)) if train => {
                let policy = own.0.clone().with_id(Id::Constant);
                baseline(running_mean(cx, &policy, own.1, state, self.op.beta)?, "delta")
            }
            (UnpairedLoss::Bco, _, Some(state)) => {
                baseline(floats(cx, &state.to_f32()?[..1])?, "delta")
            }
            _ => baseline(floats(cx, &[0.0])?, "kl"),
        }
    }
}

fn packed(cx: &Cx, sequences: &[&MaskedSequence], vocab: Vocab) -> Result<Batch> {
    let sequences: Vec<batch::Sequence> = sequences
        .iter()
        .map(|s| batch::Sequence { ids: &s.input_ids, target: Some(&s.target_mask) })
        .collect();
    Batch::new(cx, &sequences, vocab)
}

/// Log-probs of each sequence's completion, F32 `[n]`, off the tape.
fn sums(cx: &mut Cx, model: &Decoder, sequences: &[&MaskedSequence]) -> Result<Tensor> {
    let batch = packed(cx, sequences, model.vocab())?;
    let targets = batch.target_ids.len();
    if targets == 0 {
        return floats(cx, &vec![0.0; sequences.len()]);
    }
    Ok(forward(cx, model, &batch, &vec![1.0; targets], HeadPass::default())?.sums)
}

/// A warning if desirable_weight x desirable : undesirable_weight x undesirable is outside [1,
/// 4/3], the range that the paper recommends.
fn imbalance(rows: &Rows<LabelledPair>, config: &KtoConfig) -> Option<String> {
    let count = rows.count(Split::Train);
    let good = (0..count).filter(|row| rows.labels(Split::Train, *row) == [1]).count() as f64;
    let bad = count as f64 - good;
    let ratio = config.desirable_weight * good / (config.undesirable_weight * bad);
    let off = config.loss_type == UnpairedLoss::Kto
        && good > 0.0
        && bad > 0.0
        && !(0.99..=1.34).contains(&ratio);
    off.then(|| {
        format!(
            "{good} completions are good and {bad} are bad: their weighted ratio is {ratio:.2} \
             to 1, but the paper advises 1 to 4/3. Set desirable_weight and undesirable_weight \
             to change it."
        )
    })
}

impl OfflineObjective for KtoObjective {
    fn rows(&self) -> &dyn RowSet {
        &self.rows
    }

    fn masks(&self) -> Result<Vec<MaskedIds>> {
        let own = |row| self.rows.example(Split::Train, row).map(|e| e.own);
        let own = (0..self.rows.count(Split::Train).min(MASKS)).map(own);
        own.map(|s| s.map(|s| (s.input_ids, s.target_mask))).collect()
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        if self.op.loss == UnpairedLoss::Bco {
            self.delta = Some(floats(cx, &[0.0, 0.0])?);
        }
        let all = self.each() * self.rows.total();
        let digest = || {
            let mut digest = RowsDigest::default();
            for row in 0..self.rows.total() {
                self.rows.nth(row)?.sequences().into_iter().for_each(|s| digest.sequence(s));
            }
            Ok(digest.finish())
        };
        let compute = |cx: &mut Cx, model: &Decoder, range: Range<usize>| {
            let some = range.map(|i| self.sequence(i)).collect::<Result<Vec<_>>>()?;
            sums(cx, model, &some.iter().collect::<Vec<_>>())
        };
        self.reference = self.reference.attached(cx, model, all, digest, compute)?;
        Ok(())
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let rows = self.rows.pick(micro.split, micro.rows)?;
        let own: Vec<&MaskedSequence> = rows.iter().map(|e| &e.own).collect();
        let n = own.len();
        let tokens = own.iter().map(|s| s.input_ids.len()).sum();
        let batch = packed(cx, &own, model.vocab())?;
        let targets = batch.target_ids.len();
        if targets == 0 {
            return Ok(LossOutput::empty(tokens));
        }
        let reference = self.reference_sums(cx, micro, false, &own)?;
        let crossed: Vec<&MaskedSequence> =
            rows.iter().filter_map(|e| e.crossed.as_ref()).collect();
        let crossed = if crossed.is_empty() {
            None
        } else {
            let theirs = self.reference_sums(cx, micro, true, &crossed)?;
            Some((sums(cx, model, &crossed)?, theirs))
        };
        micro.record(cx);
        let pass = HeadPass { squares: false, logits: true };
        let f = forward(cx, model, &batch, &vec![1.0; targets], pass)?;
        let own = (&f.sums, &reference);
        let baseline = self.baseline(cx, own, crossed.as_ref(), micro.train)?;
        let labels: Vec<bool> = rows.iter().map(|e| e.label).collect();
        let ints: Vec<i32> = labels.iter().map(|l| i32::from(*l)).collect();
        let (label, weight) = (cx.ints("labels", &ints)?, floats(cx, &vec![micro.share(); n])?);
        let inputs = [&f.sums, &reference, &label, &weight, &baseline.value];
        let (loss, rewards) = unpaired(cx, self.op.clone(), inputs)?;
        Ok(LossOutput::new(loss, tokens, move || {
            let mut all = f.metrics(|k| labels[k])?;
            all.retain(|m| m.0 != "mean_token_accuracy"); // TRL has none: half of the rows are bad
            let (rewards, logps) = (rewards.to_f32()?, f.sums.to_f32()?);
            let mean = |values: &[f32], side: bool| -> Option<f64> {
                let of = values.iter().zip(&labels).filter(|(_, l)| **l == side);
                let of: Vec<f64> = of.map(|(v, _)| f64::from(*v)).collect();
                (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64)
            };
            let (good, bad) = (mean(&rewards, true), mean(&rewards, false));
            let metrics = [
                (baseline.name, Some(f64::from(baseline.value.to_f32()?[0]))),
                ("rewards/chosen", good),
                ("rewards/rejected", bad),
                ("rewards/margins", good.zip(bad).map(|(g, b)| g - b)),
                ("logps/chosen", mean(&logps, true)),
                ("logps/rejected", mean(&logps, false)),
            ];
            all.extend(metrics.into_iter().filter_map(|(name, v)| Some((name.into(), v?))));
            Ok(all)
        }))
    }

    fn stepped(&mut self, _cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        self.reference.stepped(model, done)
    }

    fn state(&self) -> Result<StateFiles> {
        let mut files = self.reference.state()?;
        if let Some(delta) = &self.delta {
            files.push((STATE.into(), bytemuck::cast_slice(&delta.to_f32()?).to_vec()));
        }
        Ok(files)
    }

    fn restore(&mut self, _cx: &mut Cx, dir: &Path) -> Result<()> {
        self.reference.restore(dir)?;
        let Some(delta) = &self.delta else { return Ok(()) };
        let path = dir.join(STATE);
        let bytes = fsio::read(&path)?;
        match bytes.as_chunks::<4>().0 {
            [mean, count] => delta.upload(&[f32::from_le_bytes(*mean), f32::from_le_bytes(*count)]),
            _ => Err(Error::checkpoint(&path, "does not hold two numbers, a mean and a count")),
        }
    }
}
