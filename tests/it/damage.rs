//! Damaged inputs: model folders, adapters, templates, rows and logs with bytes and values changed.
//! Each must be read or refused with an error, at once, without a panic or a hang.
//!
//! A small share runs with every `cargo test`. To run all:
//! `TEMPER_DAMAGE=32000 cargo test --test it damage -- --ignored --nocapture`

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use temper::config::{DataOptions, OnBadRow};
use temper::data::chat::{ChatTemplate, RenderOptions};
use temper::data::preference::{PairStyle, PreferenceOptions, pairs};
use temper::data::read::{FolderSplit, WantedFields, read};
use temper::data::sft::{SftOptions, prepare};
use temper::data::tokenizer::Tokenizer;
use temper::model::adapter::config::AdapterConfig;
use temper::model::folder::load_config;
use temper::model::specs::expected_params;
use temper::report;
use temper::tensor::safetensors::SafeFolder;

use crate::support::{MODEL, fixture, tokenizer_and_template};

/// The limit of one input. A test run shares the machine, so more than the two seconds of a quiet
/// one.
const LIMIT: Duration = Duration::from_secs(20);

struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }

    fn pick<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.roll(list.len())].clone()
    }
}

/// Bytes with up to six of them flipped, lost, doubled, replaced or moved.
fn bytes(dice: &mut Dice, good: &[u8]) -> Vec<u8> {
    let mut bad = good.to_vec();
    let tokens: [&[u8]; 14] = [
        b"null",
        b"-1",
        b"1e308",
        b"18446744073709551616",
        b"{",
        b"}",
        b"[",
        b"\"",
        b"\\u0000",
        b"\\ud800",
        b"{% for x in x %}",
        b"{{",
        b"\xff\xfe",
        b"\0",
    ];
    for _ in 0..1 + dice.roll(6) {
        let at = dice.roll(bad.len());
        match dice.roll(6) {
            0 if !bad.is_empty() => bad[at] ^= 1 << dice.roll(8),
            1 => bad.truncate(at),
            2 => {
                let end = (at + dice.roll(64)).min(bad.len());
                bad.drain(at.min(end)..end);
            }
            3 => {
                let end = (at + dice.roll(64)).min(bad.len());
                let copy = bad[at.min(end)..end].to_vec();
                bad.splice(at..at, copy);
            }
            4 => {
                let token = dice.pick(&tokens);
                bad.splice(at..at, token.iter().copied());
            }
            _ => {
                let token = dice.pick(&tokens);
                let end = (at + token.len()).min(bad.len());
                bad.splice(at.min(end)..end, token.iter().copied());
            }
        }
    }
    bad
}

/// JSON with up to three values replaced, removed or doubled.
fn values(dice: &mut Dice, good: &Value) -> Value {
    fn visit(dice: &mut Dice, value: &mut Value) {
        let hostile = [
            json!(null),
            json!(-1),
            json!(0),
            json!(1u64 << 62),
            json!(u64::MAX),
            json!(1e308),
            json!(-0.5),
            json!(""),
            json!("\u{0}"),
            json!("é🙂"),
            json!([]),
            json!({}),
            json!([[[]]]),
            json!(true),
            json!({ "": { "": null } }),
            json!("x".repeat(5000)),
            json!([1, "a", null]),
            json!("../../../etc/passwd"),
        ];
        match value {
            Value::Object(map) if !map.is_empty() && dice.roll(5) > 0 => {
                let keys: Vec<String> = map.keys().cloned().collect();
                let key = dice.pick(&keys);
                match dice.roll(12) {
                    0 => drop(map.remove(&key)),
                    1 => {
                        let copy = map[&key].clone();
                        map.insert(format!("{key}x"), copy);
                    }
                    _ => visit(dice, map.get_mut(&key).unwrap()),
                }
            }
            Value::Array(list) if !list.is_empty() && dice.roll(5) > 0 => {
                let at = dice.roll(list.len());
                match dice.roll(12) {
                    0 => drop(list.remove(at)),
                    1 => list.push(list[at].clone()),
                    _ => visit(dice, &mut list[at]),
                }
            }
            _ => *value = dice.pick(&hostile),
        }
    }
    let mut bad = good.clone();
    for _ in 0..1 + dice.roll(3) {
        visit(dice, &mut bad);
    }
    bad
}

