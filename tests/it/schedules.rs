//! Learning-rate schedules against transformers 5.17: every case of `tests/fixtures/schedules.json`.

use serde_json::Value;
use temper::autograd::Recompute;
use temper::checkpoint::{CheckpointWriter, checkpoint_path};
use temper::methods::offline::sft::SftRun;
use temper::optim::schedule::Schedule;
use temper::train::state::{FolderParts, RunState};

use crate::sft::trainer;
use crate::support::{fixture, floats, json, strings};

fn keys(case: &Value) -> Vec<String> {
    vec![
        format!("lr_scheduler_type={}", case["schedule"].as_str().unwrap()),
        format!("lr_scheduler_kwargs={}", case["kwargs"]),
        format!("warmup_steps={}", case["warmup_steps"]),
    ]
}

#[test]
fn every_schedule_has_transformers_rate_at_every_step() {
    let all = json(fixture("schedules.json"));
    let peak = all["peak"].as_f64().unwrap();
    let mut names = std::collections::BTreeSet::new();
    for case in all["cases"].as_array().unwrap() {
        let mut keys = keys(case);
        keys.push(format!("learning_rate={peak}"));
        if case["schedule"] == "constant" {
            keys.retain(|key| !key.starts_with("warmup"));
        }
        let (run, _) = SftRun::load(None, &keys).unwrap();
        let want = floats(&case["rates"]);
        let schedule = Schedule::of(&run.training, peak, want.len() as u64).unwrap();
        for (step, want) in want.iter().enumerate() {
            let rate = schedule.rate(step as u64);
            // At a zero of a cosine, what is left is rounding: it is held against the peak.
            let error = (rate - want).abs() / want.abs().max(1e-12 * peak);
            assert!(error <= 1e-12 || (rate - want).abs() <= 1e-15 * peak, "{case} {step}: {rate}");
        }
        names.insert(case["schedule"].as_str().unwrap().to_string());
    }
    assert_eq!(names.len(), 10, "{names:?}");
}

#[test]
fn a_resumed_run_has_the_rates_of_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let parts = FolderParts::default();
    let mut keys = strings(&["per_device_train_batch_size=2", "max_steps=8", "warmup_ratio=0.25"]);
    keys.push("lr_scheduler_type=cosine_with_restarts".into());
    keys.push("lr_scheduler_kwargs={\"num_cycles\": 2}".into());
    let (mut whole, mut sft) = trainer("prompt_completion", &keys, Recompute::Off);
    let mut rates = Vec::new();
    for step in 1..=8 {
        rates.push(whole.step(&mut sft).unwrap().learning_rate);
        if step == 3 {
            let mut writer = CheckpointWriter::new(dir.path(), step, 0).unwrap();
            whole.write_state(&mut writer, &parts, &RunState::default()).unwrap();
            writer.finish().unwrap();
        }
    }
    // Two steps of warmup, then two half waves of three steps.
    assert_eq!((rates[0], rates[1], rates[2]), (0.0, 1e-5, 2e-5));
    assert!(rates[5] == rates[2] && rates[7] < rates[6] && rates[4] < rates[3], "{rates:?}");
    let (mut resumed, mut sft) = trainer("prompt_completion", &keys, Recompute::Off);
    resumed.read_state(&checkpoint_path(dir.path(), 3)).unwrap();
    for want in &rates[3..] {
        assert_eq!(resumed.step(&mut sft).unwrap().learning_rate.to_bits(), want.to_bits());
    }
}

#[test]
fn arguments_that_a_schedule_does_not_take_are_refused() {
    let said = |keys: &[&str]| SftRun::load(None, &strings(keys)).unwrap_err().to_string();
    let kwargs = |schedule: &str, kwargs: &str| {
        said(&[&format!("lr_scheduler_type={schedule}"), &format!("lr_scheduler_kwargs={kwargs}")])
    };
    assert!(kwargs("linear", r#"{"gamma": 1}"#).contains("linear takes no arguments"));
    assert!(kwargs("cosine", r#"{"power": 1}"#).contains("cosine takes num_cycles"));
    assert!(kwargs("cosine_with_min_lr", "{}").contains("needs min_lr or min_lr_rate"));
    let both = r#"{"min_lr": 1e-6, "min_lr_rate": 0.1}"#;
    assert!(kwargs("cosine_with_min_lr", both).contains("give only one"));
    assert!(
        kwargs("cosine_with_min_lr", r#"{"min_lr": 1}"#).contains("must be below learning_rate")
    );
    assert!(kwargs("polynomial", r#"{"lr_end": 2e-5}"#).contains("must be below learning_rate"));
    assert!(kwargs("warmup_stable_decay", "{}").contains("needs num_decay_steps"));
    let warmup = r#"{"num_warmup_steps": 3, "num_decay_steps": 3}"#;
    assert!(kwargs("warmup_stable_decay", warmup).contains("give warmup_steps"));
    let shape = r#"{"num_decay_steps": 3, "decay_type": "square"}"#;
    assert!(kwargs("warmup_stable_decay", shape).contains("one of linear, cosine, 1-sqrt"));
    assert!(kwargs("inverse_sqrt", r#"{"timescale": 0}"#).contains("must be above 0"));
    for name in ["reduce_lr_on_plateau", "greedy"] {
        let message = said(&[&format!("lr_scheduler_type={name}")]);
        assert!(message.contains("depends on the evaluations"), "{message}");
    }
    assert!(said(&["lr_scheduler_type=cosin"]).contains("did you mean cosine?"));
}
