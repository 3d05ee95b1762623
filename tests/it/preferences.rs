//! The preference methods against TRL 1.16.0's trainers: every run of `tests/fixtures/preferences/losses.json`, 20 steps
//! each from the same folder, f32, batches of 4 in order; and what each method promises beside.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use temper::config::{CpoConfig, DpoConfig, KtoConfig, MethodRun, OrpoConfig, RewardConfig};
use temper::cx::Cx;
use temper::data::chat::ChatTemplate;
use temper::data::rows::{Row, read_rows};
use temper::data::tokenizer::Tokenizer;
use temper::device::{DType, cpu::Cpu};
use temper::methods::dpo::Dpo;
use temper::methods::objective::Batched;
use temper::methods::{Method, Recipe, Source};
use temper::model::config::Task;
use temper::model::decoder::Decoder;
use temper::model::folder;
use temper::tensor::safetensors::HostDtype;
use temper::train::{Step, Trainer};

const MODEL: &str = "tests/fixtures/sft/model";

fn fixture(name: &str) -> PathBuf {
    Path::new("tests/fixtures/preferences").join(name)
}

fn cpu() -> Cx {
    Cx::new(Arc::new(Cpu::new()), DType::F32).unwrap()
}

fn losses() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("losses.json")).unwrap()).unwrap()
}

/// The model as the method's task has it; a reward model starts from the fixture's score.
fn model<M: Recipe>(cx: &Cx) -> Decoder {
    let mut config = folder::load_config(MODEL).unwrap();
    config.task = M::TASK;
    let decoder = Decoder::load_as(cx, 0, MODEL, config, 512).unwrap();
    if let Task::SequenceClassification { .. } = M::TASK {
        let i = decoder.params.specs.iter().position(|(s, _)| s.name == "score.weight").unwrap();
        let score: Vec<f32> = (0..32).map(|i| ((i * 37) % 64 - 32) as f32 / 128.0).collect();
        decoder.params.store(i, &score).unwrap();
    }
    decoder
}

/// The model with its matrices times 0.75, as a folder.
fn other_reference(dir: &Path) -> PathBuf {
    let out = dir.join("reference");
    let decoder = Decoder::load(&cpu(), 0, MODEL, 8).unwrap();
    let tokenizer = folder::tokenizer_files(MODEL);
    folder::write_folder(&out, &decoder.config, &tokenizer, None, HostDtype::F32, &mut |spec| {
        let i = decoder.params.specs.iter().position(|(s, _)| s.name == spec.name).unwrap();
        let mut values = decoder.params.weight_view(i)?.to_f32()?;
        if spec.shape.len() == 2 {
            values.iter_mut().for_each(|v| *v *= 0.75);
        }
        HostDtype::F32.encode(&values)
    })
    .unwrap();
    out
}

/// The fixture's common settings, then those of one run.
fn keys(config: &Value, dir: &Path) -> Vec<String> {
    let mut keys: Vec<String> = ["per_device_train_batch_size=4", "train_sampling_strategy=sequential", "max_steps=20"]
        .map(String::from)
        .into();
    if config.get("learning_rate").is_none() {
        keys.push("learning_rate=2e-4".into());
    }
    for (key, value) in config.as_object().unwrap() {
        let text = match value {
            Value::String(s) => s.clone(),
            Value::Array(items) => items.iter().map(|v| v.to_string().replace('"', "")).collect::<Vec<_>>().join(","),
            other => other.to_string(),
        };
        match key.as_str() {
            "other_reference" => keys.push(format!("ref_model={}", other_reference(dir).display())),
            _ => keys.push(format!("{key}={text}")),
        }
    }
    keys
}

/// A run's trainer and method, attached.
fn start<M: Recipe>(rows: &[Row], eval: &[Row], keys: &[String], output: &Path) -> (Trainer, Box<dyn Method>) {
    let (run, _) = MethodRun::<M>::load(None, keys).unwrap();
    let cx = cpu();
    let model = model::<M>(&cx);
    let tokenizer = Tokenizer::load(Path::new(MODEL)).unwrap();
    let template = ChatTemplate::of(&tokenizer).unwrap();
    let config = model.config.clone();
    let source = Source { tokenizer: &tokenizer, template: Some(&template), model: &config, train: rows, eval, output };
    let (mut method, _) = run.method.method(&run.training, &source).unwrap();
    let mut trainer = Trainer::new(cx, model, run.training, method.rows(), false).unwrap();
    method.attach(&mut trainer.cx, &trainer.model).unwrap();
    (trainer, method)
}