/// Damages a file in one of both ways.
fn damage(dice: &mut Dice, good: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(good).unwrap_or_default();
    match serde_json::from_str::<Value>(text) {
        Ok(value) if dice.roll(3) > 0 => values(dice, &value).to_string().into_bytes(),
        _ if dice.roll(2) == 0 && text.contains('\n') => {
            let mut lines: Vec<String> = text.lines().map(String::from).collect();
            for _ in 0..1 + dice.roll(3) {
                let at = dice.roll(lines.len());
                if let Ok(value) = serde_json::from_str::<Value>(&lines[at]) {
                    lines[at] = values(dice, &value).to_string();
                }
            }
            lines.join("\n").into_bytes()
        }
        _ => bytes(dice, good),
    }
}

/// What reads an input; an error is as good as a result.
type Reader = fn(&Path);

/// A kind of input: its name, its files, the one that is damaged, its reader.
struct Input {
    name: &'static str,
    dir: PathBuf,
    file: &'static str,
    good: Vec<u8>,
    read: Reader,
}

fn model(dir: &Path) {
    let Ok(config) = load_config(dir) else { return };
    let known = config.num_layers < 100;
    if known {
        let _ = expected_params(&config).len();
    }
}

fn weights(dir: &Path) {
    let Ok(folder) = SafeFolder::open(dir) else { return };
    for name in folder.names() {
        if let Some(view) = folder.get(name) {
            let mut out = vec![0f32; view.len().min(1 << 20)];
            let _ = view.to_f32_into(&mut out);
            let _ = view.first_non_finite();
        }
    }
}

fn text(dir: &Path) {
    let Ok(tokenizer) = Tokenizer::load(dir) else { return };
    let Ok(ids) = tokenizer.encode("Anna has 5 books. é 🙂 <|im_end|>", true) else { return };
    let _ = tokenizer.decode(&ids, false);
    let _ = tokenizer.saved_files();
    let _ = ChatTemplate::of(&tokenizer).map(|template| render(&template));
}

fn render(template: &ChatTemplate) {
    let messages = json!([{ "role": "system", "content": "s" }, { "role": "user", "content": "a" },
                          { "role": "assistant", "content": "b" }]);
    let _ = template.render(&messages, RenderOptions::default());
}

fn template(dir: &Path) {
    let source = std::fs::read(dir.join("chat_template.jinja")).unwrap();
    let source = String::from_utf8_lossy(&source);
    if let Ok(template) = ChatTemplate::new(&source, dir, &serde_json::Map::new()) {
        render(&template);
    }
}

fn adapter(dir: &Path) {
    if let Ok(config) = AdapterConfig::load(dir) {
        let _ = config.excluded();
        let _ = config.to_json();
    }
}

fn rows(dir: &Path) {
    let file = std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
    for on_bad_row in [OnBadRow::Error, OnBadRow::Drop] {
        let options = DataOptions { on_bad_row, ..DataOptions::default() };
        let fields = WantedFields::Known(vec!["text".into()]);
        let Ok(read) = read(std::slice::from_ref(&file), FolderSplit::Train, &options, &fields)
        else {
            continue;
        };
        let (tokenizer, template) = tokenizer_and_template();
        let sft = SftOptions { on_bad_row, ..SftOptions::default() };
        let _ = prepare(&read.rows, &tokenizer, Some(&template), 320, &sft);
        let preference = PreferenceOptions { on_bad_row, ..PreferenceOptions::default() };
        if !read.rows.is_empty() {
            let _ =
                pairs(&read.rows, &tokenizer, Some(&template), 320, PairStyle::Dpo, &preference);
        }
    }
}

fn page(dir: &Path) {
    let _ = report::again(dir);
}

