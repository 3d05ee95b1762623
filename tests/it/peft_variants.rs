//! Adapters of newer PEFT versions: unsupported variants of LoRA are refused instead of being read
//! as plain LoRA.

use serde_json::{Value, json};
use temper::model::adapter::config::AdapterConfig;

use crate::support::{fixture, json as read};

#[test]
fn variants_of_lora_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    let plain = read(fixture("peft/lora/adapter_config.json"));
    let with = |key: &str, value: Value| {
        let mut config = plain.clone();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        AdapterConfig::load(dir.path())
    };
    for (key, value) in [
        ("alora_invocation_tokens", json!([5, 6])),
        ("arrow_config", json!({ "top_k": 3 })),
        ("kasa_config", json!({ "beta": 1e-4 })),
        ("monteclora_config", json!({ "num_samples": 4 })),
        ("velora_config", json!({ "num_groups": 64 })),
        ("layer_replication", json!([[0, 2]])),
    ] {
        assert!(with(key, Value::Null).is_ok(), "{key}"); // as PEFT 0.21 writes them
        let error = with(key, value).unwrap_err().to_string();
        assert!(error.contains(&format!("{key} is set; it is not supported here")), "{error}");
    }
    // PEFT reads layers_pattern only with layers_to_transform.
    assert!(with("layers_pattern", json!("blocks")).is_ok());
    for (pattern, ok) in [(json!("layers"), true), (json!(["layers"]), true), (json!("h"), false)] {
        let mut config = plain.clone();
        (config["layers_to_transform"], config["layers_pattern"]) = (json!([0]), pattern);
        std::fs::write(&path, config.to_string()).unwrap();
        let read = AdapterConfig::load(dir.path());
        match ok {
            true => assert!(read.is_ok()),
            false => assert!(read.unwrap_err().to_string().contains("layers_pattern is \"h\"")),
        }
    }
    let ia3 = json!({ "peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": [], "fan_in_fan_out": true });
    std::fs::write(&path, ia3.to_string()).unwrap();
    let error = AdapterConfig::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("fan_in_fan_out = true"), "{error}");
}
