//! The assistant's spans found in templates without generation tags, against transformers' spans of
//! the same templates with tags (`tests/fixtures/make_masks.py`); masks of distillation and
//! preferences.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};
use temper::data::chat::ChatTemplate;
use temper::data::format::{Format, RowContent};
use temper::data::preference::{PairStyle, PreferenceOptions, labelled, mismatched, pairs};
use temper::data::render::Renderer;
use temper::data::rows::Row;
use temper::data::sft::{SftOptions, prepare};
use temper::data::tokenizer::Tokenizer;
use temper::data::turns::assistant_spans;

use crate::support::{
    MODEL, done, fixture, json, metrics, temper, tokenizer, tokenizer_and_template, write_rows,
};

fn row(value: Value) -> Row {
    let Value::Object(value) = value else { unreachable!() };
    Row { value, file: Path::new("t").into(), line: 1 }
}

/// Spans without those that touch.
fn joined(spans: Vec<Range<usize>>) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    for span in spans.into_iter().filter(|s| !s.is_empty()) {
        match all.last_mut().filter(|last| last.end == span.start) {
            Some(last) => last.end = span.end,
            None => all.push(span),
        }
    }
    all
}

fn spans(list: &Value) -> Vec<Range<usize>> {
    let number = |n: &Value| n.as_u64().unwrap() as usize;
    list.as_array().unwrap().iter().map(|s| number(&s[0])..number(&s[1])).collect()
}

#[derive(Default)]
struct Counts {
    rows: usize,
    equal: usize,
    /// Also equal to TRL's own tags, which in some templates hold what the generation prompt gives.
    trl: usize,
    refused: usize,
    differ: Vec<String>,
}

/// The tokenizer of the fixture, and more special tokens.
fn with_tokens(more: &Value) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let mut file = json(Path::new(MODEL).join("tokenizer.json"));
    let added = file["added_tokens"].as_array_mut().unwrap();
    for (i, token) in more.as_array().into_iter().flatten().enumerate() {
        added.push(json!({ "id": 320 + i, "content": token, "single_word": false, "lstrip": false,
                           "rstrip": false, "normalized": false, "special": true }));
    }
    std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    for name in ["tokenizer_config.json", "config.json"] {
        std::fs::copy(Path::new(MODEL).join(name), dir.path().join(name)).unwrap();
    }
    Tokenizer::load(dir.path()).unwrap()
}

fn compare(all: &Value) -> Vec<(String, Counts)> {
    let tokenizer = with_tokens(&all["tokens"]);
    let special: Map<String, Value> = all["special"].as_object().unwrap().clone();
    let mut counts = Vec::new();
    for case in all["cases"].as_array().unwrap() {
        let (name, source) = (case["name"].as_str().unwrap(), case["source"].as_str().unwrap());
        let template = ChatTemplate::new(source, Path::new(name), &special).unwrap();
        let renderer = Renderer::new(&tokenizer, Some(&template), 320);
        let mut c = Counts::default();
        for want in case["rows"].as_array().unwrap().iter().filter(|w| !w["said"].is_null()) {
            let talk = &all["talks"][want["talk"].as_u64().unwrap() as usize];
            let row = row(json!({ "messages": talk }));
            let example = Format::Messages.parse(&row, "").unwrap();
            let RowContent::Messages(messages) = &example.content else { unreachable!() };
            let text = renderer.render(&row, &example, messages, false).unwrap().text;
            assert_eq!(text, want["text"].as_str().unwrap(), "{name}");
            c.rows += 1;
            match assistant_spans(&renderer, &row, &example, messages, &text) {
                Ok(got) => {
                    let got = joined(got);
                    c.equal += usize::from(got == spans(&want["said"]));
                    c.trl += usize::from(got == spans(&want["spans"]));
                    if got != spans(&want["said"]) {
                        c.differ.push(format!(
                            "{name}, {}: {got:?}, not {}\n{text}",
                            want["talk"], want["said"]
                        ));
                    }
                }
                Err(e) => {
                    c.refused += 1;
                    c.differ.push(format!("{name}, {}: {e}", want["talk"]));
                }
            }
        }
        counts.push((name.to_string(), c));
    }
    counts
}

#[test]
fn turns_without_tags_have_the_spans_of_tags() {
    for (name, c) in compare(&json(fixture("masks.json"))) {
        assert_eq!(c.rows, 40, "{name}");
        // Never wrong: a turn is found where the tags are, or it is an error that shows it.
        assert_eq!(c.equal + c.refused, c.rows, "{}", c.differ.join("\n"));
        assert_eq!(c.refused, 0, "{}", c.differ.join("\n"));
    }
}

/// By hand, over what `make_masks.py --trl` wrote.
#[test]
fn turns_of_stock_templates_have_the_spans_of_tags() {
    let Some(path) = std::env::var_os("TEMPER_MASKS") else { return };
    for (name, c) in compare(&json(path)) {
        let Counts { rows, equal, trl, refused, differ } = c;
        let wrong = rows - equal - refused;
        println!(
            "{name}: of {rows} {equal} equal, {trl} with TRL's tags as they are, {refused} refused, {wrong} differ"
        );
        for text in differ.iter().take(3) {
            println!("    {}", text.chars().take(1500).collect::<String>());
        }
    }
}

