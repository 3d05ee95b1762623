//! Signals, system limits, and checkpoints whose files are damaged.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{MODEL, command, finish, write_rows};

const DATA: &str = "tests/fixtures/sft/messages.jsonl";
/// Of a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(120);

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

fn exists(pid: &str) -> bool {
    // A zombie has ended; who should bury it is not our question.
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn grpo(out: &Path, rewards: &str) -> Command {
    let rows = "tests/fixtures/sft/prompt_completion.jsonl";
    let mut command = command(&["grpo", "--model", MODEL, "--data", rows, "--output"]);
    command.arg(out).arg(rewards).args([
        "num_generations=2",
        "per_device_train_batch_size=4",
        "max_completion_length=4",
    ]);
    command
}

#[test]
fn ctrl_c_is_heard_while_a_reward_command_is_silent_and_its_children_end() {
    let dir = tempfile::tempdir().unwrap();
    let pids = dir.path().join("pids");
    let script = format!("sleep 1000 & echo $! $$ > {}.new; mv {0}.new {0}; wait", pids.display());
    let rewards =
        format!("reward_funcs=[{{ kind = \"command\", command = '{script}', timeout = 900 }}]");
    let out = dir.path().join("out");
    let mut run = grpo(&out, &rewards);
    let mut child =
        run.arg("max_steps=3").stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    wait_until("the reward command starts", || pids.exists());
    let pids = std::fs::read_to_string(&pids).unwrap();
    assert!(pids.split_whitespace().all(exists));
    signal(&child, "INT");
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
    for pid in pids.split_whitespace() {
        wait_until("the command and its child end", || !exists(pid));
    }
}

#[test]
fn a_lost_terminal_ends_a_run_with_a_checkpoint_that_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let sft = |out: &str, more: &[&str]| {
        let mut command = command(&["sft", "--model", MODEL, "--data", DATA, "--output"]);
        command.arg(dir.path().join(out)).args(["max_steps=40", "logging_steps=1"]).args(more);
        command
    };
    let mut child = sft("out", &[]).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let metrics = dir.path().join("out/metrics.jsonl");
    wait_until("a step is logged", || std::fs::metadata(&metrics).is_ok_and(|m| m.len() > 0));
    signal(&child, "HUP");
    let said: Vec<String> =
        BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    let (code, said) = finish(&mut sft("out", &["--resume"]));
    assert!(code == Some(0) && said.contains("resumed at step"), "{said}");
    assert_eq!(finish(&mut sft("whole", &[])).0, Some(0));
    let bytes = |out: &str| std::fs::read(dir.path().join(out).join("model.safetensors")).unwrap();
    assert!(bytes("out") == bytes("whole"));
}

/// The binary in a shell that limits it first.
fn limited(limit: &str, args: &[&str], out: &Path) -> (Option<i32>, String) {
    let mut shell = Command::new("bash");
    shell.args(["-c", &format!("{limit}; exec \"$@\""), "bash", env!("CARGO_BIN_EXE_temper")]);
    finish(shell.args(args).arg("--output").arg(out).stdin(Stdio::null()))
}

#[test]
fn a_file_that_may_not_grow_at_any_write_is_an_error_and_nothing_is_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let args =
        ["sft", "--model", MODEL, "--data", DATA, "max_steps=4", "save_steps=2", "logging_steps=1"];
    let whole = dir.path().join("whole");
    assert_eq!(limited("true", &args, &whole).0, Some(0));
    let want = std::fs::read(whole.join("model.safetensors")).unwrap();
    let (mut failed, mut passed) = (0, 0);
    // In KiB: below each file of a run in turn, the weights and the moments among them.
    for kib in [0, 1, 4, 16, 64, 256, 1024, 4096, 1 << 20] {
        let out = dir.path().join(format!("out{kib}"));
        let (code, said) = limited(&format!("ulimit -f {kib}"), &args, &out);
        match code {
            Some(0) => passed += 1,
            Some(1) => {
                failed += 1;
                assert!(
                    said.contains("error: ") && said.contains("File too large"),
                    "{kib}: {said}"
                );
            }
            other => panic!("{kib} KiB: {other:?}: {said}"),
        }
        match std::fs::read(out.join("model.safetensors")) {
            Ok(bytes) => assert!(bytes == want, "{kib}"),
            Err(_) => assert_eq!(code, Some(1), "{kib}: {said}"),
        }
        // Whatever is there continues to the same bytes, or is started anew.
        let again = if out.join("checkpoint-2").exists() || out.join("checkpoint-4").exists() {
            "--resume"
        } else {
            "--overwrite"
        };
        let (code, said) = limited("true", &[&args[..], &[again]].concat(), &out);
        assert_eq!(code, Some(0), "{kib}, {again}: {said}");
        assert!(std::fs::read(out.join("model.safetensors")).unwrap() == want, "{kib}");
    }
    assert!(failed >= 3 && passed >= 1, "{failed} failed, {passed} passed");
}

