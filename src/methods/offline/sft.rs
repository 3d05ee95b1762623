//! Supervised fine-tuning: the negative log-likelihood of the target tokens.
//!
//! loss = -(1/T) sum over the targets t of the step batch of log p(t | tokens before it), with T
//! their number over all micro-batches of the optimizer step (the first token of a sequence is
//! never a target). The gradient of a batch of 8 is that of 8 accumulated batches of 1, up to
//! rounding. TRL 1.16.0 (`loss_type="nll"`) normalises in the same way. Metrics: `entropy` and
//! `mean_token_accuracy`, means over the targets of a micro-batch.
//!
//! Layer 7. Invariant: packing changes which rows are computed together, never what a sequence
//! sees.

use crate::autograd::Cx;
use crate::config::value::words;
use crate::config::{
    OnTruncation, Report, TrainingConfig, TruncationMode, TruncationOptions, section,
};
use crate::data::cache::TokenisedRun;
use crate::data::feed::Encoded;
use crate::data::packing::{BATCH, PackingStrategy, pack};
use crate::data::rows::RowPlace;
use crate::data::sft::{SftEncoder, SftExample, SftOptions};
use crate::data::store::{StoredRow, TokenStore};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::methods::offline::rows::{RowSet, Split, first_sequences, targets, tokenise};
use crate::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use crate::methods::reference::floats;
use crate::methods::{
    BuildMethod, BuiltMethod, MASKS, MaskedIds, MethodEntry, MethodInputs, MethodRun, Metric,
    RowPart, RowView,
};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::head::{HeadOut, head_loss};

pub const METHOD: MethodEntry = MethodEntry::new::<SftConfig>(
    "sft",
    "Supervised fine-tuning: rows of text, prompt + completion, or messages",
);

pub const PRETRAIN: MethodEntry = MethodEntry {
    name: "pretrain",
    about: "Language modelling on text rows, packed; a folder with only a config gets random weights",
    run: pretrain,
    from_scratch: true,
    ..METHOD
};

/// The defaults of pretraining: SFT over every token of `text` rows, in packs cut anywhere.
fn pretrain() -> Box<MethodRun> {
    let mut run = MethodRun::<SftConfig>::default();
    (run.training.learning_rate, run.training.num_train_epochs) = (3e-4, 1.0);
    (run.method.packing, run.method.packing_strategy) = (true, PackingStrategy::Wrapped);
    Box::new(run)
}

words! {
    pub enum SftLoss {
        Nll = "nll" | "chunked_nll",
    }
}

section! {
    /// TRL's `SFTConfig`.
    pub struct SftConfig = "sft" {
        /// Pack several rows into one sequence of max_length tokens. Rows do not attend to each
        /// other, except with wrapped.
        pub packing: bool = false,
        /// bfd: best fit, truncating long rows. bfd_split: best fit, splitting long rows. wrapped:
        /// cut the token stream anywhere.
        pub packing_strategy: PackingStrategy = PackingStrategy::Bfd,
        /// Train on the completion only. none: yes for rows with prompt and completion, no for
        /// others.
        pub completion_only_loss: Option<bool> = None,
        /// Loss on the assistant's turns only: what the chat template marks with {% generation %},
        /// else what follows its generation prompt.
        pub assistant_only_loss: bool = false,
        /// The field of plain-text rows.
        pub dataset_text_field: String = "text".into(),
        /// nll: mean negative log-likelihood of the target tokens.
        pub loss_type: SftLoss = SftLoss::Nll,
        /// The token that ends a row. none: the tokenizer's.
        pub eos_token: Option<String> = None,
        ..pub truncation: TruncationOptions = TruncationOptions::default(),
    }
}

impl SftConfig {
    fn rules(&self, report: &mut Report) {
        if self.packing && self.truncation.length.max_length.is_none() {
            report.problem(
                "packing = true needs max_length, the length of a pack; it is \"none\"".into(),
            );
        }
        if self.packing && self.truncation.truncation_mode == TruncationMode::KeepEnd {
            report.problem(
                "truncation_mode = \"keep_end\" and packing = true: packing cuts from the end only"
                    .into(),
            );
        }
        if self.packing
            && self.packing_strategy != PackingStrategy::Bfd
            && self.truncation.length.on_truncation != OnTruncation::Truncate
        {
            report.problem(
                "on_truncation: this packing_strategy splits long rows and never drops them; \
                 leave on_truncation at \"truncate\""
                    .into(),
            );
        }
    }

