//! The surroundings of a run: disks, limits, rewards that cannot be used.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use temper::observer::Silent;
use temper::rewards::{Reward, RewardBatch};

use crate::support::{MODEL, command, finish};

fn sft(out: &Path, keys: &[&str]) -> (Option<i32>, String) {
    let data = "tests/fixtures/sft/messages.jsonl";
    let mut command = command(&["sft", "--model", MODEL, "--data", data, "--output"]);
    finish(command.arg(out).args(["max_steps=3"]).args(keys))
}

fn is_whole(out: &Path) {
    for name in ["model.safetensors", "config.json", "checkpoint-3/MANIFEST"] {
        assert!(out.join(name).exists(), "{name}");
    }
    assert!(!out.join(".temper-tmp").exists());
}

#[test]
fn an_output_on_another_disk_behind_a_link_or_as_a_dot_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("here");
    std::fs::create_dir(&plain).unwrap();
    let (code, said) = sft(&plain.join("."), &[]);
    assert_eq!(code, Some(0), "{said}");
    is_whole(&plain);
    let Ok(other) = tempfile::tempdir_in("/dev/shm") else {
        println!("left out: /dev/shm is not there");
        return;
    };
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(other.path(), &link).unwrap();
    let (code, said) = sft(&link, &[]);
    assert_eq!(code, Some(0), "{said}");
    is_whole(other.path());
}

#[test]
fn after_a_step_that_is_not_finite_the_good_checkpoint_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let keys = ["learning_rate=1e9", "lr_scheduler_type=constant_with_warmup", "warmup_steps=1"];
    let more = ["save_steps=1", "save_total_limit=1", "max_grad_norm=0", "max_steps=6"];
    let (code, said) = sft(dir.path(), &[&keys[..], &more[..]].concat());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("Start a new run from it with --model"), "{said}");
    let named = said.split("--model ").nth(1).unwrap().split(',').next().unwrap();
    let manifest = temper::checkpoint::verify(PathBuf::from(named)).unwrap();
    assert!(manifest.step >= 1);
}

fn score(command: &str) -> (Result<Vec<Option<f64>>, String>, Duration) {
    let batch = RewardBatch {
        prompts: vec![json!("p")],
        completions: vec![json!("c")],
        completion_ids: vec![vec![1]],
        ..Default::default()
    };
    let begin = Instant::now();
    let spec = toml::from_str(&format!(
        "kind = 'command'\ncommand = '''{command}'''\nrestarts = 0\ntimeout = 30"
    ));
    let scores = Reward::from_toml(&spec.unwrap()).unwrap().score(&batch, &Silent);
    (scores.map_err(|e| e.to_string()), begin.elapsed())
}

#[test]
fn a_hostile_reward_command_is_bounded_and_said_without_escapes() {
    let (endless, _) = score("head -c 40000000 /dev/zero | tr '\\0' x; sleep 20");
    let endless = endless.unwrap_err();
    assert!(endless.contains("longer than 16 MiB"), "{endless}");
    let (escapes, _) =
        score("printf '\\377 \\033[2Jbad\\n' >&2; printf '\\033]0;x\\007no\\n'; sleep 20");
    let escapes = escapes.unwrap_err();
    assert!(escapes.contains("bad") && escapes.contains("`no`"), "{escapes}");
    assert!(!escapes.contains('\u{1b}'), "{escapes}");
    let empty = "yes '' | head -n 300000; read -r line; echo '{\"id\": 0, \"reward\": 1}'; sleep 1";
    assert_eq!(score(empty).0.unwrap(), [Some(1.0)]);
}

#[test]
fn rewards_of_which_none_is_usable_are_told_at_the_first_step_and_end_the_run() {
    let rows = "tests/fixtures/sft/prompt_completion.jsonl";
    for value in ["null", "1e308"] {
        let dir = tempfile::tempdir().unwrap();
        // It answers each line with the line's own id.
        let answer = format!(
            "command:sed -u 's/^{{\"id\": *\\([0-9]*\\).*/{{\"id\": \\1, \"reward\": {value}}}/'"
        );
        let mut grpo = command(&["grpo", "--model", MODEL, "--data", rows, "--output"]);
        grpo.arg(dir.path()).arg(format!("reward_funcs={answer}"));
        grpo.args(["device=cpu", "max_steps=20", "logging_steps=2", "num_generations=4"]);
        let (code, said) =
            finish(grpo.args(["max_completion_length=4", "per_device_train_batch_size=4"]));
        assert_eq!(code, Some(1), "{value}: {said}");
        assert!(said.contains("step 1: none of 4 completions has a usable reward"), "{said}");
        assert!(said.contains("step 2: none of the last 8 completions"), "{said}");
    }
}
