//! What a person sees of a run, and what happens when nobody reads its output.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{MODEL, command, done, metrics};

const DATA: &str = "tests/fixtures/sft/prompt_completion.jsonl";

fn training<'a>(method: &'a str, out: &'a Path, keys: &'a str) -> Vec<&'a str> {
    let fixed = [method, "--model", MODEL, "--data", DATA, "--output", out.to_str().unwrap()];
    fixed.into_iter().chain(keys.split(' ')).collect()
}

/// Standard output and error of a run.
fn streams(args: &[&str]) -> (String, String) {
    let output = command(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(0), "{args:?}: {err}");
    (out, err)
}

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

const GRPO: &str = "max_steps=4 logging_steps=2 num_generations=4 max_completion_length=8 \
                    reward_funcs=length:max=4 device=cpu log_completions=true";

#[test]
fn the_log_is_a_table_and_ends_with_a_summary() {
    let dir = tempfile::tempdir().unwrap();
    let runs = [
        ("sft", "max_steps=4 logging_steps=2 eval_strategy=steps eval_rows=4 device=cpu"),
        ("grpo", GRPO),
    ];
    for (method, keys) in runs {
        let out = dir.path().join(method);
        let (text, _) = streams(&training(method, &out, keys));
        let (log, summary) = text.split_once("\ndone\n").unwrap();
        let lines: Vec<&str> = log.lines().collect();
        for word in ["step", "loss", "tokens/s", "elapsed", "left"] {
            assert_eq!(log.matches(word).count(), 1, "{word} is in one header: {log}");
        }
        let rows: Vec<&&str> = lines.iter().filter(|l| l.contains("/4 ")).collect();
        assert_eq!(rows.len(), 2, "{log}");
        for row in rows {
            assert_eq!(row.chars().count(), lines[0].chars().count(), "{log}");
            assert!(!row.contains("e+") && !row.contains('{'), "{row}");
        }
        assert_eq!(
            lines.iter().filter(|l| l.trim().starts_with("eval ")).count(),
            2 * usize::from(method == "sft")
        );
        assert!(lines.iter().all(|l| l.chars().count() <= 100), "{log}");
        for word in ["time", "tokens/s", "peak memory", "loss", "page", "report.html", "next"] {
            assert!(summary.contains(word), "{word}: {summary}");
        }
        assert!(metrics(&out)[0]["peak_memory"].is_u64(), "all is in metrics.jsonl");
        // What is said to be next works, but chat, which waits for a person.
        let next = summary.split_once("\nnext\n").unwrap().1;
        assert!(next.contains("temper chat") && next.contains("temper eval"), "{next}");
        for line in next.lines().filter(|l| !l.contains("temper chat")) {
            let args: Vec<&str> = line.split_whitespace().skip(1).collect();
            done(&args);
        }
    }
}

#[test]
fn completions_are_shown_once_a_log_line_short_and_clean() {
    let dir = tempfile::tempdir().unwrap();
    let (_, err) = streams(&training("grpo", dir.path(), GRPO));
    let shown: Vec<&str> = err.lines().filter(|l| l.contains(" completion, reward ")).collect();
    assert_eq!(shown.len(), 4, "the best and the worst of two log lines: {err}");
    for line in shown {
        assert!(line.chars().count() < 400 && !line.chars().any(char::is_control), "{line:?}");
    }
    assert!(!err.contains('\x1b') && !err.contains('\r'), "no bar where there is no terminal");
}

#[test]
fn a_resumed_run_logs_the_rate_since_the_resume() {
    let dir = tempfile::tempdir().unwrap();
    let keys = "logging_steps=1 save_steps=1 device=cpu per_device_train_batch_size=1";
    let first = format!("max_steps=3 {keys}");
    streams(&training("sft", dir.path(), &first));
    // As if it had been stopped after step 2.
    std::fs::remove_dir_all(dir.path().join("checkpoint-3")).unwrap();
    let mut args = training("sft", dir.path(), &first);
    args.push("--resume");
    streams(&args);
    let lines = metrics(dir.path());
    assert_eq!(lines.len(), 3);
    assert!(lines[2]["tokens_per_second"].as_f64().unwrap() > 0.0, "{}", lines[2]);
}

#[test]
fn full_streams_and_readers_that_leave_end_no_run() {
    let dir = tempfile::tempdir().unwrap();
    for method in ["sft", "grpo"] {
        let keys = if method == "grpo" { GRPO } else { "max_steps=4 logging_steps=1 device=cpu" };
        let out = dir.path().join(format!("{method}-full"));
        let status =
            command(&training(method, &out, keys)).stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(0), "{method}");
        assert!(out.join("model.safetensors").is_file());
        let out = dir.path().join(format!("{method}-left"));
        let mut run: Command = command(&training(method, &out, keys));
        let mut child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut first).unwrap();
        assert!(first.starts_with("device"), "{first}");
        drop(child.stdout.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{method}");
        assert!(out.join("model.safetensors").is_file());
    }
}

#[test]
fn a_command_ends_quietly_when_its_reader_leaves() {
    let dir = tempfile::tempdir().unwrap();
    streams(&training("sft", dir.path(), "max_steps=1 device=cpu"));
    let out = dir.path().to_str().unwrap();
    let commands: [&[&str]; 11] = [
        &["data", "--model", MODEL, "--data", DATA, "--rows", "40"],
        &["inspect", "kernels"],
        &["inspect", "config", "--model", MODEL],
        &["inspect", "tape", "--model", MODEL, "--device", "cpu"],
        &["inspect", "memory", "--model", MODEL, "--device", "cpu"],
        &["score", "--model", MODEL, "--data", DATA, "--device", "cpu"],
        &["eval", "--model", MODEL, "--data", DATA, "--device", "cpu"],
        &["generate", "--model", MODEL, "--prompt", "a", "max_new_tokens=2", "--device", "cpu"],
        &["report", out],
        &["sft", "--help-options"],
        &["--help"],
    ];
    for args in commands {
        // The reader is gone before the first byte.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(args).stdout(writer).output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {err}");
        assert!(!err.contains("error") && !err.contains("panic"), "{args:?}: {err}");
    }
    // A full disk is an error, as of cat.
    let output = command(commands[0]).stdout(full()).stderr(Stdio::piped()).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("standard output"), "{err}");
}
