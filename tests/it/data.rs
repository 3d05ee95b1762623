//! Data: parity with transformers and TRL, against fixtures that `tests/fixtures/make_*.py` wrote.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use temper::data::chat::{ChatTemplate, RenderOptions};
use temper::data::jinja::Clock;
use temper::data::order::SamplingStrategy;
use temper::data::packing::{PackingStrategy, pack};
use temper::data::rows::{Row, read_rows};
use temper::data::sft::{SftExample, SftOptions, SftStats, TruncationMode, prepare};
use temper::data::tokenizer::Tokenizer;
use temper::data::{bpe, order};

use crate::support::{fixture, json, rows, tokenizer, tokenizer_and_template};

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
    let compiled =
        ChatTemplate::with_clock(source, Path::new("t"), special, Arc::new(move || clock));
    for case in template["renders"].as_array().unwrap() {
        let options = RenderOptions {
            tools: (case["t"] == 1).then_some(&all["tools"]),
            add_generation_prompt: case["p"] == 1,
            kwargs: case["k"].as_object(),
        };
        let messages = &all["conversations"][case["c"].as_str().unwrap()];
        let got = compiled.as_ref().map_err(|e| e.to_string());
        let got = got.and_then(|t| t.render(messages, options).map_err(|e| e.to_string()));
        let want = case
            .get("r")
            .map(|r| r.as_u64().map_or(r, |i| &template["texts"][i as usize]).as_str().unwrap());
        let at = format!(
            "{} {} p={} t={} k={}",
            template["name"], case["c"], case["p"], case["t"], case["k"]
        );
        match (got, want) {
            (Ok(got), Some(want)) => {
                let spans: Vec<Value> = got
                    .generation_spans
                    .iter()
                    .map(|s| serde_json::json!([s.start, s.end]))
                    .collect();
                if got.text != want {
                    counts.differ.push(format!("{at}\n--- want\n{want}\n--- got\n{}", got.text));
                } else if Value::Array(spans.clone()) != case["s"] {
                    counts.differ.push(format!("{at}: spans want {} got {spans:?}", case["s"]));
                } else {
                    counts.equal += 1;
                }
            }
            (Err(_), None) => counts.both_raise += 1,
            (Ok(_), None)
                if case["e"].as_str().unwrap().contains("'NoneType' object is not iterable") =>
            {
                counts.lenient += 1
            }
            (Ok(got), None) => {
                counts.differ.push(format!("{at}: should raise {}, gave\n{}", case["e"], got.text))
            }
            (Err(e), Some(_)) => counts.differ.push(format!("{at}: raised {e}")),
        }
    }
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let all = json(fixture("chat.json"));
    let mut counts = Renders::default();
    for template in all["templates"].as_array().unwrap() {
        compare_renders(&all, template, template["source"].as_str().unwrap(), &mut counts);
    }
    assert!(
        counts.differ.is_empty(),
        "{} differ, first:\n{}",
        counts.differ.len(),
        counts.differ[0]
    );
    println!("{} renders equal, {} raise in both", counts.equal, counts.both_raise);
    assert!(counts.equal > 300);
}

/// TRL's own templates are not in this repository: see make_chat.py for how to run this.
#[test]
fn trl_templates_render_as_in_transformers() {
    let (Ok(folder), Ok(renders)) =
        (std::env::var("TEMPER_TRL_TEMPLATES"), std::env::var("TEMPER_TRL_RENDERS"))
    else {
        println!(
            "skipped: TEMPER_TRL_TEMPLATES and TEMPER_TRL_RENDERS are not set (tests/fixtures/make_chat.py)"
        );
        return;
    };
    let all = json(Path::new(&renders));
    let mut counts = Renders::default();
    for template in all["templates"].as_array().unwrap() {
        let source =
            std::fs::read_to_string(Path::new(&folder).join(template["name"].as_str().unwrap()))
                .unwrap();
        compare_renders(&all, template, &source, &mut counts);
    }
    let Renders { equal, both_raise, lenient, differ } = &counts;
    println!(
        "{equal} equal, {both_raise} raise in both, {lenient} raise in Python only, {} differ",
        differ.len()
    );
    for differ in counts.differ.iter().take(400) {
        println!("==== {differ}");
    }
    assert!(counts.differ.is_empty());
}

