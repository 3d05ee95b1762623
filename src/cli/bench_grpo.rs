//! `temper bench grpo`: GRPO steps with random weights and prompts, and the time of their parts.
//! Layer 9.
//!
//! Invariant: the timed step is that of a training run, by its own clock (`time/*`); the rest of
//! the step is the optimizer's. A roofline is computed from the work that the step cannot avoid and
//! the ceilings that were just measured on this device.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::bench_measure::{Ceilings, median, peft_keys, preset};
use crate::autograd::{Cx, Recompute};
use crate::data::bpe::train_bpe;
use crate::data::rows::Row;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::methods::online::grpo::GrpoConfig;
use crate::methods::{BuildMethod, BuiltMethod, MethodInputs, MethodRun, Metric};
use crate::model::builder::InitialWeights;
use crate::model::decoder::Decoder;
use crate::model::layout::{Mixer, ModelConfig};
use crate::ops::case::Rng;
use crate::rewards::RewardFunction;
use crate::train::tuning::{prepare, scheme};
use crate::train::{StepPlan, Trainer};

/// The sizes of a step of GRPO
#[derive(clap::Args)]
pub struct GrpoArgs {
    /// grpo: prompts of a step
    #[arg(long, default_value_t = 64, value_parser = super::parsers::count)]
    prompts: usize,
    /// grpo: completions of a prompt
    #[arg(long, default_value_t = 16, value_parser = super::parsers::count)]
    completions: usize,
    /// grpo: tokens of a prompt
    #[arg(long, default_value_t = 245, value_parser = super::parsers::count)]
    prompt_tokens: usize,
    /// grpo: longest completion in tokens; random weights seldom end one earlier
    #[arg(long, default_value_t = 256, value_parser = super::parsers::count)]
    new_tokens: usize,
    /// grpo: sequences decoded at once; 0: all of them, at most 1024
    #[arg(long, default_value_t = 0)]
    sequences: usize,
    /// grpo: compare with a reference model (KL)
    #[arg(long)]
    reference: bool,
    /// grpo: any option of the run file
    #[arg(long = "option", value_name = "KEY=VALUE")]
    options: Vec<String>,
}

/// Warm-up steps: kernels are loaded and the pool grows in the first.
const WARM_UP: usize = 1;

/// A run of the bench.
pub struct GrpoBench<'a> {
    pub sizes: &'a GrpoArgs,
    pub shape: &'a str,
    /// Rows per micro-batch.
    pub batch: usize,
    pub repeat: usize,
    pub lora: Option<usize>,
    pub base: Option<&'a str>,
    pub recompute: Option<Recompute>,
    pub ceilings: Ceilings,
}

