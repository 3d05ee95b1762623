//! Absurdly large and small numbers in options, arguments, config.json and adapter_config.json.

use std::path::Path;

use serde_json::{Map, Value, json};
use temper::config::{EvalConfig, GenerateConfig, Key, Section, load};
use temper::methods::registry::REGISTRY;
use temper::model::adapter::config::AdapterConfig;
use temper::model::layout::ModelConfig;

use crate::support::{MODEL, fixture, temper};

const WHOLE: [&str; 7] = [
    "0",
    "-1",
    "4611686018427387904",
    "9223372036854775807",
    "-9223372036854775808",
    "1e12",
    "99999999999",
];
const OTHER: [&str; 6] = ["1e308", "-1e308", "nan", "inf", "-inf", "1e-320"];

fn is_numeric(key: &Key) -> bool {
    ["integer", "number"].iter().any(|kind| key.kind.contains(kind))
}

/// Every section's error is its own: none of them may panic, and none may accept a size beyond
/// the bounds.
fn try_all(keys: &[Key], context: &[&str], mut read: impl FnMut(&[String]) -> Result<(), String>) {
    for key in keys.iter().filter(|key| is_numeric(key)) {
        let mut accepted = Vec::new();
        for value in WHOLE.iter().chain(&OTHER) {
            let mut options = vec![format!("{}={value}", key.name)];
            options.extend(context.iter().map(|option| option.to_string()));
            match read(&options) {
                Ok(()) => accepted.push(*value),
                Err(e) => assert!(!e.is_empty(), "{}", key.name),
            }
        }
        for value in ["nan", "inf", "-inf", "1e308", "-1e308"] {
            assert!(!accepted.contains(&value), "{} = {value} is accepted", key.name);
        }
        if key.name != "seed" {
            for value in ["4611686018427387904", "9223372036854775807"] {
                assert!(!accepted.contains(&value), "{} = {value} is accepted", key.name);
            }
        }
    }
}

#[test]
fn no_method_accepts_an_absurd_number_or_panics_on_it() {
    for entry in REGISTRY {
        let keys: Vec<Key> = (entry.run)().sections().iter().flat_map(|s| s.keys()).collect();
        assert!(keys.iter().filter(|key| is_numeric(key)).count() > 20, "{}", entry.name);
        let lora: &[&str] = &["use_peft=true"];
        let reward: &[&str] = &["use_peft=true", "reward_funcs=exact_match"];
        let rewarded = keys.iter().any(|key| key.name == "reward_funcs");
        let context = if rewarded { reward } else { lora };
        try_all(&keys, context, |options| {
            (entry.run)().read(None, options, 0).map(drop).map_err(|e| e.to_string())
        });
    }
}

#[test]
fn generating_and_measuring_have_the_same_bounds() {
    let (mut eval, mut generate) = (EvalConfig::default(), GenerateConfig::default());
    let keys = [eval.keys(), generate.keys()].concat();
    try_all(&keys, &[], |options| {
        load(&mut [&mut eval, &mut generate], None, options).map(drop).map_err(|e| e.to_string())
    });
}

#[test]
fn a_bound_is_named_in_the_error() {
    for (option, bound) in [
        ("gradient_accumulation_steps=9223372036854775807", "must be at most 32768"),
        ("max_length=99999999999", "must be at most 1048576"),
        ("lora_r=1000000", "must be at most 32768"),
        ("lora_alpha=1e308", "must be between -1000000000 and 1000000000"),
        ("max_steps=4611686018427387904", "must be at most 1000000000000"),
    ] {
        let sft = REGISTRY.iter().find(|entry| entry.name == "sft").unwrap();
        let options = [option.to_string(), "use_peft=true".into()];
        let error = (sft.run)().read(None, &options, 0).map(drop).unwrap_err().to_string();
        assert!(error.contains(bound), "{option}: {error}");
    }
}

#[test]
fn arguments_of_commands_have_bounds() {
    let (model, prompt) = (["--model", MODEL], ["--prompt", "a", "max_new_tokens=2"]);
    let data = ["--data", "no-rows.jsonl"];
    for number in ["0", "-1", "4611686018427387904", "9223372036854775807", "1e308", "nan", "inf"] {
        for (command, argument) in [
            (&["generate", model[0], model[1], prompt[0], prompt[1], prompt[2]][..], "--batch"),
            (&["generate", model[0], model[1], prompt[0], prompt[1], prompt[2]], "--step-tokens"),
            (&["eval", model[0], model[1], data[0], data[1]], "--batch"),
            (&["eval", model[0], model[1], data[0], data[1]], "--batch-tokens"),
            (&["score", model[0], model[1], data[0], data[1]], "--batch-tokens"),
            (&["inspect", "memory", model[0], model[1]], "--length"),
            (&["inspect", "memory", model[0], model[1]], "--gpu-gib"),
            (&["inspect", "tape", model[0], model[1]], "--batch"),
            (&["inspect", "tape", model[0], model[1]], "--length"),
            (&["bench", "train"], "--batch"),
            (&["bench", "train"], "--length"),
            (&["bench", "decode"], "--repeat"),
            (&["bench", "train"], "--lora"),
            (&["quickstart"], "--threads"),
        ] {
            let given = format!("{argument}={number}");
            let (code, out, err) = temper(&[command, &[given.as_str()]].concat());
            assert_eq!(code, Some(2), "{command:?} {given}: {out} {err}");
            assert!(err.contains("from 1 to 1048576"), "{command:?} {given}: {err}");
        }
    }
    for command in [
        &["bench", "train", "--batch", "1048576", "--length", "1048576"][..],
        &["bench", "decode", "--batch", "1048576", "--length", "1048576"],
        &["inspect", "tape", "--model", MODEL, "--batch", "1048576", "--length", "1048576"],
    ] {
        let (code, _, err) = temper(command);
        assert!(code == Some(2) && err.contains("67108864 tokens"), "{command:?}: {err}");
    }
    let (code, _, err) = temper(&["bench", "decode", "--length", "1"]);
    assert!(code == Some(2) && err.contains("at least 2"), "{err}");
}

