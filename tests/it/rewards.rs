//! Rewards: built-in verifiers, their sum, well-behaved and misbehaving external commands,
//! advantages against TRL 1.16.0.

use std::time::Instant;

use serde_json::{Value, json};
use temper::observer::Silent;
use temper::rewards::{Reward, RewardBatch, Rewards};

use crate::support::{fixture, json_lines, temper, write_rows};

fn batch(completions: &[&str], columns: Value) -> RewardBatch {
    RewardBatch {
        prompts: completions.iter().map(|_| json!("1 + 1 =")).collect(),
        completions: completions.iter().map(|c| json!(c)).collect(),
        completion_ids: completions.iter().map(|c| c.bytes().map(u32::from).collect()).collect(),
        columns: columns.as_object().unwrap().clone(),
    }
}

fn scores(spec: &str, batch: &RewardBatch) -> Vec<Option<f64>> {
    Reward::parse(spec).unwrap().score(batch, &Silent).unwrap()
}

/// A shell loop that has the id of each row in `$id`.
fn shell(body: &str) -> String {
    format!("command:while read -r line; do id=${{line#*:}}; id=${{id%%,*}}; {body}; done")
}

#[test]
fn a_column_that_some_rows_have_is_null_in_the_others() {
    let mut b = RewardBatch::default();
    for (columns, text) in [
        (json!({ "answer": "2" }), "2"),
        (json!({ "other": [1] }), "3"),
        (json!({ "answer": 3, "other": null }), "3"),
    ] {
        b.push(&json!("p"), columns.as_object().unwrap().iter(), text, vec![]);
    }
    b.check().unwrap();
    assert_eq!(b.columns["answer"], json!(["2", null, 3]));
    assert_eq!(b.columns["other"], json!([null, [1], null]));
    assert_eq!(scores("exact_match", &b), [Some(1.0), None, Some(1.0)]);
}

#[test]
fn a_missing_answer_column_is_an_error_before_anything_is_generated() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [json!({ "prompt": "a", "more": "b" }), json!({ "prompt": "c", "other": 1 })];
    let data = write_rows(dir.path().join("rows.jsonl"), &rows);
    let model = fixture("sft/model").display().to_string();
    let out = dir.path().join("out").display().to_string();
    let run = |method: &str, reward: &str| {
        let args = [method, "--model", &model, "--data", &data, "--device", "cpu", reward];
        let output = ["--output", &out];
        let (code, _, error) = temper(&[&args[..], &output[..]].concat());
        assert_eq!(code, Some(2), "{method}: {error}");
        assert!(error.contains("; the data has [more, other]"), "{method}: {error}");
        assert!(!error.contains("memory"), "{method} planned its memory first: {error}");
        error
    };
    for method in ["grpo", "rloo", "reinforce", "ppo", "online-dpo"] {
        let error = run(method, "reward_funcs=numeric_match");
        assert!(error.contains("needs the column one of answer, solution"), "{error}");
        let error = run(method, "reward_funcs=exact_match:column=gold");
        assert!(error.contains("needs the column gold"), "{error}");
    }
    run("eval", "reward_funcs=exact_match");
}