fn inputs(root: &Path) -> Vec<Input> {
    let mut all = Vec::new();
    let mut add =
        |name: &'static str, files: &[(&str, PathBuf)], file: &'static str, read: Reader| {
            let dir = root.join(name);
            std::fs::create_dir_all(&dir).unwrap();
            for (to, from) in files {
                std::fs::copy(from, dir.join(to)).unwrap();
            }
            let good = std::fs::read(dir.join(file)).unwrap();
            all.push(Input { name, dir, file, good, read });
        };
    let part = |name: &'static str| (name, Path::new(MODEL).join(name));
    let tokens = [
        part("tokenizer.json"),
        part("tokenizer_config.json"),
        part("config.json"),
        part("chat_template.jinja"),
    ];
    add("config", &[part("config.json")], "config.json", model);
    add("yarn", &[("config.json", fixture("models/qwen2_yarn/config.json"))], "config.json", model);
    add("weights", &[part("model.safetensors")], "model.safetensors", weights);
    add("tokenizer", &tokens, "tokenizer.json", text);
    add("tokenizer config", &tokens, "tokenizer_config.json", text);
    add("template", &[part("chat_template.jinja")], "chat_template.jinja", template);
    add(
        "adapter",
        &[("adapter_config.json", fixture("peft/lora/adapter_config.json"))],
        "adapter_config.json",
        adapter,
    );
    add("messages", &[("rows.jsonl", fixture("sft/messages.jsonl"))], "rows.jsonl", rows);
    add("pairs", &[("rows.jsonl", fixture("preferences/chat.jsonl"))], "rows.jsonl", rows);
    add("parquet", &[("rows.parquet", fixture("sft/messages.parquet"))], "rows.parquet", rows);
    all
}

/// Reads `n` damaged inputs; what went wrong.
fn attack(inputs: &[Input], n: usize, dice: &mut Dice) -> Vec<String> {
    let mut wrong = Vec::new();
    for i in 0..n {
        let input = &inputs[i % inputs.len()];
        let bad = damage(dice, &input.good);
        std::fs::write(input.dir.join(input.file), &bad).unwrap();
        let timed = || {
            let start = Instant::now();
            let result = catch_unwind(AssertUnwindSafe(|| (input.read)(&input.dir)));
            (result, start.elapsed())
        };
        // A machine that is busy is not the input's fault: what is slow is read once more.
        let (result, took) = match timed() {
            (Ok(()), took) if took > LIMIT => timed(),
            other => other,
        };
        if result.is_err() || took > LIMIT {
            let kept = std::env::temp_dir().join(format!("damage-{}-{i}", input.name));
            let _ = std::fs::write(&kept, &bad);
            let what = if result.is_err() { "panic" } else { "too slow" };
            wrong.push(format!(
                "{} {i}: {what} after {took:?}; the input is {}",
                input.name,
                kept.display()
            ));
        }
    }
    wrong
}

/// A run's folder with both logs.
fn logs(root: &Path) -> Vec<Input> {
    let dir = root.join("run");
    std::fs::create_dir_all(&dir).unwrap();
    let line = |step: u64| json!({ "step": step, "loss": 1.0 / step as f64, "reward": 0.5, "kl": 0.1, "num_tokens": 100 * step });
    let metrics: String = (1..30).map(|step| format!("{}\n", line(step))).collect();
    let completion = |step: u64| {
        json!({ "step": step, "prompt": [{ "role": "user", "content": "q" }], "completion": "a</script>",
                "reward": 1.0, "rewards": { "exact_match": 1.0 }, "advantage": 0.5, "finish_reason": "eos" })
    };
    let completions: String = (1..20).map(|step| format!("{}\n", completion(step))).collect();
    std::fs::write(dir.join("config.toml"), "# temper grpo\nlearning_rate = 1e-5\n").unwrap();
    std::fs::write(dir.join("metrics.jsonl"), &metrics).unwrap();
    std::fs::write(dir.join("completions.jsonl"), &completions).unwrap();
    report::again(&dir).unwrap();
    let input = |name, file: &'static str, good: &str| Input {
        name,
        dir: dir.clone(),
        file,
        good: good.as_bytes().to_vec(),
        read: page as Reader,
    };
    vec![
        input("metrics", "metrics.jsonl", &metrics),
        input("completions", "completions.jsonl", &completions),
    ]
}

fn run(inputs_n: usize, logs_n: usize, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut wrong = attack(&inputs(dir.path()), inputs_n, &mut dice);
    wrong.extend(attack(&logs(dir.path()), logs_n, &mut dice));
    println!("{inputs_n} damaged inputs, {logs_n} damaged logs: {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn damaged_inputs_and_logs_end_in_an_error_or_a_result() {
    run(200, 20, 1);
}

#[test]
#[ignore = "minutes: TEMPER_DAMAGE damaged inputs, 32000 if it is not set"]
fn many_damaged_inputs_and_logs() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let n = number("TEMPER_DAMAGE").unwrap_or(32_000) as usize;
    run(n, n / 40, number("TEMPER_SEED").unwrap_or(2));
}
