//! `temper quickstart`: the post-training pipeline with a generated data set and a new model.
//! Layer 9.
//!
//! Invariant: a stage is an ordinary training run: a model folder, a data file and options in, a
//! model folder out. It reads what the previous stage wrote to disk, so the printed command repeats
//! it by hand. The pipeline is a function of (binary, device model, seed).

pub mod data;
mod outcome;

use std::path::{Path, PathBuf};
use std::time::Instant;

use data::{Problem, STYLE};
use serde_json::{Value, json};

use crate::autograd::Cx;
use crate::checkpoint::{RunFolder, prepare_output};
use crate::data::bpe::train_bpe;
use crate::data::chat::{ChatTemplate, RenderOptions, TemplateSetup};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::fsio;
use crate::model::layout::ModelConfig;
use crate::model::open::open_model;
use crate::observer::{Observer, Work};
use crate::report::{self, ReportInput, Table};
use crate::rewards::model::RewardModel;
use crate::rewards::{Reward, RewardBatch};
use crate::rollout::sample::Sampling;
use crate::rollout::stop::stop_ids;
use crate::rollout::{EngineOptions, generate};
use crate::tensor::safetensors::HostDtype;
use crate::train::Training;
use crate::train::job::FinishedJob;

pub use outcome::{QuickstartOutcome, Score, StageReport};

