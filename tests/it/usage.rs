//! What commands say when they are asked for something that does not exist.

use crate::support::{MODEL, done, temper, temper_reading, write_rows};

#[test]
fn an_unknown_subject_is_answered_with_what_there_is() {
    for (command, list) in [
        ("inspect", &["config", "tape", "memory", "launches", "kernels"][..]),
        ("bench", &["ops", "train", "decode"]),
    ] {
        let (code, _, err) = temper(&[command, "foo"]);
        assert_eq!(code, Some(2), "{err}");
        assert!(err.contains("foo") && list.iter().all(|word| err.contains(word)), "{err}");
    }
}

#[test]
fn a_chat_says_which_commands_it_has() {
    let model = ["chat", "--model", MODEL, "max_new_tokens=1"];
    let (code, out, err) = temper_reading(&model, "/rest\n/quit\n");
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("/rest is not a command") && out.contains("/reset"), "{out}");
}

#[test]
fn a_dash_is_standard_output_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let rows = write_rows(dir.path().join("a.jsonl"), &[serde_json::json!({ "text": "a b" })]);
    let score = ["score", "--model", MODEL, "--data", &rows];
    assert_eq!(done(&[&score[..], &["--output", "-"]].concat()), done(&score));
    for command in [
        &["eval", "--model", MODEL, "--data", &rows, "--output", "-"][..],
        &["sft", "--model", MODEL, "--data", &rows, "--output", "-"],
        &["quickstart", "--output", "-"],
    ] {
        let (code, _, err) = temper(command);
        assert!(code == Some(2) && err.contains("must be a file"), "{err}");
    }
    assert!(!std::path::Path::new("-").exists());
}

#[test]
fn an_unsupported_family_is_not_taken_for_a_misspelt_one() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "qwen3_5"}"#).unwrap();
    let model = dir.path().to_str().unwrap();
    let (_, _, err) = temper(&["inspect", "config", "--model", model]);
    assert!(err.contains("\"qwen3_5\" is not supported; supported:"), "{err}");
    assert!(err.contains("qwen3") && !err.contains("meant"), "{err}");
}

#[test]
fn quickstarts_help_says_what_it_does() {
    let help = done(&["quickstart", "--help"]);
    for word in ["LoRA", "DPO", "PPO", "GRPO", "held-out", "seed of the data", "number of CPU"] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

#[test]
fn statistics_of_a_reward_model_speak_of_no_completions() {
    let rows = "tests/fixtures/preferences/plain.jsonl";
    let of = |method| done(&["data", "--model", MODEL, "--method", method, "--data", rows]);
    let (reward, dpo) = (of("reward"), of("dpo"));
    assert!(reward.contains(" tokens. The longest sequence has"), "{reward}");
    assert!(!reward.contains("in completions") && dpo.contains(" of them in completions"), "{dpo}");
}

#[test]
fn an_unknown_command_gets_the_list_of_commands() {
    let (code, _, error) = temper(&["fintune"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("The commands are: ") && error.contains(" sft, "), "{error}");
}
