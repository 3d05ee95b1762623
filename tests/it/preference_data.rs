//! Preference rows against the tokens that TRL 1.16.0's trainers make of them
//! (`tests/fixtures/preferences/tokens.json`), and the messages about rows that cannot be used.

use std::path::Path;

use serde_json::Value;
use temper::data::chat::ChatTemplate;
use temper::data::masked::MaskedSequence;
use temper::data::preference::{
    OnTruncation, PairStyle, PreferenceOptions, StepOptions, TruncationMode, labelled, mismatched,
    pairs, steps,
};
use temper::data::rows::Row;

use crate::support::{self, fixture, ids, json, tokenizer_and_template};

fn options(config: &Value) -> PreferenceOptions {
    let mut options = PreferenceOptions::default();
    if let Some(n) = config.get("max_length") {
        options.max_length = Some(n.as_u64().unwrap() as usize);
    }
    if config.get("truncation_mode").is_some_and(|m| m == "keep_end") {
        options.truncation_mode = TruncationMode::KeepEnd;
    }
    options
}

/// A sequence of the fixture; the mask is stored as runs of (count, is a target).
fn sequence(v: &Value) -> MaskedSequence {
    let mut target_mask = Vec::new();
    for run in v["mask"].as_array().unwrap() {
        target_mask.extend(std::iter::repeat_n(run[1] == 1, run[0].as_u64().unwrap() as usize));
    }
    MaskedSequence { input_ids: ids(&v["ids"]), target_mask }
}

