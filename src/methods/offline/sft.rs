//! Supervised fine-tuning: the negative log-likelihood of the target tokens.
//!
//! loss = -(1/T) sum over the targets t of the step batch of log p(t | tokens before it), T their
//! number over all micro-batches of the optimizer step (the first token of a sequence is never a
//! target). The gradient of a batch of 8 is that of 8 batches of 1 accumulated, up to rounding. TRL
//! 1.16.0 (`loss_type="nll"`) normalises in the same way. Metrics: `entropy` and
//! `mean_token_accuracy`, means over the targets of a micro-batch.
//!
//! Layer 7. Invariant: packing changes which rows are computed together, never what a sequence
//! sees.

use crate::autograd::{Cx, Tape};
use crate::config::{SftConfig, TrainingConfig};
use crate::data::chat::ChatTemplate;
use crate::data::packing::pack;
use crate::data::rows::Row;
use crate::data::sft::{SftExample, SftOptions, SftStats, prepare};
use crate::data::tokenizer::Tokenizer;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::methods::{Averages, MASKS, MaskedIds, Method, Metric, Recipe, Source, StepReport};
use crate::model::batch::{Batch, Sequence};
use crate::model::decoder::Decoder;
use crate::ops::head::{HeadOut, head_loss};
use crate::tensor::Tensor;

/// One row of the step batch: a sequence, or a pack of several that do not see each other.
struct TrainRow {
    sequences: Vec<(Vec<u32>, Vec<bool>)>,
    source: String,
}

pub struct Sft {
    train: Vec<TrainRow>,
    eval: Vec<TrainRow>,
    /// Longest sequence of either set.
    pub longest: usize,
}

impl Sft {
    /// Tokenises, truncates and packs. Returns the statistics of the training rows, to be printed.
    pub fn new(
        config: &SftConfig,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        vocab: usize,
        train: &[Row],
        eval: &[Row],
    ) -> Result<(Sft, SftStats)> {
        let options = options(config);
        let (examples, stats) = prepare(train, tokenizer, template, vocab, &options)?;
        let train = rows(&examples, train, &options)?;
        let eval = if eval.is_empty() {
            Vec::new()
        } else {
            rows(&prepare(eval, tokenizer, template, vocab, &options)?.0, eval, &options)?
        };
        let longest = train
            .iter()
            .chain(&eval)
            .flat_map(|r| &r.sequences)
            .map(|s| s.0.len())
            .max()
            .unwrap_or(1);
        Ok((Sft { train, eval, longest }, stats))
    }

    /// For pretraining on token streams and for tests: sequences with their masks, one a row.
    pub fn from_sequences(sequences: Vec<(Vec<u32>, Vec<bool>)>) -> Sft {
        let longest = sequences.iter().map(|s| s.0.len()).max().unwrap_or(1);
        let row = |(i, s)| TrainRow { sequences: vec![s], source: format!("row {}", i + 1) };
        Sft {
            train: sequences.into_iter().enumerate().map(row).collect(),
            eval: Vec::new(),
            longest,
        }
    }

    /// All training rows as one batch: for `temper inspect tape`.
    pub fn whole_batch(&self, cx: &Cx, model: &Decoder) -> Result<Batch> {
        let all: Vec<usize> = (0..self.train.len()).collect();
        self.batch(cx, model, &self.train, &all)
    }

    fn batch(&self, cx: &Cx, model: &Decoder, set: &[TrainRow], rows: &[usize]) -> Result<Batch> {
        let sequences: Vec<Sequence> = rows
            .iter()
            .flat_map(|r| &set[*r].sequences)
            .map(|(ids, mask)| Sequence { ids, target: Some(mask) })
            .collect();
        Batch::new(cx, &sequences, model.vocab())
    }
}

impl Recipe for SftConfig {
    fn chat_template_path(&self) -> Option<&str> {
        self.chat_template_path.as_deref()
    }

    fn method(
        &self,
        _training: &TrainingConfig,
        source: &Source,
    ) -> Result<(Box<dyn Method>, String)> {
        let Source { tokenizer, template, model, train, eval, .. } = *source;
        let (sft, stats) = Sft::new(self, tokenizer, template, model.vocab_size, train, eval)?;
        Ok((Box::new(sft), stats.to_string()))
    }
}

impl Method for Sft {
    fn longest(&self) -> usize {
        self.longest
    }

    fn rows(&self) -> usize {
        self.train.len()
    }

    fn widest(&self, rows: usize) -> usize {
        let mut tokens: Vec<usize> =
            self.train.iter().map(|r| r.sequences.iter().map(|s| s.0.len()).sum()).collect();
        tokens.sort_unstable_by_key(|n| std::cmp::Reverse(*n));
        tokens.iter().take(rows).sum()
    }

    fn eval_rows(&self) -> usize {
        self.eval.len()
    }

    fn step(
        &mut self,
        cx: &mut Cx,
        model: &Decoder,
        micro_batches: &[&[usize]],
    ) -> Result<StepReport> {
        let targets: usize =
            micro_batches.iter().flat_map(|m| m.iter()).map(|r| self.train[*r].targets()).sum();
        let weight = 1.0 / targets.max(1) as f32;
        let one = Tensor::from_host(&cx.pool, "loss", DType::F32, &[1], &[1f32])?;
        let mut outs = Vec::new();
        let mut tokens = 0;
        for rows in micro_batches {
            let batch = self.batch(cx, model, &self.train, rows)?;
            tokens += batch.rows;
            if batch.target_ids.is_empty() {
                continue;
            }
            cx.tape = Some(Tape::default());
            let (loss, out) = nll(cx, model, &batch, weight)?;
            cx.backward(vec![(loss.clone(), one.clone())])?;
            outs.push((loss, out, batch));
        }
        // Everything was launched; only now wait for the figures.
        let mut report = StepReport { loss: 0.0, tokens, metrics: Vec::new() };
        for (loss, out, batch) in &outs {
            report.loss += loss.to_f32()?[0];
            report.metrics.extend(metrics(out, batch)?);
        }
        Ok(report)
    }

