//! `temper bench`: the speed of this device, beside its own measured ceilings. Layer 9.
//!
//! Invariant: a number comes with its unit, the device and the command that measured it.

use std::time::Instant;

use serde_json::{Value, json};

use crate::autograd::{Cx, Tape};
use crate::check::{differentiable, prepare_case, upstream};
use crate::cli::bench_args::BenchArgs;
use crate::cli::bench_grpo::GrpoBench;
use crate::cli::bench_levels;
use crate::cli::bench_measure::{Ceilings, cpu_seconds, median, preset, time};
use crate::cli::bench_train;
use crate::cli::launches::{DecodeStep, decode_step};
use crate::cli::parsers::check_tokens;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::observer::output::print_line;
use crate::ops::case::{Case, DEFAULT, PerfShape, Rng, Variant};
use crate::ops::registry::registry;
use crate::rollout::sample::Sampling;
use crate::rollout::{Engine, EngineOptions, Request};
use crate::tensor::Tensor;

pub fn run(args: BenchArgs) -> Result<()> {
    check_tokens(args.batch, args.length)?;
    let open = || -> Result<Cx> {
        let mut cx = args.on.open()?;
        cx.matmul = args.matmul;
        Ok(cx)
    };
    let mut result = match args.what.as_str() {
        "launches" => bench_train::launches(&args)?,
        "levels" => bench_levels::run(&mut open()?, args.repeat())?,
        "ops" => ops(&mut open()?, &args)?,
        "train" => bench_train::train(open()?, &args)?,
        "decode" => decode(&mut open()?, &args)?,
        "grpo" => {
            let cx = open()?;
            // In a separate pool, which the peak of the steps does not include.
            let mut own = Cx::new(cx.device.clone(), cx.dtype)?;
            own.matmul = cx.matmul;
            let ceilings = Ceilings::measure(&mut own, 3)?;
            drop(own);
            let bench = GrpoBench {
                sizes: &args.grpo,
                shape: &args.shape,
                batch: args.batch,
                repeat: args.repeat.unwrap_or(3),
                lora: args.lora,
                base: args.base.as_deref(),
                recompute: args.recompute,
                ceilings,
            };
            bench.run(cx)?
        }
        other => {
            return Err(Error::Config(format!(
                "there is no benchmark \"{other}\"; use ops, train, decode, grpo, levels or \
                 launches"
            )));
        }
    };
    if let Value::Object(map) = &mut result {
        map.insert("version".into(), json!(env!("CARGO_PKG_VERSION")));
        if args.what != "levels" {
            map.insert("shape".into(), json!(args.shape)); // levels have their own sizes
        }
    }
    let text = match args.what.as_str() {
        _ if args.json => result.to_string(),
        "levels" => bench_levels::table(&result),
        _ => readable(&result),
    };
    print_line(text)?;
    Ok(())
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
    // An untimed run of two tokens per sequence loads code and tests the exact products of these
    // shapes.
    let first = EngineOptions { max_new_tokens: new_tokens.min(2), ..options.clone() };
    let mut engine = Engine::new(cx, &mut model, first, args.length)?;
    for request in Request::numbered(prompts.clone(), 1) {
        engine.submit(&request)?;
    }
    while engine.has_work() {
        engine.step(cx, &model)?;
    }
    drop(engine);
    let (start, before) = (Instant::now(), cpu_seconds());
    let mut engine = Engine::new(cx, &mut model, options, args.length)?;
    for request in Request::numbered(prompts, 1) {
        engine.submit(&request)?;
    }
    // After the step that finishes the last prompt, every step decodes one token of each sequence.
    let mut decoding = None;
    while engine.has_work() {
        engine.step(cx, &model)?;
        if decoding.is_none() && engine.counts.tokens_out >= args.batch {
            decoding = Some((Instant::now(), engine.counts));
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let spent = before.zip(cpu_seconds()).map(|(from, to)| to - from);
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
        "new_tokens": new_tokens, "seconds": seconds, "cpu_seconds": spent, "tokens_per_second": tokens as f64 / seconds,
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
    let repeat = args.repeat();
    let Ceilings { flops: ceiling, bytes: bandwidth } = Ceilings::measure(cx, repeat)?;
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
            let seconds = time(&mut cx, repeat, run)?;
            let (bytes, flops) = (cost.bytes / seconds, cost.flops / seconds);
            let backward = time_backward(&mut cx, repeat, &case, &inputs)?;
            rows.push(json!({
                "op": entry.name, "case": case.label, "microseconds": seconds * 1e6,
                "backward_microseconds": backward.map(|s| s * 1e6),
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

/// Median seconds of the backward of a case, after an untimed forward. None: no input has a
/// gradient.
fn time_backward(
    cx: &mut Cx,
    repeat: usize,
    case: &Case,
    inputs: &[&Tensor],
) -> Result<Option<f64>> {
    if !case.inputs.iter().any(|a| a.grad) {
        return Ok(None);
    }
    let (mut times, mut gradients) = (Vec::new(), Vec::new());
    for i in 0..repeat.max(1) + 2 {
        cx.tape = Some(Tape::default());
        let outputs = cx.apply_dyn(case.op.clone(), inputs)?;
        if i == 0 {
            gradients = upstream(cx, case, &outputs, &mut Rng(7))?;
        }
        // Reuses the same gradients for the outputs of this run.
        let carriers = outputs.into_iter().filter(differentiable);
        let seeds = carriers.zip(&gradients).map(|(out, (_, grad))| (out, grad.clone())).collect();
        cx.device.sync()?;
        let from = cx.device.mark()?;
        cx.backward(seeds)?;
        let to = cx.device.mark()?;
        let seconds = f64::from(cx.device.elapsed_ms(from, to)?) / 1e3;
        if i >= 2 {
            times.push(seconds);
        }
    }
    Ok(Some(median(times)))
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