impl GrpoBench<'_> {
    pub fn run(&self, mut cx: Cx) -> Result<Value> {
        let GrpoBench { sizes, ceilings, .. } = self;
        let rows = sizes.prompts * sizes.completions;
        if !rows.is_multiple_of(self.batch) {
            return Err(Error::Config(format!(
                "--batch {} does not divide {rows} completions (--prompts x --completions)",
                self.batch
            )));
        }
        let sequences = match sizes.sequences {
            0 => rows.min(1024),
            n => n.min(rows),
        };
        let keys = [
            format!("max_sequences={sequences}"),
            format!("num_generations={}", sizes.completions),
            format!("max_completion_length={}", sizes.new_tokens),
            format!("per_device_train_batch_size={}", self.batch),
            format!("gradient_accumulation_steps={}", rows / self.batch),
            format!("beta={}", if sizes.reference { 0.04 } else { 0.0 }),
            "max_steps=1000000".into(),
        ];
        let keys =
            [keys.to_vec(), peft_keys(self.lora, self.base)?, sizes.options.clone()].concat();
        let mut run = MethodRun::<GrpoConfig>::default();
        let erased: &mut MethodRun = &mut run;
        erased.read(None, &keys, 1)?;
        let mut config = preset(self.shape)?;
        let folder = BenchFolder::new()?;
        let tokenizer = folder.tokenizer()?;
        config.eos = tokenizer.eos_id().into_iter().collect();
        let data = prompts(sizes);
        // Any reward that differs within a group is sufficient.
        let reward = RewardFunction::new("bench", |row| {
            Some(
                row.ids().iter().fold(0u32, |h, id| h.wrapping_mul(31).wrapping_add(*id)) as f64
                    / 4e9,
            )
        });
        let BuiltMethod { mut method, .. } = run.method.build(
            &run.training,
            &MethodInputs {
                tokenizer: &tokenizer,
                template: None,
                model: &config,
                train: &data,
                eval: &[],
                on_bad_row: Default::default(),
                output: &folder.0,
                rewards: &[reward],
                setup: &Default::default(),
                stored: None,
                feed: None,
            },
        )?;
        let base = Decoder::builder(config)
            .weights(InitialWeights::Random { seed: 1 })
            .storage(scheme(&run.peft))
            .positions(method.longest())
            .build(&cx)?;
        let model = prepare(&cx, base, &run.peft, None, Path::new("random"), 1)?;
        cx.recompute = self.recompute.unwrap_or(Recompute::Off);
        let device = cx.device.clone();
        let plan = StepPlan::online(&run.training, method.micro_batches().unwrap_or(1))?;
        let mut trainer = Trainer::with_plan(cx, model, run.training, plan)?;
        method.attach(&mut trainer.cx, &trainer.model)?;
        let mut timed = Timed::default();
        let mut last: Vec<Metric> = Vec::new();
        let mut trained_tokens = 0;
        for i in 0..self.repeat + WARM_UP {
            let begin = Instant::now();
            let step = trainer.step(&mut *method)?;
            device.sync()?;
            let seconds = begin.elapsed().as_secs_f64();
            method.take_completions();
            if i >= WARM_UP {
                timed.add(seconds, &step.metrics);
            }
            (last, trained_tokens) = (step.metrics, step.tokens);
        }
        let of = |name: &str| last.iter().find(|m| m.0 == name).map_or(0.0, |m| m.1);
        let work = Work {
            prompts: sizes.prompts as f64,
            completions: rows as f64,
            prompt: sizes.prompt_tokens as f64,
            completion: of("completions/mean_length"),
            longest: of("completions/max_length"),
            at_once: run.method.online.rollout.max_sequences.unwrap_or(rows).min(rows) as f64,
            trained: trainer.model.trained().trained_count() as f64,
            base: trainer.model.params.count() as f64,
            bytes: trainer.cx.dtype.size() as f64,
        };
        let roofline = work.roofline(&trainer.model.config, ceilings);
        let step = median(timed.steps.clone());
        let parts = PARTS.iter().enumerate().map(|(k, part)| {
            let seconds = median(timed.parts[k].clone());
            let floor = roofline[k].filter(|_| *part != "reference" || sizes.reference);
            json!({
                "part": part, "seconds": seconds, "of_step": seconds / step,
                "roofline_seconds": floor, "of_roofline": floor.map(|floor| floor / seconds),
            })
        });
        let tokens = work.completions * (work.prompt + work.completion);
        let generated = work.completions * work.completion;
        Ok(json!({
            "bench": "grpo", "device": device.name(), "dtype": trainer.cx.dtype.name(),
            "parameters": trainer.model.params.count(),
            "trained_parameters": trainer.model.trained().trained_count(),
            "prompts": sizes.prompts, "completions": rows, "prompt_tokens": sizes.prompt_tokens,
            "completion_tokens": work.completion, "batch": self.batch, "reference": sizes.reference,
            "max_sequences": work.at_once as usize, "recompute": self.recompute.unwrap_or(Recompute::Off).word(), "lora_r": self.lora,
            "base": self.base,
            "ceiling_matmul_tflops": ceilings.flops / 1e12,
            "ceiling_copy_gb_per_second": ceilings.bytes / 1e9,
            "seconds_per_step": step, "tokens_per_second": tokens / step,
            "tokens_through_the_update": trained_tokens,
            "generated_tokens_per_second": generated / median(timed.parts[0].clone()),
            "ratio_off_one_max": of("sampling/ratio_off_one_max"),
            "peak_memory_bytes": trainer.cx.pool.in_use().1, "parts": parts.collect::<Vec<_>>(),
        }))
    }
}

/// The parts of a step; the last one is the remaining time.
const PARTS: [&str; 5] = ["generate", "score", "reference", "train", "optimizer"];

/// Seconds of the timed steps and of their parts.
#[derive(Default)]
struct Timed {
    steps: Vec<f64>,
    parts: [Vec<f64>; 5],
}