    fn evaluate(&mut self, cx: &mut Cx, model: &Decoder, batch: usize) -> Result<Vec<Metric>> {
        let (mut nll_sum, mut count) = (0f64, 0usize);
        let mut averages = Averages::default();
        let rows: Vec<usize> = (0..self.eval.len()).collect();
        for rows in rows.chunks(batch.max(1)) {
            let batch = self.batch(cx, model, &self.eval, rows)?;
            if batch.target_ids.is_empty() {
                continue;
            }
            let (_, out) = nll(cx, model, &batch, 1.0)?;
            nll_sum -= out.logp.to_f32()?.iter().map(|l| f64::from(*l)).sum::<f64>();
            count += batch.target_ids.len();
            averages.add(metrics(&out, &batch)?);
        }
        let mut all = vec![("loss".into(), nll_sum / count.max(1) as f64)];
        all.extend(averages.take());
        Ok(all)
    }

    fn row_loss(&mut self, cx: &mut Cx, model: &Decoder, row: usize) -> Result<f32> {
        let batch = self.batch(cx, model, &self.train, &[row])?;
        if batch.target_ids.is_empty() {
            return Ok(0.0);
        }
        let (loss, _) = nll(cx, model, &batch, 1.0 / batch.target_ids.len() as f32)?;
        Ok(loss.to_f32()?[0])
    }

    fn masks(&self) -> Vec<MaskedIds> {
        self.train.iter().flat_map(|r| &r.sequences).take(MASKS).cloned().collect()
    }

    fn row_source(&self, row: usize) -> String {
        self.train[row].source.clone()
    }
}

impl TrainRow {
    /// What the loss is divided by. Behind a tuned prompt a first token that is a target adds to
    /// the loss and does not count here: transformers counts labels from the second on.
    fn targets(&self) -> usize {
        self.sequences.iter().map(|(_, mask)| mask.iter().skip(1).filter(|t| **t).count()).sum()
    }
}

/// `-weight * sum of log-probs` of the batch's targets.
fn nll(cx: &mut Cx, model: &Decoder, batch: &Batch, weight: f32) -> Result<(Tensor, HeadOut)> {
    let hidden = model.target_hidden(cx, batch)?;
    let n = batch.target_ids.len();
    let weights = Tensor::from_host(&cx.pool, "loss weights", DType::F32, &[n], &vec![weight; n])?;
    head_loss(cx, &hidden, &model.head, &batch.targets, &weights, 1.0)
}

fn metrics(out: &HeadOut, batch: &Batch) -> Result<[Metric; 2]> {
    let n = batch.target_ids.len() as f64;
    let entropy = out.entropy.to_f32()?.iter().map(|e| f64::from(*e)).sum::<f64>() / n;
    let best = out.best.to_vec::<i32>()?;
    let right = best.iter().zip(&batch.target_ids).filter(|(b, t)| **b as u32 == **t).count();
    Ok([("entropy".into(), entropy), ("mean_token_accuracy".into(), right as f64 / n)])
}

/// The keys as [`prepare`] takes them.
pub fn options(config: &SftConfig) -> SftOptions {
    SftOptions {
        max_length: config.max_length,
        truncation_mode: config.truncation_mode,
        on_truncation: config.on_truncation,
        dataset_text_field: config.dataset_text_field.clone(),
        completion_only_loss: config.completion_only_loss,
        assistant_only_loss: config.assistant_only_loss,
        eos_token: config.eos_token.clone(),
        packing: config.packing.then_some(config.packing_strategy),
    }
}

/// Examples to rows of the step batch: one each, or packs.
fn rows(examples: &[SftExample], source: &[Row], options: &SftOptions) -> Result<Vec<TrainRow>> {
    let name = |e: &SftExample| source.get(e.row).map(Row::place).unwrap_or_default();
    let (Some(strategy), Some(max_length)) = (options.packing, options.max_length) else {
        let row = |e: &SftExample| TrainRow {
            sequences: vec![(e.input_ids.clone(), e.target_mask.clone())],
            source: name(e),
        };
        return Ok(examples.iter().map(row).collect());
    };
    let lengths: Vec<usize> = examples.iter().map(|e| e.input_ids.len()).collect();
    let mut rows = Vec::new();
    for pack in pack(strategy, &lengths, max_length) {
        let mut sequences: Vec<(Vec<u32>, Vec<bool>)> = Vec::new();
        let mut sources: Vec<String> = Vec::new();
        for (example, range) in pack {
            let e = examples
                .get(example)
                .ok_or_else(|| Error::Run("packing named an example that is not there".into()))?;
            let (ids, mask) = (&e.input_ids[range.clone()], &e.target_mask[range]);
            match sequences.last_mut().filter(|_| !strategy.isolates()) {
                Some(last) => {
                    last.0.extend_from_slice(ids);
                    last.1.extend_from_slice(mask);
                }
                None => sequences.push((ids.to_vec(), mask.to_vec())),
            }
            sources.push(name(e));
        }
        sources.dedup();
        rows.push(TrainRow { sequences, source: sources.join(" + ") });
    }
    Ok(rows)
}
