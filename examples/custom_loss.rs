//! A loss of one's own, written with the ops of the tape: the likelihood of the rows, less a share
//! of the entropy, so that the model stays unsure (Pereyra et al., "Regularizing Neural Networks by
//! Penalizing Confident Output Distributions", 2017).
//!
//! `cargo run --example custom_loss` takes a second.

use std::sync::Arc;

use temper::config::Dtype;
use temper::data::rows::read_rows;
use temper::digest::Digest;
use temper::methods::MaskedIds;
use temper::methods::offline::rows::{RowSet, Split};
use temper::methods::offline::{LossOutput, MicroBatch, OfflineMethod, OfflineObjective};
use temper::model::batch::{Batch, Sequence};
use temper::ops::add::add;
use temper::ops::head::head_logps;
use temper::ops::preference::segment_sums;
use temper::ops::scale::constant;
use temper::train::Trainer;
use temper::{Cx, Decoder, Result, Silent, Tokenizer, TrainingConfig};

/// Token sequences; every token but the first is a target.
struct Texts(Vec<Vec<u32>>);

impl RowSet for Texts {
    fn count(&self, split: Split) -> usize {
        if split == Split::Train { self.0.len() } else { 0 }
    }

    fn longest(&self) -> usize {
        self.0.iter().map(Vec::len).max().unwrap_or(1)
    }

    fn source(&self, row: usize) -> String {
        format!("row {}", row + 1)
    }

    fn digest(&self, split: Split, digest: &mut Digest) -> Result<()> {
        (0..self.count(split)).for_each(|row| digest.ids(&self.0[row]));
        Ok(())
    }

    fn masks(&self) -> Result<Vec<MaskedIds>> {
        Ok(Vec::new())
    }
}

struct ConfidencePenalty {
    texts: Texts,
    /// Nats of likelihood that a nat of entropy is worth.
    beta: f32,
}

impl OfflineObjective for ConfidencePenalty {
    fn rows(&self) -> &dyn RowSet {
        &self.texts
    }

    /// The step's loss is a mean over target tokens, whatever micro-batches it is cut into.
    fn weight(&self, _split: Split, row: usize) -> Result<f64> {
        Ok((self.texts.0[row].len() - 1) as f64)
    }

    fn loss(&mut self, cx: &mut Cx, model: &Decoder, micro: &MicroBatch) -> Result<LossOutput> {
        let rows: Vec<Sequence> = micro
            .rows
            .iter()
            .map(|row| Sequence { ids: &self.texts.0[*row], target: None })
            .collect();
        let batch = Batch::new(cx, &rows, model.vocab())?;
        let n = batch.target_ids.len();
        micro.record(cx);
        let hidden = model.target_hidden(cx, &batch)?;
        let out = head_logps(cx, &hidden, &model.head, &batch.targets, 1.0)?;
        let all = cx.ints("all tokens", &[0, n as i32])?;
        let nll = constant(cx, &vec![-micro.share(); n])?;
        let nll = segment_sums(cx, &out.logp, &nll, &all)?;
        let penalty = constant(cx, &vec![-self.beta * micro.share(); n])?;
        let penalty = segment_sums(cx, &out.entropy, &penalty, &all)?;
        let loss = add(cx, &nll, &penalty)?;
        let entropy = move || {
            let values = out.entropy.to_f32()?;
            let mean = values.iter().map(|e| f64::from(*e)).sum::<f64>() / n as f64;
            Ok(vec![("entropy".into(), mean)])
        };
        Ok(LossOutput::new(loss, batch.rows, entropy))
    }
}

fn main() -> Result<()> {
    let dir = "tests/fixtures/sft/model";
    let config = TrainingConfig {
        learning_rate: 1e-3,
        max_steps: 5,
        dtype: Dtype::Float32,
        ..TrainingConfig::default()
    };
    let cx = Cx::open(&config, Arc::new(Silent))?;
    let tokenizer = Tokenizer::load(dir.as_ref())?;
    let rows = read_rows(&["tests/fixtures/sft/text.jsonl".into()])?;
    let texts: Vec<Vec<u32>> = rows
        .iter()
        .map(|row| tokenizer.encode(row.need("text")?.as_str().unwrap_or_default(), true))
        .collect::<Result<_>>()?;
    let texts = Texts(texts.into_iter().filter(|ids| (2..64).contains(&ids.len())).collect());
    let model = Decoder::folder(dir)?.positions(texts.longest()).build(&cx)?;
    let mut trainer = Trainer::new(cx, model, config, texts.0.len())?;
    let mut method = OfflineMethod(ConfidencePenalty { texts, beta: 0.1 });
    for _ in 0..5 {
        let step = trainer.step(&mut method)?;
        println!("step {}: loss {:.4}, entropy {:.4}", step.number, step.loss, step.metrics[0].1);
    }
    Ok(())
}
