//! The command line: thin. Layer 9.
//!
//! Invariant: a command parses, calls the library, prints. Exit codes: 0 done, 1 a run failed, 2
//! bad usage or config, 130 interrupted after a clean checkpoint.

mod bench;
mod chat;
mod check;
mod data;
mod eval;
mod generate;
mod inspect;
mod launches;
mod merge;
mod model_args;
mod quickstart;
mod report;
mod score;
mod train;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Parser, Subcommand};

use crate::autograd::Cx;
use crate::config::{
    CpoConfig, DistillConfig, DpoConfig, GkdConfig, GrpoConfig, KtoConfig, OnlineDpoConfig,
    OrpoConfig, PpoConfig, PrmConfig, ReinforceConfig, RewardConfig, RlooConfig, SftConfig,
};
use crate::device::{self, DType, Device};
use crate::error::{Error, Result};
use crate::model::adapter::Adapter;
use crate::model::adapter::config::AdapterConfig;
use crate::model::decoder::Decoder;
use crate::model::folder;
use crate::model::layout::Task;

#[derive(Parser)]
#[command(
    name = "temper",
    version,
    about = "Post-training of language models, one set of CUDA kernels on a GPU or any CPU"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Supervised fine-tuning: rows of text, prompt + completion, or messages
    Sft(train::Args),
    /// Language modelling on text rows, packed; makes weights at random for a folder that has only
    /// a config
    Pretrain(train::Args),
    /// Direct preference optimisation: pairs of a chosen and a rejected answer
    Dpo(train::Args),
    /// A reward model, of pairs; starts from a language model
    Reward(train::Args),
    /// A process reward model, of solutions with a label for each step
    Prm(train::Args),
    /// KTO and BCO: single answers labelled good or bad
    Kto(train::Args),
    /// Odds-ratio preference optimisation: pairs, without a reference
    Orpo(train::Args),
    /// Contrastive preference optimisation, SimPO, AlphaPO: pairs, without a reference
    Cpo(train::Args),
    /// Distillation from a teacher's distributions
    Distill(train::Args),
    /// Group relative policy optimisation: prompts and rewards
    Grpo(train::Args),
    /// REINFORCE leave-one-out
    Rloo(train::Args),
    /// REINFORCE++ and ReMax
    Reinforce(train::Args),
    /// Proximal policy optimisation, with a value model
    Ppo(train::Args),
    /// Online DPO: two completions of a prompt, ranked by rewards
    OnlineDpo(train::Args),
    /// On-policy distillation from a teacher (GKD)
    Gkd(train::Args),
    Generate(generate::Args),
    Chat(chat::Args),
    Score(score::Args),
    Eval(eval::Args),
    Data(data::Args),
    Check(check::Args),
    Bench(bench::Args),
    Inspect(inspect::Args),
    Merge(merge::Args),
    Report(report::Args),
    Quickstart(quickstart::Args),
}

/// Where to run and in which storage type.
#[derive(clap::Args, Clone)]
pub struct Where {
    /// auto, cuda or cpu; auto takes the GPU where there is one
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// auto, float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU
    #[arg(long, default_value = "auto")]
    pub dtype: String,
}

impl Where {
    /// The device, announced on stderr, and a context on it.
    pub fn open(&self) -> Result<Cx> {
        let device = device::open(&self.device)?;
        let dtype = storage(&self.dtype, &device)?;
        eprintln!("device: {}, {}", device.name(), dtype.name());
        Cx::new(device, dtype)
    }
}

/// The storage type that a `dtype` key means on a device.
pub fn storage(dtype: &str, device: &Arc<dyn Device>) -> Result<DType> {
    match dtype {
        "auto" => Ok(if device.is_cuda() { DType::BF16 } else { DType::F32 }),
        "float32" => Ok(DType::F32),
        "bfloat16" => Ok(DType::BF16),
        other => Err(Error::Config(format!("dtype is auto, float32 or bfloat16, not \"{other}\""))),
    }
}

/// A model folder with an adapter on it where one is given. The adapter of a classifier brings the
/// score that its base, a language model, has not.
fn open_model(cx: &Cx, dir: &Path, adapter: Option<&Path>) -> Result<Decoder> {
    let mut config = folder::load_config(dir)?;
    let Some(adapter) = adapter else { return Decoder::load_as(cx, 0, dir, config, 1) };
    let task = AdapterConfig::load(adapter)?.task;
    for wanted in
        [Task::SequenceClassification { labels: 1 }, Task::TokenClassification { labels: 2 }]
    {
        if config.task == Task::CausalLm && task == wanted.peft_name() {
            config.task = wanted;
        }
    }
    let model = Decoder::load_as(cx, 0, dir, config, 1)?;
    let adapter = Adapter::load(cx, 1, adapter, &model.config, &model.params)?;
    model.with_adapter(Some(adapter))
}

/// A list of files takes all that stands behind it, the keys too: what has a `=` and is no file is
/// a key.
fn part_keys(files: &mut Vec<PathBuf>, keys: &mut Vec<String>) {
    let is_key =
        |path: &PathBuf| !path.exists() && path.to_str().is_some_and(|text| text.contains('='));
    let (found, rest): (Vec<PathBuf>, Vec<PathBuf>) =
        std::mem::take(files).into_iter().partition(is_key);
    *files = rest;
    keys.splice(0..0, found.iter().map(|key| key.display().to_string()));
}

/// Runs the command line and returns the exit code.
pub fn main() -> i32 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let code = if e.use_stderr() { 2 } else { 0 };
            // A closed pipe while help is printed is no error of ours.
            let _ = e.print();
            return code;
        }
    };
    let result = match cli.command {
        Command::Sft(args) => train::run::<SftConfig>(args),
        Command::Pretrain(args) => train::pretrain(args),
        Command::Dpo(args) => train::run::<DpoConfig>(args),
        Command::Reward(args) => train::run::<RewardConfig>(args),
        Command::Prm(args) => train::run::<PrmConfig>(args),
        Command::Kto(args) => train::run::<KtoConfig>(args),
        Command::Orpo(args) => train::run::<OrpoConfig>(args),
        Command::Cpo(args) => train::run::<CpoConfig>(args),
        Command::Distill(args) => train::run::<DistillConfig>(args),
        Command::Grpo(args) => train::run::<GrpoConfig>(args),
        Command::Rloo(args) => train::run::<RlooConfig>(args),
        Command::Reinforce(args) => train::run::<ReinforceConfig>(args),
        Command::Ppo(args) => train::run::<PpoConfig>(args),
        Command::OnlineDpo(args) => train::run::<OnlineDpoConfig>(args),
        Command::Gkd(args) => train::run::<GkdConfig>(args),
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Score(args) => score::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Data(args) => data::run(args),
        Command::Check(args) => check::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Report(args) => report::run(args),
        Command::Quickstart(args) => quickstart::run(args),
    };
    match result {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("error: {e}");
            e.exit_code()
        }
    }
}
