//! Shapes, ceilings and medians for all benches. Layer 9.
//!
//! Invariant: data is random wherever power or time depend on it.

use serde_json::{Value, json};

use crate::autograd::Cx;
use crate::device::Layout;
use crate::error::{Error, Result};
use crate::model::layout::ModelConfig;
use crate::ops::case::Rng;
use crate::ops::matmul::product;
use crate::tensor::Tensor;

/// The config of a model with a known shape: (hidden, intermediate, layers, heads, kv heads,
/// head_dim, vocab, tied).
pub fn preset(name: &str) -> Result<ModelConfig> {
    let (family, [hidden, mlp, layers, heads, kv, dim, vocab], tied) = match name {
        "quickstart" => ("llama", [128, 384, 4, 4, 2, 32, 512], true),
        "smollm2-135m" => ("llama", [576, 1536, 30, 9, 3, 64, 49152], true),
        "qwen2.5-0.5b" => ("qwen2", [896, 4864, 24, 14, 2, 64, 151_936], true),
        "qwen3-0.6b" => ("qwen3", [1024, 3072, 28, 16, 8, 128, 151_936], true),
        "llama-3.2-1b" => ("llama", [2048, 8192, 16, 32, 8, 64, 128_256], true),
        "qwen3-1.7b" => ("qwen3", [2048, 6144, 28, 16, 8, 128, 151_936], true),
        "qwen2.5-1.5b" => ("qwen2", [1536, 8960, 28, 12, 2, 128, 151_936], true),
        other => {
            return Err(Error::Config(format!(
                "there is no shape \"{other}\"; see temper bench --help"
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

/// The options for --lora and --base.
pub fn peft_keys(lora: Option<usize>, base: Option<&str>) -> Result<Vec<String>> {
    let mut keys: Vec<String> = Vec::new();
    if let Some(rank) = lora {
        let lora = ["use_peft=true", "lora_target_modules=all-linear", "lora_dropout=0"];
        keys.extend(lora.map(String::from));
        keys.push(format!("lora_r={rank}"));
    }
    match base {
        None => {}
        Some("nf4") => keys.push("load_in_4bit=true".into()),
        Some("nf4-nested") => {
            keys.extend(["load_in_4bit=true".into(), "use_bnb_nested_quant=true".into()])
        }
        Some("int8") => keys.push("load_in_8bit=true".into()),
        Some(other) => {
            return Err(Error::Config(format!(
                "--base must be nf4, nf4-nested or int8, not \"{other}\""
            )));
        }
    }
    Ok(keys)
}

/// The speed of the device for a large product and a large copy.
pub struct Ceilings {
    /// flop/s
    pub flops: f64,
    /// bytes/s, reads plus writes
    pub bytes: f64,
}

impl Ceilings {
    pub fn measure(cx: &mut Cx, repeat: usize) -> Result<Ceilings> {
        let mut rng = Rng(9);
        // A multiple of a tile's side: a ragged product would not reach the device's speed.
        let side = (cx.device.capabilities().work_bytes / 8).isqrt().max(1024) / 128 * 128;
        let (a, b) = (upload(cx, &mut rng, &[side, side])?, upload(cx, &mut rng, &[side, side])?);
        let c = cx.real("bench", &[side, side])?;
        let gemm = time(cx, repeat, |cx| product(cx, Layout::NT, &c, &a, &b, None, false))?;
        let big = cx.device.capabilities().work_bytes.max(1 << 26);
        let (p, q) = (cx.float("bench", &[big / 4])?, cx.float("bench", &[big / 4])?);
        p.zero()?;
        let copy = time(cx, repeat, |_| q.copy_from(&p))?;
        let (flops, bytes) = (2.0 * (side as f64).powi(3) / gemm, 2.0 * big as f64 / copy);
        Ok(Ceilings { flops, bytes })
    }
}

pub fn upload(cx: &Cx, rng: &mut Rng, shape: &[usize]) -> Result<Tensor> {
    // Random data: with zeros the device draws less power and is too fast.
    let numel: usize = shape.iter().product();
    let block: Vec<f32> = (0..numel.min(1 << 16)).map(|_| rng.normal() as f32 * 0.1).collect();
    let values: Vec<f32> = block.iter().copied().cycle().take(numel).collect();
    Tensor::from_f32(&cx.pool, "bench", cx.dtype, shape, &values)
}

/// Median seconds of one call, by the device's own marks.
pub fn time(cx: &mut Cx, repeat: usize, mut f: impl FnMut(&mut Cx) -> Result<()>) -> Result<f64> {
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

pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Seconds that the threads of this process have run on cores. None: the system does not report it.
/// On a busy machine the wall clock includes the work of others.
pub fn cpu_seconds() -> Option<f64> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    });
    Some(nanoseconds.sum::<u64>() as f64 / 1e9)
}
