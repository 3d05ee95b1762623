//! KTO: single completions, each labelled good or bad (Ethayarajh et al., "Model Alignment as
//! Prospect Theoretic Optimization", 2024); its unpaired APO-zero (D'Oosterlinck et al., 2024); BCO
//! (Jung et al., "Binary Classifier Optimization", 2024).
//!
//! With u = log pi(y|x) - log ref(y|x): kto 1 - sigmoid(beta (u - z)) for a good one, 1 -
//! sigmoid(beta (z - u)) for a bad one, z = max(0, mean u) over mismatched completions of the
//! micro-batch, without a gradient; apo_zero_unpaired 1 - sigmoid(beta u) and sigmoid(beta u); bco
//! -log sigmoid(+-(beta u - delta)), delta the running mean of the batches' mean rewards, this
//! batch's included. Good and bad ones are weighted by `desirable_weight` and `undesirable_weight`.
//! As in TRL 1.16.0's KTOTrainer, the mismatched completions are made once, inside of batches of
//! the rows in file order, so z is an estimate from a micro-batch's rows. Other than TRL: the mean
//! is over the rows of the whole step; bco is a loss here, not a trainer (1.16.0 has none), without
//! the density ratio for a shifted prompt distribution (its `prompt_sample_size`).
//!
//! Layer 7. Invariant: a reference and its policy see the same sequences; evaluation never moves
//! delta.

use std::path::Path;

use crate::autograd::Cx;
use crate::config::{KtoConfig, KtoLoss, TrainingConfig};
use crate::data::masked::MaskedSequence;
use crate::data::preference::{Labelled, PreferenceOptions, labelled, mismatched};
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::offline::completions::{Ask, floats, forward};
use crate::methods::offline::{Batched, Objective, Pass, Set, Shot};
use crate::methods::reference::{Reference, ReferenceKeys};
use crate::methods::{Footprint, MASKS, MaskedIds, Method, Metric, Recipe, Source};
use crate::model::batch::{self, Batch, Vocab};
use crate::model::decoder::Decoder;
use crate::ops::preference::{Unpaired, UnpairedLoss, kl_baseline, running_mean, unpaired};
use crate::tensor::{Id, Tensor};

const STATE: &str = "bco.f32";

/// One set of rows: each with its own completion and, for KTO, another row's.
#[derive(Default)]
struct Rows {
    own: Vec<MaskedSequence>,
    crossed: Vec<MaskedSequence>,
    labels: Vec<bool>,
}

pub struct Kto {
    sets: [Rows; 2],
    places: Vec<String>,
    op: Unpaired,
    reference: Reference,
    batch: usize,
    /// Of bco, F32 [2]: mean and count.
    delta: Option<Tensor>,
}

impl Kto {
    pub fn new(
        config: &KtoConfig,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Kto, String)> {
        let Source { tokenizer, template, model, .. } = *source;
        let options = PreferenceOptions {
            max_length: config.max_length,
            on_truncation: config.on_truncation,
            ..PreferenceOptions::default()
        };
        let cross = config.loss_type == KtoLoss::Kto;
        let rows = |examples: &[Labelled], batch: usize| Rows {
            own: examples.iter().map(|e| e.sequence(config.max_length)).collect(),
            crossed: if cross {
                mismatched(examples, batch, config.max_length)
            } else {
                Vec::new()
            },
            labels: examples.iter().map(|e| e.label).collect(),
        };
        let (train, stats) =
            labelled(source.train, tokenizer, template, model.vocab_size, &options)?;
        if cross && training.per_device_train_batch_size < 2 {
            return Err(Error::Config(
                "loss_type = \"kto\" estimates its KL inside of a batch: per_device_train_batch_size must be at least 2 \
                 (loss_type=apo_zero_unpaired needs no estimate)"
                    .into(),
            ));
        }
        let eval = match source.eval {
            [] => Rows::default(),
            rows_of => {
                let examples =
                    labelled(rows_of, tokenizer, template, model.vocab_size, &options)?.0;
                rows(&examples, training.per_device_eval_batch_size)
            }
        };
        let places = train.iter().map(|e| source.train[e.row].place()).collect();
        let mut text = stats.to_string();
        if let Some(note) = imbalance(&train, config) {
            text += &note;
        }
        let sets = [rows(&train, training.per_device_train_batch_size), eval];
        let all = sets.iter().flat_map(|s| s.own.iter().chain(&s.crossed));
        let longest = all.map(|s| s.input_ids.len()).max().unwrap_or(1);
        let reference = Reference::new(ReferenceKeys {
            free: false,
            folder: config.ref_model.clone(),
            precompute: config.precompute_ref_log_probs,
            sync: config
                .sync_ref_model
                .then_some((config.ref_model_mixup_alpha, config.ref_model_sync_steps as u64)),
            longest,
            output: source.output.to_path_buf(),
        });
        let op = Unpaired {
            loss: match config.loss_type {
                KtoLoss::Kto => UnpairedLoss::Kto,
                KtoLoss::ApoZeroUnpaired => UnpairedLoss::ApoZeroUnpaired,
                KtoLoss::Bco => UnpairedLoss::Bco,
            },
            beta: config.beta as f32,
            desirable_weight: config.desirable_weight as f32,
            undesirable_weight: config.undesirable_weight as f32,
        };
        let batch =
            config.precompute_ref_batch_size.unwrap_or(training.per_device_train_batch_size);
        let kto = Kto { sets, places, op, reference, batch, delta: None };
        Ok((kto, text))
    }

