//! `temper quickstart`: the ladder of post-training on data and a model made on the spot. Floor 7.
//!
//! Invariant: a rung is a training run like any other: a model folder and a data file in, a model folder out, and keys.
//! It reads from disk what the rung before wrote, so each can be run again by hand with the command it prints; the
//! whole is a function of (binary, device model, seed).

pub mod data;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget};
use serde_json::{Value, json};

use crate::checkpoint::{RunFolder, prepare_output};
use crate::config::SftRun;
use crate::cx::Cx;
use crate::data::bpe::train_bpe;
use crate::data::chat::{ChatTemplate, RenderOptions};
use crate::data::rows::read_rows;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::fsio;
use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::rollout::sample::Sampling;
use crate::rollout::{self, generate};
use crate::signals::Stop;
use crate::tensor::safetensors::HostDtype;
use crate::train::job::{Job, execute};
use data::{Kind, Problem};

/// ChatML with the assistant's words marked, so that `assistant_only_loss` finds them.
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}\
    {% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\
    {% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
const SPECIAL: [&str; 3] = ["<|pad|>", "<|im_start|>", "<|im_end|>"];
const PAD: &str = "<|pad|>";
const EOS: &str = "<|im_end|>";

/// How big the ladder is. [`Scale::full`] is what the command runs.
#[derive(Clone, Debug)]
pub struct Scale {
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub pretraining_rows: usize,
    pub sft_rows: usize,
    pub held_out: usize,
    /// Keys of the two runs, as on a command line.
    pub pretrain: Vec<String>,
    pub sft: Vec<String>,
}

impl Scale {
    pub fn full() -> Scale {
        let keys = |keys: &[&str]| keys.iter().map(|k| k.to_string()).collect();
        Scale {
            vocab: 512,
            hidden: 128,
            intermediate: 384,
            layers: 4,
            heads: 4,
            kv_heads: 2,
            pretraining_rows: 8000,
            sft_rows: 14000,
            held_out: 240,
            pretrain: keys(&[
                "learning_rate=3e-3",
                "per_device_train_batch_size=4",
                "max_length=128",
                "packing=true",
                "packing_strategy=bfd",
                "num_train_epochs=1",
                "warmup_steps=20",
                "lr_scheduler_type=linear",
                "adam_beta2=0.98",
                "weight_decay=0.01",
                "logging_steps=50",
                "save_strategy=no",
            ]),
            sft: keys(&[
                "learning_rate=2e-3",
                "per_device_train_batch_size=4",
                "max_length=128",
                "packing=true",
                "packing_strategy=bfd",
                "assistant_only_loss=true",
                "num_train_epochs=1",
                "warmup_steps=10",
                "lr_scheduler_type=linear",
                "adam_beta2=0.98",
                "weight_decay=0.05",
                "logging_steps=50",
                "save_strategy=no",
            ]),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    pub output: PathBuf,
    pub overwrite: bool,
    pub seed: u64,
    pub scale: Scale,
}

/// What one training run of the ladder took and reached.
#[derive(Clone, Debug)]
pub struct RungReport {
    pub name: &'static str,
    pub steps: u64,
    pub tokens: u64,
    pub seconds: f64,
    /// Mean of the last logged steps.
    pub loss: f64,
}

/// Right answers of one model over the held-out questions.
#[derive(Clone, Debug)]
pub struct Score {
    pub model: &'static str,
    pub replies: Vec<String>,
    pub right: Vec<bool>,
}

impl Score {
    pub fn exact_match(&self) -> f64 {
        self.right.iter().filter(|r| **r).count() as f64 / self.right.len().max(1) as f64
    }
}

#[derive(Clone, Debug)]
pub struct Outcome {
    pub rungs: Vec<RungReport>,
    pub scores: Vec<Score>,
    pub problems: Vec<Problem>,
}

/// A training run of the ladder.
struct Rung {
    name: &'static str,
    /// The temper command that does the same.
    command: &'static str,
    model: PathBuf,
    data: PathBuf,
    folder: RunFolder,
    keys: Vec<String>,
    /// New weights instead of the folder's.
    fresh: bool,
}

/// Runs the ladder: data and tokenizer, pretraining, SFT, and the held-out questions before and after it.
pub fn run(mut cx: Cx, options: &Options) -> Result<Outcome> {
    let (out, scale, seed) = (&options.output, &options.scale, options.seed);
    // All folders are taken before any work is done: an old run is found at once.
    let mut rungs = Vec::new();
    let steps = [
        ("pretrained", "pretrain", "start", "pretrain.jsonl", &scale.pretrain),
        ("sft", "sft", "pretrained", "sft.jsonl", &scale.sft),
    ];
    for (name, command, model, data, keys) in steps {
        let folder = prepare_output(out.join(name), options.overwrite, false)?;
        let seed = std::iter::once(format!("seed={seed}"));
        rungs.push(Rung {
            name,
            command,
            model: out.join(model),
            data: out.join("data").join(data),
            folder,
            keys: keys.iter().cloned().chain(seed).collect(),
            fresh: command == "pretrain",
        });
    }
    let problems = write_start(out, scale, seed)?;
    let mut outcome = Outcome { rungs: Vec::new(), scores: Vec::new(), problems };
    for rung in &rungs {
        let report;
        (cx, report) = train(cx, rung)?;
        outcome.rungs.push(report);
        outcome.scores.push(ask(&mut cx, rung.name, rung.folder.path(), &outcome.problems)?);
    }
    Ok(outcome)
}

/// The data files, the tokenizer and the config of the model: everything but weights. Returns the held-out problems.
fn write_start(out: &Path, scale: &Scale, seed: u64) -> Result<Vec<Problem>> {
    let texts = data::pretraining(seed, scale.pretraining_rows);
    let training = data::training(seed, scale.sft_rows);
    let problems = data::held_out_problems(seed, scale.held_out);
    let dir = out.join("data");
    std::fs::create_dir_all(&dir).map_err(|e| crate::error::Error::io(&dir, e))?;
    write_lines(&dir.join("pretrain.jsonl"), texts.iter().map(|t| json!({ "text": t })))?;
    write_lines(
        &dir.join("sft.jsonl"),
        training.iter().map(|p| {
            json!({ "messages": [{ "role": "user", "content": p.question }, { "role": "assistant", "content": p.reply() }] })
        }),
    )?;
    write_lines(
        &dir.join("heldout.jsonl"),
        problems.iter().map(|p| json!({ "prompt": question(p), "answer": p.answer, "kind": p.kind.name() })),
    )?;
    // Roles are told to the tokenizer, so that a turn's head is three tokens.
    let replies: Vec<String> = training.iter().map(|p| format!("{} {}", p.question, p.reply())).collect();
    let roles = ["user", "assistant"].iter().cycle().take(2 * training.len()).copied();
    let all = texts.iter().chain(&replies).map(String::as_str).chain(roles);
    let bpe = train_bpe(all, scale.vocab, &SPECIAL, false)?;
    let start = out.join("start");
    bpe.write(&start, EOS, PAD, Some(TEMPLATE))?;
    let tokenizer = Tokenizer::load(&start)?;
    let mut config = ModelConfig::llama(
        scale.vocab,
        scale.hidden,
        scale.intermediate,
        scale.layers,
        scale.heads,
        scale.kv_heads,
        512,
        true,
    );
    (config.bos, config.eos, config.pad) = (None, tokenizer.eos_id().into_iter().collect(), tokenizer.pad_id());
    config.initializer_range = INITIAL;
    config.raw.insert("initializer_range".into(), json!(INITIAL));
    let json = format!("{:#}\n", Value::Object(config.to_json(HostDtype::F32)));
    fsio::atomic_write(start.join("config.json"), json.as_bytes())?;
    Ok(problems)
}

/// A small model wants larger weights than transformers' 0.02: about 1 / (2 sqrt(hidden)).
const INITIAL: f32 = 0.045;

fn question(problem: &Problem) -> Value {
    json!([{ "role": "user", "content": problem.question }])
}

fn write_lines(path: &Path, lines: impl Iterator<Item = Value>) -> Result<()> {
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    fsio::atomic_write(path, text.as_bytes()).map(drop)
}

/// One training run, from folder to folder. The context comes back for the next.
fn train(cx: Cx, rung: &Rung) -> Result<(Cx, RungReport)> {
    let dir = rung.folder.path();
    let begin = Instant::now();
    let command = format!(
        "temper {} --model {} --data {} --output {} {}",
        rung.command,
        rung.model.display(),
        rung.data.display(),
        dir.display(),
        rung.keys.join(" ")
    );
    eprintln!("\n{}: the same by hand (into another --output):\n  {command}", rung.name);
    let (run, _) = SftRun::load(None, &rung.keys)?;
    let rows = read_rows(std::slice::from_ref(&rung.data))?;
    let job = Job {
        run: &run,
        model: &rung.model,
        adapter: None,
        fresh: rung.fresh,
        train: &rows,
        eval: &[],
        folder: &rung.folder,
        command: &command,
        stop: Stop::default(),
    };
    let (cx, total, summary) = execute(cx, &job)?;
    let seconds = begin.elapsed().as_secs_f64();
    let report = RungReport { name: rung.name, steps: total, tokens: summary.num_tokens, seconds, loss: summary.loss };
    Ok((cx, report))
}

/// Puts every problem to a model through its chat template, greedily.
fn ask(cx: &mut Cx, name: &'static str, dir: &Path, problems: &[Problem]) -> Result<Score> {
    let tokenizer = Tokenizer::load(dir)?;
    let template = ChatTemplate::of(&tokenizer)?;
    let mut model = Decoder::load(cx, 0, dir, 1)?;
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let prompts = problems
        .iter()
        .map(|p| tokenizer.encode(&template.render(&question(p), options)?.text, false))
        .collect::<Result<Vec<_>>>()?;
    let options = rollout::Options {
        max_new_tokens: 40,
        sampling: Sampling::greedy(),
        stop: model.config.eos.clone(),
        batch: 64,
    };
    let bar = std::io::stderr()
        .is_terminal()
        .then(|| ProgressBar::with_draw_target(Some(prompts.len() as u64), ProgressDrawTarget::stderr()));
    let completions = generate(cx, &mut model, &prompts, &options, |_, _| {
        if let Some(bar) = &bar {
            bar.inc(1);
        }
    })?;
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let replies = completions.iter().map(|c| tokenizer.decode(&c.ids, true)).collect::<Result<Vec<_>>>()?;
    let right = replies.iter().zip(problems).map(|(r, p)| data::is_right(r, &p.answer)).collect();
    Ok(Score { model: name, replies, right })
}

impl std::fmt::Display for Outcome {
    /// Samples, then the table, then what the rungs took.
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        writeln!(f, "Held-out questions, before and after SFT (greedy, one a kind):")?;
        for kind in Kind::ALL {
            let Some(i) = self.problems.iter().position(|p| p.kind == kind) else { continue };
            writeln!(f, "\n  {}", self.problems[i].question)?;
            for score in &self.scores {
                let mark = if score.right[i] { "right" } else { "wrong" };
                writeln!(f, "    {:<10} {mark}  {}", score.model, one_line(&score.replies[i]))?;
            }
        }
        write!(f, "\n{:<10} {:>9}", "exact match", "questions")?;
        self.scores.iter().try_for_each(|s| write!(f, " {:>10}", s.model))?;
        writeln!(f)?;
        let row = |f: &mut std::fmt::Formatter, name: &str, of: &dyn Fn(&Problem) -> bool| -> std::fmt::Result {
            let asked = self.problems.iter().filter(|p| of(p)).count();
            if asked == 0 {
                return Ok(());
            }
            write!(f, "{name:<11} {asked:>9}")?;
            for score in &self.scores {
                let right = self.problems.iter().zip(&score.right).filter(|(p, r)| of(p) && **r).count();
                write!(f, " {:>9.1}%", 100.0 * right as f64 / asked as f64)?;
            }
            writeln!(f)
        };
        for kind in Kind::ALL {
            row(f, kind.name(), &|p| p.kind == kind)?;
        }
        row(f, "all", &|_| true)?;
        writeln!(f)?;
        for r in &self.rungs {
            let rate = r.tokens as f64 / r.seconds.max(1e-9);
            writeln!(
                f,
                "{:<10} {:>5} steps, {:>7} tokens, {:>5.1} s, {rate:>6.0} tokens/s, loss {:.3}",
                r.name, r.steps, r.tokens, r.seconds, r.loss
            )?;
        }
        Ok(())
    }
}

fn one_line(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(100).collect();
    if line.is_empty() { "(nothing)".into() } else { line }
}

/// A context on a device of the command line's choice.
pub fn open(device: &str) -> Result<Cx> {
    let device: Arc<dyn crate::device::Device> = crate::device::open(device)?;
    let dtype = if device.is_cuda() { crate::device::DType::BF16 } else { crate::device::DType::F32 };
    eprintln!("device: {}, {}", device.name(), dtype.name());
    Cx::new(device, dtype)
}
