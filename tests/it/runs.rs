//! Whole runs through the binary: interrupted, resumed, refused.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use temper::autograd::Recompute;
use temper::checkpoint::{CheckpointWriter, checkpoint_path};
use temper::methods::Method;
use temper::train::Trainer;
use temper::train::state::{FolderParts, RunState};

use crate::sft::trainer;
use crate::support::{MODEL, command, finish, metrics};

fn sft(out: &Path, keys: &[&str]) -> Command {
    let data = "tests/fixtures/sft/messages.jsonl";
    let mut command = command(&["sft", "--model", MODEL, "--data", data, "--output"]);
    command.arg(out).args(keys);
    command
}

fn run(out: &Path, keys: &[&str]) -> (Option<i32>, String) {
    finish(&mut sft(out, keys))
}

fn spawn(out: &Path, keys: &[&str]) -> Child {
    sft(out, keys).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn weights(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model.safetensors")).unwrap()
}

/// metrics.jsonl without the fields that hold times or depend on them.
fn deterministic_metrics(out: &Path) -> Vec<serde_json::Value> {
    let line = |mut value: serde_json::Value| {
        let map = value.as_object_mut().unwrap();
        for key in ["tokens_per_second", "peak_memory", "mfu"] {
            map.remove(key);
        }
        value
    };
    metrics(out).into_iter().map(line).collect()
}

/// Every value of the state that training goes on from, bit for bit.
fn bits(trainer: &Trainer) -> Vec<Vec<u8>> {
    let moments = trainer.optimizer.moments.named_tensors();
    let all =
        std::iter::once(&trainer.model.params.weights).chain(moments.into_iter().map(|(_, t)| t));
    all.map(|t| t.to_bytes().unwrap()).collect()
}

#[test]
fn every_kind_of_optimizer_state_resumes_bit_for_bit_and_learns() {
    let parts = FolderParts::default();
    let mut ends = Vec::new();
    for (optim, bytes_per_value) in
        [("adamw", 8.0), ("adamw_bf16_moments", 4.0), ("adamw_8bit", 2.0 + 8.0 / 256.0)]
    {
        let dir = tempfile::tempdir().unwrap();
        let keys: Vec<String> = [
            &format!("optim={optim}"),
            "learning_rate=1e-3",
            "per_device_train_batch_size=2",
            "max_steps=10",
            "weight_decay=0.1",
        ]
        .map(String::from)
        .into();
        let (mut whole, mut sft) = trainer("prompt_completion", &keys, Recompute::Off);
        let bytes = whole.optimizer.moments.bytes() as f64;
        assert!(
            (bytes / (whole.model.params.state_len as f64 * bytes_per_value) - 1.0).abs() < 0.01,
            "{optim}: {bytes}"
        );
        let mut losses = Vec::new();
        for step in 1..=10u64 {
            losses.push(whole.step(&mut sft).unwrap().loss);
            if step == 5 {
                let mut writer =
                    CheckpointWriter::new(dir.path(), step, whole.state_bytes(&parts)).unwrap();
                whole.write_state(&mut writer, &parts, &RunState::default()).unwrap();
                writer.finish().unwrap();
            }
        }
        let (mut resumed, mut sft) = trainer("prompt_completion", &keys, Recompute::Off);
        resumed.read_state(&checkpoint_path(dir.path(), 5)).unwrap();
        while resumed.done < 10 {
            resumed.step(&mut sft).unwrap();
        }
        assert!(bits(&resumed) == bits(&whole), "{optim}: other bits than the uninterrupted run");
        ends.push(losses);
        // A checkpoint of one kind is no state of another.
        let other = if optim == "adamw" { "optim=adamw_8bit" } else { "optim=adamw" };
        let (mut wrong, _) = trainer("prompt_completion", &[other.to_string()], Recompute::Off);
        let e = wrong.read_state(&checkpoint_path(dir.path(), 5)).unwrap_err().to_string();
        assert!(e.contains("optimizer.safetensors"), "{optim}: {e}");
    }
    // The same data and rate: moments of 8 bits change a loss by less than 2% here, of bf16 by less
    // (measured: see the print).
    let worst = |a: &[f32], b: &[f32]| {
        a.iter().zip(b).map(|(a, b)| (a / b - 1.0).abs()).fold(0f32, f32::max)
    };
    println!("bf16 {:.1e}, 8-bit {:.1e}", worst(&ends[1], &ends[0]), worst(&ends[2], &ends[0]));
    assert!(worst(&ends[1], &ends[0]) < 0.02 && worst(&ends[2], &ends[0]) < 0.02);
}

#[test]
fn resumed_at_any_of_fifty_steps_equals_uninterrupted() {
    let dir = tempfile::tempdir().unwrap();
    let keys: Vec<String> =
        ["learning_rate=1e-3", "per_device_train_batch_size=2", "max_steps=50", "weight_decay=0.1"]
            .map(String::from)
            .into();
    let parts = FolderParts::default();
    let (mut whole, mut sft) = trainer("prompt_completion", &keys, Recompute::Off);
    for step in 1..=50u64 {
        whole.step(&mut sft).unwrap();
        let mut writer = CheckpointWriter::new(dir.path(), step, 0).unwrap();
        whole.write_state(&mut writer, &parts, &RunState::default()).unwrap();
        writer.finish().unwrap();
    }
    let expected = bits(&whole);
    for step in 1..50 {
        let (mut resumed, mut sft) = trainer("prompt_completion", &keys, Recompute::Off);
        resumed.read_state(&checkpoint_path(dir.path(), step)).unwrap();
        assert_eq!(resumed.done, step);
        while resumed.done < 50 {
            resumed.step(&mut sft).unwrap();
        }
        assert!(
            bits(&resumed) == expected,
            "resumed at step {step}: other bits than the uninterrupted run"
        );
    }
}

#[test]
fn a_run_killed_again_and_again_ends_as_the_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let keys = [
        "max_steps=60",
        "save_steps=3",
        "save_total_limit=2",
        "logging_steps=5",
        "learning_rate=1e-3",
        "per_device_train_batch_size=4",
    ];
    let (whole, killed): (PathBuf, PathBuf) = (dir.path().join("whole"), dir.path().join("killed"));
    let (code, said) = run(&whole, &keys);
    assert_eq!(code, Some(0), "{said}");
    let mut kills = 0;
    let mut first = true;
    loop {
        let mut with_resume: Vec<&str> = keys.to_vec();
        if !first {
            with_resume.push("--resume");
        }
        let mut child = spawn(&killed, &with_resume);
        let start = Instant::now();
        let limit = Duration::from_millis(120 + 70 * (kills % 5));
        let ended = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            // Only kill once there is something to resume from.
            let checkpoint = std::fs::read_dir(&killed).is_ok_and(|d| {
                d.flatten()
                    .any(|e| e.path().join("MANIFEST").exists() && e.path().extension().is_none())
            });
            if start.elapsed() > limit && checkpoint && kills < 6 {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                break None;
            }
            std::thread::sleep(Duration::from_millis(3));
        };
        first = false;
        if let Some(status) = ended {
            assert_eq!(status.code(), Some(0), "the last run ends well");
            break;
        }
    }
    assert!(kills >= 1, "the run was killed at least once");
    assert!(weights(&whole) == weights(&killed), "after {kills} kills: other weights");
    assert_eq!(deterministic_metrics(&whole), deterministic_metrics(&killed));
    let (code, said) = run(&killed, &[&keys[..], &["--resume"]].concat());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("finished"), "resuming a finished run says so: {said}");
    assert!(weights(&whole) == weights(&killed), "and changes nothing");
}