    /// The options as `data::sft::prepare` takes them.
    pub fn options(&self) -> SftOptions {
        SftOptions {
            dataset_text_field: self.dataset_text_field.clone(),
            completion_only_loss: self.completion_only_loss,
            assistant_only_loss: self.assistant_only_loss,
            eos_token: self.eos_token.clone(),
            packing: self.packing.then_some(self.packing_strategy),
            ..(&self.truncation).into()
        }
    }
}

impl BuildMethod for SftConfig {
    fn rows_are_stored(&self) -> bool {
        true
    }

    fn training(&self) -> TrainingConfig {
        TrainingConfig { learning_rate: 2e-5, ..Default::default() }
    }

    fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }

    fn build(&self, _: &TrainingConfig, inputs: &MethodInputs) -> Result<BuiltMethod> {
        let (sft, stats) = Sft::new(self, inputs)?;
        Ok(BuiltMethod::new(sft, stats))
    }
}

pub type SftRun = MethodRun<SftConfig>;

/// Rows of the step batch: one sequence each, or a pack of several that do not attend to each
/// other.
#[derive(Default)]
struct PackedRows {
    train: TokenStore,
    eval: TokenStore,
}

pub struct Sft(PackedRows);

impl Sft {
    /// Tokenises, truncates and packs. Also returns a summary of the training rows to print.
    pub fn new(config: &SftConfig, inputs: &MethodInputs) -> Result<(OfflineMethod<Sft>, String)> {
        let MethodInputs { tokenizer, template, model, .. } = *inputs;
        if let Some(TokenisedRun { train, eval, summary, .. }) = inputs.stored {
            let rows = PackedRows { train: train.clone(), eval: eval.clone() };
            return Ok((OfflineMethod(Sft(rows)), summary.clone()));
        }
        let options = SftOptions { on_bad_row: inputs.on_bad_row, ..config.options() };
        let made = |split: Split| {
            let encoder = SftEncoder::new(tokenizer, template, model.vocab_size, &options)?;
            let mut waiting = Vec::new();
            let mut take = |store: &mut TokenStore, examples: Encoded<SftExample>, last: bool| {
                waiting.extend(examples);
                step_rows(store, &mut waiting, last, &options)
            };
            inputs.feed(|feed| tokenise(feed, split, encoder, &mut take))
        };
        // Evaluation rows come first: they are fewer, so their errors come early.
        let eval = made(Split::Eval)?.map(|(store, _)| store).unwrap_or_default();
        match made(Split::Train)? {
            Some((train, stats)) => {
                Ok((OfflineMethod(Sft(PackedRows { train, eval })), stats.to_string()))
            }
            None => Err(Error::Run("there are no rows to train on".into())),
        }
    }

    /// For pretraining on token streams and for tests: sequences with their masks, one a row.
    pub fn from_sequences(sequences: Vec<MaskedIds>) -> Result<OfflineMethod<Sft>> {
        let mut train = TokenStore::default();
        for (i, (ids, mask)) in sequences.iter().enumerate() {
            train.add([(&**ids, &**mask)])?;
            train.places.push_name(&format!("row {}", i + 1));
        }
        Ok(OfflineMethod(Sft(PackedRows { train, eval: TokenStore::default() })))
    }

    /// All training rows as one batch: for `temper inspect tape`.
    pub fn whole_batch(&self, cx: &Cx, model: &Decoder) -> Result<Batch> {
        let all: Vec<usize> = (0..self.0.train.count()).collect();
        self.batch(cx, model, Split::Train, &all)
    }

    fn batch(&self, cx: &Cx, model: &Decoder, split: Split, rows: &[usize]) -> Result<Batch> {
        let rows = rows.iter().map(|row| self.0.of(split).row(*row)).collect::<Result<Vec<_>>>()?;
        let sequences: Vec<Sequence> = rows
            .iter()
            .flat_map(StoredRow::sequences)
            .map(|(ids, mask)| Sequence { ids, target: Some(mask) })
            .collect();
        Batch::new(cx, &sequences, model.vocab())
    }
}

impl PackedRows {
    fn of(&self, split: Split) -> &TokenStore {
        match split {
            Split::Train => &self.train,
            Split::Eval => &self.eval,
        }
    }
}

impl RowSet for PackedRows {
    fn count(&self, split: Split) -> usize {
        self.of(split).count()
    }

    fn longest(&self) -> usize {
        self.train.longest().max(self.eval.longest()).unwrap_or(1)
    }

    fn widest(&self, rows: usize) -> usize {
        let mut all = self.train.row_lengths();
        all.sort_unstable_by_key(|n| std::cmp::Reverse(*n));
        all.iter().take(rows).sum()
    }

    fn source(&self, row: usize) -> String {
        self.train.places.text(row)
    }

