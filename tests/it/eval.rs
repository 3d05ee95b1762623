//! `temper eval` and `temper data` through the binary, on the small folder of the SFT tests.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{MODEL, done, json, metrics, temper, write_rows};

const COMPLETIONS: &str = "tests/fixtures/sft/prompt_completion.jsonl";

/// The JSON that `temper eval` writes.
fn eval(dir: &Path, model: &str, data: &str, keys: &[&str]) -> Value {
    let path = dir.join("eval.json");
    let fixed = [
        "eval",
        "--model",
        model,
        "--device",
        "cpu",
        "--data",
        data,
        "--output",
        path.to_str().unwrap(),
    ];
    done(&[&fixed[..], keys].concat());
    json(path)
}

#[test]
fn prompts_are_answered_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = ["one", "two", "three", "four", "five"];
    let asked: Vec<Value> = prompts.iter().map(|p| json!({ "prompt": p })).collect();
    let asked = write_rows(dir.path().join("asked.jsonl"), &asked);
    let said = done(&[
        "generate",
        "--model",
        MODEL,
        "--device",
        "cpu",
        "--data",
        &asked,
        "temperature=0",
        "max_new_tokens=8",
    ]);
    // What the model says is the right answer in two rows, another in two, and the last has none.
    let rows: Vec<Value> = said
        .lines()
        .enumerate()
        .map(|(i, line)| {
            let said: Value = serde_json::from_str(line).unwrap();
            let text = said["completion"].as_str().unwrap();
            let answer =
                if i < 2 { json!([text, "or this"]) } else { json!(format!("{text}, no")) };
            json!({ "prompt": said["prompt"], "answer": if i == 4 { Value::Null } else { answer } })
        })
        .collect();
    let data = write_rows(dir.path().join("rows.jsonl"), &rows);
    let found = eval(dir.path(), MODEL, &data, &["max_new_tokens=8"]);
    let exact = &found["metrics"]["exact_match"];
    assert_eq!((&exact["value"], &exact["rows"]), (&json!(0.5), &json!(4)), "{found}");
    // half of four: the deviation is sqrt(1/3), the mean's error half of it
    assert!((exact["stderr"].as_f64().unwrap() - (1f64 / 12.0).sqrt()).abs() < 1e-12);
    assert_eq!(found["rows"][4]["rewards"]["exact_match"], json!([null]));
    assert_eq!(found["options"]["temperature"], json!(0.0));
}

#[test]
fn pass_at_k_is_of_the_sampled_completions() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<Value> = (0..6).map(|i| json!({ "prompt": format!("number {i}") })).collect();
    let data = write_rows(dir.path().join("rows.jsonl"), &rows);
    let keys = ["n=4", "temperature=1", "max_new_tokens=6", "reward_funcs=regex:[aeiou]{2}|e.*t"];
    let found = eval(dir.path(), MODEL, &data, &keys);
    let figure = |name: &str| found["metrics"][name]["value"].as_f64().unwrap();
    let rows = found["rows"].as_array().unwrap();
    let right: Vec<f64> = rows
        .iter()
        .map(|row| {
            row["rewards"]["regex"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).sum()
        })
        .collect();
    let all: f64 = right.iter().sum();
    assert!(all > 0.0 && all < 24.0, "some pass and some do not: {right:?}");
    let share = right.iter().filter(|r| **r > 0.0).count() as f64 / 6.0;
    assert!(
        (figure("regex") - all / 24.0).abs() < 1e-12
            && (figure("regex/pass@1") - all / 24.0).abs() < 1e-12
    );
    assert!((figure("regex/pass@4") - share).abs() < 1e-12);
    assert!(
        figure("regex/pass@1") <= figure("regex/pass@2")
            && figure("regex/pass@2") <= figure("regex/pass@4")
    );
    let (code, _, err) =
        temper(&["eval", "--model", MODEL, "--device", "cpu", "--data", &data, "n=4"]);
    assert!(code == Some(2) && err.contains("temperature"), "{err}");
}