fn mean(step: &Step, name: &str) -> Option<f64> {
    let values: Vec<f64> = step.metrics.iter().filter(|m| m.0 == name).map(|m| m.1).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The largest differences of one run: of losses and gradient norms relative, of metrics as shares of their tolerance.
#[derive(Default)]
struct Worst {
    loss: f64,
    early: f64,
    norm: f64,
    metric: f64,
    name: String,
}

/// rewards/*: 1e-4 relative + 1e-5; the others have no figure of their own: they follow from the same log-probs.
fn tolerance(name: &str, want: f64) -> f64 {
    match name {
        "rewards/accuracies" | "accuracy" | "mean_token_accuracy" => 1e-6,
        _ => 1e-4 * want.abs() + 1e-5,
    }
}

fn compare<M: Recipe>(name: &str, run: &Value) -> Worst {
    let dir = tempfile::tempdir().unwrap();
    let rows = read_rows(&[fixture(&format!("{}.jsonl", run["rows"].as_str().unwrap()))]).unwrap();
    let (mut trainer, mut method) = start::<M>(&rows, &[], &keys(&run["config"], dir.path()), dir.path());
    let without_reference = ["orpo", "cpo"].contains(&run["method"].as_str().unwrap());
    let mut worst = Worst::default();
    let mut tokens = 0;
    for i in 0..20 {
        let step = trainer.step(&mut *method).unwrap();
        tokens += step.tokens;
        let relative = |a: f64, b: f64| (a - b).abs() / b.abs().max(1e-12);
        let loss = relative(f64::from(step.loss), run["loss"][i].as_f64().unwrap());
        worst.loss = worst.loss.max(loss);
        if i < 5 {
            worst.early = worst.early.max(loss);
        }
        worst.norm = worst.norm.max(relative(f64::from(step.grad_norm), run["grad_norm"][i].as_f64().unwrap()));
        for (key, values) in run.as_object().unwrap() {
            let Some(want) = values.get(i).and_then(Value::as_f64) else { continue };
            match key.as_str() {
                "loss" | "grad_norm" => continue,
                // TRL's are means over all positions, padding included: there is none here.
                "logits/chosen" | "logits/rejected" if without_reference => continue,
                "num_tokens" => {
                    assert_eq!(tokens as f64, want, "{name} step {i}: num_tokens");
                    continue;
                }
                // Which of two equal rewards is larger is rounding.
                "rewards/accuracies" if run["rewards/margins"][i].as_f64().unwrap().abs() < 1e-5 => continue,
                _ => {}
            }
            let got = mean(&step, key).unwrap_or_else(|| panic!("{name} step {i}: no {key}"));
            let share = (got - want).abs() / tolerance(key, want);
            if share > worst.metric {
                (worst.metric, worst.name) = (share, format!("{key} at step {i}: {got} for {want}"));
            }
        }
    }
    worst
}

fn every_run<M: Recipe>(methods: &[&str], count: usize, loss: f64) {
    let all = losses();
    let runs: Vec<(&String, &Value)> =
        all.as_object().unwrap().iter().filter(|(_, r)| methods.contains(&r["method"].as_str().unwrap())).collect();
    assert_eq!(runs.len(), count);
    let (mut report, mut bad) = (String::new(), Vec::new());
    for (name, run) in runs {
        let mut run = run.clone();
        if run["method"] == "bco" {
            run["config"]["loss_type"] = "bco".into();
        }
        let w = compare::<M>(name, &run);
        let line = format!(
            "{name}: loss {:.1e} (first 5: {:.1e}), grad_norm {:.1e}, metrics {:.2} of their tolerance ({})\n",
            w.loss, w.early, w.norm, w.metric, w.name
        );
        if !(w.loss <= loss && w.norm <= 1e-3 && w.metric <= 1.0) {
            bad.push(line.clone());
        }
        report += &line;
    }
    println!("{report}");
    assert!(bad.is_empty(), "beyond the tolerance:\n{}", bad.concat());
}

#[test]
fn every_dpo_run_has_trls_losses_and_metrics() {
    every_run::<DpoConfig>(&["dpo"], 34, 1e-5);
}

#[test]
fn every_kto_run_has_trls_losses_and_metrics() {
    every_run::<KtoConfig>(&["kto", "bco"], 9, 1e-5);
}

#[test]
fn every_orpo_run_has_trls_losses_and_metrics() {
    every_run::<OrpoConfig>(&["orpo"], 4, 1e-5);
}

#[test]
fn every_cpo_run_has_trls_losses_and_metrics() {
    every_run::<CpoConfig>(&["cpo"], 7, 1e-5);
}

#[test]
fn every_reward_run_has_trls_losses_and_metrics() {
    every_run::<RewardConfig>(&["reward"], 6, 1e-4);
}

fn plain() -> Vec<Row> {
    read_rows(&[fixture("plain.jsonl")]).unwrap()
}

#[test]
fn dpo_starts_at_exactly_ln_2_with_margins_exactly_0() {
    let dir = tempfile::tempdir().unwrap();
    for more in
        [&["use_weighting=false"][..], &["precompute_ref_log_probs=true"], &["ref_model=tests/fixtures/sft/model"]]
    {
        let mut keys = vec!["per_device_train_batch_size=4".to_string(), "max_steps=1".into()];
        keys.extend(more.iter().map(|k| k.to_string()));
        let (mut trainer, mut method) = start::<DpoConfig>(&plain(), &[], &keys, dir.path());
        let step = trainer.step(&mut *method).unwrap();
        assert_eq!(step.loss.to_bits(), std::f32::consts::LN_2.to_bits(), "{keys:?}: {}", step.loss);
        for name in ["rewards/chosen", "rewards/rejected", "rewards/margins"] {
            assert_eq!(mean(&step, name), Some(0.0), "{keys:?}: {name}");
        }
    }
}

/// The gradients of one step, all of them.
fn gradients(share_prompts: bool, name: &str) -> (Vec<f32>, f32) {
    let keys: Vec<String> =
        ["per_device_train_batch_size=8", "loss_type=sigmoid,sft", "loss_weights=1,0.1"].map(String::from).into();
    let (run, _) = MethodRun::<DpoConfig>::load(None, &keys).unwrap();
    let cx = cpu();
    let model = model::<DpoConfig>(&cx);
    let tokenizer = Tokenizer::load(Path::new(MODEL)).unwrap();
    let template = ChatTemplate::of(&tokenizer).unwrap();
    let config = model.config.clone();
    let (rows, dir) = (read_rows(&[fixture(name)]).unwrap(), tempfile::tempdir().unwrap());
    let source = Source {
        tokenizer: &tokenizer,
        template: Some(&template),
        model: &config,
        train: &rows,
        eval: &[],
        output: dir.path(),
    };
    let (mut dpo, _) = Dpo::new(&run.method, &run.training, &source).unwrap();
    dpo.pairs.share_prompts = share_prompts;
    let mut method = Batched(dpo);
    let mut trainer = Trainer::new(cx, model, run.training, method.rows(), false).unwrap();
    method.attach(&mut trainer.cx, &trainer.model).unwrap();
    let picked: Vec<usize> = (0..8).collect();
    let report = method.step(&mut trainer.cx, &trainer.model, &[&picked], false).unwrap();
    (trainer.optimizer.grad.to_f32().unwrap(), report.loss)
}

#[test]
fn a_pair_that_shares_its_prompt_has_the_gradients_of_the_pair_apart() {
    for name in ["plain.jsonl", "chat.jsonl"] {
        let ((shared, a), (apart, b)) = (gradients(true, name), gradients(false, name));
        let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
        let difference = square(&mut shared.iter().zip(&apart).map(|(x, y)| f64::from(x - y)));
        let relative = difference / square(&mut apart.iter().map(|y| f64::from(*y)));
        println!("{name}: relative L2 {relative:.1e}, losses {a} and {b}");
        assert!(relative <= 2e-6 && relative > 0.0, "{name}: {relative:.2e}"); // 0 would mean that nothing was shared
    }
}
