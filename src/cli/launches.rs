//! `temper inspect launches`: the number of kernels per layer, forward and backward, and the host's
//! time for a decode step. Layer 9.
//!
//! Invariant: the numbers are measured. The step runs on a device that computes nothing; counts of
//! a layer are the difference between training steps with three and with two layers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::autograd::{Cx, Tape};
use crate::config::MatmulChoice;
use crate::device::{Capabilities, DType, MemoryInfo, dry_run::DryRun};
use crate::error::Result;
use crate::methods::offline::sft::{Sft, SftRun};
use crate::model::decoder::Decoder;
use crate::model::layout::{Mixer, ModelConfig};
use crate::observer::output::print_line;
use crate::rollout::sample::Sampling;
use crate::rollout::{Engine, EngineOptions, Request};
use crate::tensor::Tensor;
use crate::train::Trainer;
use crate::train::tuning::{prepare, scheme};

/// Number of launches by name.
pub type LaunchCounts = BTreeMap<String, usize>;

/// A way of training, as options.
pub struct Mode {
    pub name: &'static str,
    pub keys: &'static [&'static str],
    pub matmul: MatmulChoice,
    /// On a GPU with the Hopper kernels.
    pub hopper: bool,
}

const LORA: &[&str] = &["use_peft=true", "lora_dropout=0", "lora_target_modules=all-linear"];
const QLORA: &[&str] =
    &["use_peft=true", "lora_dropout=0", "lora_target_modules=all-linear", "load_in_4bit=true"];