#[test]
fn no_more_threads_is_an_error_not_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    // The limit does not hold for root: another user, who must be able to read the binary.
    let binary = dir.path().join("temper");
    std::fs::copy(env!("CARGO_BIN_EXE_temper"), &binary).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.path(), open).unwrap();
    let root =
        std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    let mut shell = match root {
        Ok(true) => {
            let mut other = Command::new("setpriv");
            other.args(["--reuid", "54321", "--regid", "54321", "--clear-groups", "bash"]);
            other
        }
        _ => Command::new("bash"),
    };
    shell.args(["-c", "ulimit -u 1; exec \"$@\"", "bash"]).arg(&binary);
    let Ok(output) = shell.args(["inspect", "kernels"]).current_dir(dir.path()).output() else {
        println!("left out: setpriv is not there");
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if said.contains("setpriv:") || said.contains("cannot modify limit") {
        println!("left out: {said}");
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: ") && !said.contains("panicked"), "{said}");
}

/// Every file of a checkpoint but its manifest.
fn files(checkpoint: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(checkpoint).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|n| n != "MANIFEST").collect();
    names.sort();
    names
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(|e| e.unwrap().path()) {
        let target = to.join(entry.file_name().unwrap());
        if entry.is_dir() {
            copy(&entry, &target)
        } else {
            std::fs::copy(&entry, &target).unwrap();
        }
    }
}

#[test]
fn a_checkpoint_with_any_damaged_file_is_named_and_the_older_one_taken() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    // Two steps use one generation, so checkpoints after odd steps carry rollouts.
    let keys = ["steps_per_generation=2", "max_steps=4", "save_steps=1", "logging_steps=1"];
    let rewards = "reward_funcs=length:min=1,max=3";
    let (code, said) = finish(grpo(&whole, rewards).args(keys));
    assert_eq!(code, Some(0), "{said}");
    let want = std::fs::read(whole.join("model.safetensors")).unwrap();
    std::fs::remove_dir_all(whole.join("checkpoint-4")).unwrap();
    let all = files(&whole.join("checkpoint-3"));
    assert!(all.iter().any(|n| n == "rollouts.bin") && all.len() >= 8, "{all:?}");
    let resume = |out: &Path| finish(grpo(out, rewards).args(keys).arg("--resume"));
    for name in &all {
        let out = dir.path().join(format!("of {name}"));
        copy(&whole, &out);
        let path = out.join("checkpoint-3").join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let (code, said) = resume(&out);
        assert_eq!(code, Some(0), "{name}: {said}");
        assert!(said.contains("checkpoint-3") && said.contains(name.as_str()), "{name}: {said}");
        assert!(said.contains("resumed at step 2"), "{name}: {said}");
        assert!(std::fs::read(out.join("model.safetensors")).unwrap() == want, "{name}");
    }
}

#[test]
fn rollouts_of_rows_that_are_not_there_are_refused_and_the_older_checkpoint_taken() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let keys = ["steps_per_generation=2", "max_steps=4", "save_steps=1", "logging_steps=1"];
    let rewards = "reward_funcs=length:min=1,max=3";
    assert_eq!(finish(grpo(&out, rewards).args(keys)).0, Some(0));
    let want = std::fs::read(out.join("model.safetensors")).unwrap();
    std::fs::remove_dir_all(out.join("checkpoint-4")).unwrap();
    let path = out.join("checkpoint-3/rollouts.bin");
    let mut changed = std::fs::read(&path).unwrap();
    // Behind the generation and the number of completions: the prompt of the first.
    changed[16..24].copy_from_slice(&999_999u64.to_le_bytes());
    std::fs::write(&path, &changed).unwrap();
    // With a manifest that agrees: damage that a checksum does not find.
    let manifest = out.join("checkpoint-3/MANIFEST");
    let lines: Vec<String> =
        std::fs::read_to_string(&manifest).unwrap().lines().map(String::from).collect();
    let crc = format!("{:08x}", crc32fast::hash(&changed));
    let line = |l: &String| match l.ends_with("rollouts.bin") {
        true => format!("{crc} {} rollouts.bin", changed.len()),
        false => l.clone(),
    };
    let body: String = lines[..lines.len() - 1].iter().map(|l| line(l) + "\n").collect();
    let last = lines.last().unwrap();
    let old = last.split_whitespace().last().unwrap();
    let sum = last.replace(old, &format!("{:08x}", crc32fast::hash(body.as_bytes())));
    std::fs::write(&manifest, format!("{body}{sum}\n")).unwrap();
    temper::checkpoint::verify(out.join("checkpoint-3")).unwrap();
    let (code, said) = finish(grpo(&out, rewards).args(keys).arg("--resume"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("rollouts.bin") && said.contains("resumed at step 2"), "{said}");
    assert!(std::fs::read(out.join("model.safetensors")).unwrap() == want);
}

