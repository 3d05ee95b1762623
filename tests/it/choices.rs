//! `temper eval` on multiple-choice questions against an independent computation in float64: every
//! run of `tests/fixtures/choices/values.json`.

use serde_json::{Value, json};

use crate::support::{MODEL, done, fixture, floats, json, json_lines, temper, write_rows};

const ARC: &str = "columns=answer:answerKey";

fn args<'a>(data: &'a str, extra: &[&'a str]) -> Vec<&'a str> {
    let fixed = ["eval", "--model", MODEL, "--device", "cpu", "--data", data];
    [&fixed[..], extra].concat()
}

fn measured(data: &str, extra: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("eval.json");
    let mut args = args(data, extra);
    args.extend(["--output", path.to_str().unwrap()]);
    done(&args);
    json(path)
}

fn data(name: &str) -> String {
    fixture("choices").join(name).to_str().unwrap().to_string()
}

#[test]
fn accuracies_and_log_probs_are_those_of_the_oracle() {
    let values = json(fixture("choices/values.json"));
    let shot = format!("fewshot_data={}", data("shot.jsonl"));
    let runs: [(&str, &str, Vec<&str>); 5] = [
        ("arc", "arc.jsonl", vec![ARC]),
        ("arc", "arc.parquet", vec![ARC]),
        ("arc_one_shot", "arc.jsonl", vec![ARC, "--num-fewshot", "1", &shot]),
        (
            "hellaswag",
            "hellaswag.jsonl",
            vec!["columns=question:ctx,choices:endings,answer:label", "question_format={question}"],
        ),
        (
            "mmlu",
            "mmlu.jsonl",
            vec!["question_format={question}\\n{choices}\\nAnswer:", "scored_choice=letter"],
        ),
    ];
    let mut worst = 0f64;
    for (name, file, extra) in runs {
        let (found, want) = (measured(&data(file), &extra), &values[name]);
        for metric in ["acc", "acc_norm"] {
            let got = &found["metrics"][metric];
            assert_eq!(got["value"], want[metric], "{name} {metric}");
            // The standard error of a share, with n - 1.
            let p = got["value"].as_f64().unwrap();
            let error = (p * (1.0 - p) / 23.0).sqrt();
            assert!((got["stderr"].as_f64().unwrap() - error).abs() < 1e-12, "{name} {metric}");
            assert_eq!(got["rows"], 24);
        }
        let rows = found["rows"].as_array().unwrap();
        assert_eq!(rows.len(), want["logps"].as_array().unwrap().len());
        for (row, want) in rows.iter().zip(want["logps"].as_array().unwrap()) {
            let (got, want) = (floats(&row["logps"]), floats(want));
            assert_eq!(got.len(), want.len());
            for (a, b) in got.iter().zip(&want) {
                worst = worst.max((a - b).abs() / b.abs().max(1.0));
            }
        }
    }
    println!("log-probs within {worst:.1e}");
    assert!(worst < 5e-5);
}

#[test]
fn shots_are_chosen_by_seed_and_are_never_the_question() {
    let dir = tempfile::tempdir().unwrap();
    let rows = json_lines(data("mmlu.jsonl"));
    let train = write_rows(dir.path().join("train.jsonl"), &rows[12..]);
    let test = write_rows(dir.path().join("test.jsonl"), &rows[..4]);
    let shots = format!("fewshot_data={train}");
    let logps = |file: &str, extra: &[&str]| {
        let found = measured(file, &[&["num_fewshot=3", &shots], extra].concat());
        found["rows"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|r| floats(&r["logps"]))
            .collect::<Vec<_>>()
    };
    let first = logps(&test, &[]);
    assert_eq!(first, logps(&test, &["seed=42", "--batch-tokens", "300"]));
    assert_ne!(first, logps(&test, &["seed=43"]));
    // The only three others are the shots of a question of the file itself, whatever the seed.
    let four = write_rows(dir.path().join("four.jsonl"), &rows[..4]);
    let own = format!("fewshot_data={four}");
    let (code, _, err) = temper(&args(&four, &["num_fewshot=4", &own]));
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("3 questions beside") && err.contains("four.jsonl:1"), "{err}");
    let (code, _, err) = temper(&args(&four, &["num_fewshot=4"]));
    assert!(code == Some(2) && err.contains("needs fewshot_data=FILE"), "{err}");
}

#[test]
fn bad_questions_are_named_or_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = json_lines(data("mmlu.jsonl"));
    rows[2]["answer"] = json!(9);
    rows[5]["choices"] = json!(["one"]);
    let bad = write_rows(dir.path().join("bad.jsonl"), &rows);
    let (code, _, err) = temper(&args(&bad, &[]));
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("bad.jsonl:3: field \"answer\" is \"9\""), "{err}");
    let (code, out, err) = temper(&args(&bad, &["on_bad_row=drop"]));
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("(22 rows)"), "{out}");
    assert!(err.contains("2 bad rows dropped") && err.contains("bad.jsonl:6: "), "{err}");
    let (code, _, err) = temper(&args(&bad, &["question_format=Q:"]));
    assert!(code == Some(2) && err.contains("all questions would be the same"), "{err}");
}

#[test]
fn a_loss_and_its_perplexity_have_standard_errors() {
    let found = measured("tests/fixtures/sft/text.jsonl", &[]);
    let of = |name: &str, field: &str| found["metrics"][name][field].as_f64();
    let rows = found["rows"].as_array().unwrap();
    let pairs: Vec<(f64, f64)> =
        rows.iter().map(|r| (r["nll"].as_f64().unwrap(), r["tokens"].as_f64().unwrap())).collect();
    let (loss, error) = (of("loss", "value").unwrap(), of("loss", "stderr").unwrap());
    // Leaving out one row at a time gives nearly the same error.
    let (nats, tokens): (f64, f64) = pairs.iter().fold((0.0, 0.0), |a, p| (a.0 + p.0, a.1 + p.1));
    let without: Vec<f64> = pairs.iter().map(|p| (nats - p.0) / (tokens - p.1)).collect();
    let n = without.len() as f64;
    let mean = without.iter().sum::<f64>() / n;
    let jackknife = without.iter().map(|v| (v - mean).powi(2)).sum::<f64>() * (n - 1.0) / n;
    assert!((error / jackknife.sqrt() - 1.0).abs() < 0.05, "{error} {}", jackknife.sqrt());
    let perplexity = of("perplexity", "stderr").unwrap();
    assert!((perplexity - error * loss.exp()).abs() < 1e-9 && of("tokens", "stderr").is_none());
}
