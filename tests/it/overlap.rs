//! Rewards computed while completions are still being generated: the same lines, the same scores.

use std::path::Path;

use serde_json::{Value, json};
use temper::observer::Silent;
use temper::rewards::{RewardBatch, Rewards};

use crate::support::{MODEL, command, finish, json_lines};

fn batch(completions: &[&str]) -> RewardBatch {
    let mut batch = RewardBatch::default();
    for (i, text) in completions.iter().enumerate() {
        let columns = json!({ "level": i });
        batch.push(&json!("p"), columns.as_object().unwrap().iter(), text, vec![i as u32]);
    }
    batch
}

/// A reward that keeps what it read in `log` and gives each row the number of its line.
fn counting(log: &Path, more: &str) -> Rewards {
    let spec = format!(
        "command:while read -r line; do printf '%s\\n' \"$line\" >> {}; {more} id=${{line#*:}}; id=${{id%%,*}}; n=$((n + 1)); \
         echo \"{{\\\"id\\\": $id, \\\"reward\\\": $n}}\"; done",
        log.display()
    );
    Rewards::parse(&[spec], None).unwrap()
}

#[test]
fn rows_that_are_offered_early_are_scored_as_others() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, early) = (dir.path().join("plain"), dir.path().join("early"));
    let whole = batch(&["a", "b", "c", "d"]);
    let mut usual = counting(&plain, "");
    let mut rewards = counting(&early, "");
    let wanted =
        |first: u32| vec![(first..first + 4).map(|n| Some(f64::from(n))).collect::<Vec<_>>()];
    for (generation, offered) in [0usize, 2, 4, 1].into_iter().enumerate() {
        for row in 0..offered {
            // Later rows are not there yet.
            let mut coming = batch(&["a", "b", "c", "d"]);
            (row + 1..4).for_each(|r| coming.replace(r, json!(""), vec![]));
            rewards.offer(&coming, row);
        }
        if offered > 0 {
            let sent = 4 * generation + offered;
            let begin = std::time::Instant::now();
            while json_lines_of(&early) < sent {
                assert!(begin.elapsed().as_secs() < 60, "nothing comes before the batch is whole");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
        let first = 4 * generation as u32 + 1;
        assert_eq!(rewards.score(&whole, &Silent).unwrap().each, wanted(first));
        assert_eq!(usual.score(&whole, &Silent).unwrap().each, wanted(first));
    }
    drop((rewards, usual));
    assert_eq!(json_lines(&early), json_lines(&plain), "the same lines in the same order");
}

fn json_lines_of(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().count()
}

#[test]
fn rows_that_were_offered_and_never_scored_answer_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut rewards = counting(&log, "");
    rewards.offer(&batch(&["a", "b"]), 0);
    // Another batch than the one that was offered: the program begins anew.
    let scores = rewards.score(&batch(&["x", "y", "z"]), &Silent).unwrap();
    assert_eq!(scores.each, [[1.0, 2.0, 3.0].map(Some)]);
    rewards.offer(&batch(&["a", "b"]), 0);
    rewards.offer(&batch(&["c", "d"]), 0);
    assert_eq!(rewards.score(&batch(&["c", "d"]), &Silent).unwrap().each, [[1.0, 2.0].map(Some)]);
}

#[test]
fn a_program_that_dies_on_early_rows_is_started_again_with_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let (log, died) = (dir.path().join("log"), dir.path().join("died"));
    let dies = format!("if ! [ -e {0} ]; then touch {0}; exit 3; fi;", died.display());
    let mut rewards = counting(&log, &dies);
    rewards.offer(&batch(&["a", "b"]), 0);
    assert_eq!(rewards.score(&batch(&["a", "b"]), &Silent).unwrap().each, [[1.0, 2.0].map(Some)]);
    let rows: Vec<Value> = json_lines(&log);
    let ids: Vec<u64> = rows.iter().map(|r| r["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.first(), Some(&0));
    assert_eq!(ids[ids.len() - 2..], [2, 3], "rows that are owed get new ids");
}

#[test]
fn a_run_is_the_same_however_early_its_completions_are_scored() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &str| {
        let log = dir.path().join(format!("{name}.log"));
        let script = format!(
            "while read -r line; do printf \"%s\\n\" \"$line\" >> {}; id=${{line#*:}}; id=${{id%%,*}}; \
             echo \"{{\\\"id\\\": $id, \\\"reward\\\": $((id % 3))}}\"; done",
            log.display()
        );
        let rewards = format!("reward_funcs=[{{ kind = \"command\", command = '''{script}''' }}]");
        let rows = "tests/fixtures/sft/prompt_completion.jsonl";
        let mut command = command(&["grpo", "--model", MODEL, "--data", rows, "--output"]);
        command.arg(dir.path().join(name)).arg(rewards).args([
            "num_generations=4",
            "per_device_train_batch_size=8",
            "max_completion_length=12",
            "learning_rate=1e-3",
            "max_steps=3",
            more,
        ]);
        let (code, said) = finish(&mut command);
        assert_eq!(code, Some(0), "{said}");
        log
    };
    // One after the other, each completion is scored before the next begins.
    let (all, one) = (run("all", "max_sequences=32"), run("one", "max_sequences=1"));
    assert_eq!(json_lines(all), json_lines(one));
    for file in ["model.safetensors", "completions.jsonl"] {
        let read = |name: &str| std::fs::read(dir.path().join(name).join(file)).unwrap();
        assert!(read("all") == read("one"), "{file}");
    }
}
