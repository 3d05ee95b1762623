//! `temper data` and `temper inspect memory` for every method: rows, masks and plans of training.

use temper::methods::registry::REGISTRY;

use crate::support::{MODEL, command, done, finish, json_lines, temper, write_rows};

/// Rows that a method reads, and the options without which it does not start.
fn rows_of(method: &str) -> (&'static str, &'static [&'static str]) {
    const TEACHER: &[&str] = &["teacher_model_name_or_path=tests/fixtures/sft/model"];
    match method {
        "sft" => ("sft/messages.jsonl", &[]),
        "pretrain" => ("sft/text.jsonl", &["max_length=64"]),
        "dpo" | "orpo" | "cpo" => ("preferences/chat.jsonl", &[]),
        "reward" => ("preferences/margin.jsonl", &[]),
        "prm" => ("preferences/steps.jsonl", &[]),
        "kto" => ("preferences/unpaired.jsonl", &[]),
        "distill" | "gkd" => ("sft/prompt_completion.jsonl", TEACHER),
        "on-policy-distill" => ("sft/prompt_completion.jsonl", TEACHER),
        _ => ("sft/prompt_completion.jsonl", &[]),
    }
}

fn data(method: &str, more: &[&str]) -> String {
    let (rows, options) = rows_of(method);
    let path = format!("tests/fixtures/{rows}");
    let args = ["data", "--model", MODEL, "--method", method, "--rows", "1", "--data", &path];
    done(&[&args, options, more].concat())
}

#[test]
fn the_rows_of_every_method_are_shown() {
    for entry in REGISTRY {
        let out = data(entry.name, &[]);
        let (rows, _) = rows_of(entry.name);
        assert!(out.contains(&format!("{rows}:1")), "{}: {out}", entry.name);
        assert!(out.contains("tokens a row: median"), "{}: {out}", entry.name);
        assert!(out.contains(" rows are dropped"), "{}: {out}", entry.name);
    }
}

#[test]
fn masks_are_those_that_each_method_trains_on() {
    let dpo = data("dpo", &[]);
    let sides: Vec<&str> = dpo.split("chat.jsonl:1: ").skip(1).collect();
    assert!(sides[0].starts_with("chosen, ") && sides[1].starts_with("rejected, "), "{dpo}");
    let answer = "<|im_start|>assistant\n[[1 + 19 = 20. The answer is 20.<|im_end|>\n]]";
    assert!(sides[0].contains(answer), "{dpo}");
    let reward = data("reward", &[]);
    assert!(reward.contains("20.[[<|im_end|>]]") && reward.contains("; margin 0.889"), "{reward}");
    let kto = data("kto", &[]);
    assert!(kto.contains("; label false") && kto.contains("another row's completion"), "{kto}");
    let prm = data("prm", &[]);
    assert!(prm.contains("steps: right, wrong, right") && prm.contains("= 20[[\n]]"), "{prm}");
    let grpo = data("grpo", &[]);
    assert!(grpo.contains(":1: prompt, ") && grpo.contains("rewards: completion"), "{grpo}");
    assert!(!grpo.contains("[["), "{grpo}");
    let gkd = data("gkd", &[]);
    assert!(gkd.contains("left?\n[[21 - 2 = 19. The answer is 19.<|im_end|>]]"), "{gkd}");
    let packs = data("sft", &["packing=true", "max_length=256"]);
    assert!(packs.contains("messages.jsonl:1") && packs.contains(" + "), "{packs}");
}

#[test]
fn a_pair_that_is_cut_away_is_named_with_its_reason() {
    let out = data("dpo", &["max_length=70"]);
    assert!(out.contains("no loss target is left after truncation to max_length=70"), "{out}");
    let (code, _, err) = temper(&["data", "--model", MODEL, "--data", "x", "--method", "dpoo"]);
    assert!(code == Some(2) && err.contains("did you mean dpo?"), "{err}");
}

#[test]
fn the_plan_of_every_method_is_the_one_that_training_prints() {
    for entry in REGISTRY {
        let (rows, options) = rows_of(entry.name);
        let path = format!("tests/fixtures/{rows}");
        let mut options: Vec<&str> = options.to_vec();
        options.extend(["--device", "cpu", "per_device_train_batch_size=2", "max_steps=1"]);
        if ["grpo", "rloo", "reinforce", "ppo", "online-dpo"].contains(&entry.name) {
            options.push("reward_funcs=length:min=1,max=9");
        }
        let length = match entry.name {
            "online-dpo" | "gkd" => "max_new_tokens=4",
            "grpo" | "rloo" | "reinforce" | "ppo" | "on-policy-distill" => {
                "max_completion_length=4"
            }
            _ => "max_length=64",
        };
        options.push(length);
        if ["grpo", "rloo", "reinforce"].contains(&entry.name) {
            options.push("num_generations=2");
        }
        let head = ["inspect", "memory", "--model", MODEL, "--method", entry.name, "--data", &path];
        let (code, planned, err) = temper(&[&head, &options[..]].concat());
        assert_eq!(code, Some(0), "{}: {err}", entry.name);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut train = command(&[entry.name, "--model", MODEL, "--data", &path, "--output"]);
        let (code, said) = finish(train.arg(&out).args(&options));
        assert_eq!(code, Some(0), "{}: {said}", entry.name);
        // But for what is free at the moment.
        let table = planned.rsplit_once(';').unwrap().0;
        assert!(said.contains(table), "{}: {table}\n{said}", entry.name);
        assert!(json_lines(out.join("metrics.jsonl")).len() == 1);
    }
}

#[test]
fn a_plan_without_rows_is_that_of_rows_as_long_as_max_length() {
    let plan = |method: &str, more: &[&str]| {
        let args = ["inspect", "memory", "--model", MODEL, "--device", "cpu", "--method", method];
        temper(&[&args, more].concat())
    };
    for method in ["dpo", "kto", "reward", "prm", "orpo", "cpo", "pretrain"] {
        let (code, out, err) = plan(method, &["max_length=32"]);
        assert!(code == Some(0) && out.contains("at the peak"), "{method}: {err}");
    }
    let (code, _, err) = plan("grpo", &["reward_funcs=exact_match"]);
    assert!(code == Some(2) && err.contains("give --data FILE"), "{err}");
}

#[test]
fn a_plan_needs_no_weights() {
    let bare = tempfile::tempdir().unwrap();
    std::fs::copy(format!("{MODEL}/config.json"), bare.path().join("config.json")).unwrap();
    let plan = |dir: &str| {
        let args = ["inspect", "memory", "--model", dir, "--gpu-gib", "8", "max_length=32"];
        let (code, out, err) = temper(&args);
        assert_eq!(code, Some(0), "{err}");
        out
    };
    let dir = bare.path().to_str().unwrap();
    assert_eq!(plan(dir), plan(MODEL));
    for what in ["config", "launches"] {
        let (code, _, err) = temper(&["inspect", what, "--model", dir]);
        assert_eq!(code, Some(0), "{what}: {err}");
    }
    let (code, _, err) = temper(&["inspect", "tape", "--model", dir]);
    assert!(code == Some(1) && err.contains("has no weights"), "{code:?} {err}");
}

#[test]
fn a_run_file_gives_the_method_its_options() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [serde_json::json!({ "q": "a", "completion": " b" })];
    write_rows(dir.path().join("rows.jsonl"), &rows);
    let file = dir.path().join("run.toml");
    std::fs::write(&file, "columns = ['prompt:q']\ndata = ['rows.jsonl']\n").unwrap();
    let out = done(&["data", "--model", MODEL, "--config", file.to_str().unwrap()]);
    assert!(out.contains("rows.jsonl:1: ") && out.contains("a[[ b<|im_end|>]]"), "{out}");
}