fn strategy(name: &Value) -> PackingStrategy {
    match name.as_str() {
        Some("bfd_split") => PackingStrategy::BfdSplit,
        Some("wrapped") => PackingStrategy::Wrapped,
        _ => PackingStrategy::Bfd,
    }
}

#[test]
fn packs_equal_those_of_trl() {
    let cases = json(fixture("sft/packs.json"));
    let cases = cases.as_array().unwrap();
    for case in cases {
        let lengths: Vec<usize> = serde_json::from_value(case["lengths"].clone()).unwrap();
        let max = case["max"].as_u64().unwrap() as usize;
        let got: Vec<Vec<usize>> = pack(strategy(&case["strategy"]), &lengths, max)
            .into_iter()
            .map(|pack| {
                pack.into_iter().flat_map(|(e, tokens)| [e, tokens.start, tokens.len()]).collect()
            })
            .collect();
        // where no token is left, TRL fails
        let Ok(want) = serde_json::from_value::<Vec<Vec<usize>>>(case["packs"].clone()) else {
            assert!(got.is_empty(), "{}", case["packs"]);
            continue;
        };
        // one piece that goes on from another may be written as one
        let first = got.iter().zip(&want).position(|(a, b)| a != b);
        assert!(
            got == want,
            "{} max {max}, {} lengths: pack {first:?}",
            case["strategy"],
            lengths.len()
        );
    }
    assert_eq!(cases.len(), 30);
}

fn options(config: &Value) -> SftOptions {
    let mut o = SftOptions::default();
    for (key, value) in config.as_object().unwrap() {
        match key.as_str() {
            "max_length" => o.max_length = value.as_u64().map(|n| n as usize),
            "truncation_mode" => o.truncation_mode = TruncationMode::KeepEnd,
            "assistant_only_loss" => o.assistant_only_loss = true,
            "completion_only_loss" => o.completion_only_loss = value.as_bool(),
            "packing" => o.packing = Some(strategy(&config["packing_strategy"])),
            _ => {}
        }
    }
    o
}

fn sft(kind: &str, options: &SftOptions) -> (Vec<SftExample>, SftStats) {
    let (tokenizer, template) = tokenizer_and_template();
    let rows = rows(&format!("sft/{kind}.jsonl"));
    prepare(&rows, &tokenizer, Some(&template), 320, options).unwrap()
}

#[test]
fn ids_and_masks_equal_those_of_trl() {
    let runs = json(fixture("sft/tokens.json"));
    let mut compared = 0;
    for (name, run) in runs.as_object().unwrap() {
        let options = options(&run["config"]);
        let (examples, stats) = sft(run["rows"].as_str().unwrap(), &options);
        let mut got: Vec<(Vec<u32>, Vec<bool>, Vec<usize>)> = Vec::new();
        match options.packing {
            None => {
                got.extend(examples.into_iter().map(|e| (e.input_ids, e.target_mask, Vec::new())))
            }
            Some(strategy) => {
                let lengths: Vec<usize> = examples.iter().map(|e| e.input_ids.len()).collect();
                for pack in pack(strategy, &lengths, options.max_length.unwrap()) {
                    let pieces = || pack.iter().map(|(e, tokens)| (&examples[*e], tokens.clone()));
                    let ids = pieces().flat_map(|(e, t)| e.input_ids[t].to_vec()).collect();
                    let mask = pieces().flat_map(|(e, t)| e.target_mask[t].to_vec()).collect();
                    let lengths = pack.iter().map(|(_, t)| t.len()).collect();
                    got.push((ids, mask, if strategy.isolates() { lengths } else { Vec::new() }));
                }
            }
        }
        assert_eq!(got.len() as u64, run["total"].as_u64().unwrap(), "{name}: examples, {stats}");
        for (i, want) in run["examples"].as_array().unwrap().iter().enumerate() {
            let ids: Vec<u32> = serde_json::from_value(want["ids"].clone()).unwrap();
            let mask = unrolled(&want["mask"]);
            let lengths: Vec<usize> = want
                .get("seq_lengths")
                .map_or(vec![], |l| serde_json::from_value(l.clone()).unwrap());
            assert_eq!(got[i], (ids, mask, lengths), "{name}: example {i}");
            compared += 1;
        }
    }
    println!("{compared} examples equal");
    assert!(compared > 200);
}