#[test]
fn perplexity_is_of_the_log_probs_that_score_gives() {
    let dir = tempfile::tempdir().unwrap();
    let found = eval(dir.path(), MODEL, COMPLETIONS, &[]);
    let scored = done(&["score", "--model", MODEL, "--device", "cpu", "--data", COMPLETIONS]);
    let (mut sum, mut tokens) = (0f64, 0);
    for line in scored.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        sum -= line["sum"].as_f64().unwrap();
        tokens += line["logps"].as_array().unwrap().len();
    }
    let figure = |name: &str| found["metrics"][name]["value"].as_f64().unwrap();
    assert_eq!(figure("tokens"), tokens as f64);
    // the same numbers, added in the same order
    assert!((figure("perplexity") / (sum / tokens as f64).exp() - 1.0).abs() < 1e-9, "{found}");
}

#[test]
fn pairs_are_ranked_as_the_reward_run_ranks_them() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("reward");
    let (model, pairs) = (model.to_str().unwrap(), "tests/fixtures/preferences/plain.jsonl");
    done(&[
        "reward",
        "--model",
        MODEL,
        "--data",
        pairs,
        "--eval-data",
        pairs,
        "--output",
        model,
        "device=cpu",
        "max_steps=3",
        "learning_rate=1e-3",
        "eval_strategy=steps",
        "per_device_eval_batch_size=1000",
        "max_length=none",
    ]);
    let last = metrics(Path::new(model)).pop().unwrap();
    let found = eval(dir.path(), model, pairs, &[]);
    assert_eq!(found["metrics"]["accuracy"]["value"], last["eval_accuracy"], "{last}");
    // a shared prompt is computed once in the run: other blocks of the same sums
    let margin = found["metrics"]["margin"]["value"].as_f64().unwrap();
    assert!((margin - last["eval_margin"].as_f64().unwrap()).abs() < 1e-5, "{last} {margin}");
    let (code, _, err) = temper(&["eval", "--model", MODEL, "--device", "cpu", "--data", pairs]);
    assert!(code == Some(2) && err.contains("reward model"), "{err}");
    let (code, _, err) =
        temper(&["eval", "--model", model, "--device", "cpu", "--data", COMPLETIONS]);
    assert!(code == Some(1) && err.contains("chosen and rejected"), "{err}");
}

#[test]
fn the_doctor_shows_what_the_loss_is_on_and_what_is_dropped() {
    let out = done(&["data", "--model", MODEL, "--data", COMPLETIONS, "--rows", "1"]);
    assert!(out.contains("left?\n[[21 - 2 = 19. The answer is 19.<|im_end|>]]"), "{out}");
    assert!(out.contains("EOS \"<|im_end|>\": a loss target in 48 of 48 rows"), "{out}");
    assert!(out.contains("0 of 48 rows are dropped") && !out.contains("\x1b["), "{out}");

    let messages = "tests/fixtures/sft/messages.jsonl";
    let out = done(&[
        "data",
        "--model",
        MODEL,
        "--data",
        messages,
        "--rows",
        "1",
        "assistant_only_loss=true",
    ]);
    assert!(
        out.contains("<|im_start|>assistant\n[[5 - 3 = 2. The answer is 2.<|im_end|>]]"),
        "{out}"
    );

    let dir = tempfile::tempdir().unwrap();
    let long = "word ".repeat(60);
    let rows = [
        json!({ "prompt": "a", "completion": " b" }),
        json!({ "prompt": long, "completion": "lost" }),
        json!({ "prompt": "c", "completion": " d<|im_end|><|im_end|>" }),
    ];
    let data = write_rows(dir.path().join("rows.jsonl"), &rows);
    let out = done(&["data", "--model", MODEL, "--data", &data, "max_length=32"]);
    assert!(out.contains("1 of 3 rows are dropped") && out.contains("rows.jsonl:2: "), "{out}");
    assert!(
        out.contains("no loss target is left after truncation to max_length=32")
            && out.contains("<- max_length"),
        "{out}"
    );
    assert!(out.contains("doubled in 1"), "{out}");
    let out =
        done(&["data", "--model", MODEL, "--data", &data, "max_length=32", "on_truncation=drop"]);
    assert!(out.contains("more than max_length=32, and on_truncation=drop"), "{out}");
}
