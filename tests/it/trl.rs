//! TRL's options: the table of every field in the docs, and runs written as TRL's YAML.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use temper::config::{described, has_trl_key};
use temper::methods::registry::find;

use crate::support::{MODEL, done, fixture, json, strings, temper};

const METHODS: [&str; 6] = ["sft", "dpo", "reward", "kto", "grpo", "rloo"];
const PAGE: &str = "docs/from-trl.md";
const BEGIN: &str = "<!-- fields of TRL -->\n";

fn keys(method: &str) -> Vec<String> {
    let run = (find(method).unwrap().run)();
    run.sections().iter().flat_map(|s| s.keys()).map(|k| k.name.to_string()).collect()
}

/// What becomes of a field: of TRL's config, of the model's and of the script's.
fn fate(method: &str, field: &str) -> String {
    match keys(method).iter().any(|key| key == field) {
        true => "honoured".into(),
        false => described(field).unwrap_or_else(|| panic!("{method}: unknown field {field}")),
    }
}

/// A line for each field of one config class, or of several.
fn table(trl: &Value) -> String {
    let mut fields: BTreeMap<&str, Vec<(&str, String)>> = BTreeMap::new();
    for method in METHODS {
        for class in [method, "model", "script"] {
            for field in trl[class].as_object().unwrap().keys() {
                let of = fields.entry(field).or_default();
                if !of.iter().any(|(m, _)| *m == method) {
                    of.push((method, fate(method, field)));
                }
            }
        }
    }
    let mut table = String::from("| field | of | here |\n|---|---|---|\n");
    for (field, of) in fields {
        let mut by_fate: Vec<(&str, Vec<&str>)> = Vec::new();
        for (method, fate) in &of {
            match by_fate.iter_mut().find(|(f, _)| f == fate) {
                Some((_, methods)) => methods.push(method),
                None => by_fate.push((fate, vec![method])),
            }
        }
        for (fate, methods) in by_fate {
            let of = if methods.len() == METHODS.len() { "all".into() } else { methods.join(", ") };
            table += &format!("| `{field}` | {of} | {fate} |\n");
        }
    }
    table
}

#[test]
fn the_docs_table_of_trls_fields_is_the_programs() {
    let table = table(&json(fixture("trl_fields.json")));
    let page = std::fs::read_to_string(PAGE).unwrap();
    let from = page.find(BEGIN).unwrap() + BEGIN.len();
    let to = from + page[from..].find("<!-- end of fields -->").unwrap();
    if page[from..to] == table {
        return;
    }
    let write = std::env::var_os("TEMPER_WRITE_DOCS").is_some();
    assert!(write, "{PAGE} is out of date; run TEMPER_WRITE_DOCS=1 cargo test docs_table");
    std::fs::write(PAGE, [&page[..from], &table, &page[to..]].concat()).unwrap();
}

#[test]
fn options_that_trl_has_are_those_of_its_fields() {
    let trl = json(fixture("trl_fields.json"));
    for method in METHODS {
        for key in keys(method) {
            let has = [method, "model"].iter().any(|class| trl[*class].get(&key).is_some());
            assert_eq!(has_trl_key(method, &key), has, "{method}: {key}");
        }
    }
}

/// The run, written for TRL.
fn written(dir: &Path, method: &str, options: &[&str]) -> String {
    let file = dir.join(format!("{method}.yaml"));
    let out = dir.join("out");
    let mut args = vec![method, "--model", MODEL, "--data", "rows.jsonl", "more.jsonl"];
    args.extend(["--output", out.to_str().unwrap(), "--write-trl", file.to_str().unwrap()]);
    args.extend(options);
    done(&args);
    assert!(!out.exists(), "nothing is trained");
    std::fs::read_to_string(file).unwrap()
}

