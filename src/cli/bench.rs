//! `temper bench`: what this device reaches, beside its own measured ceilings. Layer 9.
//!
//! Invariant: a number comes with its unit, the device and the command that measured it.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::autograd::{Cx, Recompute};
use crate::check::prepare_case;
use crate::cli::args::{Where, choice};
use crate::cli::parsers::{check_tokens, count};
use crate::config::MatmulChoice;
use crate::device::dry_run::DryRun;
use crate::device::{Capabilities, DType, Device, Layout, MemoryInfo};
use crate::error::{Error, Result};
use crate::methods::offline::OfflineMethod;
use crate::methods::offline::sft::{Sft, SftRun};
use crate::model::decoder::{Decoder, InitialWeights};
use crate::model::layout::ModelConfig;
use crate::observer::output::print_line;
use crate::ops::case::{DEFAULT, PerfShape, Rng, Variant};
use crate::ops::matmul::product;
use crate::ops::registry::registry;
use crate::rollout::sample::Sampling;
use crate::rollout::{EngineOptions, generate};
use crate::tensor::Tensor;
use crate::train::Trainer;
use crate::train::run::flops_per_token;
use crate::train::tuning::{prepare, scheme};

/// Time ops against measured ceilings, a training step, decoding, or the host's work for a launch,
/// on random weights of a real shape
#[derive(clap::Args)]
pub struct BenchArgs {
    /// what is timed; launches: the host's time for each launch of a training step, on a stand-in
    /// for a GPU that computes nothing, whatever --device says
    #[arg(value_parser = ["ops", "train", "decode", "launches"])]
    what: String,
    /// quickstart, smollm2-135m, qwen2.5-0.5b, qwen3-0.6b, llama-3.2-1b, qwen2.5-1.5b
    #[arg(long, default_value = "quickstart")]
    shape: String,
    /// rows of a micro-batch (train), sequences (decode)
    #[arg(long, default_value_t = 16, value_parser = count)]
    batch: usize,
    /// tokens of a row
    #[arg(long, default_value_t = 128, value_parser = count)]
    length: usize,
    /// timed repetitions, of which the median counts
    #[arg(long, default_value_t = 10, value_parser = count)]
    repeat: usize,
    /// train: LoRA of this rank on all seven projections, no dropout, in the place of full
    /// fine-tuning
    #[arg(long, value_parser = count)]
    lora: Option<usize>,
    /// train, with --lora: hold the base in 4 bits (nf4), 4 bits with quantised scales (nf4-nested)
    /// or 8 bits (int8)
    #[arg(long, requires = "lora")]
    base: Option<String>,
    /// auto, library, exact or own: which matrix products
    #[arg(long, default_value = "auto", value_parser = choice::<MatmulChoice>)]
    matmul: MatmulChoice,
    /// recompute each layer's activations on the way back
    #[arg(long)]
    recompute: bool,
    /// one JSON object on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    on: Where,
}

pub fn run(args: BenchArgs) -> Result<()> {
    check_tokens(args.batch, args.length)?;
    let open = || -> Result<Cx> {
        let mut cx = args.on.open()?;
        cx.matmul = args.matmul;
        Ok(cx)
    };
    let mut result = match args.what.as_str() {
        "ops" => ops(&mut open()?, &args)?,
        "train" => train(open()?, &args)?,
        "decode" => decode(&mut open()?, &args)?,
        _ => launches(&args)?,
    };
    if let Value::Object(map) = &mut result {
        map.insert("version".into(), json!(env!("CARGO_PKG_VERSION")));
        map.insert("shape".into(), json!(args.shape));
    }
    print_line(format_args!("{}", if args.json { result.to_string() } else { readable(&result) }))?;
    Ok(())
}

/// A model of a known shape with random weights: (hidden, intermediate, layers, heads, kv heads,
/// head_dim, vocab, tied).
pub fn preset(name: &str) -> Result<ModelConfig> {
    let (family, [hidden, mlp, layers, heads, kv, dim, vocab], tied) = match name {
        "quickstart" => ("llama", [128, 384, 4, 4, 2, 32, 512], true),
        "smollm2-135m" => ("llama", [576, 1536, 30, 9, 3, 64, 49152], true),
        "qwen2.5-0.5b" => ("qwen2", [896, 4864, 24, 14, 2, 64, 151_936], true),
        "qwen3-0.6b" => ("qwen3", [1024, 3072, 28, 16, 8, 128, 151_936], true),
        "llama-3.2-1b" => ("llama", [2048, 8192, 16, 32, 8, 64, 128_256], true),
        "qwen2.5-1.5b" => ("qwen2", [1536, 8960, 28, 12, 2, 128, 151_936], true),
        other => {
            return Err(Error::Config(format!(
                "no shape is called \"{other}\"; see temper bench --help"
            )));
        }
    };
    let map = json!({
        "model_type": family, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": dim, "vocab_size": vocab,
        "tie_word_embeddings": tied, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu",
    });
    match map {
        Value::Object(map) => ModelConfig::from_json(name, map),
        _ => Err(Error::Config("a preset is an object".into())),
    }
}

