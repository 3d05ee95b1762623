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
}
