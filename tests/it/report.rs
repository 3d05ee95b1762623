//! `report.html` of made-up runs. `TEMPER_REPORT_SAMPLE=DIR cargo test --test it report` leaves the
//! pages in DIR for inspection.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use temper::report::{self, MaskRow, ReportInput, ReportStage, Table};

use crate::support::{MODEL, command, finish, strings};

/// A run folder as a GRPO run leaves it: curves with a NaN, completions with rewards, a config.
fn grpo_run(dir: &Path, steps: u64) {
    std::fs::create_dir_all(dir).unwrap();
    let mut noise = temper::ops::case::Rng(7);
    let mut metrics = String::new();
    for step in 1..=steps {
        let t = step as f64 / steps as f64;
        let mut wave = |scale: f64| scale * noise.normal();
        let reward = 0.35 + 0.5 * (1.0 - (-4.0 * t).exp()) + wave(0.05);
        let line = json!({
            "step": step, "loss": if step == 3 { None } else { Some(0.02 * wave(1.0)) }, "reward": reward,
            "reward_std": 0.3 * (1.0 - t) + 0.05 + wave(0.01).abs(), "rewards/numeric_match/mean": reward - 0.02,
            "kl": 0.01 + 0.05 * t + wave(0.004), "entropy": 1.4 - 0.8 * t + wave(0.03),
            "completions/mean_length": 40.0 + 30.0 * t + wave(2.0), "clip_ratio/region_mean": 0.02 + wave(0.004).abs(),
            "frac_reward_zero_std": 0.1 + 0.4 * t, "grad_norm": 0.8 + wave(0.1), "learning_rate": 1e-5 * (1.0 - t),
            "num_tokens": step * 8192, "tokens_per_second": 9000.0 + wave(200.0), "time/generate": 1.9 + wave(0.1),
            "time/score": 0.12 + wave(0.01), "time/train": 1.1 + wave(0.05),
        });
        metrics += &format!("{line}\n");
    }
    std::fs::write(dir.join("metrics.jsonl"), metrics + "{\"step\": 99999, \"lo").unwrap();
    let mut completions = String::new();
    for i in 0..40u64 {
        let (a, b) = (13 + i % 7, 8 + i % 5);
        let right = i % 3 != 0;
        let answer = a + b + u64::from(!right);
        let text =
            format!("{a} + {b} = {answer}. So the answer is {answer}.</script><b>not markup</b>");
        let line = json!({
            "step": 10 * (i / 8 + 1), "prompt": [{"role": "user", "content": format!("What is {a} + {b}?")}],
            "completion": [{"role": "assistant", "content": text}], "reward": if right { 1.0 } else { -0.5 },
            "rewards": {"numeric_match": f64::from(u8::from(right)), "think_format": null},
            "advantage": if right { 0.71 } else { -1.22 }, "finish_reason": "eos",
        });
        completions += &format!("{line}\n");
    }
    std::fs::write(dir.join("completions.jsonl"), completions).unwrap();
    std::fs::write(
        dir.join("config.toml"),
        "# the resolved run\nloss_type = \"dapo\"\nlearning_rate = 1e-5\n",
    )
    .unwrap();
}

fn input() -> ReportInput {
    let tokens = strings(&[
        "<|im_start|>",
        "user\n",
        "What is",
        " 13",
        " +",
        " 8",
        "?",
        "<|im_end|>\n",
        "assistant\n",
        "21",
        "<|im_end|>",
    ]);
    let mask = (0..tokens.len()).map(|i| i >= 9).collect();
    ReportInput {
        facts: vec![("model".into(), "<b>a model</b>".into())],
        title: "GRPO on sums".into(),
        notes: strings(&["0.4M parameters, on the CPU."]),
        table: Some(Table {
            caption: "240 questions that no run has seen".into(),
            columns: strings(&["", "before", "after"]),
            rows: vec![
                strings(&["exact match", "37.1%", "84.6%"]),
                strings(&["mean length", "41", "66"]),
            ],
        }),
        masks: vec![MaskRow { tokens, mask }],
    }
}

fn data(page: &Path) -> (String, Value) {
    let html = std::fs::read_to_string(page).unwrap();
    let begin = "<script type=\"application/json\" id=\"data\">";
    let json = html.split_once(begin).unwrap().1.split_once("</script>").unwrap().0;
    let value = serde_json::from_str(json).unwrap();
    (html, value)
}

/// A folder for pages that stay where the variable says so.
fn folder(name: &str) -> (Option<tempfile::TempDir>, PathBuf) {
    match std::env::var_os("TEMPER_REPORT_SAMPLE") {
        Some(kept) => (None, PathBuf::from(kept).join(name)),
        None => {
            let temp = tempfile::tempdir().unwrap();
            let path = temp.path().join(name);
            (Some(temp), path)
        }
    }
}