    fn digest(&self, split: Split, digest: &mut Digest) -> Result<()> {
        let set = self.of(split);
        for row in 0..set.count() {
            let row = set.row(row)?;
            digest.number(row.sequences().count() as u64);
            for (ids, mask) in row.sequences() {
                digest.ids(ids);
                digest.mask(mask);
            }
        }
        Ok(())
    }

    fn masks(&self) -> Result<Vec<MaskedIds>> {
        first_sequences(&self.train, MASKS)
    }

    fn view(&self, row: usize) -> Result<RowView> {
        let part = |(ids, mask): (&[u32], &[bool])| RowPart {
            name: "",
            ids: ids.to_vec(),
            mask: mask.to_vec(),
        };
        Ok(RowView {
            places: self.train.places.lines(row),
            parts: self.train.row(row)?.sequences().map(part).collect(),
            note: String::new(),
        })
    }

    fn store(&self, split: Split) -> Option<&TokenStore> {
        Some(self.of(split))
    }
}

impl OfflineObjective for Sft {
    fn rows(&self) -> &dyn RowSet {
        &self.0
    }

    /// Behind a tuned prompt a first token that is a target adds to the loss but does not count
    /// here: transformers counts labels from the second on.
    fn weight(&self, split: Split, row: usize) -> Result<f64> {
        let row = self.0.of(split).row(row)?;
        Ok(row.sequences().map(|(_, mask)| targets(mask)).sum::<usize>() as f64)
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let batch = self.batch(cx, model, micro.split, micro.rows)?;
        let (rows, n) = (batch.rows, batch.target_ids.len());
        if n == 0 {
            return Ok(LossOutput::empty(rows));
        }
        micro.record(cx);
        let hidden = model.target_hidden(cx, &batch)?;
        let weights = floats(cx, &vec![micro.share(); n])?;
        let (loss, out) = head_loss(cx, &hidden, &model.head, &batch.targets, &weights, 1.0)?;
        Ok(LossOutput::new(loss, rows, move || metrics(&out, &batch)))
    }
}

fn metrics(out: &HeadOut, batch: &Batch) -> Result<Vec<Metric>> {
    let n = batch.target_ids.len() as f64;
    let entropy = out.entropy.to_f32()?.iter().map(|e| f64::from(*e)).sum::<f64>() / n;
    let best = out.best.to_vec::<i32>()?;
    let right = best.iter().zip(&batch.target_ids).filter(|(b, t)| **b as u32 == **t).count();
    Ok(vec![("entropy".into(), entropy), ("mean_token_accuracy".into(), right as f64 / n)])
}

/// Examples to rows of the step batch: one each, or packs. Packing takes a batch of examples at a
/// time, the rest waits unless it is the `last`.
fn step_rows(
    rows: &mut TokenStore,
    waiting: &mut Encoded<SftExample>,
    last: bool,
    options: &SftOptions,
) -> Result<()> {
    let (Some(strategy), Some(max_length)) = (options.packing, options.max_length) else {
        for (place, e) in waiting.drain(..) {
            rows.add([(&*e.input_ids, &*e.target_mask)])?;
            rows.places.push_row(&place);
        }
        return Ok(());
    };
    while waiting.len() >= BATCH || (last && !waiting.is_empty()) {
        let batch: Encoded<SftExample> = waiting.drain(..waiting.len().min(BATCH)).collect();
        add_packs(rows, &batch, strategy, max_length)?;
    }
    Ok(())
}

fn add_packs(
    rows: &mut TokenStore,
    examples: &[(RowPlace, SftExample)],
    strategy: PackingStrategy,
    max_length: usize,
) -> Result<()> {
    let lengths: Vec<usize> = examples.iter().map(|(_, e)| e.input_ids.len()).collect();
    for pack in pack(strategy, &lengths, max_length) {
        let mut sequences: Vec<MaskedIds> = Vec::new();
        let mut lines = Vec::new();
        for (example, range) in pack {
            let (place, e) = examples
                .get(example)
                .ok_or_else(|| Error::Run("packing names an example that does not exist".into()))?;
            let (ids, mask) = (&e.input_ids[range.clone()], &e.target_mask[range]);
            match sequences.last_mut().filter(|_| !strategy.isolates()) {
                Some(last) => {
                    last.0.extend_from_slice(ids);
                    last.1.extend_from_slice(mask);
                }
                None => sequences.push((ids.to_vec(), mask.to_vec())),
            }
            lines.push((&place.file, place.line));
        }
        rows.add(sequences.iter().map(|(ids, mask)| (&**ids, &**mask)))?;
        rows.places.push(lines);
    }
    Ok(())
}
