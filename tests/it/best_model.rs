//! The best checkpoint as the result, early stopping, and completions at every evaluation: whole
//! runs through the binary.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use temper::tensor::safetensors::SafeFolder;
use temper::{Silent, Training};

use crate::support::{MODEL, command, done, finish, json, json_lines, metrics, write_rows};

const ROWS: &str = "tests/fixtures/sft/messages.jsonl";
const HELD_OUT: &str = "tests/fixtures/sft/chat_prompt_completion.jsonl";

/// The loss of these evaluations falls all the time; with greater_is_better the first one is best.
const KEYS: [&str; 10] = [
    "learning_rate=1e-3",
    "lr_scheduler_type=constant",
    "per_device_train_batch_size=4",
    "max_steps=24",
    "logging_steps=2",
    "eval_strategy=steps",
    "save_steps=2",
    "device=cpu",
    "metric_for_best_model=loss",
    "greater_is_better=true",
];

fn run(out: &Path, extra: &[&str]) -> (Option<i32>, String) {
    let mut command = command(&["sft", "--model", MODEL, "--data", ROWS, "--eval-data", HELD_OUT]);
    finish(command.arg("--output").arg(out).args(KEYS).args(extra))
}

fn ran(out: &Path, extra: &[&str]) -> String {
    let (code, text) = run(out, extra);
    assert_eq!(code, Some(0), "{text}");
    text
}

/// Step and loss of every evaluation.
fn evaluations(out: &Path) -> Vec<(u64, f64)> {
    let of = |line: &Value| Some((line["step"].as_u64()?, line.get("eval_loss")?.as_f64()?));
    metrics(out).iter().filter_map(of).collect()
}

fn best(evaluations: &[(u64, f64)]) -> (u64, f64) {
    *evaluations.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap()
}

fn checkpoints(out: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(out).unwrap().map(|e| e.unwrap().file_name());
    let step = |name: std::ffi::OsString| {
        name.to_str().unwrap().strip_prefix("checkpoint-").and_then(|n| n.parse().ok())
    };
    let mut steps: Vec<u64> = names.filter_map(step).collect();
    steps.sort_unstable();
    steps
}

fn weights(dir: PathBuf) -> Vec<(String, Vec<u8>)> {
    let folder = SafeFolder::open_file(dir.join("model.safetensors")).unwrap();
    let mut names: Vec<String> = folder.names().map(String::from).collect();
    names.sort();
    let bytes = |name: &String| folder.get(name).unwrap().bytes.to_vec();
    names.iter().map(|name| (name.clone(), bytes(name))).collect()
}

#[test]
fn the_best_checkpoint_is_kept_and_is_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let extra = ["load_best_model_at_end=true", "save_total_limit=2", "early_stopping_patience=3"];
    let text = ran(&out, &extra);
    let all = evaluations(&out);
    let (step, loss) = best(&all);
    let last = all.last().unwrap().0;
    // Three evaluations without a better one end the run.
    assert_eq!((step, last), (2, 8), "{all:?}");
    assert!(text.contains(&format!("stopped early, after step {last}")), "{text}");
    assert!(text.contains(&format!("the result is the model of checkpoint-{step}")), "{text}");
    assert_eq!(checkpoints(&out), [step, last]);
    assert!(weights(out.clone()) == weights(out.join(format!("checkpoint-{step}"))));
    assert!(weights(out.clone()) != weights(out.join(format!("checkpoint-{last}"))));
    let state = json(out.join(format!("checkpoint-{last}/trainer_state.json")));
    assert_eq!((&state["best_metric"], &state["best_global_step"]), (&json!(loss), &json!(step)));
    let named = state["best_model_checkpoint"].as_str().unwrap();
    assert!(named.ends_with(&format!("checkpoint-{step}")), "{named}");
    // A run that has stopped stays stopped.
    let again = ran(&out, &[&extra[..], &["--resume"]].concat());
    assert!(again.contains("nothing is left to do"), "{again}");
    assert_eq!(evaluations(&out), all);
}

#[test]
fn a_resumed_run_stops_and_ends_as_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let prompts = "sample_prompts=[\"How many now?\", \"Ana has 3 pens.\"]";
    let extra = [
        "load_best_model_at_end=true",
        "early_stopping_patience=3",
        prompts,
        "sample_max_new_tokens=6",
    ];
    ran(&whole, &extra);
    let all = evaluations(&whole);
    let (best, _) = best(&all);
    // One evaluation after the best one: the count and the best metric come from the checkpoint.
    ran(&cut, &[&extra[..], &["--overwrite"]].concat());
    for step in checkpoints(&cut).into_iter().filter(|n| *n > best + 2) {
        std::fs::remove_dir_all(cut.join(format!("checkpoint-{step}"))).unwrap();
    }
    std::fs::remove_file(cut.join("model.safetensors")).unwrap();
    ran(&cut, &[&extra[..], &["--resume"]].concat());
    assert_eq!(evaluations(&cut), all);
    assert!(weights(whole.clone()) == weights(cut.clone()));
    let last = all.last().unwrap().0;
    let state =
        |out: &Path| json(out.join(format!("checkpoint-{last}/state.json")))["best"].clone();
    assert_eq!(state(&whole), state(&cut));
    let lines = |out: &Path| json_lines(out.join("completions.jsonl"));
    assert_eq!(lines(&whole), lines(&cut));
    assert_eq!(lines(&whole).len(), 2 * all.len());
}