#[test]
fn a_page_has_everything_of_its_run_and_asks_the_network_for_nothing() {
    let (_keep, dir) = folder("grpo");
    grpo_run(&dir, 120);
    let (html, data) = data(&report::write(&dir, &input()).unwrap());
    let run = &data["runs"][0];
    let names: Vec<&str> =
        run["series"].as_array().unwrap().iter().map(|s| s[0].as_str().unwrap()).collect();
    for name in ["loss", "reward", "time/generate", "rewards/numeric_match/mean", "learning_rate"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    let loss = run["series"].as_array().unwrap().iter().find(|s| s[0] == "loss").unwrap();
    assert_eq!(loss[1].as_array().unwrap().len(), 120, "the line that was cut short is left out");
    assert_eq!(loss[1][2][1], Value::Null, "a NaN is a gap");
    assert_eq!(run["samples"].as_array().unwrap().len(), 40);
    let chips = run["samples"][1]["chips"].as_array().unwrap();
    assert!(chips.contains(&json!(["rewards/numeric_match", 1.0])), "{chips:?}");
    assert!(run["config"].as_str().unwrap().contains("loss_type"));
    assert_eq!(run["masks"][0]["mask"][9], true);
    assert_eq!(run["table"]["rows"][0][2], "84.6%");
    // what a model writes cannot leave the data, and nothing is loaded from anywhere
    assert_eq!(html.matches("</script>").count(), 2);
    let foreign: Vec<&str> = html.matches("http").collect();
    assert_eq!(foreign.len(), 1, "only the name of the SVG namespace");
    for word in ["src=", "@import", "url(", "fetch(", "@DATA@", "@JS@", "@CSS@", "@TITLE@"] {
        assert!(!html.contains(word), "{word}");
    }
}

#[test]
fn a_page_can_be_written_again_from_its_folder() {
    let (_keep, dir) = folder("again");
    grpo_run(&dir, 12);
    let first = std::fs::read_to_string(report::write(&dir, &input()).unwrap()).unwrap();
    let given = report::read_input(&dir).unwrap();
    assert_eq!(given, input());
    assert_eq!(std::fs::read_to_string(report::write(&dir, &given).unwrap()).unwrap(), first);
    assert_eq!(report::read_input(dir.join("absent")).unwrap(), ReportInput::default());
}

#[test]
fn a_pipeline_page_tells_all_stages() {
    let (_keep, dir) = folder("pipeline");
    let mut stages = Vec::new();
    for name in ["pretrain", "sft", "reward", "dpo", "ppo", "grpo"] {
        let own = dir.join(name);
        grpo_run(&own, 60);
        let input = if name == "grpo" { input() } else { ReportInput::default() };
        stages.push(ReportStage { name: name.into(), dir: own, input });
    }
    let table = Table {
        caption: "held-out questions".into(),
        columns: strings(&["stage", "seconds", "before", "after"]),
        rows: vec![
            strings(&["sft", "41 s", "2.1%", "91.2%"]),
            strings(&["grpo", "63 s", "37.1%", "84.6%"]),
        ],
    };
    let (_, data) =
        data(&report::write_pipeline(&dir, "temper quickstart", Some(&table), &stages).unwrap());
    assert_eq!(data["runs"].as_array().unwrap().len(), 6);
    assert_eq!(data["runs"][5]["name"], "grpo");
    assert_eq!(data["table"]["rows"][1][3], "84.6%");
}

#[test]
fn long_runs_are_thinned_and_the_page_says_so() {
    let (_keep, dir) = folder("long");
    grpo_run(&dir, 7000);
    let (html, data) = data(&report::write(&dir, &ReportInput::default()).unwrap());
    let run = &data["runs"][0];
    let points = run["series"][0][1].as_array().unwrap();
    assert!(points.len() < 3000 && points[points.len() - 1][0] == 7000.0, "{}", points.len());
    assert!(run["notes"][0].as_str().unwrap().contains("one of 3"), "{}", run["notes"]);
    assert!(html.len() < 4_000_000);
}

#[test]
fn a_folder_that_cannot_be_read_says_which_line() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("metrics.jsonl"), "{\"step\": 1}\nnot json\n{\"step\": 2}\n")
        .unwrap();
    let error = report::write(dir.path(), &ReportInput::default()).unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl:2"), "{error}");
    std::fs::write(dir.path().join("metrics.jsonl"), "").unwrap();
    let mut bad = input();
    bad.masks[0].mask.pop();
    assert!(
        report::write(dir.path(), &bad)
            .unwrap_err()
            .to_string()
            .contains("11 tokens and 10 mask values")
    );
}

/// An SFT run through the binary.
fn sft(out: &Path, keys: &[&str]) -> std::process::Command {
    let data = "tests/fixtures/sft/prompt_completion.jsonl";
    let mut command = command(&["sft", "--model", MODEL, "--data", data]);
    command
        .arg("--output")
        .arg(out)
        .args(["device=cpu", "save_steps=3", "logging_steps=1", "max_steps=6"])
        .args(keys);
    command
}

