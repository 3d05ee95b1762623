//! The self-check of early launches and recorded steps: the same decoding and training, launched in
//! each way. Layer 8.
//!
//! Invariant: the model has the sizes for which decoding has kernels of its own. The cases of the ops
//! cannot show this: they are single kernels, each behind an upload, and such a kernel is not
//! launched early.

use std::sync::Arc;

use super::CheckOutcome;
use super::model::{VOCAB, check_training, context, tokens};
use crate::autograd::Recompute;
use crate::device::{DType, Device};
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::layout::ModelConfig;
use crate::ops::case::Rng;
use crate::rollout::sample::Sampling;
use crate::rollout::{Engine, EngineOptions, Request};

const NAME: &str = "early launches";
/// Tokens of each completion.
const NEW_TOKENS: usize = 80;
/// Sequences that are generated at once.
const BATCHES: [u32; 3] = [1, 8, 70];

/// Generates with steps that are launched and recorded, with early launches and without them, and
/// trains with and without them, and compares bit for bit.
pub fn check_early(
    device: &Arc<dyn Device>,
    mut each: impl FnMut(&CheckOutcome),
) -> Vec<CheckOutcome> {
    let mut all = Vec::new();
    let mut add = |outcome: CheckOutcome| {
        each(&outcome);
        all.push(outcome);
    };
    let launches_early = device.launch_early(true);
    device.launch_early(launches_early);
    for dtype in [DType::BF16, DType::F32] {
        if let Err(e) = check_dtype(device, dtype, launches_early, &mut add) {
            add(CheckOutcome::new(NAME, "error".into(), dtype, Some(e.to_string())));
        }
    }
    all
}

/// `expected`: the device launches early, and must still do so in the end.
fn check_dtype(
    device: &Arc<dyn Device>,
    dtype: DType,
    expected: bool,
    add: &mut dyn FnMut(CheckOutcome),
) -> Result<()> {
    let mut add = |case: String, differ: &[String]| {
        add(CheckOutcome::of_bits(NAME, case, dtype, differ));
    };
    for batch in BATCHES {
        let plain = late(device, || generate(device, dtype, batch, false))?.0;
        let (recorded, ways) = late(device, || generate(device, dtype, batch, true))?;
        let mut differ = Vec::new();
        let mut compare = |other: &[u32], name: &str| {
            differ.extend((other != plain).then(|| name.to_string()));
        };
        compare(&recorded, "recorded steps");
        if ways {
            compare(&generate(device, dtype, batch, false)?, "early launches");
            compare(&generate(device, dtype, batch, true)?, "early launches, recorded");
        }
        add(format!("{batch} sequences of {NEW_TOKENS} tokens"), &differ);
    }
    let (without, ways) = late(device, || check_training(device, dtype, Recompute::Off))?;
    let mut differ = Vec::new();
    if ways && check_training(device, dtype, Recompute::Off)? != without {
        differ.push("weights after 12 steps".into());
    }
    match (expected, ways) {
        (true, true) => add("training".into(), &differ),
        (true, false) => {
            let failure = "not compared: recording a step turned early launches off";
            return Err(Error::Run(failure.into()));
        }
        (false, _) => {}
    }
    Ok(())
}

/// Runs `work` without early launches, and says whether the device has any.
fn late<T>(device: &Arc<dyn Device>, work: impl FnOnce() -> Result<T>) -> Result<(T, bool)> {
    let before = device.launch_early(false);
    let done = work();
    device.launch_early(before);
    Ok((done?, before))
}

/// Token ids and bits of the log-probs, one sequence after the other.
fn generate(
    device: &Arc<dyn Device>,
    dtype: DType,
    sequences: u32,
    recorded: bool,
) -> Result<Vec<u32>> {
    let mut cx = context(device, dtype)?;
    let config = ModelConfig::llama(VOCAB, 256, 512, 3, 4, 2, 256, true);
    let mut model = Decoder::builder(config).positions(256).build(&cx)?;
    model.params.initialise(0.1, 17)?;
    let sampling = Sampling { temperature: 1.0, seed: 8, ..Sampling::greedy() };
    let mut options = EngineOptions::new(NEW_TOKENS, sampling, Vec::new(), sequences as usize);
    options.replay = Some(recorded);
    let mut engine = Engine::new(&cx, &mut model, options, 256)?;
    let mut rng = Rng(9);
    let requests: Vec<Request> = (0..sequences)
        .map(|number| Request { prompt: tokens(&mut rng, 3 + number as usize % 70), n: 1, number })
        .collect();
    let completions = engine.generate(&mut cx, &model, &requests)?;
    let bits = completions.iter().flat_map(|c| {
        c.ids.iter().copied().chain(c.logps.iter().map(|logp| logp.to_bits())).collect::<Vec<_>>()
    });
    Ok(bits.collect())
}
