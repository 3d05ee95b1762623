//! `temper inspect`: shows a folder's config, the tape of a step, the memory plan, launches and
//! kernels. Layer 9.
//!
//! Invariant: it changes nothing and needs no GPU.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::autograd::{Cx, Recompute, Tape};
use crate::cli::args::{Where, part_keys};
use crate::cli::launches;
use crate::cli::parsers::{check_tokens, count, recompute};
use crate::device::dry_run::DryRun;
use crate::device::{Capabilities, Device, MemoryInfo};
use crate::error::{Error, Result};
use crate::kernels;
use crate::methods::offline::sft::Sft;
use crate::methods::{BuiltMethod, registry};
use crate::model::decoder::Decoder;
use crate::model::folder;
use crate::model::hub::resolve_model;
use crate::model::layout::Mixer;
use crate::observer::Terminal;
use crate::observer::output::{note_line, print, print_line};
use crate::ops::case::Rng;
use crate::tensor::ParamSetId;
use crate::train::plan::{self, PlanRequest};
use crate::train::rows::{RunFeed, RunFiles, RunRows};
use crate::train::setup::{
    MethodRows, PlannedModel, RunSetup, Weights, build_again, plan_request, row_request, task,
};
use crate::train::take_data;

/// Print a model's config and parameters, the tape of a training step with the bytes each node
/// holds, what a run will hold in memory, the launches of a layer, or the kernels
#[derive(clap::Args)]
pub struct InspectArgs {
    /// what is printed
    #[arg(value_parser = ["config", "tape", "memory", "launches", "kernels"])]
    what: String,
    /// model folder, or a hub name in the local cache (config, tape, memory, launches); only tape
    /// needs the weights
    #[arg(long)]
    model: Option<String>,
    /// tape: rows of the batch
    #[arg(long, default_value_t = 2, value_parser = count)]
    batch: usize,
    /// tokens of a row; tape: 64, memory: max_length
    #[arg(long, value_parser = count)]
    length: Option<usize>,
    /// tape: recompute activations in the backward pass: light (outputs of norms and activations)
    /// or layers (the default without a value)
    #[arg(long, num_args = 0..=1, default_missing_value = "layers", value_parser = recompute)]
    recompute: Option<Recompute>,
    /// memory: the training command
    #[arg(long, default_value = "sft")]
    method: String,
    /// memory: rows that the run would read; without them, all rows have --length tokens
    #[arg(long, num_args = 1..)]
    data: Vec<PathBuf>,
    /// memory: run file (TOML, YAML or JSON)
    #[arg(long)]
    config: Option<PathBuf>,
    /// memory: an adapter folder to train further
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// memory: plan for a GPU with this many GiB, whether or not it is here
    #[arg(long, value_parser = count)]
    gpu_gib: Option<usize>,
    /// memory: also list every block by its allocator's name
    #[arg(long)]
    blocks: bool,
    /// memory: any option of the training command
    #[arg(value_name = "KEY=VALUE")]
    keys: Vec<String>,
    #[command(flatten)]
    on: Where,
}

pub fn run(mut args: InspectArgs) -> Result<()> {
    part_keys(&mut args.data, &mut args.keys);
    if args.what == "kernels" {
        for kernel in kernels::ALL {
            let hot = if kernel.hot { ", hot" } else { "" };
            print_line(format_args!(
                "{:<28} up to {} threads a block{hot}; image {}",
                kernel.name,
                kernel.threads,
                kernel.image.bytes.len()
            ))?;
        }
        print_line(format_args!(
            "{} kernel instances; image: bytes of the GPU code of the kernel's file, 0 in a build without nvcc",
            kernels::ALL.len()
        ))?;
        return Ok(());
    }
    let Some(model) = &args.model else {
        return Err(Error::Config(format!("temper inspect {} needs --model DIR", args.what)));
    };
    let dir = resolve_model(model)?;
    match args.what.as_str() {
        "config" => config(&dir),
        "tape" => tape(&args, &dir),
        "memory" => memory(&args, &dir),
        "launches" => launches::print(&folder::inspect_config(&dir)?),
        other => Err(Error::Config(format!(
            "temper inspect cannot show \"{other}\"; use config, tape, memory, launches or kernels"
        ))),
    }
}

fn config(dir: &Path) -> Result<()> {
    let config = folder::inspect_config(dir)?;
    let specs = crate::model::specs::expected_params(&config);
    print_line(format_args!("{} ({})", config.family.architecture, config.family.model_type))?;
    print_line(format_args!(
        "vocabulary {}, hidden {}, intermediate {}, layers {}, heads {} (kv {}), head_dim {}",
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim
    ))?;
    print_line(format_args!(
        "eps {:e}, tied head {}, qk-norm {}",
        config.rms_norm_eps,
        config.tie_word_embeddings,
        config.qk_norm.map_or("no".into(), |over| format!("over each {over:?}").to_lowercase())
    ))?;
    for (i, rope) in config.ropes.iter().enumerate() {
        let layers = layers_where(&config.layer_rope, |r| *r == Some(i));
        let turned = rope.turned(config.head_dim);
        print_line(format_args!("layers {layers}: rope {rope:?}, {turned} of a head turn"))?;
    }
    let layers = config.mixers.iter().zip(&config.layer_rope);
    let still: Vec<bool> =
        layers.map(|(mixer, rope)| *mixer == Mixer::Attention && rope.is_none()).collect();
    if still.contains(&true) {
        print_line(format_args!("layers {}: no rope", layers_where(&still, |still| *still)))?;
    }
    if let Some(taps) = config.conv_taps() {
        let layers = layers_where(&config.mixers, |mixer| *mixer != Mixer::Attention);
        print_line(format_args!("layers {layers}: a short convolution over {taps} tokens"))?;
    }
    for spec in &specs {
        print_line(format_args!("{:<56} {:?}", spec.name, spec.shape))?;
    }
    print_line(format_args!(
        "{} parameters in {} tensors",
        specs.iter().map(|s| s.len()).sum::<usize>(),
        specs.len()
    ))?;
    Ok(())
}