fn turn(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// The tokens that count, as text.
fn counted(ids: &[u32], mask: &[bool]) -> String {
    let said: Vec<u32> = ids.iter().zip(mask).filter(|(_, m)| **m).map(|(id, _)| *id).collect();
    tokenizer().decode(&said, false).unwrap()
}

const ANSWER: [(&str, &str); 3] = [("assistant", "sure"), ("user", "go on"), ("assistant", "done")];

fn talk() -> Value {
    ANSWER.map(|(role, text)| turn(role, text)).to_vec().into()
}

#[test]
fn preferences_count_only_what_the_assistant_says_if_asked() {
    let (tokenizer, template) = tokenizer_and_template();
    let ask = [turn("user", "please"), turn("assistant", "what"), turn("user", "that")];
    let pair =
        row(json!({ "prompt": ask, "chosen": talk(), "rejected": [turn("assistant", "no")] }));
    let of = |assistant_only_loss: bool| {
        let options = PreferenceOptions { assistant_only_loss, ..Default::default() };
        let rows = [row(pair.value.clone().into())];
        pairs(&rows, &tokenizer, Some(&template), 320, PairStyle::Dpo, &options)
            .unwrap()
            .0
            .remove(0)
    };
    let (all, said) = (of(false), of(true));
    assert_eq!(all.chosen.input_ids, said.chosen.input_ids);
    let text = |s: &temper::data::masked::MaskedSequence| counted(&s.input_ids, &s.target_mask);
    assert!(text(&all.chosen).contains("go on"), "{}", text(&all.chosen));
    assert_eq!(text(&said.chosen), "sure<|im_end|>done<|im_end|>");
    assert_eq!(text(&said.rejected), "no<|im_end|>");
    assert_eq!(all.shared, said.shared, "the prompt is shared all the same");
    // The template has tags, and what it writes after a turn is outside of them.
    assert_eq!(text(&all.rejected), "no<|im_end|>\n");

    let single = |assistant_only_loss: bool| {
        let options = PreferenceOptions { assistant_only_loss, ..Default::default() };
        let rows = [
            row(json!({ "prompt": ask, "completion": talk(), "label": true })),
            row(json!({ "prompt": ask, "completion": [turn("assistant", "no")], "label": false })),
        ];
        labelled(&rows, &tokenizer, Some(&template), 320, &options).unwrap().0
    };
    let said = single(true);
    let own = said[0].sequence(None);
    assert_eq!(text(&own), "sure<|im_end|>done<|im_end|>");
    assert!(text(&single(false)[0].sequence(None)).contains("go on"));
    // Behind another prompt a completion keeps its mask.
    let crossed = mismatched(&said, 2, None);
    assert_eq!(text(&crossed[1]), text(&own));

    let options = PreferenceOptions { assistant_only_loss: true, ..Default::default() };
    let plain = [row(json!({ "prompt": "a", "chosen": "b", "rejected": "c" }))];
    let e = pairs(&plain, &tokenizer, Some(&template), 320, PairStyle::Dpo, &options).unwrap_err();
    assert!(e.to_string().contains("needs conversations"), "{e}");
}

#[test]
fn every_method_with_masks_trains_on_assistant_turns() {
    let dir = tempfile::tempdir().unwrap();
    let ask = [turn("user", "please")];
    let file =
        |name: &str, rows: Vec<Value>| write_rows(dir.path().join(format!("{name}.jsonl")), &rows);
    let messages: Value = [&ask[..], talk().as_array().unwrap().as_slice()].concat().into();
    let no = [turn("assistant", "no")];
    let model = MODEL;
    // What the run of SFT leaves: from its own weights a student has nothing to learn.
    let teacher = dir.path().join("sft assistant_only_loss=true");
    let teacher = format!("teacher_model_name_or_path={}", teacher.display());
    let mut unpaired = vec![json!({ "prompt": ask, "completion": talk(), "label": true }); 2];
    unpaired.extend(vec![json!({ "prompt": ask, "completion": no, "label": false }); 2]);
    for (method, data, more) in [
        ("sft", file("sft", vec![json!({ "messages": messages }); 4]), None),
        ("distill", file("distill", vec![json!({ "messages": messages }); 4]), Some(&*teacher)),
        (
            "dpo",
            file("dpo", vec![json!({ "prompt": ask, "chosen": talk(), "rejected": no }); 4]),
            None,
        ),
        ("kto", file("kto", unpaired), None),
    ] {
        let loss = |option: &str| {
            let out = dir.path().join(format!("{method} {option}"));
            let out = out.to_str().unwrap();
            let mut args = vec![method, "--model", model, "--data", &data, "--output", out, option];
            args.extend(["max_steps=2", "logging_steps=2", "learning_rate=1e-3"]);
            args.extend(["per_device_train_batch_size=4", "device=cpu"]);
            args.extend(more);
            done(&args);
            let log = metrics(Path::new(out));
            log[0]["grad_norm"].as_f64().unwrap()
        };
        let (all, said) = (loss("assistant_only_loss=false"), loss("assistant_only_loss=true"));
        assert!(all != said && said > 0.0, "{method}: {all} {said}");
    }
    let (code, _, err) = temper(&[
        "orpo",
        "assistant_only_loss=true",
        "--model",
        "m",
        "--data",
        "d",
        "--output",
        "o",
    ]);
    assert!(code == Some(2) && err.contains("unknown option"), "{err}");
}

#[test]
fn masks_of_rows_are_those_of_the_spans() {
    let (tokenizer, template) = tokenizer_and_template();
    let options = SftOptions { assistant_only_loss: true, ..Default::default() };
    let messages: Value =
        [&[turn("user", "please")][..], talk().as_array().unwrap().as_slice()].concat().into();
    let rows = [row(json!({ "messages": messages }))];
    let made = prepare(&rows, &tokenizer, Some(&template), 320, &options).unwrap().0;
    let text = counted(&made[0].input_ids, &made[0].target_mask);
    assert!(text.starts_with("sure") && text.contains("done") && !text.contains("go on"), "{text}");
}