/// ChatML with the assistant's text marked, so that `assistant_only_loss` finds it.
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}\
    {% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\
    {% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
const SPECIAL: [&str; 3] = ["<|pad|>", "<|im_start|>", "<|im_end|>"];
const PAD: &str = "<|pad|>";
const EOS: &str = "<|im_end|>";

/// The size of the pipeline. The command runs [`QuickstartScale::full`].
#[derive(Clone, Debug)]
pub struct QuickstartScale {
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub pretraining_rows: usize,
    pub sft_rows: usize,
    pub pairs: usize,
    pub chains: usize,
    pub held_out: usize,
    /// Options of the runs, written as on the command line.
    pub pretrain: Vec<String>,
    pub sft: Vec<String>,
    pub lora: Vec<String>,
    pub reward: Vec<String>,
    pub dpo: Vec<String>,
    pub ppo: Vec<String>,
    pub grpo: Vec<String>,
}

impl QuickstartScale {
    pub fn full() -> QuickstartScale {
        let keys =
            |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_string).collect() };
        QuickstartScale {
            vocab: 512,
            hidden: 128,
            intermediate: 384,
            layers: 4,
            heads: 4,
            kv_heads: 2,
            pretraining_rows: 8000,
            sft_rows: 22000,
            pairs: 640,
            chains: 4000,
            held_out: 240,
            pretrain: keys(
                "learning_rate=3e-3 per_device_train_batch_size=4 max_length=128 packing=true packing_strategy=bfd \
                 num_train_epochs=1 warmup_steps=20 lr_scheduler_type=linear adam_beta2=0.98 weight_decay=0.01 \
                 logging_steps=50 save_strategy=no",
            ),
            sft: keys(
                "learning_rate=2e-3 per_device_train_batch_size=4 max_length=128 packing=true packing_strategy=bfd \
                 assistant_only_loss=true num_train_epochs=1 warmup_steps=10 lr_scheduler_type=linear \
                 adam_beta2=0.98 weight_decay=0.05 logging_steps=50 save_strategy=no",
            ),
            lora: keys(
                "use_peft=true lora_r=64 lora_alpha=64 lora_dropout=0 lora_target_modules=all-linear \
                 learning_rate=2e-3 per_device_train_batch_size=4 max_length=128 packing=true packing_strategy=bfd \
                 assistant_only_loss=true num_train_epochs=0.36 warmup_steps=10 lr_scheduler_type=linear \
                 adam_beta2=0.98 logging_steps=50 save_strategy=no",
            ),
            reward: keys(
                "learning_rate=5e-4 per_device_train_batch_size=16 num_train_epochs=1 warmup_steps=4 logging_steps=5 \
                 save_strategy=no",
            ),
            dpo: keys(
                "learning_rate=4e-4 beta=0.1 loss_type=sigmoid,sft per_device_train_batch_size=16 num_train_epochs=1 \
                 warmup_steps=4 logging_steps=5 save_strategy=no",
            ),
            ppo: keys(
                "learning_rate=1.5e-4 value_learning_rate=1e-3 per_device_train_batch_size=64 num_ppo_epochs=2 \
                 num_mini_batches=1 max_completion_length=32 temperature=1 kl_coef=0.1 max_steps=40 \
                 lr_scheduler_type=constant logging_steps=4 save_strategy=no",
            ),
            // A reward for the number alone lets the model drop the sentence that the table looks for.
            grpo: [
                vec![format!("reward_funcs={MEASURE}")],
                keys(
                    "learning_rate=2e-4 per_device_train_batch_size=128 num_generations=8 max_completion_length=32 \
                     temperature=1 max_steps=120 lr_scheduler_type=linear max_sequences=128 adam_beta2=0.98 \
                     logging_steps=5 save_strategy=no",
                ),
            ]
            .concat(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct QuickstartOptions {
    pub output: PathBuf,
    pub overwrite: bool,
    pub seed: u64,
    pub scale: QuickstartScale,
}

/// A training run of the pipeline.
struct Stage {
    name: &'static str,
    /// The temper command of the stage.
    command: &'static str,
    model: PathBuf,
    data: PathBuf,
    folder: RunFolder,
    keys: Vec<String>,
}

/// Runs the pipeline and evaluates each model on the task of its stage.
pub fn run(mut cx: Cx, options: &QuickstartOptions) -> Result<QuickstartOutcome> {
    let (out, scale, seed) = (&options.output, &options.scale, options.seed);
    // Prepares all folders before any work is done, so that an old run is found at once.
    let reward_model = format!("reward_model={}", out.join("reward").display());
    let with = |keys: &[String], more: &[String]| [keys, more].concat();
    let steps = [
        ("pretrained", "pretrain", "start", "pretrain.jsonl", scale.pretrain.clone()),
        ("sft", "sft", "pretrained", "sft.jsonl", scale.sft.clone()),
        ("lora", "sft", "pretrained", "sft.jsonl", scale.lora.clone()),
        ("reward", "reward", "sft", "preferences.jsonl", scale.reward.clone()),
        ("dpo", "dpo", "sft", "preferences.jsonl", scale.dpo.clone()),
        ("ppo", "ppo", "sft", "prompts.jsonl", with(&scale.ppo, &[reward_model])),
        ("grpo", "grpo", "sft", "chains.jsonl", scale.grpo.clone()),
    ];
    let mut stages = Vec::new();
    for (name, command, model, data, keys) in steps {
        let folder = prepare_output(out.join(name), options.overwrite, false)?;
        let keys = with(&keys, &[format!("seed={seed}")]);
        stages.push(Stage {
            name,
            command,
            model: out.join(model),
            data: out.join("data").join(data),
            folder,
            keys,
        });
    }
    let asked = write_start(out, scale, seed)?;
    let mut outcome = QuickstartOutcome {
        problems: asked.basic,
        chains: asked.chains,
        ..QuickstartOutcome::default()
    };
    for stage in &stages {
        let report;
        (cx, report) = train(cx, stage)?;
        outcome.stages.push(report);
        let dir = stage.folder.path();
        match stage.name {
            "reward" => outcome.ranked = rank(&mut cx, dir, &outcome.problems)?,
            "lora" => {
                let score =
                    ask(&mut cx, stage.name, &stage.model, Some(dir), &outcome.problems, 0.0)?;
                outcome.scores.push(score);
            }
            name => {
                outcome.scores.push(ask(&mut cx, name, dir, None, &outcome.problems, 0.0)?);
                if ["sft", "grpo"].contains(&name) {
                    outcome.chain_scores.push(ask(&mut cx, name, dir, None, &outcome.chains, 0.0)?);
                }
            }
        }
    }
    for name in ["sft", "ppo"] {
        // At temperature 1, as PPO samples.
        let replies = ask(&mut cx, name, &out.join(name), None, &outcome.problems, 1.0)?.replies;
        let scores = judge(&mut cx, &out.join("reward"), &outcome.problems, &replies)?;
        outcome.judged.push((name, scores));
    }
    write_report(out, &outcome, &stages)?;
    Ok(outcome)
}

/// The held-out questions.
struct Asked {
    basic: Vec<Problem>,
    chains: Vec<Problem>,
}

/// Writes the data files, the tokenizer and the config of the model, but no weights.
fn write_start(out: &Path, scale: &QuickstartScale, seed: u64) -> Result<Asked> {
    let texts = data::pretraining(seed, scale.pretraining_rows);
    let training = data::training(seed, scale.sft_rows);
    let asked = Asked {
        basic: data::held_out_problems(seed, scale.held_out),
        chains: data::held_out_chains(seed, scale.held_out),
    };
    let dir = out.join("data");
    std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
    let reply = |text: String| json!([{ "role": "assistant", "content": text }]);
    write_lines(&dir.join("pretrain.jsonl"), texts.iter().map(|t| json!({ "text": t })))?;
    let taught: Vec<String> =
        training.iter().enumerate().map(|(i, p)| data::taught(seed, i, p)).collect();
    write_lines(
        &dir.join("sft.jsonl"),
        training.iter().zip(&taught).map(|(p, reply)| {
            json!({ "messages": [{ "role": "user", "content": p.question }, { "role": "assistant", "content": reply }] })
        }),
    )?;
    let pairs = data::preferences(seed, scale.pairs);
    write_lines(
        &dir.join("preferences.jsonl"),
        pairs.iter().map(|p| {
            let (styled, plain) = (reply(format!("{}{STYLE}", p.reply())), reply(p.reply()));
            json!({ "prompt": question(p), "chosen": styled, "rejected": plain })
        }),
    )?;
    let asks =
        |p: &Problem| json!({ "prompt": question(p), "answer": p.answer, "kind": p.kind.name() });
    write_lines(&dir.join("prompts.jsonl"), pairs.iter().map(asks))?;
    write_lines(&dir.join("chains.jsonl"), data::chains(seed, scale.chains).iter().map(asks))?;
    write_lines(&dir.join("heldout.jsonl"), asked.basic.iter().map(asks))?;
    write_lines(&dir.join("heldout_chains.jsonl"), asked.chains.iter().map(asks))?;
    // The tokenizer is also trained on the role names, so that the head of a turn is three tokens.
    let replies: Vec<String> =
        training.iter().zip(&taught).map(|(p, r)| format!("{} {r}", p.question)).collect();
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
    (config.bos, config.eos, config.pad) =
        (None, tokenizer.eos_id().into_iter().collect(), tokenizer.pad_id());
    config.initializer_range = INITIAL;
    config.raw.insert("initializer_range".into(), json!(INITIAL));
    let json = format!("{:#}\n", Value::Object(config.to_json(HostDtype::F32)));
    fsio::atomic_write(start.join("config.json"), json.as_bytes())?;
    Ok(asked)
}

/// A small model needs larger initial weights than transformers' 0.02: about 1 / (2 sqrt(hidden)).
const INITIAL: f32 = 0.045;

fn question(problem: &Problem) -> Value {
    json!([{ "role": "user", "content": problem.question }])
}

fn write_lines(path: &Path, lines: impl Iterator<Item = Value>) -> Result<()> {
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    fsio::atomic_write(path, text.as_bytes()).map(drop)
}

/// Runs one stage, from folder to folder. Returns the context for the next.
fn train(cx: Cx, stage: &Stage) -> Result<(Cx, StageReport)> {
    let dir = stage.folder.path();
    let begin = Instant::now();
    let command = format!(
        "temper {} --model {} --data {} --output {} {}",
        stage.command,
        stage.model.display(),
        stage.data.display(),
        dir.display(),
        stage.keys.join(" ")
    );
    cx.observer.info(&format!(
        "\n{}: to run this stage yourself (give another --output):\n  {command}",
        stage.name
    ));
    let FinishedJob { cx, total_steps, summary, .. } = Training::new(stage.command)?
        .options(stage.keys.iter().cloned())
        .model(stage.model.display().to_string())
        .data([&stage.data])
        .run_in(cx, &stage.folder)?;
    let seconds = begin.elapsed().as_secs_f64();
    let report = StageReport {
        name: stage.name,
        steps: total_steps,
        tokens: summary.num_tokens,
        seconds,
        loss: summary.loss,
    };
    Ok((cx, report))
}

/// Asks a model, with its adapter if any, all problems through its chat template. Temperature 0 is
/// greedy.
fn ask(
    cx: &mut Cx,
    name: &'static str,
    dir: &Path,
    adapter: Option<&Path>,
    problems: &[Problem],
    temperature: f64,
) -> Result<Score> {
    let tokenizer = Tokenizer::of_model(dir, adapter)?;
    let template = ChatTemplate::of(&tokenizer)?;
    let mut model = open_model(cx, dir, adapter)?;
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let prompts = problems
        .iter()
        .map(|p| tokenizer.encode(&template.render(&question(p), options)?.text, false))
        .collect::<Result<Vec<_>>>()?;
    let sampling = Sampling { temperature, seed: 1, ..Sampling::greedy() };
    let stop = stop_ids(&tokenizer, &model.config, &[])?;
    let options = EngineOptions::new(40, sampling, stop, 64);
    let observer = cx.observer.clone();
    let total = prompts.len();
    let mut done = 0;
    let completions = generate(cx, &mut model, &prompts, &options, |_, _| {
        done += 1;
        observer.work(&Work { what: "questions", done, total });
    })?;
    let replies =
        completions.iter().map(|c| tokenizer.decode(&c.ids, true)).collect::<Result<Vec<_>>>()?;
    let right = right(&replies, problems, &*cx.observer)?;
    Ok(Score { model: name, replies, right })
}

/// The exact match of the table, as a reward of `temper eval`.
pub const MEASURE: &str = "exact_match:after=The answer is,until=.";

/// Which replies are right.
fn right(replies: &[String], problems: &[Problem], observer: &dyn Observer) -> Result<Vec<bool>> {
    let mut batch = RewardBatch::default();
    for (reply, problem) in replies.iter().zip(problems) {
        let answer = ("answer".to_string(), json!(problem.answer));
        batch.push(&question(problem), std::iter::once((&answer.0, &answer.1)), reply, Vec::new());
    }
    let scores = Reward::parse(MEASURE)?.score(&batch, observer)?;
    Ok(scores.into_iter().map(|score| score == Some(1.0)).collect())
}

/// The reward model's scores of replies.
fn judge(cx: &mut Cx, dir: &Path, problems: &[Problem], replies: &[String]) -> Result<Vec<f64>> {
    let mut model = RewardModel::load(cx, dir, &TemplateSetup::default())?;
    let mut batch = RewardBatch::default();
    for (problem, reply) in problems.iter().zip(replies) {
        batch.push(&question(problem), std::iter::empty(), reply, Vec::new());
    }
    Ok(model.score(cx, &batch)?.into_iter().map(f64::from).collect())
}

/// The share of held-out pairs that the reward model ranks correctly.
fn rank(cx: &mut Cx, dir: &Path, problems: &[Problem]) -> Result<f64> {
    let plain: Vec<String> = problems.iter().map(Problem::reply).collect();
    let styled: Vec<String> = plain.iter().map(|r| format!("{r}{STYLE}")).collect();
    let (chosen, rejected) =
        (judge(cx, dir, problems, &styled)?, judge(cx, dir, problems, &plain)?);
    let right = chosen.iter().zip(&rejected).filter(|(c, r)| c > r).count();
    Ok(right as f64 / problems.len().max(1) as f64)
}

/// Writes report.html for the whole pipeline and for each stage.
fn write_report(out: &Path, outcome: &QuickstartOutcome, stages: &[Stage]) -> Result<()> {
    let table: Table = outcome.table();
    let stages: Vec<report::ReportStage> = stages
        .iter()
        .map(|r| {
            let input = ReportInput { title: r.name.into(), ..ReportInput::default() };
            report::ReportStage { name: r.name.into(), dir: r.folder.path().to_path_buf(), input }
        })
        .collect();
    report::write_pipeline(out, "temper quickstart", Some(&table), &stages).map(drop)
}