/// Indices as `0, 1, 4`, or `all` for every layer.
fn layers_where<T>(layers: &[T], is: impl Fn(&T) -> bool) -> String {
    let found: Vec<String> =
        layers.iter().enumerate().filter(|(_, l)| is(l)).map(|(i, _)| i.to_string()).collect();
    if found.len() == layers.len() { "all".into() } else { found.join(", ") }
}

/// Records the forward of a step with random tokens and prints the tape.
fn tape(args: &InspectArgs, dir: &Path) -> Result<()> {
    let length = args.length.unwrap_or(64);
    check_tokens(args.batch, length)?;
    let mut cx = args.on.open()?;
    let model = Decoder::folder(dir)?.positions(length).build(&cx)?;
    let (_arena, slots) = model.params.gradients(&cx)?;
    cx.param_grads[ParamSetId::Model] = slots;
    let mut rng = Rng(1);
    let mut row =
        || (0..length).map(|_| rng.below(model.config.vocab_size) as u32).collect::<Vec<_>>();
    let rows: Vec<_> = (0..args.batch).map(|_| (row(), vec![true; length])).collect();
    let batch = Sft::from_sequences(rows)?.0.whole_batch(&cx, &model)?;
    cx.tape = Some(Tape::default());
    cx.recompute = args.recompute.unwrap_or(Recompute::Off);
    model.target_hidden(&mut cx, &batch)?;
    if let Some(tape) = cx.tape.take() {
        print(format_args!("{}", tape.describe()))?;
    }
    Ok(())
}

/// Prints the memory plan of a training command with these options, computed as in the run itself.
fn memory(args: &InspectArgs, dir: &Path) -> Result<()> {
    let mut run = (registry::find(&args.method)?.run)();
    for note in run.read(args.config.as_deref(), &args.keys, 0)? {
        note_line(format_args!("note: {note}"));
    }
    let cx = match args.gpu_gib {
        Some(gib) => {
            let memory = MemoryInfo { free: gib << 30, total: gib << 30 };
            let name = format!("a GPU of {gib} GiB");
            let device: Arc<dyn Device> =
                Arc::new(DryRun::new(&name, Capabilities::gpu(memory.total), memory));
            Cx::on(device, &args.on.options())?
        }
        None => args.on.open()?,
    };
    let adapter = args.adapter.as_deref();
    let rows = !args.data.is_empty() || !run.training.data.0.is_empty();
    // A GPU that is not present has all of its memory free.
    let available = args.gpu_gib.map_or_else(|| plan::available(&cx), |gib| Ok(gib << 30))?;
    let print = |ask: &PlanRequest| -> Result<()> {
        let plan = plan::fit(&cx, ask, available)?;
        print_line(format_args!("{}", plan.table(ask, available)))?;
        for (name, bytes) in plan.blocks.iter().filter(|_| args.blocks) {
            print_line(format_args!("{bytes:>14}  {name}"))?;
        }
        Ok(())
    };
    if rows {
        let setup = RunSetup::open(&run, dir, adapter, Weights::Optional, None)?;
        let model = PlannedModel { config: &setup.config, dir, adapter };
        take_data(&mut run, &args.data)?;
        let files = RunFiles { train: run.training.data.clone(), eval: Vec::new() };
        let (terminal, nowhere) = (Terminal::default(), Path::new(""));
        let (feed, held);
        let rows = if run.method.rows_are_stored() {
            feed = RunFeed::new(&run, &files, None, &terminal)?;
            MethodRows::Fed(&feed)
        } else {
            held = RunRows::read(&run, &files, &terminal)?;
            MethodRows::Held(&held)
        };
        let inputs = setup.inputs(&run, rows, nowhere, &[]);
        let BuiltMethod { method, summary } = run.method.build(&run.training, &inputs)?;
        note_line(format_args!("{summary}"));
        let build = build_again(&run, &inputs);
        return print(&plan_request(&run, model, &*method, &build));
    }
    if !run.method.rows_are_stored() {
        return Err(Error::Config(format!(
            "the memory plan of {} is for one step with the longest prompts; give --data FILE to \
             measure them",
            args.method
        )));
    }
    let limit = run.method.keys().into_iter().find(|k| k.name == "max_length");
    let limit = limit.and_then(|k| k.value.as_integer()).map(|n| n as usize);
    let Some(length) = args.length.or(limit) else {
        return Err(Error::Config(
            "max_length is none; give --length (tokens of the longest row) or --data FILE".into(),
        ));
    };
    // Rows of a given length need no tokenizer.
    let mut config = folder::inspect_config(dir)?;
    config.task = task(dir, &run.method, config.task)?;
    let model = PlannedModel { config: &config, dir, adapter };
    let sequences = run.method.footprint().sequences;
    let tokens = run.training.per_device_train_batch_size * length * sequences;
    print(&row_request(&run, model, length, tokens))
}
