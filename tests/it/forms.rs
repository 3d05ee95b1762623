//! Both syntaxes of options on the command line, in every command; lists of rewards.

use temper::config::value::{Given, Value};
use temper::config::{RewardSpecs, Section, TrainingConfig, load};
use temper::methods::online::grpo::GrpoConfig;
use temper::methods::registry::REGISTRY;
use temper::rewards::Reward;

use crate::support::{MODEL, done, fixture, json, strings, temper, write_rows};

/// The error of a training command without its files comes after that of its options.
fn refused(command: &str, options: &[&str]) -> String {
    let fixed = ["--model", "no-model", "--data", "no-data.jsonl", "--output", "no-output"];
    let (code, _, err) = temper(&[&[command], options, &fixed].concat());
    assert_eq!(code, Some(2), "{command} {options:?}: {err}");
    err
}

#[test]
fn every_method_takes_both_forms_of_an_option() {
    for entry in REGISTRY {
        // A value out of range proves that the option was read, and which.
        for options in [
            &["--learning-rate", "-1"][..],
            &["--learning_rate=-1"],
            &["learning-rate=-1"],
            &["--learning_rate", "-1", "--device", "cpu", "--max-steps", "1"],
            &["--disable-dropout", "learning_rate=-1", "--bf16", "--report-to", "none"],
        ] {
            let err = refused(entry.name, options);
            assert!(err.contains("learning_rate = -1: must not be negative"), "{err}");
            assert_eq!(err.lines().filter(|l| l.starts_with("error")).count(), 1, "{err}");
        }
        let err = refused(entry.name, &["--learning-rte", "1e-4"]);
        assert!(err.contains("did you mean learning_rate?"), "{err}");
        let help = done(&[entry.name, "--help"]);
        assert!(help.contains("--model"), "{help}");
    }
}

#[test]
fn a_switch_is_on_off_or_has_a_value() {
    let strict = |options: &[&str]| refused("sft", &[options, &["max_length=none"]].concat());
    for on in [&["--packing"][..], &["--packing", "true"], &["--packing=True"], &["packing=true"]] {
        assert!(strict(on).contains("packing = true needs max_length"), "{on:?}");
    }
    for off in [&["--no-packing"][..], &["--packing", "False"], &["--no_packing"]] {
        let err = strict(&[off, &["seed=-1"]].concat());
        assert!(err.contains("seed = -1") && !err.contains("packing"), "{off:?}: {err}");
    }
}

#[test]
fn generating_takes_arguments_as_options_and_options_as_arguments() {
    let prompt =
        |rest: &[&str]| done(&[&["generate", "--model", MODEL, "--prompt", "a b"], rest].concat());
    let expected = prompt(&["--device", "cpu", "temperature=0", "max_new_tokens=4"]);
    for rest in [
        &["device=cpu", "--temperature", "0", "--max-new-tokens", "4"][..],
        &["--max_new_tokens=4", "--temperature=0", "device=cpu", "batch=2"],
    ] {
        assert_eq!(prompt(rest), expected, "{rest:?}");
    }
}

#[test]
fn several_data_files_and_options_may_mix() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [serde_json::json!({ "text": "a b c" })];
    let one = write_rows(dir.path().join("a.jsonl"), &rows);
    let two = write_rows(dir.path().join("b=c.jsonl"), &rows);
    let args = ["data", "--model", MODEL, "max-length=9", "--data", &one, &two, "--seed", "7"];
    assert!(done(&args).contains("2"), "both files are read");
    let (code, _, err) = temper(&["merge", "--frobnicate", "1"]);
    assert!(code == Some(2) && err.contains("--frobnicate"), "{err}");
}

#[test]
fn the_default_order_of_grpo_is_accepted() {
    let said = |option: &str| {
        let (mut training, mut grpo) = (TrainingConfig::default(), GrpoConfig::default());
        let options = strings(&[option, "reward_funcs=exact_match"]);
        load(&mut [&mut training, &mut grpo], None, &options).unwrap();
        training.keys().into_iter().find(|k| k.name == "train_sampling_strategy").unwrap().value
    };
    assert_eq!(said("shuffle_dataset=true").as_str(), Some("random"));
    assert_eq!(said("shuffle_dataset=false").as_str(), Some("sequential"));
}