#[test]
fn verifiers_score_and_skip() {
    let b = batch(
        &["2", "so \\boxed{2}", "3", ""],
        json!({"answer": ["2", 2, "2", null], "other": [[1, 3], 3, 3, 3]}),
    );
    assert_eq!(scores("exact_match", &b), [Some(1.0), Some(0.0), Some(0.0), None]);
    assert_eq!(scores("numeric_match", &b), [Some(1.0), Some(1.0), Some(0.0), None]);
    assert_eq!(
        scores("numeric_match:column=other", &b),
        [Some(0.0), Some(0.0), Some(1.0), Some(0.0)]
    );
    assert_eq!(scores(r"regex:^\d(?!\d)", &b), [Some(1.0), Some(0.0), Some(1.0), Some(0.0)]);
    assert_eq!(scores("length:min=1,max=5", &b), [Some(1.0), Some(0.0), Some(1.0), Some(0.0)]);
    let b = batch(&["aaaa", "<think>a</think>b"], json!({}));
    assert_eq!(scores("think_format", &b), [Some(0.0), Some(1.0)]);
    assert_eq!(scores("repetition:ngram_size=2,max_penalty=-1", &b)[0], Some(-(1.0 - 1.0 / 3.0)));
    assert_eq!(
        scores("soft_overlong:max_completion_len=16,soft_punish_cache=8", &b),
        [Some(0.0), Some(-1.0)]
    );
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("schema.json");
    std::fs::write(&file, r#"{"type": "object", "required": ["a"]}"#).unwrap();
    let b = batch(&["{\"a\": 1}", "{}", "[", "```json\n{\"a\": 2}\n```"], json!({}));
    let spec = format!("json_schema:{}", file.display());
    assert_eq!(scores(&spec, &b), [Some(1.0), Some(0.0), Some(0.0), Some(1.0)]);
}

#[test]
fn a_reward_that_is_not_understood_says_what_there_is() {
    let say = |spec: &str| Reward::parse(spec).unwrap_err().to_string();
    assert!(say("exct_match").contains("did you mean `exact_match`"));
    assert!(say("repetition:ngram=2").contains("ngram_size"));
    assert!(say("soft_overlong").contains("max_completion_len"));
    assert!(say("regex:(").contains("regex:("));
    assert!(say("python:/nowhere/r.py:f").contains("no file"));
    assert!(say("length").contains("in tokens"));
    let b = batch(&["2"], json!({"gold": ["2"]}));
    let error = Reward::parse("exact_match").unwrap().score(&b, &Silent).unwrap_err().to_string();
    assert!(error.contains("[gold]") && error.contains("column=NAME"), "{error}");
    let short = batch(&["2", "3"], json!({"answer": ["2"]}));
    assert!(
        Reward::parse("exact_match")
            .unwrap()
            .score(&short, &Silent)
            .unwrap_err()
            .to_string()
            .contains("answer has 1")
    );
    let table: toml::Value =
        toml::from_str("kind = 'length'\nmax = 3\nweight = 0.5\nname = 'short'").unwrap();
    let reward = Reward::from_toml(&table).unwrap();
    assert_eq!((reward.name.as_str(), reward.weight), ("short", 0.5));
}

#[test]
fn rewards_add_up_and_a_row_that_none_scores_has_none() {
    let b = batch(&["2", "3", "4"], json!({"answer": ["2", null, "4"], "more": ["2", null, null]}));
    let specs = ["exact_match", "exact_match:column=more"].map(String::from);
    let scored = Rewards::parse(&specs, Some(&[1.0, 0.5])).unwrap().score(&b, &Silent).unwrap();
    assert_eq!(scored.names, ["exact_match", "exact_match_2"]);
    assert_eq!(scored.total(), [Some(1.5), None, Some(1.0)]);
    assert!(
        Rewards::parse(&specs, Some(&[1.0]))
            .unwrap_err()
            .to_string()
            .contains("1 values for 2 rewards")
    );
}

#[test]
fn a_command_is_started_once_and_sees_every_row() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let spec = shell("n=$((n + 1)); printf '%s\\n' \"$line\" >> LOG; echo \"{\\\"id\\\": $id, \\\"reward\\\": $n}\"")
        .replace("LOG", log.to_str().unwrap());
    let mut reward = Reward::parse(&spec).unwrap();
    let b = batch(&["a", "b", "c"], json!({"level": [1, 2, 3]}));
    assert_eq!(reward.score(&b, &Silent).unwrap(), [1.0, 2.0, 3.0].map(Some));
    assert_eq!(reward.score(&b, &Silent).unwrap(), [4.0, 5.0, 6.0].map(Some));
    let rows: Vec<Value> = json_lines(log);
    assert_eq!(rows.len(), 6);
    let want = json!({"id": 4, "index": 1, "batch": 3, "prompt": "1 + 1 =", "completion": "b", "completion_ids": [98],
        "columns": {"level": 2}});
    assert_eq!(rows[4], want);
}

#[test]
fn null_skips_a_row_and_true_is_one() {
    let spec = shell(
        "if [ $id = 1 ]; then r=null; else r=true; fi; echo \"{\\\"id\\\": $id, \\\"reward\\\": $r}\"",
    );
    assert_eq!(scores(&spec, &batch(&["a", "b", "c"], json!({}))), [Some(1.0), None, Some(1.0)]);
}

#[test]
fn a_large_batch_does_not_block_either_side() {
    // more than two pipes hold, in both directions
    let long = "x".repeat(2000);
    let b = batch(&vec![long.as_str(); 200], json!({}));
    let spec = shell(
        "echo \"                                        {\\\"id\\\": $id, \\\"reward\\\": 1}\"",
    );
    assert_eq!(scores(&spec, &b), vec![Some(1.0); 200]);
}

/// The error of a command that fails at the third of four rows, each time it is started.
fn fails(body: &str, more: &str) -> String {
    let spec = shell(&format!(
        "n=$((n + 1)); if [ $n = 3 ]; then {body}; fi; echo \"{{\\\"id\\\": $id, \\\"reward\\\": 0}}\""
    ));
    let table = format!(
        "kind = 'command'\ncommand = '''{}'''\n{more}",
        spec.strip_prefix("command:").unwrap()
    );
    let mut reward = Reward::from_toml(&toml::from_str(&table).unwrap()).unwrap();
    reward.score(&batch(&["a", "b", "c", "d", "e"], json!({})), &Silent).unwrap_err().to_string()
}