#[test]
fn every_trainers_rows_have_trls_ids_and_masks() {
    let all = json(fixture("preferences/tokens.json"));
    let (tokenizer, template) = tokenizer_and_template();
    let mut compared = 0;
    for (name, run) in all.as_object().unwrap() {
        let rows = support::rows(&format!("preferences/{}.jsonl", run["rows"].as_str().unwrap()));
        let (options, total) = (options(&run["config"]), run["total"].as_u64().unwrap() as usize);
        let want = run["examples"].as_array().unwrap();
        let method = run["method"].as_str().unwrap();
        let style = match method {
            "dpo" => PairStyle::Dpo,
            "reward" => PairStyle::Reward,
            _ => PairStyle::Orpo,
        };
        match method {
            "kto" => {
                let (got, stats) =
                    labelled(&rows, &tokenizer, Some(&template), 320, &options).unwrap();
                assert_eq!((got.len(), stats.examples), (total, total), "{name}");
                let crossed = mismatched(&got, 4, options.max_length);
                for (i, w) in want.iter().enumerate() {
                    assert_eq!(got[i].label, w["label"] == true, "{name} example {i}");
                    assert_eq!(
                        got[i].sequence(options.max_length),
                        sequence(&w["completion"]),
                        "{name} example {i}"
                    );
                    assert_eq!(crossed[i], sequence(&w["kl"]), "{name} example {i}, mismatched");
                    compared += 2;
                }
            }
            "prm" => {
                let mut how = StepOptions::default();
                if let Some(s) = run["config"].get("step_separator") {
                    how.step_separator = s.as_str().unwrap().to_string();
                }
                how.train_on_last_step_only =
                    run["config"].get("train_on_last_step_only").is_some();
                let (got, _) = steps(&rows[..total], &tokenizer, 320, &how, &options).unwrap();
                for w in want {
                    let labels: Vec<(usize, bool)> = w["labels"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .map(|l| (l[0].as_u64().unwrap() as usize, l[1] == 1))
                        .collect();
                    let row = w["row"].as_u64().unwrap() as usize;
                    match got.iter().find(|e| e.row == row) {
                        Some(e) => {
                            assert_eq!(
                                (&e.input_ids, &e.labels),
                                (&ids(&w["ids"]), &labels),
                                "{name} row {row}"
                            )
                        }
                        None => assert!(labels.is_empty(), "{name} row {row} is missing"),
                    }
                    compared += 1;
                }
            }
            _ => {
                let (got, stats) =
                    pairs(&rows, &tokenizer, Some(&template), 320, style, &options).unwrap();
                assert_eq!((got.len(), stats.examples), (total, total), "{name}");
                for (g, w) in got.iter().zip(want) {
                    assert_eq!(g.row as u64, w["row"].as_u64().unwrap(), "{name}");
                    if style == PairStyle::Reward {
                        assert_eq!(
                            g.chosen.input_ids,
                            ids(&w["chosen"]["ids"]),
                            "{name} row {}",
                            g.row
                        );
                        assert_eq!(
                            g.rejected.input_ids,
                            ids(&w["rejected"]["ids"]),
                            "{name} row {}",
                            g.row
                        );
                    } else {
                        assert_eq!(
                            g.chosen,
                            sequence(&w["chosen"]),
                            "{name} row {}, chosen",
                            g.row
                        );
                        assert_eq!(
                            g.rejected,
                            sequence(&w["rejected"]),
                            "{name} row {}, rejected",
                            g.row
                        );
                    }
                    assert_eq!(g.chosen.input_ids[..g.shared], g.rejected.input_ids[..g.shared]);
                    assert!(!g.chosen.target_mask[..g.shared].contains(&true));
                    let margin = (name == "reward_margin")
                        .then(|| rows[g.row].get("margin").unwrap().as_f64().unwrap() as f32);
                    assert_eq!(g.margin, margin, "{name}");
                    compared += 2;
                }
            }
        }
    }
    assert!(compared > 500, "{compared} sequences compared");
}

fn rows(lines: &[&str]) -> Vec<Row> {
    let row = |(i, line): (usize, &&str)| match serde_json::from_str(line).unwrap() {
        Value::Object(value) => Row { value, file: Path::new("r.jsonl").into(), line: i + 1 },
        _ => panic!("{line}"),
    };
    lines.iter().enumerate().map(row).collect()
}

const GOOD: &str = r#"{"prompt":"1 + 1 =","chosen":" 2","rejected":" 3","margin":1}"#;

fn said(style: PairStyle, line: &str) -> String {
    let (tokenizer, template) = tokenizer_and_template();
    let rows = rows(&[GOOD, line]);
    pairs(&rows, &tokenizer, Some(&template), 320, style, &PreferenceOptions::default())
        .unwrap_err()
        .to_string()
}

#[test]
fn rows_that_cannot_be_used_are_told_with_file_and_line() {
    let cases = [
        (
            r#"{"prompt":"a","chosen":"b","rejected":"b","margin":1}"#,
            "chosen and rejected are identical",
        ),
        (r#"{"prompt":"a","chosen":"b","margin":1}"#, "has no field \"rejected\""),
        (r#"{"prompt":"a","rejected":"b","margin":1}"#, "has no field \"chosen\""),
        (
            r#"{"prompt":"a","chosen":"b","rejected":"c"}"#,
            "has no \"margin\", or one that is null or NaN",
        ),
        (
            r#"{"prompt":"a","chosen":"b","rejected":"c","margin":"NaN"}"#,
            "must be a finite number, found the string \"NaN\"",
        ),
        (r#"{"prompt":"a","chosen":"b","rejected":"c","margin":1e300}"#, "is not a finite number"),
        (
            r#"{"prompt":"a","chosen":"b","rejected":[{"role":"user","content":"c"}],"margin":1}"#,
            "make both strings",
        ),
    ];
    for (line, part) in cases {
        for style in [PairStyle::Dpo, PairStyle::Orpo, PairStyle::Reward] {
            let message = said(style, line);
            assert!(
                message.starts_with("r.jsonl:2: ") && message.contains(part),
                "{style:?} {line}\n{message}"
            );
        }
    }
    for style in [PairStyle::Dpo, PairStyle::Orpo] {
        let message = said(style, r#"{"chosen":"no beginning","rejected":"in common","margin":1}"#);
        assert!(
            message.starts_with("r.jsonl:2: ") && message.contains("no common prefix"),
            "{message}"
        );
    }
}

#[test]
fn a_prompt_that_begins_nothing_is_an_error() {
    let (tokenizer, _) = tokenizer_and_template();
    let source = "{% for m in messages %}{% if add_generation_prompt %}Q{% endif %}{{ m.content }}{% endfor %}";
    let template = ChatTemplate::new(source, Path::new("t"), tokenizer.special_tokens()).unwrap();
    let said =
        |content: &str, answer: &str| format!(r#"[{{"role":"{content}","content":"{answer}"}}]"#);
    let line = format!(
        r#"{{"prompt":{},"chosen":{},"rejected":{}}}"#,
        said("user", "a"),
        said("assistant", "b"),
        said("assistant", "c")
    );
    let rows = rows(&[&line]);
    let error = pairs(
        &rows,
        &tokenizer,
        Some(&template),
        320,
        PairStyle::Dpo,
        &PreferenceOptions::default(),
    );
    let message = error.unwrap_err().to_string();
    assert!(
        message.starts_with("r.jsonl:1: ") && message.contains("prompt are not a prefix"),
        "{message}"
    );
}

#[test]
fn long_rows_are_cut_dropped_or_refused_as_asked_and_counted() {
    let (tokenizer, template) = tokenizer_and_template();
    let rows = support::rows("preferences/plain.jsonl");
    let run = |on_truncation, max_length| {
        let options = PreferenceOptions {
            max_length: Some(max_length),
            on_truncation,
            ..PreferenceOptions::default()
        };
        pairs(&rows, &tokenizer, Some(&template), 320, PairStyle::Dpo, &options)
    };
    let (cut, stats) = run(OnTruncation::Truncate, 24).unwrap();
    assert_eq!(stats.rows, 40);
    assert_eq!(stats.dropped_no_target + stats.examples, 40);
    assert!(stats.truncated > 0 && stats.dropped_no_target > 0 && stats.longest > 24);
    assert!(cut.iter().all(|e| e.chosen.targets() > 0 && e.rejected.targets() > 0));
    assert_eq!(
        stats.target_tokens,
        Some(cut.iter().map(|e| e.chosen.targets() + e.rejected.targets()).sum::<usize>())
    );
    let text = stats.to_string();
    assert!(text.contains("dropped because their prompt fills max_length (the first: "), "{text}");
    let (kept, stats) = run(OnTruncation::Drop, 36).unwrap();
    assert_eq!((stats.truncated, stats.examples), (0, kept.len()));
    assert_eq!(stats.dropped_too_long + kept.len(), 40);
    assert!(
        stats.dropped_too_long > 0
            && kept.iter().all(|e| e.chosen.input_ids.len().max(e.rejected.input_ids.len()) <= 36)
    );
    let message = run(OnTruncation::Error, 36).unwrap_err().to_string();
    assert!(
        message.contains("plain.jsonl:") && message.contains("more than max_length=36"),
        "{message}"
    );
    let message = run(OnTruncation::Truncate, 3).unwrap_err().to_string();
    assert!(message.contains("excludes all 40 rows"), "{message}");
}

#[test]
fn labels_and_steps_that_do_not_fit_are_told_with_their_row() {
    let (tokenizer, template) = tokenizer_and_template();
    let good = r#"{"prompt":"a","completion":"b","label":true}"#;
    for (line, part) in [
        (r#"{"prompt":"a","completion":"b"}"#, "has no field \"label\""),
        (r#"{"prompt":"a","completion":"b","label":1}"#, "must be true or false"),
        (r#"{"completion":"b","label":true}"#, "has no field \"prompt\""),
    ] {
        let rows = rows(&[good, line]);
        let error =
            labelled(&rows, &tokenizer, Some(&template), 320, &PreferenceOptions::default());
        let message = error.unwrap_err().to_string();
        assert!(message.starts_with("r.jsonl:2: ") && message.contains(part), "{message}");
    }
    for (line, part) in [
        (
            r#"{"prompt":"a","completions":["b"],"labels":[true,false]}"#,
            "1 completions and 2 labels",
        ),
        (r#"{"prompt":"a","completions":[],"labels":[]}"#, "at least one step"),
        (r#"{"prompt":"a","completions":["b"],"labels":["yes"]}"#, "labels[0]"),
    ] {
        let rows = rows(&[line]);
        let error =
            steps(&rows, &tokenizer, 320, &StepOptions::default(), &PreferenceOptions::default());
        let message = error.unwrap_err().to_string();
        assert!(message.starts_with("r.jsonl:1: ") && message.contains(part), "{message}");
    }
}
