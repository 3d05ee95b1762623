//! `temper bench train` and `launches`: a training step of a real shape with random weights.
//! Layer 9.
//!
//! Invariant: both run the step of a training run, on rows in which every token is a target.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::bench_args::BenchArgs;
use super::bench_measure::{cpu_seconds, median, peft_keys, preset};
use crate::autograd::{Cx, Recompute};
use crate::data::masked::MaskedSequence;
use crate::data::preference::PairExample;
use crate::device::dry_run::DryRun;
use crate::device::{Capabilities, DType, Device, MemoryInfo};
use crate::error::Result;
use crate::methods::offline::dpo::{DpoConfig, DpoObjective};
use crate::methods::offline::sft::{Sft, SftRun};
use crate::methods::{MaskedIds, Method};
use crate::model::builder::InitialWeights;
use crate::model::decoder::Decoder;
use crate::ops::case::Rng;
use crate::train::Trainer;
use crate::train::run::flops_per_token;
use crate::train::tuning::{prepare, scheme};

/// A trainer, and a method with rows for one micro-batch per step.
fn trainer(
    mut cx: Cx,
    args: &BenchArgs,
    weights: InitialWeights,
) -> Result<(Trainer, Box<dyn Method>)> {
    let mut keys = peft_keys(args.lora, args.base.as_deref())?;
    keys.extend([
        format!("per_device_train_batch_size={}", args.batch),
        "max_steps=1000000".into(),
    ]);
    let (run, _) = SftRun::load(None, &keys)?;
    let base = Decoder::builder(preset(&args.shape)?)
        .weights(weights)
        .storage(scheme(&run.peft))
        .positions(args.length)
        .build(&cx)?;
    let model = prepare(&cx, base, &run.peft, None, Path::new("random"), 1)?;
    let mut rng = Rng(5);
    let vocab = model.config.vocab_size;
    let row = |_| (0..args.length).map(|_| rng.below(vocab) as u32).collect::<Vec<_>>();
    let rows = (0..args.batch).map(row).map(|ids| (ids, vec![true; args.length])).collect();
    let mut method: Box<dyn Method> = match args.method.as_str() {
        "dpo" => Box::new(DpoObjective::from_pairs(&DpoConfig::default(), &pairs_of(rows))?),
        _ => Box::new(Sft::from_sequences(rows)?),
    };
    cx.recompute = args.recompute.unwrap_or(Recompute::Off);
    method.attach(&mut cx, &model)?;
    Ok((Trainer::new(cx, model, run.training, args.batch)?, method))
}

/// Steps that are not timed.
const WARM_UP: usize = 3;

/// Median wall seconds of a step, and its mean seconds on cores.
fn time_steps(
    trainer: &mut Trainer,
    method: &mut dyn Method,
    repeat: usize,
) -> Result<(f64, Option<f64>)> {
    let device = trainer.cx.device.clone();
    let (mut times, mut before) = (Vec::new(), None);
    for i in 0..repeat + WARM_UP {
        if i == WARM_UP {
            before = cpu_seconds();
        }
        let start = Instant::now();
        trainer.step(method)?;
        device.sync()?;
        if i >= WARM_UP {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let spent = before.zip(cpu_seconds()).map(|(from, to)| (to - from) / repeat as f64);
    Ok((median(times), spent))
}

pub(super) fn train(cx: Cx, args: &BenchArgs) -> Result<Value> {
    let started = Instant::now();
    let (name, dtype) = (cx.device.name(), cx.dtype.name());
    let (mut trainer, mut method) = trainer(cx, args, InitialWeights::Random { seed: 1 })?;
    let ready = started.elapsed().as_secs_f64();
    let (trained, params) = (trainer.model.trained().trained_count(), trainer.model.params.count());
    let flops = flops_per_token(&trainer.model.config, params, args.length);
    let (seconds, spent) = time_steps(&mut trainer, &mut *method, args.repeat())?;
    let sides = if args.method == "dpo" { 2 } else { 1 };
    let tokens = (sides * args.batch * args.length) as f64;
    Ok(json!({
        "bench": "train", "method": args.method, "device": name, "dtype": dtype, "parameters": params,
        "batch": args.batch, "length": args.length, "seconds_per_step": seconds, "cpu_seconds_per_step": spent,
        "tokens_per_second": tokens / seconds, "tflops": tokens * flops / seconds / 1e12,
        "peak_memory_bytes": trainer.cx.pool.in_use().1, "recompute": args.recompute.unwrap_or(Recompute::Off).word(), "seconds_to_build": ready,
        "trained_parameters": trained, "lora_r": args.lora, "base": args.base,
        "matmul": format!("{:?}", args.matmul).to_lowercase(),
    }))
}

/// Nanoseconds that this thread has run on a core. None: the system does not report it.
fn thread_nanoseconds() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// The host's time per launch, without the driver's own call.
pub(super) fn launches(args: &BenchArgs) -> Result<Value> {
    let memory = MemoryInfo { free: 0, total: 0 };
    let device = Arc::new(DryRun::new("a GPU that computes nothing", Capabilities::GPU, memory));
    let mut cx = Cx::new(device.clone(), DType::BF16)?;
    cx.matmul = args.matmul;
    let (mut trainer, mut method) = trainer(cx, args, InitialWeights::Zero)?;
    trainer.step(&mut *method)?;
    device.take_launches();
    trainer.step(&mut *method)?;
    let launches: usize = device.take_launches().values().sum();
    let before = thread_nanoseconds();
    let (seconds, _) = time_steps(&mut trainer, &mut *method, args.repeat())?;
    // Of this thread only.
    let spent = before.zip(thread_nanoseconds()).map(|(from, to)| (to - from) as f64);
    let of_launch = |ns: f64| ns / 1e3 / (args.repeat() + WARM_UP) as f64 / launches as f64;
    Ok(json!({
        "bench": "launches", "device": device.name(), "dtype": trainer.cx.dtype.name(), "batch": args.batch,
        "length": args.length, "lora_r": args.lora, "base": args.base, "recompute": args.recompute.unwrap_or(Recompute::Off).word(),
        "launches_per_step": launches, "wall_microseconds_per_launch": seconds * 1e6 / launches as f64,
        "cpu_microseconds_per_launch": spent.map(of_launch),
    }))
}

/// A pair for each row: the row itself, and its prompt with the completion reversed.
fn pairs_of(rows: Vec<MaskedIds>) -> Vec<PairExample> {
    let pair = |(row, (ids, _)): (usize, MaskedIds)| {
        let shared = ids.len() / 2;
        let target_mask: Vec<bool> = (0..ids.len()).map(|i| i >= shared).collect();
        let mut rejected = ids.clone();
        rejected[shared..].reverse();
        PairExample {
            chosen: MaskedSequence { input_ids: ids, target_mask: target_mask.clone() },
            rejected: MaskedSequence { input_ids: rejected, target_mask },
            shared,
            margin: None,
            row,
        }
    };
    rows.into_iter().enumerate().map(pair).collect()
}