#[test]
fn a_comma_inside_of_a_reward_does_not_end_it() {
    let read = |text: &str| RewardSpecs::read(&Given::Text(text.into()));
    for (text, specs) in [
        ("length:min=1,max=200", &["length:min=1,max=200"][..]),
        ("regex:a{1,3}, exact_match", &["regex:a{1,3}", "exact_match"]),
        ("exact_match,exact_mach", &["exact_match", "exact_mach"]),
        ("", &[]),
    ] {
        assert_eq!(read(text).unwrap().0, strings(specs), "{text}");
    }
    for bad in ["{kind", "[1, 2]", "{ kind = ", "[[["] {
        assert!(read(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_reward_is_a_table_in_a_file_and_on_the_command_line() {
    let table =
        "{ kind = \"command\", command = \"cat\", timeout = 5, restarts = 0, weight = 0.5 }";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, format!("reward_funcs = [\"exact_match\", {table}]\n")).unwrap();
    let mut file = GrpoConfig::default();
    load(&mut [&mut file], Some(&path), &[]).unwrap();
    let given = |config: &GrpoConfig| {
        config.keys().into_iter().find(|k| k.name == "reward_funcs").unwrap().value
    };
    let mut line = GrpoConfig::default();
    load(&mut [&mut line], None, &[format!("reward_funcs=[\"exact_match\", {table}]")]).unwrap();
    assert_eq!(file, line);
    // What is written loads back the same.
    let specs = RewardSpecs::read(&Given::File(given(&file))).unwrap();
    assert_eq!(specs.written(), given(&file));
    let reward = Reward::parse(&specs[1]).unwrap();
    assert_eq!((reward.name.as_str(), reward.weight), ("command", 0.5));
    let wrong = Reward::parse("{ kind = \"command\", command = \"cat\", timeout = -1 }");
    assert!(wrong.err().unwrap().to_string().contains("timeout"));
}

#[test]
fn every_field_of_trl_is_known_and_its_default_accepted() {
    let trl = json(fixture("trl_fields.json"));
    let shared = ["model", "script"].map(|name| trl[name].as_object().unwrap());
    let mut refused = Vec::new();
    for method in ["sft", "dpo", "reward", "kto", "grpo", "rloo"] {
        let entry = temper::methods::registry::find(method).unwrap();
        let own = trl[method].as_object().unwrap();
        assert!(own.len() > 120, "{method}: {} fields", own.len());
        for (field, default) in own.iter().chain(shared.iter().copied().flatten()) {
            let text = match default {
                serde_json::Value::Null => "none".into(),
                serde_json::Value::String(text) => text.clone(),
                serde_json::Value::Array(list) => {
                    let words = list.iter().map(|word| word.as_str().unwrap());
                    words.collect::<Vec<_>>().join(",")
                }
                other => other.to_string(),
            };
            let read = |value: &str| {
                let mut options = vec![format!("{field}={value}")];
                if ["grpo", "rloo"].contains(&method) && field != "reward_funcs" {
                    options.push("reward_funcs=exact_match".into());
                }
                (entry.run)().read(None, &options, 0)
            };
            if let Err(e) = read(&text) {
                refused.push(format!("{method}: {e}"));
            }
            if let Err(e) = read("another") {
                assert!(!e.to_string().contains("unknown option"), "{method}: {e}");
            }
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[test]
fn a_list_may_stand_in_brackets_as_in_a_run_file() {
    let read = |text: &str| Vec::<u64>::read(&Given::Text(text.into()));
    assert_eq!(read("[15, 16]"), Ok(vec![15, 16]));
    assert_eq!(read("15,16"), Ok(vec![15, 16]));
    assert_eq!(read("[]"), Ok(vec![]));
    assert!(read("[15, x]").unwrap_err().contains("each item"));
    let texts = |text: &str| Vec::<String>::read(&Given::Text(text.into()));
    assert_eq!(texts("[\"q_proj\", \"v_proj\"]"), Ok(vec!["q_proj".into(), "v_proj".into()]));
    // A pattern is one text, whatever it begins and ends with.
    assert_eq!(texts("[qv]_proj"), Ok(vec!["[qv]_proj".into()]));
    assert_eq!(texts("q_pro[j-l]"), Ok(vec!["q_pro[j-l]".into()]));
    assert_eq!(texts("[a-c]"), Ok(vec!["[a-c]".into()]));
}