const fn mode(name: &'static str, keys: &'static [&'static str], matmul: MatmulChoice) -> Mode {
    Mode { name, keys, matmul, hopper: false }
}

pub const MODES: [Mode; 7] = [
    mode("full, library products", &[], MatmulChoice::Auto),
    mode("full, own products", &[], MatmulChoice::Own),
    mode("LoRA, library products", LORA, MatmulChoice::Auto),
    mode("LoRA, own products", LORA, MatmulChoice::Own),
    mode("LoRA on 4 bits, own products", QLORA, MatmulChoice::Own),
    Mode { hopper: true, ..mode("LoRA, Hopper", LORA, MatmulChoice::Auto) },
    Mode { hopper: true, ..mode("LoRA on 4 bits, Hopper", QLORA, MatmulChoice::Auto) },
];

/// Launches of one layer, forward and backward, in a bf16 step on a GPU.
pub fn per_layer(config: &ModelConfig, mode: &Mode) -> Result<(LaunchCounts, LaunchCounts)> {
    let (few, more) = (step(config, mode, 2)?, step(config, mode, 3)?);
    let less = |more: LaunchCounts, few: &LaunchCounts| -> LaunchCounts {
        let rest =
            more.into_iter().map(|(name, n)| (n - few.get(&name).copied().unwrap_or(0), name));
        rest.filter(|(n, _)| *n > 0).map(|(n, name)| (name, n)).collect()
    };
    Ok((less(more.0, &few.0), less(more.1, &few.1)))
}

fn step(config: &ModelConfig, mode: &Mode, layers: usize) -> Result<(LaunchCounts, LaunchCounts)> {
    let capabilities = Capabilities { wgmma: mode.hopper, ..Capabilities::GPU };
    let device = Arc::new(DryRun::new("a GPU", capabilities, MemoryInfo { free: 0, total: 0 }));
    let mut cx = Cx::new(device.clone(), DType::BF16)?;
    cx.matmul = mode.matmul;
    let mut config = config.clone();
    config.num_layers = layers;
    // As many as the last layer's kind.
    config.mixers = vec![config.mixers.last().copied().unwrap_or(Mixer::Attention); layers];
    config.sliding_window = vec![None; layers];
    config.layer_rope = vec![config.layer_rope.iter().find_map(|rope| *rope); layers];
    let (run, _) =
        SftRun::load(None, &mode.keys.iter().map(|k| k.to_string()).collect::<Vec<_>>())?;
    let base = Decoder::builder(config).storage(scheme(&run.peft)).positions(64).build(&cx)?;
    let model = prepare(&cx, base, &run.peft, None, Path::new("model"), 0)?;
    let sft = Sft::from_sequences(vec![(vec![0; 64], vec![true; 64])])?;
    let mut trainer = Trainer::new(cx, model, run.training, 1)?;
    let (cx, model) = (&mut trainer.cx, &trainer.model);
    let batch = sft.0.whole_batch(cx, model)?;
    device.take_launches();
    cx.tape = Some(Tape::default());
    let hidden = model.target_hidden(cx, &batch)?;
    let forward = device.take_launches();
    let upstream = Tensor::new(&cx.pool, "upstream", hidden.dtype(), hidden.shape())?;
    cx.backward(vec![(hidden, upstream)])?;
    Ok((forward, device.take_launches()))
}

/// The host's work for a decode step.
pub struct DecodeStep {
    pub launches: LaunchCounts,
    /// Time of the call: rows, uploads, launches. Excludes the driver.
    pub host: Duration,
}

/// A bf16 decode step of `sequences` sequences on a GPU, launched or replayed: the mean of 32
/// steps.
pub fn decode_step(config: &ModelConfig, sequences: usize, replay: bool) -> Result<DecodeStep> {
    const STEPS: usize = 32;
    let device =
        Arc::new(DryRun::new("a GPU", Capabilities::GPU, MemoryInfo { free: 0, total: 0 }));
    let mut cx = Cx::new(device.clone(), DType::BF16)?;
    let mut model = Decoder::builder(config.clone()).build(&cx)?;
    let mut options = EngineOptions::new(STEPS + 8, Sampling::greedy(), Vec::new(), sequences);
    (options.replay, options.ahead) = (Some(replay), Some(replay));
    let mut engine = Engine::new(&cx, &mut model, options, STEPS + 9)?;
    for number in 0..sequences as u32 {
        engine.submit(&Request { prompt: vec![0], n: 1, number })?;
    }
    // The first step launches and the second records.
    for _ in 0..3 {
        engine.step(&mut cx, &model)?;
    }
    device.take_launches();
    let start = Instant::now();
    for _ in 0..STEPS {
        engine.step(&mut cx, &model)?;
    }
    let host = start.elapsed() / STEPS as u32;
    let launches = device.take_launches().into_iter().map(|(name, n)| (name, n / STEPS)).collect();
    Ok(DecodeStep { launches, host })
}

/// Prints the table and the kernels in each count.
pub fn print(config: &ModelConfig) -> Result<()> {
    print_line(format_args!(
        "launches of one layer of a bf16 training step on a GPU, rank 16 on all seven projections, no dropout:\n"
    ))?;
    print_line(format_args!("{:<30} {:>8} {:>9} {:>6}", "", "forward", "backward", "both"))?;
    let mut details = String::new();
    for mode in &MODES {
        let (forward, backward) = per_layer(config, mode)?;
        let (f, b): (usize, usize) = (forward.values().sum(), backward.values().sum());
        print_line(format_args!("{:<30} {f:>8} {b:>9} {:>6}", mode.name, f + b))?;
        for (what, counts) in [("forward", forward), ("backward", backward)] {
            let list: Vec<String> = counts.iter().map(|(name, n)| format!("{n} {name}")).collect();
            details += &format!("{}, {what}: {}\n", mode.name, list.join(", "));
        }
    }
    print_line(format_args!("\n{details}"))?;
    print_line(format_args!(
        "a bf16 decode step on a GPU: launches, and host time without the driver's\n"
    ))?;
    print_line(format_args!("{:>9} {:>9} {:>9} {:>9}", "sequences", "launched", "", "replayed"))?;
    for sequences in [1, 64, 256, 1024] {
        let [launched, replayed] = [false, true].map(|r| decode_step(config, sequences, r));
        let (launched, replayed) = (launched?, replayed?);
        let sum = |step: &DecodeStep| step.launches.values().sum::<usize>();
        let us = |step: &DecodeStep| format!("{:.0} us", step.host.as_secs_f64() * 1e6);
        print_line(format_args!(
            "{sequences:>9} {:>9} {:>9} {:>9} {:>9}",
            sum(&launched),
            us(&launched),
            sum(&replayed),
            us(&replayed)
        ))?;
    }
    Ok(())
}
