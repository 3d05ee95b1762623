//! `temper bench`: what this device reaches, beside its own measured ceilings. Layer 9.
//!
//! Invariant: a number comes with its unit, the device and the command that measured it.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::autograd::{Cx, Recompute};
use crate::check::prepare_case;
use crate::cli::args::Where;
use crate::cli::launches::{DecodeStep, decode_step};
use crate::cli::parsers::{check_tokens, count};
use crate::config::MatmulChoice;
use crate::device::Layout;
use crate::error::{Error, Result};
use crate::methods::offline::sft::{Sft, SftRun};
use crate::model::decoder::{Decoder, InitialWeights};
use crate::model::layout::ModelConfig;
use crate::observer::output::print_line;
use crate::ops::case::{DEFAULT, PerfShape, Rng, Variant};
use crate::ops::matmul::product;
use crate::ops::registry::registry;
use crate::rollout::sample::Sampling;
use crate::rollout::{Engine, EngineOptions, Request};
use crate::tensor::Tensor;
use crate::train::Trainer;
use crate::train::run::flops_per_token;
use crate::train::tuning::{prepare, scheme};

/// Time ops against measured ceilings, a training step, or decoding, on random weights of a real
/// shape
#[derive(clap::Args)]
pub struct BenchArgs {
    /// what is timed
    #[arg(value_parser = ["ops", "train", "decode"])]
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
    /// auto or own: which matrix product
    #[arg(long, default_value = "auto")]
    matmul: String,
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
    let mut cx = args.on.open()?;
    cx.matmul = match args.matmul.as_str() {
        "auto" => MatmulChoice::Auto,
        "own" => MatmulChoice::Own,
        other => return Err(Error::Config(format!("matmul is auto or own, not \"{other}\""))),
    };
    let mut result = match args.what.as_str() {
        "ops" => ops(&mut cx, &args)?,
        "train" => train(cx, &args)?,
        "decode" => decode(&mut cx, &args)?,
        other => {
            return Err(Error::Config(format!(
                "temper bench ops, train or decode, not \"{other}\""
            )));
        }
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

fn train(mut cx: Cx, args: &BenchArgs) -> Result<Value> {
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
        .weights(InitialWeights::Random { seed: 1 })
        .storage(scheme(&run.peft))
        .positions(args.length)
        .build(&cx)?;
    let model = prepare(&cx, base, &run.peft, None, Path::new("random"), 1)?;
    let trained = model.trained().trained_count();
    let (params, vocab) = (model.params.count(), model.config.vocab_size);
    let flops = flops_per_token(&model.config, params, args.length);
    let mut rng = Rng(5);
    let rows: Vec<_> = (0..args.batch)
        .map(|_| {
            (
                (0..args.length).map(|_| rng.below(vocab) as u32).collect::<Vec<_>>(),
                vec![true; args.length],
            )
        })
        .collect();
    let mut sft = Sft::from_sequences(rows);
    let device = cx.device.clone();
    let (name, dtype) = (device.name(), cx.dtype.name());
    if args.recompute {
        cx.recompute = Recompute::Layers;
    }
    let mut trainer = Trainer::new(cx, model, run.training, args.batch)?;
    let mut times = Vec::new();
    for i in 0..args.repeat + 3 {
        let start = Instant::now();
        trainer.step(&mut sft)?;
        device.sync()?;
        if i >= 3 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let seconds = median(times);
    let tokens = (args.batch * args.length) as f64;
    Ok(json!({
        "bench": "train", "device": name, "dtype": dtype, "parameters": params, "batch": args.batch, "length": args.length,
        "seconds_per_step": seconds, "tokens_per_second": tokens / seconds, "tflops": tokens * flops / seconds / 1e12,
        "peak_memory_bytes": trainer.cx.pool.in_use().1, "recompute": args.recompute,
        "trained_parameters": trained, "lora_r": args.lora, "base": args.base, "matmul": args.matmul,
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
    let new_tokens = options.max_new_tokens;
    let start = Instant::now();
    let mut engine = Engine::new(cx, &mut model, options, args.length)?;
    for request in Request::numbered(prompts, 1) {
        engine.submit(&request)?;
    }
    // From the step on whose end every prompt is in, a step decodes one token of each sequence.
    let mut decoding = None;
    while engine.has_work() {
        engine.step(cx, &model)?;
        if decoding.is_none() && engine.counts.tokens_out >= args.batch {
            decoding = Some((Instant::now(), engine.counts));
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let tokens = args.batch * new_tokens;
    let steady = decoding.map(|(since, before)| {
        let (seconds, after) = (since.elapsed().as_secs_f64(), engine.counts);
        let (tokens, steps) = (after.tokens_out - before.tokens_out, after.steps - before.steps);
        (tokens as f64 / seconds, 1e6 * seconds / steps.max(1) as f64)
    });
    let [launched, replayed] = [false, true].map(|r| decode_step(&model.config, args.batch, r));
    let (launched, replayed) = (launched?, replayed?);
    let us = |step: &DecodeStep| step.host.as_secs_f64() * 1e6;
    Ok(json!({
        "bench": "decode", "device": cx.device.name(), "dtype": cx.dtype.name(), "batch": args.batch, "prompt": prompt,
        "new_tokens": new_tokens, "seconds": seconds, "tokens_per_second": tokens as f64 / seconds,
        "steady_tokens_per_second": steady.map(|s| s.0), "steady_microseconds_per_step": steady.map(|s| s.1),
        "steps": engine.counts.steps, "replayed_steps": engine.counts.replayed,
        "peak_memory_bytes": cx.pool.in_use().1,
        "launches_of_a_step": launched.launches.values().sum::<usize>(),
        "host_microseconds_launched": us(&launched), "host_microseconds_replayed": us(&replayed),
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