fn object(path: impl AsRef<Path>) -> Map<String, Value> {
    let text = std::fs::read_to_string(path).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn extremes() -> Vec<Value> {
    let numbers = [0i64, -1, 1 << 40, 1 << 62, i64::MAX, i64::MIN];
    let mut all: Vec<Value> = numbers.iter().map(|n| json!(n)).collect();
    all.extend([json!(u64::MAX), json!(1e308), json!(-1e308), json!(1e12), json!(0.5)]);
    all
}

/// The paths of numbers in a JSON object, two levels deep.
fn numbers(map: &Map<String, Value>) -> Vec<(String, Option<String>)> {
    let mut found = Vec::new();
    for (key, value) in map {
        match value {
            Value::Number(_) => found.push((key.clone(), None)),
            Value::Object(inner) => {
                let names = inner.iter().filter(|(_, v)| v.is_number());
                found.extend(names.map(|(name, _)| (key.clone(), Some(name.clone()))));
            }
            _ => {}
        }
    }
    found
}

fn with(
    map: &Map<String, Value>,
    at: &(String, Option<String>),
    value: Value,
) -> Map<String, Value> {
    let mut map = map.clone();
    match &at.1 {
        None => map.insert(at.0.clone(), value),
        Some(inner) => map[&at.0].as_object_mut().unwrap().insert(inner.clone(), value),
    };
    map
}

#[test]
fn the_sizes_of_a_model_are_believed_only_within_bounds() {
    for model in [
        "llama_gqa",
        "llama3_rope",
        "qwen3",
        "qwen2_yarn",
        "mistral_window",
        "gemma3",
        "granite",
        "lfm2_bias",
        "olmo2",
    ] {
        let map = object(fixture("models").join(model).join("config.json"));
        for at in numbers(&map) {
            for value in extremes() {
                let read = ModelConfig::from_json("config.json", with(&map, &at, value.clone()));
                let Ok(config) = read else { continue };
                let specs = temper::model::specs::expected_params(&config);
                let total: u128 = specs.iter().map(|s| s.len() as u128).sum();
                assert!(total <= 1 << 44, "{model}: {at:?} = {value}: {total} parameters");
            }
        }
        let mut huge = map.clone();
        huge.remove("layer_types");
        for key in ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"] {
            huge.insert(key.into(), json!(1 << 28));
        }
        huge.insert("num_hidden_layers".into(), json!(10_000));
        huge.insert("num_key_value_heads".into(), json!(1 << 28));
        let error = ModelConfig::from_json("config.json", huge).unwrap_err().to_string();
        assert!(error.contains("parameters; at most"), "{model}: {error}");
    }
}

#[test]
fn the_numbers_of_an_adapter_are_believed_only_within_bounds() {
    let path = Path::new("adapter_config.json");
    for adapter in ["lora", "lora_patterns", "lora_layers", "ia3", "prompt"] {
        let mut map = object(fixture("peft").join(adapter).join("adapter_config.json"));
        if map["peft_type"] == "LORA" {
            map.insert("rank_pattern".into(), json!({ "q_proj": 4 }));
            map.insert("alpha_pattern".into(), json!({ "q_proj": 4 }));
        }
        for at in numbers(&map) {
            for value in extremes() {
                let read = AdapterConfig::from_json(path, with(&map, &at, value.clone()));
                let key = at.1.as_deref().map_or(at.0.as_str(), |_| at.0.as_str());
                let known =
                    ["r", "rank_pattern", "alpha_pattern", "lora_alpha", "num_virtual_tokens"];
                if known.contains(&key) && value != json!(0.5) {
                    let error = read.map_or_else(|e| e.to_string(), |_| "accepted".into());
                    assert!(error.contains("must be"), "{at:?} = {value}: {error}");
                }
            }
        }
    }
    let map = object(fixture("adapter_hub/seq_bn/adapter_config.json"));
    for value in extremes() {
        let factor = ("config".to_string(), Some("reduction_factor".to_string()));
        let read = AdapterConfig::from_json(path, with(&map, &factor, value.clone()));
        assert_eq!(read.is_err(), value != json!(0.5), "{value}");
    }
}