#[test]
fn samples_are_what_generate_gives_at_every_evaluation() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let prompts = "sample_prompts=How many pens, now?";
    let text = ran(&out, &[prompts, "sample_max_new_tokens=8", "max_steps=4"]);
    assert_eq!(text.matches("sample  How many pens, now?").count(), 2, "{text}");
    let lines = json_lines(out.join("completions.jsonl"));
    let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [2, 4]);
    // The rows are conversations, so the text is what a user says.
    assert_eq!(lines[1]["prompt"], json!([{ "role": "user", "content": "How many pens, now?" }]));
    assert_eq!(lines[1]["by"], "sample");
    let folder = out.to_str().unwrap();
    let generated = done(&[
        "generate",
        "--model",
        folder,
        "--device",
        "cpu",
        "--prompt",
        "How many pens, now?",
        "--chat",
        "temperature=0",
        "max_new_tokens=8",
    ]);
    assert_eq!(generated.trim(), lines[1]["completion"].as_str().unwrap().trim());
    assert!(
        std::fs::read_to_string(out.join("report.html")).unwrap().contains("How many pens, now?")
    );
}

#[test]
fn dpo_samples_a_file_of_prompts_and_a_classifier_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let asked = [json!({ "prompt": "one" }), json!({ "prompt": "two" })];
    let asked = write_rows(dir.path().join("asked.jsonl"), &asked);
    let out = dir.path().join("out");
    let of = |method: &str, asked: &str| {
        let data = "tests/fixtures/preferences/plain.jsonl";
        let mut command = command(&[method, "--model", MODEL, "--data", data, "--overwrite"]);
        command.arg("--output").arg(&out).args([
            "max_steps=2",
            "eval_strategy=epoch",
            "eval_rows=4",
        ]);
        finish(command.args([
            &format!("sample_prompts={asked}"),
            "sample_max_new_tokens=4",
            "device=cpu",
        ]))
    };
    let (code, text) = of("dpo", &asked);
    assert_eq!(code, Some(0), "{text}");
    let lines = json_lines(out.join("completions.jsonl"));
    let prompts: Vec<&Value> = lines.iter().map(|line| &line["prompt"]).collect();
    assert_eq!(prompts, [&json!("one"), &json!("two")]);
    let (code, text) = of("reward", &asked);
    assert!(code == Some(1) || code == Some(2), "{text}");
    assert!(text.contains("generates no text; leave it out"), "{text}");
    let bad = write_rows(dir.path().join("bad.jsonl"), &[json!({ "text": "x" })]);
    let (_, text) = of("dpo", &bad);
    assert!(text.contains("bad.jsonl:1: "), "{text}");
}

#[test]
fn the_memory_plan_has_room_for_the_samples() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, prompts: usize| {
        let prompts: Vec<String> = (0..prompts).map(|i| format!("prompt {i}")).collect();
        let options = [
            "max_steps=1".to_string(),
            "per_device_train_batch_size=1".into(),
            "per_device_eval_batch_size=1".into(),
            "eval_strategy=epoch".into(),
            "save_strategy=no".into(),
            "device=cpu".into(),
            format!("sample_prompts={}", json!(prompts)),
        ];
        let training = Training::new("sft").unwrap().options(options).model(MODEL);
        let training = match prompts.is_empty() {
            true => training,
            false => training.option("sample_max_new_tokens", 600),
        };
        let data = training.data([ROWS]).eval_data([HELD_OUT]);
        let finished = data.output(dir.path().join(name)).observer(Silent).run().unwrap();
        (finished.planned, finished.summary.peak_memory as usize)
    };
    let ((without, _), (with, measured)) = (run("without", 0), run("with", 8));
    // Of 8 sequences: keys and values of 2 layers, 16 floats each, for 600 tokens.
    let cache = 8 * 600 * 2 * 2 * 16 * 4;
    assert!(with > without && with > cache, "{with} {without} {cache}");
    assert!(measured <= with + with / 20 && measured > with / 2, "{measured} of {with}");
}

#[test]
fn options_that_contradict_each_other_are_refused_before_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let said = |extra: &[&str]| {
        let (code, text) = run(&out, extra);
        assert_eq!(code, Some(2), "{text}");
        text
    };
    let best = "load_best_model_at_end=true";
    assert!(said(&[best, "save_strategy=epoch"]).contains("make them the same"));
    assert!(said(&[best, "eval_steps=3"]).contains("must be a multiple of eval_steps, which is 3"));
    assert!(said(&[best, "eval_steps=0.1"]).contains("both whole numbers"));
    assert!(said(&[best, "eval_strategy=no"]).contains("needs evaluations"));
    assert!(said(&["early_stopping_patience=0"]).contains("must be at least 1"));
    assert!(said(&["early_stopping_threshold=0.1"]).contains("early_stopping_patience is none"));
    let (code, text) = run(&out, &[best, "metric_for_best_model=f1"]);
    assert!(code == Some(2) && text.contains("give one of eval_loss"), "{text}");
}
