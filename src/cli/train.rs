//! `temper sft` and `temper pretrain`: one training run each. Floor 7.

use std::path::{Path, PathBuf};

use crate::checkpoint::prepare_output;
use crate::cli::storage;
use crate::config::{self, AttentionChoice, DeviceChoice, Dtype, MatmulChoice, Recompute, SftRun};
use crate::cx::{self, Cx};
use crate::data::chat::ChatTemplate;
use crate::data::rows::{Row, read_rows};
use crate::data::tokenizer::Tokenizer;
use crate::device::{self, DType};
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::Method;
use crate::methods::sft::Sft;
use crate::model::decoder::Decoder;
use crate::model::folder;
use crate::model::hub::resolve_model;
use crate::signals::Stop;
use crate::train::Trainer;
use crate::train::run::{Run, peak_flops};
use crate::train::state::{activation_bytes, parts_of};

/// One training run, from a model folder and rows to a model folder
#[derive(clap::Args)]
pub struct Args {
    /// model folder, or a hub name in the local cache
    #[arg(long, required_unless_present = "help_keys")]
    model: Option<String>,
    /// .jsonl, .json or .parquet files
    #[arg(long, num_args = 1.., required_unless_present = "help_keys")]
    data: Vec<PathBuf>,
    /// rows to evaluate on (else eval_rows splits some off the end of the data)
    #[arg(long, num_args = 1..)]
    eval_data: Vec<PathBuf>,
    /// where the run is written
    #[arg(long, required_unless_present = "help_keys")]
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
    /// print every key with its type, default and meaning
    #[arg(long)]
    help_keys: bool,
    /// any key of the run file
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

/// What sets `pretrain` apart: every token of `text` rows, in packs, and weights made at random where a folder has none.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Sft,
    Pretrain,
}

pub fn run(args: Args, kind: Kind) -> Result<()> {
    let mut keys = Vec::new();
    if kind == Kind::Pretrain {
        // Defaults of a pretraining run; a run file or the command line overrides them.
        let given = |key: &str| args.config.is_some() || args.keys.iter().any(|k| k.starts_with(&format!("{key}=")));
        for default in ["packing=true", "packing_strategy=wrapped", "learning_rate=3e-4", "num_train_epochs=1"] {
            if !given(default.split('=').next().unwrap_or_default()) {
                keys.push(default.to_string());
            }
        }
    }
    keys.extend(args.keys.iter().cloned());
    if args.help_keys {
        print!("{}", config::help(&SftRun::default().sections()));
        return Ok(());
    }
    let (Some(model), Some(output)) = (&args.model, &args.output) else {
        return Err(Error::Config("--model, --data and --output are needed".into()));
    };
    let (run, notes) = SftRun::load(args.config.as_deref(), &keys)?;
    for note in notes {
        eprintln!("note: {note}");
    }
    let dir = resolve_model(model)?;
    let mut cx = open(&run)?;
    let folder = prepare_output(output, args.overwrite, args.resume)?;
    if folder.resume().is_some() {
        same_run(folder.path(), &run)?;
    }
    let tokenizer = Tokenizer::load(&dir)?;
    let template = chat_template(&run, &tokenizer)?;
    let mut rows = read_rows(&args.data)?;
    let eval = eval_rows(&args, &run, &mut rows)?;
    let mut config = folder::load_config(&dir);
    let fresh = kind == Kind::Pretrain && !has_weights(&dir);
    if fresh {
        config = crate::model::config::ModelConfig::load(&dir);
    }
    let config = config?;
    if config.attention_dropout > 0.0 {
        let p = config.attention_dropout;
        eprintln!("note: config.json has attention_dropout {p}; temper trains without dropout on attention weights");
    }
    let (mut sft, stats) = Sft::new(&run.sft, &tokenizer, template.as_ref(), config.vocab_size, &rows, &eval)?;
    eprintln!("{stats}");
    let dtype = config.dtype;
    let model = if fresh {
        eprintln!("{} holds no weights: they are made at random from seed {}", dir.display(), run.training.seed);
        let model = Decoder::new(&cx, 0, config, sft.longest)?;
        model.params.initialise(model.config.initializer_range, run.training.seed)?;
        model
    } else {
        Decoder::load(&cx, 0, &dir, sft.longest)?
    };
    (cx.matmul, cx.attention) = choices(&run);
    let tokens = run.training.per_device_train_batch_size * sft.longest;
    let recompute = recompute(&run, &cx, &model, tokens)?;
    let flops = crate::cli::bench::flops_per_token(&model.config, model.params.count(), sft.longest);
    let peak = peak_flops(&cx.device.name());
    let rows = sft.rows();
    eprintln!(
        "{} parameters, {} rows a step",
        model.params.count(),
        run.training.per_device_train_batch_size * run.training.gradient_accumulation_steps
    );
    let mut trainer = Trainer::new(cx, model, run.training.clone(), rows, recompute)?;
    let whole = Run {
        folder: &folder,
        parts: parts_of(&dir, dtype)?,
        stop: Stop::on_signals()?,
        config_toml: run.to_toml(&format!(
            "temper {} --model {model_name} --data {}",
            name(kind),
            shown(&args.data),
            model_name = model_arg(&args)
        )),
        peak_flops: peak,
        flops_per_token: flops,
    };
    whole.train(&mut trainer, &mut sft)?;
    eprintln!("wrote {}", output.display());
    Ok(())
}