impl Timed {
    fn add(&mut self, seconds: f64, metrics: &[Metric]) {
        self.steps.push(seconds);
        let mut left = seconds;
        for (k, part) in PARTS.iter().enumerate().take(4) {
            let named = metrics.iter().find(|m| m.0.strip_prefix("time/") == Some(*part));
            let spent = named.map_or(0.0, |m| m.1);
            self.parts[k].push(spent);
            left -= spent;
        }
        self.parts[4].push(left.max(0.0));
    }
}

/// The work that a step cannot avoid.
struct Work {
    prompts: f64,
    completions: f64,
    /// Tokens per prompt, per completion on average, and of the longest completion.
    prompt: f64,
    completion: f64,
    longest: f64,
    /// Sequences that are decoded at once.
    at_once: f64,
    /// Number of trained values, and of all values of the model.
    trained: f64,
    base: f64,
    /// Bytes of a stored value.
    bytes: f64,
}

impl Work {
    /// Seconds of each part at the ceilings. None: the part runs on the host.
    ///
    /// Forward: 2 flops per weight and row, 4 layers heads head_dim per query and key; each prompt
    /// once. Training: 6 and 14 (4 for frozen weights, which have no gradient). Decoding: the
    /// larger of reading the weights and multiplying by them, then reading keys and values, one
    /// after the other. Optimizer: the float state of AdamW and a gradient, once.
    fn roofline(&self, model: &ModelConfig, at: &Ceilings) -> [Option<f64>; 5] {
        let (n, p, c) = (self.completions, self.prompt, self.completion);
        let table = (model.vocab_size * model.hidden_size) as f64;
        let tables = if model.tie_word_embeddings { 1.0 } else { 2.0 };
        let body = self.base - tables * table;
        let attending = model.mixers.iter().filter(|m| **m == Mixer::Attention).count();
        let width = (attending * model.num_heads * model.head_dim) as f64;
        let (shared, own, targets) = (self.prompts * (p - 1.0), n * (c + 1.0), n * c);
        // Pairs of a query and a visible key.
        let within = self.prompts * p * (p - 1.0) / 2.0;
        let pairs = within + n * ((c + 1.0) * p + c * (c + 1.0) / 2.0);
        let linear = body * (shared + own) + table * targets;
        let forward = 2.0 * linear + 4.0 * width * pairs;
        let each = if self.trained < self.base { 4.0 } else { 6.0 };
        let train = each * linear + 14.0 * width * pairs;
        let waves = (n / self.at_once).ceil();
        let multiply = 2.0 * (body + table) * self.at_once.min(n) / at.flops;
        let read = (body + table) * self.bytes / at.bytes;
        let key_value = (2 * attending * model.num_kv_heads * model.head_dim) as f64;
        let cached = n * (c * p + c * c / 2.0) * key_value * self.bytes;
        let decode = waves * self.longest * multiply.max(read) + cached / at.bytes;
        let prefill = 2.0 * body * shared + 4.0 * width * within;
        // Reads gradient, moments and weight; writes moments, weight, and a copy in the storage
        // dtype.
        let copy = if self.bytes < 4.0 { self.bytes } else { 0.0 };
        let optimizer = self.trained * (28.0 + copy) / at.bytes;
        [
            Some(decode + prefill / at.flops),
            None,
            Some(forward / at.flops),
            Some(train / at.flops),
            Some(optimizer),
        ]
    }
}

/// Random prompts with one byte per token.
fn prompts(sizes: &GrpoArgs) -> Vec<Row> {
    let mut rng = Rng(7);
    let mut text = || -> String {
        (0..sizes.prompt_tokens).map(|_| char::from(b'a' + rng.below(26) as u8)).collect()
    };
    let row = |i: usize, prompt: String| {
        let mut value = Map::new();
        value.insert("prompt".into(), json!(prompt));
        Row { value, file: Path::new("random").into(), line: i + 1 }
    };
    (0..sizes.prompts).map(|i| row(i, text())).collect()
}

/// A folder with a byte tokenizer, which is removed when the bench ends.
struct BenchFolder(PathBuf);

impl BenchFolder {
    fn new() -> Result<BenchFolder> {
        let name = format!("temper-bench-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        Ok(BenchFolder(dir))
    }

    fn tokenizer(&self) -> Result<Tokenizer> {
        let special = ["<|end|>", "<|pad|>"];
        train_bpe(std::iter::empty(), 258, &special, false)?
            .write(&self.0, "<|end|>", "<|pad|>", None)?;
        Tokenizer::load(&self.0)
    }
}

impl Drop for BenchFolder {
    fn drop(&mut self) {
        // If this fails, the folder remains among the system's temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
