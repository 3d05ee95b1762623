//! Online RL end to end: exactness of the ratio, resume, rewards that fail, what each method does with a plain reward.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use temper::checkpoint::prepare_output;
use temper::config::{GrpoConfig, MethodRun, PpoConfig, ReinforceConfig, RlooConfig};
use temper::cx::Cx;
use temper::data::rows::read_rows;
use temper::device::{DType, cpu::Cpu};
use temper::error::Result;
use temper::methods::Recipe;
use temper::signals::Stop;
use temper::train::job::{Job, execute};

fn cpu(dtype: DType) -> Cx {
    Cx::new(Arc::new(Cpu::new()), dtype).unwrap()
}

/// Prompts of the SFT fixture, with an answer column.
fn prompts(dir: &Path) -> PathBuf {
    let path = dir.join("prompts.jsonl");
    let text = std::fs::read_to_string("tests/fixtures/sft/prompt_completion.jsonl").unwrap();
    let lines = text.lines().map(|line| {
        let row: Value = serde_json::from_str(line).unwrap();
        format!("{}\n", json!({ "prompt": row["prompt"], "answer": "a" }))
    });
    std::fs::write(&path, lines.collect::<String>()).unwrap();
    path
}

/// Runs a method on the fixture's model into `out`; with `resume`, goes on with what lies there.
fn run<M: Recipe>(out: &Path, keys: &[&str], resume: bool, dtype: DType) -> Result<Vec<Value>> {
    let common = [
        "per_device_train_batch_size=4",
        "gradient_accumulation_steps=2",
        "learning_rate=1e-3",
        "max_completion_length=12",
        "logging_steps=1",
        "max_steps=6",
        "save_steps=3",
    ];
    let keys: Vec<String> = common.iter().chain(keys).map(|k| k.to_string()).collect();
    let (run, _) = MethodRun::<M>::load(None, &keys)?;
    let dir = tempfile::tempdir().unwrap();
    let rows = read_rows(&[prompts(dir.path())])?;
    let folder = prepare_output(out, false, resume)?;
    let job = Job {
        run: &run,
        model: Path::new("tests/fixtures/sft/model"),
        adapter: None,
        fresh: false,
        train: &rows,
        eval: &[],
        folder: &folder,
        command: "test",
        stop: Stop::default(),
    };
    execute(cpu(dtype), &job)?;
    drop(folder);
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    Ok(text.lines().map(|l| serde_json::from_str(l).unwrap()).collect())
}

const LETTERS: &str = "reward_funcs=regex:^[a-z ]";

#[test]
fn the_first_ratio_is_exactly_one_and_later_ones_are_not() {
    for dtype in [DType::F32, DType::BF16] {
        let dir = tempfile::tempdir().unwrap();
        let keys = [LETTERS, "num_generations=4", "num_iterations=2", "temperature=0.8", "steps_per_generation=2"];
        let log = run::<GrpoConfig>(&dir.path().join("out"), &keys, false, dtype).unwrap();
        let off = |i: usize| log[i]["sampling/ratio_off_one_max"].as_f64().unwrap();
        // A generation serves two steps: the second has moved.
        for i in [0, 2, 4] {
            assert_eq!(off(i), 0.0, "{dtype:?} step {i}: {:?}", log[i]);
        }
        assert!([1, 3, 5].iter().any(|i| off(*i) > 0.0), "{dtype:?}: no later ratio moved");
    }
}

/// A run of six steps, and one that goes on from its third: the final folders have the same bytes.
fn resumes<M: Recipe>(name: &str, keys: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (whole, part) = (dir.path().join("whole"), dir.path().join("part"));
    let log = run::<M>(&whole, keys, false, DType::F32).unwrap();
    assert_eq!(log.len(), 6, "{name}");
    std::fs::create_dir(&part).unwrap();
    for file in ["config.toml", "metrics.jsonl", "completions.jsonl"] {
        std::fs::copy(whole.join(file), part.join(file)).unwrap();
    }
    std::fs::create_dir(part.join("checkpoint-3")).unwrap();
    for file in std::fs::read_dir(whole.join("checkpoint-3")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), part.join("checkpoint-3").join(file.file_name())).unwrap();
    }
    run::<M>(&part, keys, true, DType::F32).unwrap();
    for file in ["model.safetensors", "completions.jsonl"] {
        let (a, b) = (std::fs::read(whole.join(file)).unwrap(), std::fs::read(part.join(file)).unwrap());
        assert!(a == b, "{name}: {file} differs after a resume");
    }
}