fn unrolled(runs: &Value) -> Vec<bool> {
    let runs: Vec<(usize, u8)> = serde_json::from_value(runs.clone()).unwrap();
    runs.iter().flat_map(|(n, bit)| vec![*bit == 1; *n]).collect()
}

#[test]
fn assistant_masks_equal_those_of_transformers_inside_tokens() {
    let tokenizer = tokenizer();
    let fixture = json(fixture("sft/masks.json"));
    let options = SftOptions { assistant_only_loss: true, ..SftOptions::default() };
    for case in fixture["masks"].as_array().unwrap() {
        let source = case["template"].as_str().unwrap();
        let template =
            ChatTemplate::new(source, tokenizer.dir(), tokenizer.special_tokens()).unwrap();
        let Value::Object(value) = serde_json::json!({"messages": case["messages"]}) else {
            unreachable!()
        };
        let row = Row { value, file: Path::new("masks").into(), line: 1 };
        let want: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        let mask: Vec<u8> = serde_json::from_value(case["mask"].clone()).unwrap();
        let (got, _) = prepare(&[row], &tokenizer, Some(&template), 320, &options).unwrap();
        let bits: Vec<u8> = got[0].target_mask.iter().map(|b| u8::from(*b)).collect();
        assert_eq!((&got[0].input_ids, bits), (&want, mask), "{source} {}", case["messages"]);
    }
}

