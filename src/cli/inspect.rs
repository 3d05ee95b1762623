//! `temper inspect`: what a folder means, what the tape records, which kernels are built. Floor 7.

use crate::cli::Where;
use crate::device::kernels;
use crate::error::{Error, Result};
use crate::methods::Method;
use crate::methods::sft::Sft;
use crate::model::decoder::Decoder;
use crate::model::folder;
use crate::model::hub::resolve_model;
use crate::ops::Rng;
use crate::tape::Tape;

/// Print a model's config and parameters, the tape of a training step with the bytes each node holds, or the kernels
#[derive(clap::Args)]
pub struct Args {
    /// config, tape, memory or kernels
    what: String,
    /// model folder, or a hub name in the local cache (config, tape, memory)
    #[arg(long)]
    model: Option<String>,
    /// tape, memory: rows of the batch
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// tape, memory: tokens of a row
    #[arg(long, default_value_t = 64)]
    length: usize,
    /// tape, memory: recompute each layer's activations on the way back
    #[arg(long)]
    recompute: bool,
    #[command(flatten)]
    on: Where,
}

pub fn run(args: Args) -> Result<()> {
    if args.what == "kernels" {
        for kernel in kernels::ALL {
            let hot = if kernel.hot { ", hot" } else { "" };
            println!(
                "{:<28} up to {} threads a block{hot}; image {}",
                kernel.name,
                kernel.threads,
                kernel.image.bytes.len()
            );
        }
        println!(
            "{} kernel instances; image: bytes of the GPU code of the kernel's file, 0 in a build without nvcc",
            kernels::ALL.len()
        );
        return Ok(());
    }
    let Some(model) = &args.model else {
        return Err(Error::Config(format!("temper inspect {} needs --model DIR", args.what)));
    };
    let dir = resolve_model(model)?;
    match args.what.as_str() {
        "config" => config(&dir),
        "tape" | "memory" => step(&args, &dir),
        other => Err(Error::Config(format!("temper inspect config, tape, memory or kernels, not \"{other}\""))),
    }
}

fn config(dir: &std::path::Path) -> Result<()> {
    let config = folder::load_config(dir)?;
    let specs = crate::model::families::expected_params(&config);
    println!("{} ({})", config.family.architecture, config.family.model_type);
    println!(
        "vocabulary {}, hidden {}, intermediate {}, layers {}, heads {} (kv {}), head_dim {}",
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim
    );
    println!(
        "rope {:?}, eps {:e}, tied head {}, qk-norm {}",
        config.rope, config.rms_norm_eps, config.tie_word_embeddings, config.qk_norm
    );
    for spec in &specs {
        println!("{:<56} {:?}", spec.name, spec.shape);
    }
    println!("{} parameters in {} tensors", specs.iter().map(|s| s.len()).sum::<usize>(), specs.len());
    Ok(())
}

/// Records the forward of a step over random tokens, prints it, runs its backward, and prints the memory at the peak.
fn step(args: &Args, dir: &std::path::Path) -> Result<()> {
    let mut cx = args.on.open()?;
    let model = Decoder::load(&cx, 0, dir, args.length)?;
    let (arena, slots) = model.params.gradients(&cx)?;
    cx.param_grads = vec![slots];
    let mut rng = Rng(1);
    let mut row = || (0..args.length).map(|_| rng.below(model.config.vocab_size) as u32).collect::<Vec<_>>();
    let rows: Vec<_> = (0..args.batch).map(|_| (row(), vec![true; args.length])).collect();
    let mut sft = Sft::from_sequences(rows);
    if args.what == "tape" {
        let batch = sft.whole_batch(&cx, &model)?;
        cx.tape = Some(Tape::default());
        model.target_hidden(&mut cx, &batch, args.recompute)?;
        if let Some(tape) = cx.tape.take() {
            print!("{}", tape.describe());
        }
        return Ok(());
    }
    let all: Vec<usize> = (0..args.batch).collect();
    sft.step(&mut cx, &model, &[&all], args.recompute)?;
    drop(arena);
    println!("at the peak of one step (no optimizer), {} bytes:", cx.pool.in_use().1);
    for (name, bytes) in cx.pool.high_water() {
        println!("{bytes:>14}  {name}");
    }
    Ok(())
}