#[test]
fn online_runs_resumed_equal_uninterrupted_ones_also_within_a_generation() {
    // A generation serves two steps, so step 3 is in the middle of one.
    resumes::<GrpoConfig>("grpo", &[LETTERS, "num_generations=4", "num_iterations=2", "beta=0.1"]);
    resumes::<GrpoConfig>(
        "grpo with a moving reference",
        &[LETTERS, "num_generations=2", "beta=0.1", "sync_ref_model=true", "ref_model_sync_steps=2"],
    );
    resumes::<PpoConfig>("ppo", &[LETTERS, "num_ppo_epochs=2", "num_mini_batches=1", "temperature=1"]);
    resumes::<PpoConfig>("ppo, shared trunk", &[LETTERS, "num_ppo_epochs=2", "value_model=shared", "target_kl=0.5"]);
    resumes::<RlooConfig>("rloo", &[LETTERS, "num_generations=2"]);
    resumes::<ReinforceConfig>("reinforce++", &[LETTERS, "num_generations=2", "beta=0.01"]);
}

#[test]
fn every_method_raises_a_plain_reward() {
    fn gain<M: Recipe>(name: &str, keys: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        let mut all = vec![LETTERS, "learning_rate=1e-2", "temperature=1", "save_steps=1000", "max_steps=60"];
        all.extend(keys);
        let log = run::<M>(&dir.path().join("out"), &all, false, DType::F32).unwrap();
        let reward = |lines: &[Value]| {
            let values: Vec<f64> = lines.iter().filter_map(|l| l["reward"].as_f64()).collect();
            values.iter().sum::<f64>() / values.len() as f64
        };
        let (first, last) = (reward(&log[..5]), reward(&log[log.len() - 8..]));
        println!("{name}: {first:.2} -> {last:.2}");
        assert!(last > first + 0.25, "{name}: {first:.2} -> {last:.2}");
    }
    gain::<GrpoConfig>("grpo", &["num_generations=8"]);
    gain::<GrpoConfig>("grpo, dynamic sampling", &["num_generations=4", "dynamic_sampling=2"]);
    gain::<RlooConfig>("rloo", &["num_generations=4"]);
    gain::<ReinforceConfig>("reinforce++", &["num_generations=2"]);
    gain::<ReinforceConfig>("remax", &["num_generations=1", "greedy_baseline=true"]);
    gain::<PpoConfig>("ppo", &["num_ppo_epochs=2", "kl_coef=0.01", "max_steps=120"]);
    gain::<PpoConfig>(
        "ppo, shared trunk",
        &["num_ppo_epochs=2", "kl_coef=0.01", "value_model=shared", "max_steps=120"],
    );
}

fn refused<M: Recipe>(keys: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    match run::<M>(&dir.path().join("out"), keys, false, DType::F32) {
        Ok(_) => "accepted".into(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn what_cannot_be_right_is_refused_with_the_next_step() {
    for (said, text) in [
        ("no reward", refused::<GrpoConfig>(&[])),
        ("does not divide", refused::<GrpoConfig>(&[LETTERS, "num_generations=3"])),
        ("set lora_dropout=0", refused::<GrpoConfig>(&[LETTERS, "use_peft=true", "num_generations=4"])),
        ("at least 2", refused::<RlooConfig>(&[LETTERS, "num_generations=1"])),
        ("is no reward model", refused::<PpoConfig>(&["reward_model=tests/fixtures/sft/model"])),
        ("importance_sampling_level=sequence", refused::<GrpoConfig>(&[LETTERS, "loss_type=luspo"])),
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
}

#[test]
fn a_reward_command_that_dies_leaves_a_checkpoint_to_go_on_from() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // It answers the rows of the first generation and then no more.
    let script = dir.path().join("reward.sh");
    let body = "n=0\nwhile read -r line; do\n  n=$((n+1)); [ \"$n\" -gt 8 ] && exit 3\n  \
                id=$(printf '%s' \"$line\" | sed 's/.*\"id\":\\([0-9]*\\).*/\\1/')\n  \
                printf '{\"id\":%s,\"reward\":%s}\\n' \"$id\" \"$((n % 2))\"\ndone\n";
    std::fs::write(&script, body).unwrap();
    let reward = format!("reward_funcs=command:sh {}", script.display());
    let error = run::<GrpoConfig>(&out, &[&reward, "num_generations=4"], false, DType::F32).unwrap_err().to_string();
    let names = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let saved: Vec<String> = names.filter(|n| n.starts_with("checkpoint-")).collect();
    assert!(!saved.is_empty(), "{error}");
    assert!(error.contains("row") && error.contains("reward"), "{error}");
}