#[test]
fn sigterm_ends_a_run_with_a_checkpoint_and_130() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let keys = ["max_steps=100000", "save_strategy=steps", "learning_rate=1e-3"];
    let mut child = spawn(&out, &keys);
    let start = Instant::now();
    while !out.join("metrics.jsonl").exists() && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(200));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let found = temper::checkpoint::latest(&out).unwrap().found;
    assert!(found.is_some_and(|f| f.step > 0), "a checkpoint was written");
    assert!(out.join("report.html").is_file(), "and the page so far");
}

#[test]
fn what_cannot_run_says_what_to_do_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let short = ["max_steps=2", "logging_steps=1"];
    assert_eq!(run(&out, &short).0, Some(0));
    let before = weights(&out);

    let (code, refused) = run(&out, &short);
    assert_eq!(code, Some(2));
    assert!(refused.contains("--resume") && refused.contains("--overwrite"), "{refused}");
    assert!(before == weights(&out));

    let wrong = ["learning_rte=1", "per_device_train_batch_size=0"];
    let (code, message) = run(&dir.path().join("x"), &wrong);
    assert_eq!(code, Some(2));
    assert!(
        message.contains("learning_rate") && message.contains("per_device_train_batch_size"),
        "{message}"
    );

    let (code, changed) = run(&out, &["max_steps=4", "learning_rate=0.5", "--resume"]);
    assert!(code == Some(2) && changed.contains("learning_rate"), "{changed}");

    let (code, cuda) = run(&dir.path().join("y"), &["device=cuda"]);
    assert_eq!(code, Some(1), "{cuda}");
    let cuda = cuda.to_lowercase();
    assert!(cuda.contains("nvcc") || cuda.contains("driver"), "{cuda}");
}

#[test]
fn a_divergence_stops_the_run_and_names_tensor_and_rows() {
    let keys: Vec<String> =
        ["learning_rate=1e9", "lr_scheduler_type=constant", "max_grad_norm=0", "max_steps=9"]
            .map(String::from)
            .into();
    let (mut trainer, mut sft) = trainer("messages", &keys, Recompute::Off);
    let mut error = String::new();
    for _ in 0..9 {
        if let Err(e) = trainer.step(&mut sft) {
            error = e.to_string();
            break;
        }
    }
    assert!(error.contains("first bad tensor") && error.contains("messages.jsonl:"), "{error}");
    let row = sft.row_source(0);
    assert!(row.ends_with("messages.jsonl:1"), "{row}");
}

#[test]
fn nan_weights_are_refused_at_load_and_nan_rows_do_not_exist() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(MODEL).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let out = dir.path().join("out");
    let data = "tests/fixtures/sft/messages.jsonl";
    let (code, said) = finish(
        command(&["sft", "--data", data, "--model"]).arg(dir.path()).arg("--output").arg(&out),
    );
    assert_eq!(code, Some(1));
    assert!(said.to_lowercase().contains("nan"), "{said}");
}