#[test]
fn a_run_written_as_trls_yaml_reads_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let keep = std::env::var_os("TEMPER_TRL_SAMPLE"); // a folder, for TRL's own parser
    for (method, options) in [
        (
            "sft",
            "learning_rate=1e-6 dtype=bfloat16 packing=true use_peft=true lora_target_modules=q_proj,v_proj",
        ),
        (
            "dpo",
            "loss_type=sigmoid,sft loss_weights=1,0.5 save_total_limit=2 device=cpu max_length=none",
        ),
        ("reward", "use_peft=true optim=adamw_8bit adam_epsilon=1e-9 lr_scheduler_type=cosine"),
        (
            "kto",
            "warmup_steps=0.1 eval_strategy=steps eval_rows=0.05 eval_steps=10 undesirable_weight=2",
        ),
        (
            "grpo",
            "reward_model=rm train_sampling_strategy=sequential scale_rewards=none epsilon_high=0.3",
        ),
        ("rloo", "reward_model=rm num_generations=2 log_completions=true dtype=float32 min_p=0.1"),
    ] {
        let options = strings(&options.split(' ').collect::<Vec<_>>());
        let words: Vec<&str> = options.iter().map(String::as_str).collect();
        let text = written(dir.path(), method, &words);
        let file = dir.path().join(format!("{method}.yaml"));
        if let Some(keep) = &keep {
            std::fs::copy(&file, Path::new(keep).join(format!("{method}.yaml"))).unwrap();
        }
        let entry = find(method).unwrap();
        let (mut was, mut read) = ((entry.run)(), (entry.run)());
        was.read(None, &options, 0).unwrap();
        // A share of the rows is TRL's test_split_size, which has no key of ours.
        let rest: Vec<String> =
            options.iter().filter(|o| o.starts_with("eval_rows")).cloned().collect();
        read.read(Some(&file), &rest, 0).unwrap_or_else(|e| panic!("{method}: {e}\n{text}"));
        let values = |run: &temper::methods::MethodRun| -> Vec<(&str, String)> {
            let keys = run.sections().iter().flat_map(|s| s.keys()).collect::<Vec<_>>();
            // A relative path of a file is relative to that file.
            let paths = ["reward_model"];
            let keys = keys.into_iter().filter(|k| !paths.contains(&k.name));
            keys.map(|k| (k.name, k.value.to_string())).collect()
        };
        assert_eq!(values(&read), values(&was), "{method}\n{text}");
    }
}

#[test]
fn what_trl_has_not_is_a_comment_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let options = ["on_truncation=drop", "attention=simt", "freeze=embed", "optim=adamw_bf16"];
    let text = written(dir.path(), "sft", &options);
    for (name, value) in options.map(|option| option.split_once('=').unwrap()) {
        let comment = |l: &str| l.starts_with(&format!("# {name} = ")) && l.contains(value);
        assert!(text.lines().any(comment), "{name}: {text}");
    }
    assert!(
        text.contains("\noptim: \"adamw_torch\"\n") || text.contains("\noptim: adamw_torch\n"),
        "{text}"
    );
    let text = written(
        dir.path(),
        "grpo",
        &["reward_funcs=think_format,exact_match,python:mine.py:score"],
    );
    assert!(text.contains("reward_funcs: [\"think_format_reward\", \"mine.score\"]"), "{text}");
    assert!(text.contains("# reward \"exact_match\": TRL has no reward"), "{text}");
    for (args, why) in [
        (&["sft", "use_peft=true", "peft_type=ia3"][..], "LoRA adapters only"),
        (&["kto", "loss_type=bco"], "no such loss"),
        (&["orpo"], "has no command for orpo"),
    ] {
        let file = dir.path().join("none.yaml");
        let fixed = [
            "--model",
            MODEL,
            "--data",
            "r.jsonl",
            "--output",
            "o",
            "--write-trl",
            file.to_str().unwrap(),
        ];
        let (code, _, err) = temper(&[args, &fixed].concat());
        assert!(code == Some(2) && err.contains(why) && !file.exists(), "{err}");
    }
}

#[test]
fn a_table_of_environment_variables_in_trls_file_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.yaml");
    std::fs::write(&file, "env:\n  WANDB_MODE: offline\ndatasets:\n- path: json\nmax_steps: 3\n")
        .unwrap();
    let mut run = (find("sft").unwrap().run)();
    let notes = run.read(Some(&file), &[], 0).unwrap();
    assert!(
        notes.iter().any(|n| n.contains("WANDB_MODE") && n.contains("in the shell")),
        "{notes:?}"
    );
    assert_eq!(run.training.max_steps, 3);
}