#[test]
fn every_run_writes_its_page_and_a_resumed_one_the_page_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    assert!(sft(&out, &[]).output().unwrap().status.success());
    let (_, whole) = data(&out.join("report.html"));
    let run = &whole["runs"][0];
    let loss = |run: &Value| {
        run["series"].as_array().unwrap().iter().find(|s| s[0] == "loss").unwrap()[1].clone()
    };
    assert_eq!(loss(run).as_array().unwrap().len(), 6);
    assert!(run["config"].as_str().unwrap().contains("max_steps = 6"));
    let row = &run["masks"][0];
    let joined = |of: bool| -> String {
        let tokens = row["tokens"].as_array().unwrap().iter().zip(row["mask"].as_array().unwrap());
        tokens.filter(|(_, m)| **m == json!(of)).map(|(t, _)| t.as_str().unwrap()).collect()
    };
    assert_eq!(joined(false), "Ana had 21 stones and lost 2. How many are left?\n");
    assert_eq!(joined(true), "21 - 2 = 19. The answer is 19.<|im_end|>");
    // as if it had been killed between the checkpoint of step 3 and its end
    std::fs::remove_dir_all(out.join("checkpoint-6")).unwrap();
    std::fs::remove_file(out.join("report.html")).unwrap();
    assert!(sft(&out, &["--resume"]).output().unwrap().status.success());
    let (_, resumed) = data(&out.join("report.html"));
    assert_eq!(loss(&resumed["runs"][0]), loss(run));
    assert_eq!(resumed["runs"][0]["masks"], run["masks"]);
}

#[test]
fn a_page_that_cannot_be_written_ends_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    std::fs::create_dir_all(out.join("report.html")).unwrap(); // a folder where the file goes
    let (code, said) = finish(&mut sft(&out, &[]));
    assert!(code == Some(0) && said.contains("warning: report.html was not written"), "{said}");
    assert!(out.join("model.safetensors").is_file());
}

#[test]
fn the_command_writes_pages_again() {
    let dir = tempfile::tempdir().unwrap();
    let again = |path: &Path| finish(command(&["report"]).arg(path));
    for name in ["first", "second"] {
        grpo_run(&dir.path().join(name), 5);
    }
    report::write(dir.path().join("second"), &input()).unwrap();
    let (code, said) = again(dir.path());
    assert!(code == Some(0) && said.trim().ends_with("report.html"), "{said}");
    let (_, page) = data(&dir.path().join("report.html"));
    assert_eq!(
        (&page["runs"][0]["name"], &page["runs"][1]["masks"][0]["mask"][9]),
        (&json!("first"), &json!(true))
    );
    // the runs' curves of a metric are in one chart
    assert_eq!(page["overlay"], true);
    let charts = page["layouts"][0]["charts"].as_array().unwrap();
    let lines = |name: &str| charts.iter().find(|c| c[0] == name).unwrap()[1].clone();
    assert_eq!(lines("reward"), json!([[0, 1, false], [1, 1, false]]));
    // a pipeline's page is the same again, wherever its folder went
    let stages = ["second", "first"].map(|name| ReportStage {
        name: name.into(),
        dir: dir.path().join(name),
        input: ReportInput::default(),
    });
    let path = report::write_pipeline(dir.path(), "two", input().table.as_ref(), &stages).unwrap();
    let pipeline = std::fs::read_to_string(&path).unwrap();
    let moved = tempfile::tempdir().unwrap();
    let moved = moved.path().join("moved");
    std::fs::rename(dir.keep(), &moved).unwrap();
    std::fs::remove_file(moved.join("report.html")).unwrap();
    assert_eq!(again(&moved).0, Some(0));
    assert!(std::fs::read_to_string(moved.join("report.html")).unwrap() == pipeline);
    std::fs::remove_file(moved.join("pipeline.json")).unwrap();
    let (code, said) = again(&moved.join("first/absent"));
    assert!(code == Some(1) && said.contains("absent"), "{said}");
    std::fs::create_dir(moved.join("first/empty")).unwrap();
    let (code, said) = again(&moved.join("first/empty"));
    assert!(code == Some(1) && said.contains("holds no run"), "{said}");
}

#[test]
fn of_many_completions_some_are_shown_and_the_page_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let line = |i: usize| {
        format!("{}\n", json!({ "step": i, "prompt": "p", "completion": "c", "reward": 1.0 }))
    };
    let text: String = (1..=1000).map(line).collect();
    std::fs::write(dir.path().join("completions.jsonl"), text + "{\"step\": 1001, \"pro").unwrap();
    let (_, data) = data(&report::write(dir.path(), &ReportInput::default()).unwrap());
    let samples = data["runs"][0]["samples"].as_array().unwrap();
    assert_eq!((samples.len(), &samples[298]["step"]), (299, &json!(997)));
    assert!(data["runs"][0]["notes"][0].as_str().unwrap().starts_with("299 of 1000"), "{data}");
}