fn name(kind: Kind) -> &'static str {
    if kind == Kind::Sft { "sft" } else { "pretrain" }
}

fn model_arg(args: &Args) -> &str {
    args.model.as_deref().unwrap_or("")
}

fn shown(paths: &[PathBuf]) -> String {
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" ")
}

fn open(run: &SftRun) -> Result<Cx> {
    let device = device::open(match run.training.device {
        DeviceChoice::Auto => "auto",
        DeviceChoice::Cuda => "cuda",
        DeviceChoice::Cpu => "cpu",
    })?;
    let dtype = match run.training.dtype {
        Dtype::Auto => storage("auto", &device)?,
        Dtype::Float32 => DType::F32,
        Dtype::Bfloat16 => DType::BF16,
    };
    eprintln!("device: {}, {}", device.name(), dtype.name());
    Cx::new(device, dtype)
}

fn choices(run: &SftRun) -> (cx::MatmulChoice, cx::AttentionChoice) {
    let matmul = match run.training.matmul {
        MatmulChoice::Auto => cx::MatmulChoice::Auto,
        MatmulChoice::Own => cx::MatmulChoice::Own,
    };
    let attention = match run.training.attention {
        AttentionChoice::Auto => cx::AttentionChoice::Auto,
        AttentionChoice::Light => cx::AttentionChoice::Light,
        AttentionChoice::TensorCore => cx::AttentionChoice::TensorCore,
    };
    (matmul, attention)
}

fn has_weights(dir: &Path) -> bool {
    dir.join("model.safetensors").exists() || dir.join("model.safetensors.index.json").exists()
}

/// A resumed run must be the run that is resumed.
fn same_run(dir: &Path, run: &SftRun) -> Result<()> {
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

fn chat_template(run: &SftRun, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    if let Some(path) = &run.sft.chat_template_path {
        let path = Path::new(path);
        let source = String::from_utf8_lossy(&fsio::read(path)?).into_owned();
        return Ok(Some(ChatTemplate::new(&source, path, tokenizer.special_tokens())?));
    }
    tokenizer.chat_template().map(|_| ChatTemplate::of(tokenizer)).transpose()
}

/// The rows of --eval-data, or the last eval_rows of the data, which are then not trained on.
fn eval_rows(args: &Args, run: &SftRun, rows: &mut Vec<Row>) -> Result<Vec<Row>> {
    if !args.eval_data.is_empty() {
        return read_rows(&args.eval_data);
    }
    let n = run.training.eval_rows.of(rows.len() as u64) as usize;
    if n >= rows.len() && n > 0 {
        return Err(Error::Config(format!("eval_rows = {n} leaves no row of {} to train on", rows.len())));
    }
    Ok(rows.split_off(rows.len() - n))
}

/// `auto` recomputes where the activations of a micro-batch would take more than half of the memory that is free.
fn recompute(run: &SftRun, cx: &Cx, model: &Decoder, tokens: usize) -> Result<bool> {
    Ok(match run.training.gradient_checkpointing {
        Recompute::On => true,
        Recompute::Off => false,
        Recompute::Auto => {
            let need = activation_bytes(&model.config, cx.dtype, tokens);
            let on = need > cx.device.memory()?.free / 2;
            eprintln!("activations of a micro-batch: about {} MiB; gradient_checkpointing={on}", need >> 20);
            on
        }
    })
}
