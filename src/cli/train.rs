//! The training commands: one run each, from a model folder and rows to a folder. Layer 9.
//!
//! Invariant: what a method is stands in its recipe; here are the arguments that all of them take.

use std::path::{Path, PathBuf};

use crate::autograd::Cx;
use crate::checkpoint::prepare_output;
use crate::cli::args::{part_keys, storage};
use crate::config::{self, DeviceChoice, Dtype, TrainingConfig};
use crate::data::rows::{Row, read_rows};
use crate::device::{self, DType};
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::{MethodEntry, MethodRun};
use crate::model::hub::resolve_model;
use crate::signals::Stop;
use crate::train::job::{Job, execute};

/// One training run, from a model folder and rows to a model folder
#[derive(clap::Args)]
pub struct Args {
    /// model folder, or a hub name in the local cache
    #[arg(long, required_unless_present = "help_options")]
    model: Option<String>,
    /// an adapter folder to train further
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// .jsonl, .json or .parquet files
    #[arg(long, num_args = 1.., required_unless_present = "help_options")]
    data: Vec<PathBuf>,
    /// rows to evaluate on (else eval_rows splits some off the end of the data)
    #[arg(long, num_args = 1..)]
    eval_data: Vec<PathBuf>,
    /// where the run is written
    #[arg(long, required_unless_present = "help_options")]
    output: Option<PathBuf>,
    /// run file (TOML)
    #[arg(long)]
    config: Option<PathBuf>,
    /// go on from the newest checkpoint of --output that verifies
    #[arg(long)]
    resume: bool,
    /// replace the run that --output holds
    #[arg(long)]
    overwrite: bool,
    /// print every option with its type, default and meaning
    #[arg(long, alias = "help-keys")]
    help_options: bool,
    /// any option of the run file
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

/// `temper sft`, `temper dpo` and the others.
pub fn run(entry: &MethodEntry, mut args: Args) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    part_keys(&mut args.eval_data, &mut args.keys);
    let mut run = (entry.run)();
    if args.help_options {
        print!("{}", config::help(&run.sections()));
        return Ok(());
    }
    let (Some(model), Some(output)) = (&args.model, &args.output) else {
        return Err(Error::Config("--model, --data and --output are needed".into()));
    };
    for note in run.read(args.config.as_deref(), &args.keys)? {
        eprintln!("note: {note}");
    }
    let dir = resolve_model(model)?;
    let cx = open(&run.training)?;
    let folder = prepare_output(output, args.overwrite, args.resume)?;
    if folder.resume().is_some() {
        same_run(folder.path(), &run)?;
    }
    let mut rows = read_rows(&args.data)?;
    let eval = eval_rows(&args, &run.training, &mut rows)?;
    let adapter = args.adapter.as_ref().map(|a| format!(" --adapter {}", a.display()));
    let (name, adapter, data) = (entry.name, adapter.unwrap_or_default(), shown(&args.data));
    let job = Job {
        run: &run,
        model: &dir,
        adapter: args.adapter.as_deref(),
        fresh: entry.from_scratch && !has_weights(&dir),
        train: &rows,
        eval: &eval,
        folder: &folder,
        command: &format!("temper {name} --model {model}{adapter} --data {data}"),
        stop: Stop::on_signals()?,
    };
    execute(cx, &job)?;
    eprintln!("wrote {}", output.display());
    Ok(())
}

fn shown(paths: &[PathBuf]) -> String {
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" ")
}

fn open(training: &TrainingConfig) -> Result<Cx> {
    let device = device::open(match training.device {
        DeviceChoice::Auto => "auto",
        DeviceChoice::Cuda => "cuda",
        DeviceChoice::Cpu => "cpu",
    })?;
    let dtype = match training.dtype {
        Dtype::Auto => storage("auto", &device)?,
        Dtype::Float32 => DType::F32,
        Dtype::Bfloat16 => DType::BF16,
    };
    eprintln!("device: {}, {}", device.name(), dtype.name());
    let mut cx = Cx::new(device, dtype)?;
    cx.matmul = training.matmul;
    cx.attention = training.attention;
    Ok(cx)
}

fn has_weights(dir: &Path) -> bool {
    dir.join("model.safetensors").exists() || dir.join("model.safetensors.index.json").exists()
}

/// A resumed run must be the run that is resumed.
fn same_run(dir: &Path, run: &MethodRun) -> Result<()> {
    let path = dir.join("config.toml");
    let text = String::from_utf8_lossy(&fsio::read(&path)?).into_owned();
    let changes = config::changes(&text, &run.sections())?;
    if changes.is_empty() {
        return Ok(());
    }
    Err(Error::Config(format!(
        "--resume goes on with the run in {}, but these keys differ from its config.toml:\n  {}\nGive the same keys, or start another run in another --output.",
        dir.display(),
        changes.join("\n  ")
    )))
}

/// The rows of --eval-data, or the last eval_rows of the data, which are then not trained on.
fn eval_rows(args: &Args, training: &TrainingConfig, rows: &mut Vec<Row>) -> Result<Vec<Row>> {
    if !args.eval_data.is_empty() {
        return read_rows(&args.eval_data);
    }
    let n = training.eval_rows.of(rows.len() as u64) as usize;
    if n >= rows.len() && n > 0 {
        return Err(Error::Config(format!(
            "eval_rows = {n} leaves no row of {} to train on",
            rows.len()
        )));
    }
    Ok(rows.split_off(rows.len() - n))
}
