//! `temper sft` against TRL 1.16.0's SFTTrainer: every run of `tests/fixtures/sft/losses.json`, 20
//! steps each.

use serde_json::Value;
use temper::autograd::Recompute;
use temper::methods::offline::OfflineMethod;
use temper::methods::offline::sft::Sft;
use temper::methods::offline::sft::SftRun;
use temper::train::{Step, Trainer};

use crate::support::{self, MODEL, cpu, decoder, fixture, json, with_inputs};

/// The run of the fixture, as a trainer that has done nothing yet.
pub fn trainer(rows: &str, keys: &[String], recompute: Recompute) -> (Trainer, OfflineMethod<Sft>) {
    let (run, _) = SftRun::load(None, keys).unwrap();
    let mut cx = cpu();
    cx.recompute = recompute;
    let model = decoder(&cx, MODEL, 512);
    let rows = support::rows(&format!("sft/{rows}.jsonl"));
    let (sft, _) = with_inputs(&model.config, &rows, |i| Sft::new(&run.method, i).unwrap());
    let rows = temper::methods::Method::rows(&sft);
    (Trainer::new(cx, model, run.training, rows).unwrap(), sft)
}

/// The common settings of the fixture's runs, then those of one run.
fn keys(config: &Value) -> Vec<String> {
    let common = [
        "learning_rate=1e-3",
        "per_device_train_batch_size=4",
        "train_sampling_strategy=sequential",
        "max_steps=20",
    ];
    let mut keys: Vec<String> = Vec::new();
    for (key, value) in config.as_object().unwrap() {
        let text = value.as_str().map(str::to_string).unwrap_or_else(|| value.to_string());
        keys.push(format!("{key}={text}"));
    }
    let given: Vec<String> =
        keys.iter().map(|k| k.split('=').next().unwrap().to_string()).collect();
    keys.extend(
        common
            .iter()
            .filter(|c| !given.iter().any(|g| g == c.split('=').next().unwrap()))
            .map(|c| c.to_string()),
    );
    keys
}

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs().max(1e-12)
}

#[test]
fn every_run_has_trls_losses_and_gradient_norms() {
    let all: Value = json(fixture("sft/losses.json"));
    let runs: Vec<(&String, &Value)> =
        all.as_object().unwrap().iter().filter(|(_, r)| r.get("loss").is_some()).collect();
    assert_eq!(runs.len(), 20);
    let mut report = String::new();
    let (mut worst_loss, mut worst_norm) = (0f64, 0f64);
    for (name, run) in runs {
        let (mut trainer, mut sft) =
            trainer(run["rows"].as_str().unwrap(), &keys(&run["config"]), Recompute::Off);
        let (mut loss, mut norm, mut entropy, mut rate) = (0f64, 0f64, 0f64, 0f64);
        let mut tokens = 0;
        for i in 0..20 {
            let step = trainer.step(&mut sft).unwrap();
            tokens += step.tokens;
            let want = |field: &str| run[field][i].as_f64().unwrap();
            loss = loss.max(relative(f64::from(step.loss), want("loss")));
            norm = norm.max(relative(f64::from(step.grad_norm), want("grad_norm")));
            entropy = entropy.max(relative(mean(&step, "entropy"), want("entropy")));
            rate = rate.max((step.learning_rate - want("learning_rate")).abs() / 1e-3);
            assert_eq!(tokens as f64, want("num_tokens"), "{name} step {i}: num_tokens");
            assert!(
                (mean(&step, "mean_token_accuracy") - want("mean_token_accuracy")).abs() < 1e-6,
                "{name} step {i}"
            );
            assert!(
                (step.epoch - want("epoch")).abs() < 1e-9,
                "{name} step {i}: epoch {} {}",
                step.epoch,
                want("epoch")
            );
        }
        report += &format!(
            "{name}: loss {loss:.1e}, grad_norm {norm:.1e}, entropy {entropy:.1e}, lr {rate:.1e}\n"
        );
        (worst_loss, worst_norm) = (worst_loss.max(loss), worst_norm.max(norm));
        assert!(entropy < 1e-4 && rate < 1e-9, "{report}");
    }
    println!("{report}");
    assert!(worst_loss <= 1e-5 && worst_norm <= 1e-4, "{report}");
}

fn mean(step: &Step, name: &str) -> f64 {
    let values: Vec<f64> = step.metrics.iter().filter(|m| m.0 == name).map(|m| m.1).collect();
    values.iter().sum::<f64>() / values.len() as f64
}

/// The bits of all weights.
fn bits(trainer: &Trainer) -> Vec<u32> {
    trainer.model.params.weights.to_vec::<u32>().unwrap()
}

#[test]
fn the_same_run_twice_and_with_checkpointing_has_the_same_bits() {
    let keys: Vec<String> = ["learning_rate=1e-3", "per_device_train_batch_size=4", "max_steps=5"]
        .map(String::from)
        .into();
    let run = |recompute: Recompute| {
        let (mut trainer, mut sft) = trainer("messages", &keys, recompute);
        let losses: Vec<u32> =
            (0..5).map(|_| trainer.step(&mut sft).unwrap().loss.to_bits()).collect();
        (losses, bits(&trainer))
    };
    let first = run(Recompute::Off);
    assert_eq!(first, run(Recompute::Off), "the same run twice");
    assert_eq!(first, run(Recompute::Light), "with gradient_checkpointing=light");
    assert_eq!(first, run(Recompute::Layers), "with gradient_checkpointing");
}

#[test]
fn a_batch_of_eight_has_the_gradient_of_eight_batches_of_one() {
    let gradient = |batch: usize, accumulation: usize| {
        let keys = vec![
            format!("per_device_train_batch_size={batch}"),
            format!("gradient_accumulation_steps={accumulation}"),
            "max_steps=1".into(),
        ];
        let (mut trainer, mut sft) = trainer("messages", &keys, Recompute::Off);
        let step = trainer.step(&mut sft).unwrap();
        (f64::from(step.loss), trainer.optimizer.grad.to_f32().unwrap())
    };
    let (a, b) = (gradient(8, 1), gradient(1, 8));
    assert!(relative(a.0, b.0) <= 1e-6, "losses {} and {}", a.0, b.0);
    let (mut difference, mut norm) = (0f64, 0f64);
    for (x, y) in a.1.iter().zip(&b.1) {
        difference += f64::from(x - y).powi(2);
        norm += f64::from(*x).powi(2);
    }
    let error = (difference / norm).sqrt();
    println!("loss {:.1e}, gradients {error:.1e}", relative(a.0, b.0));
    assert!(error <= 2e-6, "relative L2 over all gradients {error:.2e}");
}
