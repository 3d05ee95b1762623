//! `temper quickstart`: the whole pipeline with generated data and a new model. Layer 9.
//!
//! Invariant: it needs only the binary: no network, no data, no model.

use std::path::PathBuf;
use std::sync::Arc;

use crate::autograd::Cx;
use crate::cli::args::choice;
use crate::cli::parsers::{count, file};
use crate::config::{DeviceChoice, TrainingConfig};
use crate::error::{Error, Result};
use crate::observer::Terminal;
use crate::observer::output::print_line;
use crate::quickstart::{self, QuickstartOptions, QuickstartScale};

/// Train a small model from nothing through every stage of post-training
///
/// Makes its own data and tokenizer, then runs pretraining, SFT, LoRA, a reward model, DPO, PPO and
/// GRPO, and answers held-out questions before and after each stage.
#[derive(clap::Args)]
pub struct QuickstartArgs {
    /// folder for the data, the models and the report
    #[arg(long, default_value = "temper-quickstart", value_parser = file)]
    output: PathBuf,
    /// replace the quickstart that --output holds
    #[arg(long)]
    overwrite: bool,
    /// seed of the data, the weights and the order of rows
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// auto, cuda or cpu; auto takes the GPU if there is one
    #[arg(long, default_value = "auto", value_parser = choice::<DeviceChoice>)]
    device: DeviceChoice,
    /// number of CPU threads; all cores if absent
    #[arg(long, value_parser = count)]
    threads: Option<usize>,
}

pub fn run(args: QuickstartArgs) -> Result<()> {
    if let Some(threads) = args.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        pool.map_err(|e| Error::Config(format!("--threads {threads}: {e}")))?;
    }
    let begin = std::time::Instant::now();
    let training = TrainingConfig { device: args.device, ..TrainingConfig::default() };
    let cx = Cx::open(&training, Arc::new(Terminal::default()))?;
    let options = QuickstartOptions {
        output: args.output,
        overwrite: args.overwrite,
        seed: args.seed,
        scale: QuickstartScale::full(),
    };
    let outcome = quickstart::run(cx, &options)?;
    print_line(format_args!("\n{outcome}"))?;
    let out = options.output.display();
    print_line(format_args!(
        "{:.1} s in all; written to {out}. Ask the model something:",
        begin.elapsed().as_secs_f64()
    ))?;
    print_line(format_args!(
        "  temper generate --model {out}/sft --chat --prompt \"Tom has 7 cups. Tom gets 5 cups more from Mia. How many cups does Tom have?\" temperature=0"
    ))?;
    print_line(format_args!("To compute the table's exact_match of a model yourself:"))?;
    print_line(format_args!(
        "  temper eval --model {out}/sft --data {out}/data/heldout.jsonl max_new_tokens=40 \"reward_funcs={}\"",
        quickstart::MEASURE
    ))?;
    Ok(())
}
