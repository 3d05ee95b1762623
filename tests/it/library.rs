//! Runs started by a program: options, rewards and observers take effect without the command line.

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use temper::config::{AttentionChoice, MatmulChoice};
use temper::device::{Capabilities, DType};
use temper::methods::offline::dpo::DpoConfig;
use temper::methods::online::grpo::GrpoConfig;
use temper::observer::MetricValue;
use temper::{MethodRun, Observer, Silent, Training};

const MODEL: &str = "tests/fixtures/sft/model";
const ROWS: &str = "tests/fixtures/sft/prompt_completion.jsonl";

fn training(method: &str, out: &Path) -> Training {
    let length = match method {
        "sft" => "max_length=64",
        "online-dpo" => "max_new_tokens=8",
        _ => "max_completion_length=8",
    };
    Training::new(method)
        .unwrap()
        .options(["per_device_train_batch_size=8", "max_steps=1", length].map(String::from))
        .model(MODEL)
        .data([ROWS])
        .output(out)
        .observer(Silent)
}

/// What a run said, a word and a text each.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<(&'static str, String)>>>);

impl Heard {
    fn add(&self, what: &'static str, text: String) {
        self.0.lock().unwrap().push((what, text));
    }
}

impl Observer for Heard {
    fn info(&self, text: &str) {
        self.add("info", text.into());
    }
    fn note(&self, text: &str) {
        self.add("note", text.into());
    }
    fn begin(&self, step: u64, total: u64) {
        self.add("begin", format!("{step}/{total}"));
    }
    fn metrics(&self, step: u64, total: u64, metrics: &[(&str, MetricValue)]) {
        self.add("metrics", format!("{step}/{total} {}", metrics[0].0));
    }
    fn summary(&self, text: &str) {
        self.add("summary", text.into());
    }
    fn end(&self) {
        self.add("end", String::new());
    }
}

#[test]
fn device_dtype_matmul_and_attention_take_effect() {
    let dir = tempfile::tempdir().unwrap();
    let finished = training("sft", &dir.path().join("out"))
        .option("device", "cpu")
        .option("dtype", "bfloat16")
        .option("matmul", "own")
        .option("attention", "simt")
        .run()
        .unwrap();
    let cx = finished.cx;
    assert_eq!(cx.device.capabilities(), Capabilities::CPU);
    assert_eq!(cx.dtype, DType::BF16);
    assert_eq!(cx.matmul, MatmulChoice::Own);
    assert_eq!(cx.attention, AttentionChoice::Simt);
}

#[test]
fn all_problems_are_reported_at_once_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = training("grpo", &out).option("learning_rte", 1).option("max_steps", 0).run();
    let error = run.err().unwrap().to_string();
    for part in ["did you mean learning_rate?", "max_steps = 0", "no reward"] {
        assert!(error.contains(part), "{error}");
    }
    // Typed options are checked likewise.
    let mut typed = MethodRun::<DpoConfig>::default();
    typed.training.max_steps = 0;
    typed.training.learning_rate = -1.0;
    let run = Training::with(typed).unwrap().model(MODEL).data([ROWS]).output(&out).run();
    let error = run.err().unwrap().to_string();
    for part in ["max_steps = 0", "learning_rate = -1"] {
        assert!(error.contains(part), "{error}");
    }
    let scored = training("sft", &out).reward("x", |_| None).run().err().unwrap().to_string();
    assert_eq!(scored, "sft does not use rewards; leave them out");
    assert!(training("sft", &out).model("").run().err().unwrap().to_string().contains("a model"));
    assert!(Training::new("grp").err().unwrap().to_string().contains("did you mean grpo?"));
    assert!(!out.exists());
}

#[test]
fn every_method_with_rewards_takes_a_function() {
    let dir = tempfile::tempdir().unwrap();
    for method in ["grpo", "rloo", "reinforce", "ppo", "online-dpo"] {
        let out = dir.path().join(method);
        let seen = Arc::new(Mutex::new(0));
        let count = seen.clone();
        training(method, &out)
            .option("logging_steps", 1)
            .reward("length", move |row| {
                assert!(row.prompt().is_string() && row.column("completion").is_string());
                assert!(row.column("nothing").is_null());
                *count.lock().unwrap() += 1;
                Some(row.ids().len() as f64)
            })
            .run()
            .unwrap_or_else(|e| panic!("{method}: {e}"));
        assert!(*seen.lock().unwrap() > 0, "{method}");
        let line = std::fs::read_to_string(out.join("completions.jsonl")).unwrap();
        let line: Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
        assert!(line["rewards"]["length"].as_f64().unwrap() >= 1.0, "{method}: {line}");
    }
}

#[test]
fn a_function_trains_as_the_built_in_reward_that_it_repeats() {
    let dir = tempfile::tempdir().unwrap();
    let (named, own) = (dir.path().join("named"), dir.path().join("own"));
    let steps = |out| training("grpo", out).option("max_steps", 3).option("learning_rate", 1e-3);
    steps(&named).option("reward_funcs", "regex:^[a-z ]").run().unwrap();
    let letter = |text: &str| text.starts_with(|c: char| c.is_ascii_lowercase() || c == ' ');
    let reward = move |row: &temper::RewardRow| Some(f64::from(letter(&row.text())));
    steps(&own).reward("regex", reward).run().unwrap();
    let weights = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
    assert!(weights(&named) == weights(&own));
    assert!(weights(&named) != std::fs::read(Path::new(MODEL).join("model.safetensors")).unwrap());
    let config = std::fs::read_to_string(own.join("config.toml")).unwrap();
    assert!(config.contains("# with the program's reward regex"), "{config}");
}

#[test]
fn weights_cover_functions_and_typed_options_take_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = MethodRun::<GrpoConfig>::default();
    run.training.max_steps = 1;
    run.training.per_device_train_batch_size = 8;
    run.method.online.max_completion_length = 4;
    run.method.online.rewards.reward_weights = Some(vec![1.0, 0.5]);
    let typed = |out: &str| {
        let training = Training::with(run.clone()).unwrap().model(MODEL).data([ROWS]);
        training.output(dir.path().join(out)).observer(Silent).reward("one", |_| Some(1.0))
    };
    let error = typed("few").run().err().unwrap().to_string();
    assert!(error.contains("reward_weights has 2 values for 1 rewards"), "{error}");
    typed("out").reward("two", |_| Some(2.0)).run().unwrap();
    let line = std::fs::read_to_string(dir.path().join("out/completions.jsonl")).unwrap();
    let line: Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
    assert_eq!(line["reward"], 2.0, "{line}");
}

#[test]
fn an_observer_hears_the_run_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let heard = Heard::default();
    let run = training("sft", &dir.path().join("out")).option("max_steps", 2);
    let run = run.option("logging_steps", 1).option("num_train_epochs", 2);
    run.observer(heard.clone()).run().unwrap();
    let all = heard.0.lock().unwrap();
    let what: Vec<&str> = all.iter().map(|(what, _)| *what).collect();
    let rest = ["info"; 4].into_iter().chain(["begin", "metrics", "metrics", "end", "summary"]);
    assert_eq!(what, std::iter::once("note").chain(rest).collect::<Vec<_>>(), "{all:?}");
    assert!(all[0].1.starts_with("num_train_epochs has no effect"), "{all:?}");
    assert!(all[1].1.starts_with("device: "), "{all:?}");
    assert_eq!(all[5].1, "0/2");
    assert_eq!(all[7].1, "2/2 loss");
    assert!(all[9].1.contains("peak memory"), "{all:?}");
}