#[test]
fn a_bos_post_processor_acts_as_in_trl() {
    let masks = json(fixture("sft/masks.json"));
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("sft/model").join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("tokenizer.json");
    let mut text = json(&path);
    text["post_processor"] = masks["post_processor"].clone();
    std::fs::write(&path, text.to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    for kind in ["text", "prompt_completion"] {
        let rows = rows(&format!("sft/{kind}.jsonl"));
        let (got, _) = prepare(&rows[..6], &tokenizer, None, 320, &SftOptions::default()).unwrap();
        for (got, want) in got.iter().zip(masks["with_bos"][kind].as_array().unwrap()) {
            let ids: Vec<u32> = serde_json::from_value(want[0].clone()).unwrap();
            assert_eq!(
                (&got.input_ids, &got.target_mask),
                (&ids, &unrolled(&want[1])),
                "{kind} {}",
                got.row
            );
            assert_eq!(ids[0], 1);
        }
    }
    // A text that brings its own BOS gets a second one, as in TRL: training says so.
    let bos = tokenizer.id_to_token(1).unwrap();
    let path = dir.path().join("tokenizer_config.json");
    let mut config = json(&path);
    config["bos_token"] = bos.clone().into();
    std::fs::write(&path, config.to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let rows: Vec<Row> = ["one", "two"]
        .into_iter()
        .enumerate()
        .map(|(i, text)| {
            let text = if i == 0 { format!("{bos}{text}") } else { text.into() };
            let value = serde_json::json!({ "text": text }).as_object().unwrap().clone();
            Row { value, file: Path::new("r.jsonl").into(), line: i + 1 }
        })
        .collect();
    let (_, stats) = prepare(&rows, &tokenizer, None, 320, &SftOptions::default()).unwrap();
    assert_eq!(stats.doubled_bos, 1);
    assert!(stats.to_string().contains("two BOS tokens: 1."), "{stats}");
}

#[test]
fn tokens_that_only_the_config_names_are_tokens() {
    let loose = &json(fixture("sft/masks.json"))["loose"];
    let dir = tempfile::tempdir().unwrap();
    let mut tokenizer = json(fixture("sft/model/tokenizer.json"));
    tokenizer["added_tokens"] = serde_json::json!([]);
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let mut config = json(fixture("sft/model/tokenizer_config.json"));
    config["added_tokens_decoder"] = loose["config"]["added_tokens_decoder"].clone();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let t = Tokenizer::load(dir.path()).unwrap();
    for (i, text) in loose["texts"].as_array().unwrap().iter().enumerate() {
        let want: Vec<u32> = serde_json::from_value(loose["ids"][i].clone()).unwrap();
        assert_eq!(t.encode(text.as_str().unwrap(), true).unwrap(), want, "{text}");
        assert_eq!(t.decode(&want, true).unwrap(), loose["decoded"][i].as_str().unwrap());
    }
    config["added_tokens_decoder"] = serde_json::json!({"400": {"content": "<far>"}});
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    assert!(
        Tokenizer::load(dir.path())
            .map(|_| ())
            .unwrap_err()
            .to_string()
            .contains("\"<far>\" has the id 400")
    );
}

#[test]
fn stats_say_what_was_cut_and_dropped() {
    let short = SftOptions { max_length: Some(21), ..SftOptions::default() };
    let (examples, stats) = sft("prompt_completion", &short);
    assert_eq!(stats.rows, 48);
    assert_eq!(stats.examples + stats.dropped_no_target, 48);
    assert!(
        stats.truncated > 0 && stats.dropped_no_target > 0 && stats.prefix_mismatches > 0,
        "{stats:?}"
    );
    let said = stats.to_string();
    for part in [
        "48 rows read",
        "cut at max_length=21",
        "because no target was left",
        "End prompts where a token ends",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert!(
        examples
            .iter()
            .all(|e| e.input_ids.len() <= 21 && e.target_mask.len() == e.input_ids.len())
    );
    assert_eq!(stats.rows_with_eos, 0);
    assert!(said.contains("No loss target is the EOS token \"<|im_end|>\""), "{said}");
    let (all, stats) = sft("text", &SftOptions::default());
    assert_eq!(stats.rows_with_eos, 48);
    assert_eq!((all.len(), stats.target_tokens), (48, stats.tokens - 48));
}

#[test]
fn rows_that_cannot_be_trained_on_are_errors() {
    let (tokenizer, template) = tokenizer_and_template();
    let rows = |kind: &str| rows(&format!("sft/{kind}.jsonl"));
    let said = |rows: &[Row], vocab, o: &SftOptions| {
        prepare(rows, &tokenizer, Some(&template), vocab, o).unwrap_err().to_string()
    };
    let default = SftOptions::default();
    let beyond = said(&rows("text"), 260, &default);
    assert!(
        beyond.contains("text.jsonl:1: token ")
            && beyond.contains("beyond the model's vocabulary of 260"),
        "{beyond}"
    );
    let tiny = SftOptions { max_length: Some(3), ..default.clone() };
    let nothing = said(&rows("prompt_completion"), 320, &tiny);
    assert!(
        nothing.contains(
            "truncation to max_length=3 removed every loss target of all 48 rows; raise max_length"
        ),
        "{nothing}"
    );
    let strict = SftOptions { on_truncation: temper::data::sft::OnTruncation::Error, ..tiny };
    assert!(said(&rows("text"), 320, &strict).contains("text.jsonl:1: has "));
    let assistant = SftOptions { assistant_only_loss: true, ..default.clone() };
    assert!(said(&rows("text"), 320, &assistant).contains("needs conversations"));
    let plain =
        ChatTemplate::new("{{ messages[0].content }}", tokenizer.dir(), tokenizer.special_tokens())
            .unwrap();
    let e = prepare(&rows("messages"), &tokenizer, Some(&plain), 320, &assistant)
        .unwrap_err()
        .to_string();
    assert!(e.contains("{% generation %}"), "{e}");
    let e = prepare(&rows("messages"), &tokenizer, None, 320, &default).unwrap_err().to_string();
    assert!(e.contains("has no chat template"), "{e}");
    let mut mixed = rows("messages");
    mixed.extend(rows("text"));
    let e = said(&mixed, 320, &default);
    assert!(e.contains("text.jsonl:1: has no field \"messages\" (it has \"text\")"), "{e}");
    let eos = SftOptions { eos_token: Some("<nope>".into()), ..default };
    assert!(
        said(&rows("text"), 320, &eos).contains("eos_token=\"<nope>\" is not in the vocabulary")
    );
}

#[test]
fn the_tokenizer_fixture_loads_whole() {
    let t = tokenizer();
    assert_eq!(
        (t.vocab_size(), t.eos_token(), t.pad_token(), t.bos_token()),
        (320, Some("<|im_end|>"), Some("<|endoftext|>"), None)
    );
    assert_eq!((t.eos_id(), t.pad_id(), t.files().len()), (Some(2), Some(0), 3));
    assert_eq!(order::epoch_order(SamplingStrategy::Sequential, 3, 0, 0), [0, 1, 2]);
}

/// Writes what transformers is to load when TEMPER_BPE_OUT names a folder; see make_sft.py --load.
#[test]
fn a_trained_tokenizer_is_a_folder() {
    let kept = std::env::var("TEMPER_BPE_OUT").ok();
    let dir = tempfile::tempdir().unwrap();
    let dir = kept.as_deref().map_or(dir.path(), Path::new);
    let texts: Vec<String> =
        rows("sft/text.jsonl").iter().map(|r| r.string("text").unwrap().to_string()).collect();
    let trained =
        bpe::train_bpe(texts.iter().map(String::as_str), 350, &["<|end|>", "<|pad|>"], true)
            .unwrap();
    trained
        .write(dir, "<|end|>", "<|pad|>", Some("{{ messages[0].content }}{{ eos_token }}"))
        .unwrap();
    let t = Tokenizer::load(dir).unwrap();
    let lines: Vec<String> =
        texts.iter().map(|x| serde_json::to_string(&t.encode(x, true).unwrap()).unwrap()).collect();
    std::fs::write(dir.join("ids.jsonl"), lines.join("\n")).unwrap();
    for text in &texts {
        assert_eq!(&t.decode(&t.encode(text, true).unwrap(), true).unwrap(), text);
    }
    assert_eq!(t.encode("2719", false).unwrap().len(), 4);
}

#[test]
fn parquet_rows_equal_json_rows() {
    let (tokenizer, template) = tokenizer_and_template();
    let parquet = rows("sft/messages.parquet");
    let lines = rows("sft/messages.jsonl");
    assert_eq!(
        (parquet.len(), parquet[3].line, parquet[3].get("id"), parquet[3].get("tools")),
        (9, 4, Some(&3.into()), None)
    );
    let make = |rows: &[Row]| {
        prepare(rows, &tokenizer, Some(&template), 320, &SftOptions::default()).unwrap()
    };
    assert_eq!(make(&parquet), make(&lines[..9]));
}

#[test]
fn broken_parquet_files_never_panic() {
    let good = std::fs::read(fixture("sft/messages.parquet")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.parquet");
    for i in 0..400 {
        let mut bad = good.clone();
        let draws = temper::rng::philox([5, 0], [i, 0, 0, 0]);
        let at = |d: u32| d as usize % good.len();
        match i % 3 {
            0 => bad.truncate(at(draws[0])),
            1 => draws.iter().for_each(|d| bad[at(*d)] ^= 1 << (d >> 29)),
            _ => bad[at(draws[1])] = draws[2] as u8,
        }
        std::fs::write(&path, bad).unwrap();
        if let Err(e) = read_rows(std::slice::from_ref(&path)) {
            assert!(e.to_string().contains("bad.parquet"), "{e}");
        }
    }
}
