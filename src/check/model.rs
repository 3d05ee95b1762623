//! The self-check of a whole model: a small random model on the user's device. Layer 8.
//!
//! Invariant: nothing is read from disk, so the check runs wherever the binary does. On a GPU
//! matmul is `exact`, because only that promises the bits.

use std::sync::Arc;

use super::CheckOutcome;
use crate::autograd::{Cx, Recompute};
use crate::config::MatmulChoice;
use crate::device::{DType, Device};
use crate::error::Result;
use crate::methods::offline::sft::{Sft, SftRun};
use crate::model::batch::Sequence;
use crate::model::decoder::Decoder;
use crate::model::layout::ModelConfig;
use crate::ops::case::Rng;
use crate::rollout::sample::Sampling;
use crate::rollout::{Engine, EngineOptions, Request};
use crate::train::Trainer;

/// Tokens of the models.
pub(super) const VOCAB: usize = 96;

/// Checks that the log-probs of rollouts are the trainer's, that a short training has the same bits
/// twice and with recomputation, and that it learns.
pub fn check_model(
    device: &Arc<dyn Device>,
    mut each: impl FnMut(&CheckOutcome),
) -> Vec<CheckOutcome> {
    let mut all = Vec::new();
    let mut add = |outcome: CheckOutcome| {
        each(&outcome);
        all.push(outcome);
    };
    for dtype in [DType::F32, DType::BF16] {
        if let Err(e) = check_dtype(device, dtype, &mut add) {
            add(CheckOutcome::new("training", "error".into(), dtype, Some(e.to_string())));
        }
    }
    all
}

fn check_dtype(
    device: &Arc<dyn Device>,
    dtype: DType,
    add: &mut dyn FnMut(CheckOutcome),
) -> Result<()> {
    let mut add = |op: &'static str, case: &str, failure: Option<String>| {
        add(CheckOutcome::new(op, case.to_string(), dtype, failure));
    };
    add(
        "rollout",
        "log-probs are the trainer's, bit for bit",
        differ("log-probs", rollout(device, dtype)?),
    );
    let (first, last, weights) = train(device, dtype, Recompute::Off)?;
    let falls = last < 0.7 * first;
    let failure = (!falls).then(|| format!("from {first} to {last} in 12 steps"));
    add("training", "the loss falls", failure);
    let again = train(device, dtype, Recompute::Off)?;
    add("training", "twice the same bits", differ("weights", again.2 == weights));
    let light = train(device, dtype, Recompute::Light)?;
    let recomputed = train(device, dtype, Recompute::Layers)?;
    let same = light.2 == weights && recomputed.2 == weights;
    add("training", "recomputation changes no bit", differ("weights", same));
    Ok(())
}

fn differ(what: &str, equal: bool) -> Option<String> {
    (!equal).then(|| format!("the {what} differ"))
}

pub(super) fn context(device: &Arc<dyn Device>, dtype: DType) -> Result<Cx> {
    let mut cx = Cx::new(device.clone(), dtype)?;
    if device.capabilities().gemm_depends_on_rows {
        cx.matmul = MatmulChoice::Exact;
    }
    Ok(cx)
}

fn model(device: &Arc<dyn Device>, dtype: DType) -> Result<(Cx, Decoder)> {
    let cx = context(device, dtype)?;
    let model = Decoder::builder(ModelConfig::llama(VOCAB, 64, 160, 2, 4, 2, 256, true))
        .positions(128)
        .build(&cx)?;
    model.params.initialise(0.1, 11)?;
    Ok((cx, model))
}

pub(super) fn tokens(rng: &mut Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.below(VOCAB) as u32).collect()
}

fn rollout(device: &Arc<dyn Device>, dtype: DType) -> Result<bool> {
    let (mut cx, mut model) = model(device, dtype)?;
    let mut rng = Rng(3);
    let prompts: Vec<Vec<u32>> = [3, 70, 12].iter().map(|n| tokens(&mut rng, *n)).collect();
    let sampling = Sampling { temperature: 1.0, seed: 5, ..Sampling::greedy() };
    // Groups of two share the pages of their prompt, prompts are prefilled in pieces, and the pages
    // do not suffice for all sequences.
    let mut options = EngineOptions::new(20, sampling, Vec::new(), 5);
    (options.max_step_tokens, options.pages) = (17, Some(4));
    let mut engine = Engine::new(&cx, &mut model, options, 90)?;
    let requests: Vec<Request> = (0..)
        .zip(&prompts)
        .map(|(i, p)| Request { prompt: p.clone(), n: 2, number: 2 * i })
        .collect();
    let completions = engine.generate(&mut cx, &model, &requests)?;
    for completion in &completions {
        let prompt = &prompts[completion.request];
        let ids: Vec<u32> = prompt.iter().chain(&completion.ids).copied().collect();
        let target: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
        let scored = model.logps(&mut cx, &[Sequence { ids: &ids, target: Some(&target) }])?;
        if scored[0].iter().map(|l| l.to_bits()).ne(completion.logps.iter().map(|l| l.to_bits())) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The bytes of the weights after 12 steps.
pub(super) fn check_training(
    device: &Arc<dyn Device>,
    dtype: DType,
    recompute: Recompute,
) -> Result<Vec<u8>> {
    Ok(train(device, dtype, recompute)?.2)
}

/// The first and last loss of 12 steps over 6 rows, and the bytes of the final weights.
fn train(
    device: &Arc<dyn Device>,
    dtype: DType,
    recompute: Recompute,
) -> Result<(f32, f32, Vec<u8>)> {
    let (mut cx, model) = model(device, dtype)?;
    cx.recompute = recompute;
    let mut rng = Rng(4);
    let rows: Vec<_> =
        [20, 33, 7, 64, 65, 18].iter().map(|n| (tokens(&mut rng, *n), vec![true; *n])).collect();
    let mut sft = Sft::from_sequences(rows)?;
    let keys = [
        "learning_rate=1e-2",
        "per_device_train_batch_size=3",
        "gradient_accumulation_steps=2",
        "max_steps=12",
    ];
    let (run, _) = SftRun::load(None, &keys.map(String::from))?;
    let mut trainer = Trainer::new(cx, model, run.training, 6)?;
    let mut losses = Vec::new();
    for _ in 0..12 {
        losses.push(trainer.step(&mut sft)?.loss);
    }
    let weights = &trainer.model.params.weights;
    let bytes = weights.view(0, DType::U8, &[weights.bytes()])?.to_vec::<u8>()?;
    Ok((losses[0], losses[11], bytes))
}