#[test]
fn a_command_that_crashes_is_reported_with_its_row_and_last_words() {
    let error = fails("echo out of luck >&2; exit 7", "restarts = 0");
    for part in
        ["reward `command`, row 2 of 5", "exit status: 7", "out of luck", "id 2", "last checkpoint"]
    {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
}

#[test]
fn a_restarted_command_gets_the_rows_it_owes_until_restarts_run_out() {
    // with one restart rows 0, 1 and then 2, 3 are scored; the last one is scored by the second
    // restart
    let error = fails("exit 7", "restarts = 1");
    assert!(error.contains("row 4 of 5"), "{error}");
    let spec = shell(
        "n=$((n + 1)); if [ $n = 3 ]; then exit 7; fi; echo \"{\\\"id\\\": $id, \\\"reward\\\": 0}\"",
    );
    assert_eq!(scores(&spec, &batch(&["a", "b", "c", "d", "e"], json!({}))), vec![Some(0.0); 5]);
}

#[test]
fn a_command_that_hangs_is_ended_with_its_children() {
    let start = Instant::now();
    let error = fails("sleep 100", "restarts = 0\ntimeout = 0.3");
    assert!(error.contains("row 2 of 5") && error.contains("within 0.3 s"), "{error}");
    assert!(start.elapsed().as_secs() < 20, "the sleep was waited for");
}

#[test]
fn garbage_is_shown_as_it_came() {
    let error = fails("echo 'no json at all'", "restarts = 0");
    assert!(error.contains("row 2 of 5") && error.contains("`no json at all`"), "{error}");
    let error = fails("echo \"{\\\"id\\\": $id, \\\"reward\\\": \\\"high\\\"}\"", "restarts = 0");
    assert!(error.contains("row 2 of 5") && error.contains("\"high\""), "{error}");
}

#[test]
fn an_answer_out_of_order_is_an_error_that_names_both_ids() {
    let error = fails("echo \"{\\\"id\\\": 3, \\\"reward\\\": 1}\"", "restarts = 0");
    for part in ["row 2 of 5", "in the order of the rows", "\"id\": 2", "\"id\": 3"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
}

#[test]
fn an_error_that_the_command_reports_stops_at_once() {
    let error =
        fails("echo \"{\\\"id\\\": $id, \\\"error\\\": \\\"no such file\\\"}\"", "restarts = 5");
    assert!(error.contains("row 2 of 5") && error.contains("it says: no such file"), "{error}");
}

#[test]
fn a_command_that_does_not_exist_says_so() {
    let error = Reward::parse("command:/nowhere/judge")
        .unwrap()
        .score(&batch(&["a"], json!({})), &Silent)
        .unwrap_err();
    assert!(error.to_string().contains("/nowhere/judge"), "{error}");
}

/// Without python3 this fails rather than passing unseen: `--skip needs_python3` leaves it out.
#[test]
fn a_trl_reward_function_runs_in_the_worker_needs_python3() {
    let found = std::process::Command::new("python3").arg("--version").output().is_ok();
    assert!(found, "no python3 on PATH; run with --skip needs_python3 to leave this test out");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("my.py");
    std::fs::write(
        &file,
        "calls = 0\n\
         def reward(prompts, completions, level, **kwargs):\n    global calls\n    calls += 1\n    print('noise')\n\
         \x20   return [None if l == 0 else len(c) + 10 * calls for c, l in zip(completions, level)]\n\
         def ids(completion_ids, **kwargs):\n    return [float(sum(i)) for i in completion_ids]\n\
         def narrow(completions):\n    return [float('nan')] * len(completions)\n\
         async def later(completions, **kwargs):\n    return [1] * len(completions)\n\
         def short(completions, **kwargs):\n    return [1]\n\
         def broken(completions, **kwargs):\n    return 1 / 0\n",
    )
    .unwrap();
    let spec = |f: &str| format!("python:{}:{f}", file.display());
    let b = batch(&["a", "bb", "ccc"], json!({"level": [1, 0, 2]}));
    let mut reward = Reward::parse(&spec("reward")).unwrap();
    assert_eq!(reward.name, "reward");
    assert_eq!(reward.score(&b, &Silent).unwrap(), [Some(11.0), None, Some(13.0)]);
    assert_eq!(
        reward.score(&b, &Silent).unwrap(),
        [Some(21.0), None, Some(23.0)],
        "one process, one call a batch"
    );
    assert_eq!(scores(&spec("ids"), &b), [97.0, 196.0, 297.0].map(Some));
    assert_eq!(scores(&spec("narrow"), &b), [None, None, None]);
    assert_eq!(scores(&spec("later"), &b), [Some(1.0); 3]);
    let say =
        |f: &str| Reward::parse(&spec(f)).unwrap().score(&b, &Silent).unwrap_err().to_string();
    assert!(say("short").contains("1 rewards for 3 completions"));
    assert!(say("broken").contains("ZeroDivisionError"));
    assert!(say("absent").contains("has no function absent"));
}