/// A trainer, and rows for one micro-batch a step.
fn trainer(
    mut cx: Cx,
    args: &BenchArgs,
    weights: InitialWeights,
) -> Result<(Trainer, OfflineMethod<Sft>)> {
    let mut keys =
        vec![format!("per_device_train_batch_size={}", args.batch), "max_steps=1000000".into()];
    if let Some(rank) = args.lora {
        let lora = ["use_peft=true", "lora_target_modules=all-linear", "lora_dropout=0"];
        keys.extend(lora.map(String::from));
        keys.push(format!("lora_r={rank}"));
    }
    match args.base.as_deref() {
        None => {}
        Some("nf4") => keys.push("load_in_4bit=true".into()),
        Some("nf4-nested") => {
            keys.extend(["load_in_4bit=true".into(), "use_bnb_nested_quant=true".into()])
        }
        Some("int8") => keys.push("load_in_8bit=true".into()),
        Some(other) => {
            return Err(Error::Config(format!(
                "--base is nf4, nf4-nested or int8, not \"{other}\""
            )));
        }
    }
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
    if args.recompute {
        cx.recompute = Recompute::Layers;
    }
    Ok((Trainer::new(cx, model, run.training, args.batch)?, Sft::from_sequences(rows)))
}

/// Steps that are not counted.
const WARM_UP: usize = 3;