#[test]
fn a_reward_command_sees_the_environment_that_reward_env_names() {
    let dir = tempfile::tempdir().unwrap();
    let seen = |out: &str, more: &[&str]| {
        let file = dir.path().join(format!("{out}.env"));
        let script = format!("env > {}; while read l; do echo 1; done", file.display());
        let rewards = format!("reward_funcs=[{{ kind = \"command\", command = '{script}' }}]");
        let mut run = grpo(&dir.path().join(out), &rewards);
        run.arg("max_steps=1").args(more).env("A_SECRET", "told").env("WANTED", "yes");
        finish(&mut run);
        std::fs::read_to_string(&file).unwrap()
    };
    assert!(seen("all", &[]).contains("A_SECRET=told"));
    let some = seen("some", &["reward_env=PATH,WANTED"]);
    assert!(
        some.contains("WANTED=yes") && some.contains("PATH=") && !some.contains("SECRET"),
        "{some}"
    );
}

#[test]
fn adapters_and_merged_models_on_another_disk_are_whole() {
    let dir = tempfile::tempdir().unwrap();
    let Ok(other) = tempfile::tempdir_in("/dev/shm") else {
        println!("left out: /dev/shm is not there");
        return;
    };
    let link = |name: &str| -> PathBuf {
        let (target, link) = (other.path().join(name), dir.path().join(name));
        std::fs::create_dir(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        link
    };
    let (adapter, merged) = (link("adapter"), link("merged"));
    let mut train = command(&["sft", "--model", MODEL, "--data", DATA, "--output"]);
    let (code, said) = finish(train.arg(&adapter).args(["use_peft=true", "max_steps=2"]));
    assert_eq!(code, Some(0), "{said}");
    for name in ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"] {
        assert!(other.path().join("adapter").join(name).exists(), "{name}");
    }
    let mut merge = command(&["merge", "--model", MODEL, "--adapter"]);
    let (code, said) = finish(merge.arg(&adapter).arg("--output").arg(&merged));
    assert_eq!(code, Some(0), "{said}");
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert!(other.path().join("merged").join(name).exists(), "{name}");
    }
    let left: Vec<String> = files(other.path()).into_iter().filter(|n| n.contains("tmp")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn an_output_that_cannot_be_made_is_an_error_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    for out in [file.join("out"), PathBuf::from("/proc/nothing/out")] {
        for more in [&[][..], &["use_peft=true"]] {
            let mut train = command(&["sft", "--model", MODEL, "--data", DATA, "--output"]);
            let (code, said) = finish(train.arg(&out).arg("max_steps=1").args(more));
            assert!(code == Some(1) || code == Some(2), "{said}");
            assert!(said.contains("error: ") && !said.contains("grad_norm"), "{said}");
        }
    }
}

#[test]
fn a_classifier_adapter_without_its_score_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir("tests/fixtures/peft/lora").unwrap().map(|e| e.unwrap().path()) {
        std::fs::copy(&entry, dir.path().join(entry.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("adapter_config.json");
    let mut config = crate::support::json(&path);
    config["task_type"] = json!("SEQ_CLS");
    std::fs::write(&path, config.to_string()).unwrap();
    let rows = dir.path().join("rows.jsonl");
    write_rows(&rows, &[json!({ "prompt": "a", "chosen": "b", "rejected": "c" })]);
    for name in ["score", "eval"] {
        let mut score = command(&[name, "--model", MODEL, "--adapter"]);
        let (code, said) = finish(score.arg(dir.path()).arg("--data").arg(&rows));
        assert!(code.is_some_and(|c| c > 0) && said.contains("score.weight"), "{name}: {said}");
    }
}
