//! Data: parity with transformers and TRL, against fixtures that `tests/fixtures/make_*.py` wrote.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use temper::data::chat::{ChatTemplate, RenderOptions};
use temper::data::jinja::Clock;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[derive(Default, Debug, PartialEq)]
struct Renders {
    equal: usize,
    both_raise: usize,
    lenient: usize, // Python cannot loop over None, minijinja loops zero times
    differ: Vec<String>,
}

/// Renders every case of a fixture that make_chat.py wrote and compares text and spans.
fn compare_renders(all: &Value, template: &Value, source: &str, counts: &mut Renders) {
    let special = all["special"].as_object().unwrap();
    let clock = Clock { year: 2025, month: 3, day: 9, hour: 14, minute: 5, second: 7 };
    let compiled = ChatTemplate::with_clock(source, Path::new("t"), special, Arc::new(move || clock));
    for case in template["renders"].as_array().unwrap() {
        let options = RenderOptions {
            tools: (case["t"] == 1).then_some(&all["tools"]),
            add_generation_prompt: case["p"] == 1,
            kwargs: case["k"].as_object(),
        };
        let messages = &all["conversations"][case["c"].as_str().unwrap()];
        let got = compiled.as_ref().map_err(|e| e.to_string());
        let got = got.and_then(|t| t.render(messages, options).map_err(|e| e.to_string()));
        let want = case.get("r").map(|r| r.as_u64().map_or(r, |i| &template["texts"][i as usize]).as_str().unwrap());
        let at = format!("{} {} p={} t={} k={}", template["name"], case["c"], case["p"], case["t"], case["k"]);
        match (got, want) {
            (Ok(got), Some(want)) => {
                let spans: Vec<Value> =
                    got.generation_spans.iter().map(|s| serde_json::json!([s.start, s.end])).collect();
                if got.text != want {
                    counts.differ.push(format!("{at}\n--- want\n{want}\n--- got\n{}", got.text));
                } else if &Value::Array(spans.clone()) != &case["s"] {
                    counts.differ.push(format!("{at}: spans want {} got {spans:?}", case["s"]));
                } else {
                    counts.equal += 1;
                }
            }
            (Err(_), None) => counts.both_raise += 1,
            (Ok(_), None) if case["e"].as_str().unwrap().contains("'NoneType' object is not iterable") => {
                counts.lenient += 1
            }
            (Ok(got), None) => counts.differ.push(format!("{at}: should raise {}, gave\n{}", case["e"], got.text)),
            (Err(e), Some(_)) => counts.differ.push(format!("{at}: raised {e}")),
        }
    }
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let all = json(&fixture("chat.json"));
    let mut counts = Renders::default();
    for template in all["templates"].as_array().unwrap() {
        compare_renders(&all, template, template["source"].as_str().unwrap(), &mut counts);
    }
    assert!(counts.differ.is_empty(), "{} differ, first:\n{}", counts.differ.len(), counts.differ[0]);
    println!("{} renders equal, {} raise in both", counts.equal, counts.both_raise);
    assert!(counts.equal > 300);
}

/// TRL's own templates are not in this repository: see make_chat.py for how to run this.
#[test]
fn trl_templates_render_as_in_transformers() {
    let (Ok(folder), Ok(renders)) = (std::env::var("TEMPER_TRL_TEMPLATES"), std::env::var("TEMPER_TRL_RENDERS")) else {
        println!("skipped: TEMPER_TRL_TEMPLATES and TEMPER_TRL_RENDERS are not set (tests/fixtures/make_chat.py)");
        return;
    };
    let all = json(Path::new(&renders));
    let mut counts = Renders::default();
    for template in all["templates"].as_array().unwrap() {
        let source = std::fs::read_to_string(Path::new(&folder).join(template["name"].as_str().unwrap())).unwrap();
        compare_renders(&all, template, &source, &mut counts);
    }
    let Renders { equal, both_raise, lenient, differ } = &counts;
    println!("{equal} equal, {both_raise} raise in both, {lenient} raise in Python only, {} differ", differ.len());
    for differ in counts.differ.iter().take(400) {
        println!("==== {differ}");
    }
    assert!(counts.differ.is_empty());
}
