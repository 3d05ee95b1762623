//! `temper inspect launches`: how many kernels a layer takes, forward and backward. Layer 9.
//!
//! Invariant: counted, not told: the step runs on a device that computes nothing, with one layer
//! more and one less.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::autograd::{Cx, Tape};
use crate::config::MatmulChoice;
use crate::device::{Capabilities, DType, MemoryInfo, dry_run::DryRun};
use crate::error::Result;
use crate::methods::offline::sft::{Sft, SftRun};
use crate::model::decoder::Decoder;
use crate::model::layout::ModelConfig;
use crate::observer::output::print_line;
use crate::tensor::Tensor;
use crate::train::Trainer;
use crate::train::tuning::{prepare, scheme};

type Counts = BTreeMap<String, usize>;

/// A way of training, as keys.
pub struct Mode {
    pub name: &'static str,
    pub keys: &'static [&'static str],
    pub matmul: MatmulChoice,
}

const LORA: &[&str] = &["use_peft=true", "lora_dropout=0", "lora_target_modules=all-linear"];
const QLORA: &[&str] =
    &["use_peft=true", "lora_dropout=0", "lora_target_modules=all-linear", "load_in_4bit=true"];

pub const MODES: [Mode; 5] = [
    Mode { name: "full, library products", keys: &[], matmul: MatmulChoice::Auto },
    Mode { name: "full, own products", keys: &[], matmul: MatmulChoice::Own },
    Mode { name: "LoRA, library products", keys: LORA, matmul: MatmulChoice::Auto },
    Mode { name: "LoRA, own products", keys: LORA, matmul: MatmulChoice::Own },
    Mode { name: "LoRA on 4 bits, own products", keys: QLORA, matmul: MatmulChoice::Own },
];

/// Launches of one layer, forward and backward, of a bf16 step on a GPU.
pub fn per_layer(config: &ModelConfig, mode: &Mode) -> Result<(Counts, Counts)> {
    let (few, more) = (step(config, mode, 2)?, step(config, mode, 3)?);
    let less = |more: Counts, few: &Counts| -> Counts {
        let rest =
            more.into_iter().map(|(name, n)| (n - few.get(&name).copied().unwrap_or(0), name));
        rest.filter(|(n, _)| *n > 0).map(|(n, name)| (name, n)).collect()
    };
    Ok((less(more.0, &few.0), less(more.1, &few.1)))
}

fn step(config: &ModelConfig, mode: &Mode, layers: usize) -> Result<(Counts, Counts)> {
    let device =
        Arc::new(DryRun::new("a GPU", Capabilities::GPU, MemoryInfo { free: 0, total: 0 }));
    let mut cx = Cx::new(device.clone(), DType::BF16)?;
    cx.matmul = mode.matmul;
    let mut config = config.clone();
    config.num_layers = layers;
    config.sliding_window = vec![None; layers];
    let (run, _) =
        SftRun::load(None, &mode.keys.iter().map(|k| k.to_string()).collect::<Vec<_>>())?;
    let base = Decoder::builder(config).storage(scheme(&run.peft)).positions(64).build(&cx)?;
    let model = prepare(&cx, base, &run.peft, None, Path::new("model"), 0)?;
    let sft = Sft::from_sequences(vec![(vec![0; 64], vec![true; 64])]);
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

/// Prints the table, and what each count is made of.
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
    Ok(())
}