/// Median seconds of a step.
fn time_steps(trainer: &mut Trainer, sft: &mut OfflineMethod<Sft>, repeat: usize) -> Result<f64> {
    let device = trainer.cx.device.clone();
    let mut times = Vec::new();
    for i in 0..repeat + WARM_UP {
        let start = Instant::now();
        trainer.step(sft)?;
        device.sync()?;
        if i >= WARM_UP {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(median(times))
}

fn train(cx: Cx, args: &BenchArgs) -> Result<Value> {
    let started = Instant::now();
    let (name, dtype) = (cx.device.name(), cx.dtype.name());
    let (mut trainer, mut sft) = trainer(cx, args, InitialWeights::Random { seed: 1 })?;
    let ready = started.elapsed().as_secs_f64();
    let (trained, params) = (trainer.model.trained().trained_count(), trainer.model.params.count());
    let flops = flops_per_token(&trainer.model.config, params, args.length);
    let seconds = time_steps(&mut trainer, &mut sft, args.repeat)?;
    let tokens = (args.batch * args.length) as f64;
    Ok(json!({
        "bench": "train", "device": name, "dtype": dtype, "parameters": params, "batch": args.batch, "length": args.length,
        "seconds_per_step": seconds, "tokens_per_second": tokens / seconds, "tflops": tokens * flops / seconds / 1e12,
        "peak_memory_bytes": trainer.cx.pool.in_use().1, "recompute": args.recompute, "seconds_to_build": ready,
        "trained_parameters": trained, "lora_r": args.lora, "base": args.base,
        "matmul": format!("{:?}", args.matmul).to_lowercase(),
    }))
}

/// Nanoseconds that this thread has run on a core; None where the system does not say.
fn thread_nanoseconds() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// What the host does for a launch, without the driver's own call.
fn launches(args: &BenchArgs) -> Result<Value> {
    let memory = MemoryInfo { free: 0, total: 0 };
    let device = Arc::new(DryRun::new("a GPU that computes nothing", Capabilities::GPU, memory));
    let mut cx = Cx::new(device.clone(), DType::BF16)?;
    cx.matmul = args.matmul;
    let (mut trainer, mut sft) = trainer(cx, args, InitialWeights::Zero)?;
    trainer.step(&mut sft)?;
    device.take_launches();
    trainer.step(&mut sft)?;
    let launches: usize = device.take_launches().values().sum();
    let before = thread_nanoseconds();
    let seconds = time_steps(&mut trainer, &mut sft, args.repeat)?;
    // Time on a core: on a busy machine the clock on the wall tells of others' work.
    let spent = before.zip(thread_nanoseconds()).map(|(from, to)| (to - from) as f64);
    let of_launch = |ns: f64| ns / 1e3 / (args.repeat + WARM_UP) as f64 / launches as f64;
    Ok(json!({
        "bench": "launches", "device": device.name(), "dtype": trainer.cx.dtype.name(), "batch": args.batch,
        "length": args.length, "lora_r": args.lora, "base": args.base, "recompute": args.recompute,
        "launches_per_step": launches, "wall_microseconds_per_launch": seconds * 1e6 / launches as f64,
        "cpu_microseconds_per_launch": spent.map(of_launch),
    }))
}

fn decode(cx: &mut Cx, args: &BenchArgs) -> Result<Value> {
    let mut model = Decoder::builder(preset(&args.shape)?).positions(args.length).build(cx)?;
    model.params.initialise(0.02, 1)?;
    let mut rng = Rng(6);
    let vocab = model.config.vocab_size;
    let prompt = (args.length / 4).max(1);
    if prompt == args.length {
        return Err(Error::Config("--length 1 leaves nothing to decode; give at least 2".into()));
    }
    let prompts: Vec<Vec<u32>> =
        (0..args.batch).map(|_| (0..prompt).map(|_| rng.below(vocab) as u32).collect()).collect();
    let options =
        EngineOptions::new(args.length - prompt, Sampling::greedy(), Vec::new(), args.batch);
    let start = Instant::now();
    generate(cx, &mut model, &prompts, &options, |_, _| {})?;
    let seconds = start.elapsed().as_secs_f64();
    let tokens = args.batch * options.max_new_tokens;
    Ok(json!({
        "bench": "decode", "device": cx.device.name(), "dtype": cx.dtype.name(), "batch": args.batch, "prompt": prompt,
        "new_tokens": options.max_new_tokens, "seconds": seconds, "tokens_per_second": tokens as f64 / seconds,
    }))
}

fn ops(cx: &mut Cx, args: &BenchArgs) -> Result<Value> {
    let config = preset(&args.shape)?;
    let mut rng = Rng(9);
    let side = (cx.device.capabilities().work_bytes / 8).isqrt().max(1024);
    let (a, b) = (upload(cx, &mut rng, &[side, side])?, upload(cx, &mut rng, &[side, side])?);
    let c = cx.real("bench", &[side, side])?;
    let gemm = time(cx, args.repeat, |cx| product(cx, Layout::NT, &c, &a, &b, None, false))?;
    let ceiling = 2.0 * (side as f64).powi(3) / gemm;
    let big = cx.device.capabilities().work_bytes.max(1 << 26);
    let (p, q) = (cx.float("bench", &[big / 4])?, cx.float("bench", &[big / 4])?);
    p.zero()?;
    let copy = time(cx, args.repeat, |_| q.copy_from(&p))?;
    let bandwidth = 2.0 * big as f64 / copy;
    drop((a, b, c, p, q));

    let shape = PerfShape {
        sequences: args.batch,
        length: args.length,
        hidden: config.hidden_size,
        intermediate: config.intermediate_size,
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        vocab: config.vocab_size,
    };
    let variant = Variant { matmul: cx.matmul, ..DEFAULT };
    let mut rows = Vec::new();
    for entry in registry() {
        for case in (entry.perf)(&mut rng, &shape) {
            let (mut cx, inputs) = prepare_case(&cx.device, &case, cx.dtype, &variant)?;
            let inputs: Vec<&Tensor> = inputs.iter().collect();
            let cost = case.op.cost(&inputs);
            let op = case.op.clone();
            let run = |cx: &mut Cx| cx.apply_dyn(op.clone(), &inputs).map(drop);
            let seconds = time(&mut cx, args.repeat, run)?;
            let (bytes, flops) = (cost.bytes / seconds, cost.flops / seconds);
            rows.push(json!({
                "op": entry.name, "case": case.label, "microseconds": seconds * 1e6,
                "gb_per_second": bytes / 1e9, "of_bandwidth": bytes / bandwidth,
                "gflops": flops / 1e9, "of_matmul": flops / ceiling,
            }));
        }
    }
    Ok(json!({
        "bench": "ops", "device": cx.device.name(), "dtype": cx.dtype.name(), "tokens": shape.tokens(),
        "ceiling_matmul_tflops": ceiling / 1e12, "ceiling_copy_gb_per_second": bandwidth / 1e9, "ops": rows,
    }))
}

fn upload(cx: &Cx, rng: &mut Rng, shape: &[usize]) -> Result<Tensor> {
    // Random data: zeros draw less power and time too well.
    let numel: usize = shape.iter().product();
    let block: Vec<f32> = (0..numel.min(1 << 16)).map(|_| rng.normal() as f32 * 0.1).collect();
    let values: Vec<f32> = block.iter().copied().cycle().take(numel).collect();
    Tensor::from_f32(&cx.pool, "bench", cx.dtype, shape, &values)
}

/// Median seconds of one call, by the device's own marks.
fn time(cx: &mut Cx, repeat: usize, mut f: impl FnMut(&mut Cx) -> Result<()>) -> Result<f64> {
    for _ in 0..2 {
        f(cx)?;
    }
    cx.device.sync()?;
    let mut times = Vec::new();
    for _ in 0..repeat.max(1) {
        let from = cx.device.mark()?;
        f(cx)?;
        let to = cx.device.mark()?;
        times.push(f64::from(cx.device.elapsed_ms(from, to)?) / 1e3);
    }
    Ok(median(times))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

fn readable(result: &Value) -> String {
    let mut text = String::new();
    for (key, value) in result.as_object().into_iter().flatten() {
        match value {
            Value::Array(rows) => {
                for row in rows {
                    let line: Vec<String> = row
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(k, v)| format!("{k} {}", short(v)))
                        .collect();
                    text += &format!("  {}\n", line.join("  "));
                }
            }
            v => text += &format!("{key}: {}\n", short(v)),
        }
    }
    text
}

fn short(v: &Value) -> String {
    match v {
        Value::String(s) => s.clone(),
        Value::Number(n) if n.is_f64() => format!("{:.4}", n.as_f64().unwrap_or(f64::NAN)),
        other => other.to_string(),
    }
}