    fn of(&self, set: Set) -> &Rows {
        &self.sets[usize::from(set == Set::Eval)]
    }

    /// The sequences that references are asked for, in the order in which their log-probs are kept.
    fn all(&self) -> Vec<&MaskedSequence> {
        self.sets.iter().flat_map(|s| s.own.iter().chain(&s.crossed)).collect()
    }

    /// The reference's sums, F32 [n], of `sequences`, which stand from `start` on in [`Kto::all`],
    /// at `rows`.
    fn reference_sums(
        &self,
        cx: &mut Cx,
        start: usize,
        rows: &[usize],
        sequences: &[&MaskedSequence],
    ) -> Result<Tensor> {
        if let Some(stored) = self.reference.stored() {
            let values: Vec<f32> = rows.iter().map(|r| stored[start + r]).collect();
            return floats(cx, &values);
        }
        match self.reference.model() {
            Some(model) => sums(cx, model, sequences),
            None => Err(Error::op("kto", "has no reference; attach comes before the first step")),
        }
    }

    /// The baseline of a micro-batch, F32 [1], and what the log calls it.
    fn baseline(
        &self,
        cx: &mut Cx,
        own: (&Tensor, &Tensor),
        crossed: Option<(&Tensor, &Tensor)>,
        train: bool,
    ) -> Result<(Tensor, &'static str)> {
        match (self.op.loss, crossed, &self.delta) {
            (UnpairedLoss::Kto, Some((policy, reference)), _) => {
                Ok((kl_baseline(cx, policy, reference)?, "kl"))
            }
            (UnpairedLoss::Bco, _, Some(state)) if train => {
                let policy = own.0.clone().with_id(Id::Constant);
                Ok((running_mean(cx, &policy, own.1, state, self.op.beta)?, "delta"))
            }
            (UnpairedLoss::Bco, _, Some(state)) => {
                Ok((floats(cx, &state.to_f32()?[..1])?, "delta"))
            }
            _ => Ok((floats(cx, &[0.0])?, "kl")),
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

/// Log-probs of each sequence's completion, F32 [n], off the tape.
fn sums(cx: &mut Cx, model: &Decoder, sequences: &[&MaskedSequence]) -> Result<Tensor> {
    let batch = packed(cx, sequences, model.vocab())?;
    if batch.target_ids.is_empty() {
        return floats(cx, &vec![0.0; sequences.len()]);
    }
    Ok(forward(cx, model, &batch, &vec![1.0; batch.target_ids.len()], Ask::default())?.sums)
}

fn digest(sequences: &[&MaskedSequence]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    for s in sequences {
        crc.update(&(s.input_ids.len() as u64).to_le_bytes());
        crc.update(bytemuck::cast_slice(&s.input_ids));
        crc.update(&s.target_mask.iter().map(|m| u8::from(*m)).collect::<Vec<u8>>());
    }
    crc.finalize()
}

/// The paper asks that desirable_weight x good : undesirable_weight x bad be in [1, 4/3].
fn imbalance(rows: &[Labelled], config: &KtoConfig) -> Option<String> {
    let good = rows.iter().filter(|r| r.label).count() as f64;
    let bad = rows.len() as f64 - good;
    let ratio = config.desirable_weight * good / (config.undesirable_weight * bad);
    let off = config.loss_type == KtoLoss::Kto
        && good > 0.0
        && bad > 0.0
        && !(0.99..=1.34).contains(&ratio);
    off.then(|| {
        format!(
            " {good} completions are good, {bad} bad: weighted {ratio:.2} to 1, where the paper advises 1 to 4/3; \
             desirable_weight and undesirable_weight set it."
        )
    })
}

impl Objective for Kto {
    fn rows(&self, set: Set) -> usize {
        self.of(set).own.len()
    }

    fn longest(&self) -> usize {
        self.all().iter().map(|s| s.input_ids.len()).max().unwrap_or(1)
    }

    fn masks(&self) -> Vec<MaskedIds> {
        self.sets[0]
            .own
            .iter()
            .take(MASKS)
            .map(|s| (s.input_ids.clone(), s.target_mask.clone()))
            .collect()
    }

    fn source(&self, row: usize) -> String {
        self.places[row].clone()
    }

    fn attach(&mut self, cx: &mut Cx, model: &Decoder) -> Result<()> {
        if self.op.loss == UnpairedLoss::Bco {
            self.delta = Some(floats(cx, &[0.0, 0.0])?);
        }
        let mut reference = std::mem::take(&mut self.reference);
        let all = self.all();
        let attached = reference.attach(cx, model, digest(&all), |cx, model| {
            let mut values = Vec::with_capacity(all.len());
            for sequences in all.chunks(self.batch.max(1)) {
                values.extend(sums(cx, model, sequences)?.to_f32()?);
            }
            Ok(values)
        });
        drop(all);
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
        let of = self.of(set);
        let before = &self.sets[0];
        let start = if set == Set::Train { 0 } else { before.own.len() + before.crossed.len() };
        let own: Vec<&MaskedSequence> = rows.iter().map(|r| &of.own[*r]).collect();
        let n = own.len();
        let tokens = own.iter().map(|s| s.input_ids.len()).sum();
        let batch = packed(cx, &own, model.vocab())?;
        if batch.target_ids.is_empty() {
            return Ok(None);
        }
        let reference = self.reference_sums(cx, start, rows, &own)?;
        let crossed = match of.crossed.is_empty() {
            true => None,
            false => {
                let sequences: Vec<&MaskedSequence> =
                    rows.iter().map(|r| &of.crossed[*r]).collect();
                let theirs = self.reference_sums(cx, start + of.own.len(), rows, &sequences)?;
                Some((sums(cx, model, &sequences)?, theirs))
            }
        };
        pass.begin(cx);
        let ask = Ask { squares: false, figures: true };
        let f = forward(cx, model, &batch, &vec![1.0; batch.target_ids.len()], ask)?;
        let pair = crossed.as_ref().map(|(a, b)| (a, b));
        let (baseline, name) = self.baseline(cx, (&f.sums, &reference), pair, pass.train)?;
        let labels: Vec<bool> = rows.iter().map(|r| of.labels[*r]).collect();
        let ints: Vec<i32> = labels.iter().map(|l| i32::from(*l)).collect();
        let (label, weight) =
            (cx.ints("labels", &ints)?, floats(cx, &vec![(1.0 / total) as f32; n])?);
        let (loss, rewards) =
            unpaired(cx, self.op.clone(), [&f.sums, &reference, &label, &weight, &baseline])?;
        let metrics = move || -> Result<Vec<Metric>> {
            let mut all = f.figures(|k| labels[k])?;
            all.retain(|m| m.0 != "mean_token_accuracy"); // TRL shows none: half of the rows are bad
            let (rewards, logps) = (rewards.to_f32()?, f.sums.to_f32()?);
            let mean = |values: &[f32], side: bool| -> Option<f64> {
                let of: Vec<f64> = values
                    .iter()
                    .zip(&labels)
                    .filter(|(_, l)| **l == side)
                    .map(|(v, _)| f64::from(*v))
                    .collect();
                (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64)
            };
            let (good, bad) = (mean(&rewards, true), mean(&rewards, false));
            let figures = [
                (name, Some(f64::from(baseline.to_f32()?[0]))),
                ("rewards/chosen", good),
                ("rewards/rejected", bad),
                ("rewards/margins", good.zip(bad).map(|(g, b)| g - b)),
                ("logps/chosen", mean(&logps, true)),
                ("logps/rejected", mean(&logps, false)),
            ];
            all.extend(figures.into_iter().filter_map(|(name, v)| Some((name.into(), v?))));
            Ok(all)
        };
        Ok(Some(Shot { loss, tokens, metrics: Box::new(metrics) }))
    }

    fn stepped(&mut self, _cx: &mut Cx, model: &Decoder, done: u64) -> Result<()> {
        self.reference.stepped(model, done)
    }

    fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
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

impl Recipe for KtoConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.chat_template_path.as_deref()
    }

    fn footprint(&self) -> Footprint {
        // A row and, for KTO's baseline, one with another's completion.
        Footprint { sequences: 2, reference: !self.precompute_ref_log_probs }
    }

    fn disable_dropout(&self) -> bool {
        self.disable_dropout
    }

    fn method(
        &self,
        training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let (kto, stats) = Kto::new(self, training, source)?;
        Ok((Box::new(Batched(kto)), stats))
    }
}
