use super::*;
use crate::model::rope::{RopeKind, rope_table};

fn base(model_type: &str) -> Map<String, Value> {
    let family = families::find(model_type).unwrap();
    let value = json!({
        "model_type": model_type, "architectures": [family.architecture], "vocab_size": 96, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2
    });
    value.as_object().unwrap().clone()
}

fn with(model_type: &str, more: Value) -> Result<ModelConfig> {
    let mut map = base(model_type);
    for (key, value) in more.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    ModelConfig::from_json("config.json", map)
}

fn error(model_type: &str, more: Value) -> String {
    with(model_type, more).unwrap_err().to_string()
}

#[test]
fn absent_keys_mean_what_transformers_means() {
    let llama = with("llama", json!({})).unwrap();
    assert_eq!(
        (llama.head_dim, llama.bos, llama.eos.as_slice(), llama.pad),
        (8, Some(1), [2].as_slice(), None)
    );
    assert_eq!((llama.rms_norm_eps, llama.max_position_embeddings), (1e-6, 2048));
    assert!(!llama.tie_word_embeddings && !llama.qkv_bias && llama.dtype.is_none());
    let qwen2 = with("qwen2", json!({})).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.o_bias && qwen2.bos.is_none() && qwen2.eos.is_empty());
    let qwen3 = with("qwen3", json!({})).unwrap();
    assert!(qwen3.qk_norm.is_some() && !qwen3.qkv_bias && qwen3.head_dim == 128);
    assert_eq!(with("mistral", json!({})).unwrap().sliding_window, [Some(4096); 3]);
    let mut map = base("llama");
    map.remove("num_key_value_heads");
    assert_eq!(ModelConfig::from_json("config.json", map).unwrap().num_kv_heads, 4);
    let mut map = base("llama");
    map.remove("model_type");
    assert_eq!(ModelConfig::from_json("config.json", map).unwrap().family.model_type, "llama");
}

#[test]
fn windows_follow_each_familys_rule() {
    let window = |model_type: &str, more: Value| with(model_type, more).unwrap().sliding_window;
    assert_eq!(window("llama", json!({ "sliding_window": 16 })), [None; 3]);
    assert_eq!(window("mistral", json!({ "sliding_window": null })), [None; 3]);
    assert_eq!(window("mistral", json!({ "sliding_window": 16 })), [Some(16); 3]);
    assert_eq!(window("qwen2", json!({ "sliding_window": 16, "max_window_layers": 1 })), [None; 3]);
    let on = json!({ "sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1 });
    assert_eq!(window("qwen2", on.clone()), [None, Some(16), Some(16)]);
    assert_eq!(window("qwen3", on), [None, Some(16), Some(16)]);
    assert_eq!(
        window("qwen3", json!({ "sliding_window": 16, "use_sliding_window": true })),
        [None; 3]
    );
    let listed = json!({ "sliding_window": 16, "use_sliding_window": true,
                         "layer_types": ["sliding_attention", "full_attention", "full_attention"] });
    assert_eq!(window("qwen3", listed), [Some(16), None, None]);
    let off = json!({ "layer_types": ["sliding_attention", "full_attention", "full_attention"] });
    assert!(error("qwen3", off).contains("use_sliding_window or sliding_window is off"));
    assert!(error("qwen3", json!({ "layer_types": ["full_attention"] })).contains("has 1 entries"));
}

#[test]
fn new_families_have_the_defaults_of_their_config_classes() {
    let smol =
        with("smollm3", json!({ "num_hidden_layers": 5, "num_key_value_heads": 4 })).unwrap();
    assert_eq!(smol.layer_rope, [Some(0), Some(0), Some(0), None, Some(0)]);
    assert_eq!(
        (smol.ropes[0].theta, smol.pad, smol.tie_word_embeddings),
        (2e6, Some(128004), true)
    );
    assert_eq!(smol.sliding_window, [None; 5]);
    let on =
        json!({ "sliding_window": 16, "use_sliding_window": true, "no_rope_layer_interval": 2 });
    assert_eq!(with("smollm3", on).unwrap().sliding_window, [None, Some(16), None]);
    let listed = json!({ "sliding_window": 16, "use_sliding_window": true, "layer_types":
                         ["sliding_attention", "full_attention", "full_attention"] });
    assert_eq!(with("smollm3", listed).unwrap().sliding_window, [Some(16), None, None]);

    let phi = with("phi3", json!({ "partial_rotary_factor": 0.5 })).unwrap();
    assert_eq!(
        (phi.rms_norm_eps, phi.eos.as_slice(), phi.pad),
        (1e-5, [32000].as_slice(), Some(32000))
    );
    assert_eq!((phi.sliding_window.as_slice(), phi.ropes[0].turned(8)), ([None; 3].as_slice(), 4));
    assert_eq!(
        with("phi3", json!({ "sliding_window": 16 })).unwrap().sliding_window,
        [Some(16); 3]
    );
    let specs = super::super::specs::expected_params(&phi);
    let shape = |name: &str| specs.iter().find(|s| s.name.ends_with(name)).map(|s| s.shape.clone());
    assert_eq!(shape("layers.2.self_attn.qkv_proj.weight"), Some(vec![32 + 2 * 16, 32]));
    assert_eq!(shape("layers.0.mlp.gate_up_proj.weight"), Some(vec![96, 32]));
    assert_eq!((shape("q_proj.weight"), shape("up_proj.weight")), (None, Some(vec![96, 32])));

    let types = json!({ "sliding_window": 16, "layer_types":
                        ["sliding_attention", "full_attention", "sliding_attention"] });
    let ministral = with("ministral", types).unwrap();
    assert_eq!(ministral.sliding_window, [Some(16), None, Some(16)]);
    assert_eq!(with("ministral", json!({})).unwrap().sliding_window, [Some(4096); 3]);
    assert_eq!(
        with("ministral", json!({ "sliding_window": null })).unwrap().sliding_window,
        [None; 3]
    );

    let yarn = json!({ "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "mscale": 1.0,
                       "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384 });
    let error = error("ministral3", json!({ "rope_parameters": yarn }));
    assert!(error.contains("llama_4_scaling_beta is missing"), "{error}");
    let mut yarn = yarn;
    yarn["llama_4_scaling_beta"] = json!(0.1);
    let three = with("ministral3", json!({ "rope_parameters": yarn })).unwrap();
    assert_eq!((three.head_dim, three.ropes[0].attention_factor()), (128, 1.0));
    assert!(three.ropes[0].query_scale.is_some());
    // No other family reads this setting.
    assert_eq!(
        with("mistral", json!({ "rope_parameters": yarn })).unwrap().ropes[0].query_scale,
        None
    );
}

#[test]
fn ids_may_be_a_number_a_list_or_null() {
    assert_eq!(with("llama", json!({ "eos_token_id": [5, 6] })).unwrap().eos, [5, 6]);
    assert_eq!(with("llama", json!({ "eos_token_id": 7 })).unwrap().eos, [7]);
    assert!(with("llama", json!({ "eos_token_id": null })).unwrap().eos.is_empty());
    let none = with("llama", json!({ "bos_token_id": null, "pad_token_id": -1 })).unwrap();
    assert_eq!((none.bos, none.pad), (None, None));
    assert!(
        error("llama", json!({ "bos_token_id": "x" }))
            .contains("bos_token_id is \"x\"; it must be a token id")
    );
}

#[test]
fn both_names_of_dtype_and_of_gelu_are_read() {
    assert_eq!(
        with("llama", json!({ "torch_dtype": "bfloat16" })).unwrap().dtype,
        Some(HostDtype::BF16)
    );
    assert_eq!(
        with("llama", json!({ "dtype": "torch.float16" })).unwrap().dtype,
        Some(HostDtype::F16)
    );
    let both = json!({ "dtype": "float32", "torch_dtype": "bfloat16" });
    assert_eq!(with("llama", both).unwrap().dtype, Some(HostDtype::F32));
    for (name, act) in [("gelu", HiddenAct::Gelu), ("gelu_new", HiddenAct::GeluTanh)] {
        assert_eq!(with("llama", json!({ "hidden_act": name })).unwrap().hidden_act, act);
    }
}

#[test]
fn all_problems_of_a_config_come_at_once() {
    let text = error(
        "llama",
        json!({ "hidden_size": "big", "vocab_size": null, "num_hidden_layers": 0, "hidden_act": "relu",
                "rope_scaling": { "rope_type": "dynamic" }, "tie_word_embeddings": 1, "dtype": "int8" }),
    );
    for part in [
        "hidden_size is \"big\"; it must be an integer",
        "vocab_size is missing",
        "num_hidden_layers is 0; it must be",
        "hidden_act is \"relu\"; supported: silu, gelu",
        "rope_type is \"dynamic\"; supported: default, linear, llama3, yarn",
        "tie_word_embeddings is 1; it must be true or false",
        "dtype is \"int8\"",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert_eq!(text.lines().count(), 8, "{text}");
}

#[test]
fn contradictions_and_strangers_are_told_apart() {
    assert!(
        error("llama", json!({ "hidden_size": 33 }))
            .contains("hidden_size 33 is not a multiple of num_att")
    );
    assert!(
        error("llama", json!({ "num_key_value_heads": 3 }))
            .contains("num_attention_heads 4 is not a multiple")
    );
    assert!(error("qwen3", json!({ "head_dim": 15 })).contains("head_dim 15 is not even"));
    assert!(with("qwen3", json!({ "hidden_size": 33 })).is_ok());
    let stranger = error("llama", json!({ "model_type": "gpt2" }));
    assert!(
        stranger.contains("\"gpt2\" is not supported")
            && stranger.contains("qwen3 (Qwen3ForCausalLM)")
    );
    assert!(error("llama", json!({ "model_type": "qwen" })).contains("supported: "));
    let head = error("qwen2", json!({ "architectures": ["Qwen2ForQuestionAnswering"] }));
    assert!(
        head.contains("Qwen2ForQuestionAnswering")
            && head.contains("in this family: Qwen2ForCausalLM"),
        "{head}"
    );
    let empty = ModelConfig::from_json("config.json", Map::new()).unwrap_err().to_string();
    assert!(empty.contains("neither model_type nor architectures"), "{empty}");
    assert!(error("llama", json!({ "quantization_config": { "bits": 4 } })).contains("quantised"));
}

#[test]
fn what_is_saved_changes_only_what_changed() {
    let raw = json!({ "unknown": [1, { "x": null }], "rope_theta": 5e5, "torch_dtype": "float16",
                      "rope_scaling": { "type": "linear", "factor": 2.0 } });
    let mut config = with("llama", raw).unwrap();
    let out = config.to_json(HostDtype::BF16);
    for (key, value) in &config.raw {
        assert!(key == "torch_dtype" || out.get(key) == Some(value), "{key}");
    }
    assert_eq!(out["torch_dtype"], "bfloat16");
    assert_eq!(out["dtype"], "bfloat16");
    assert_eq!(
        out["rope_parameters"],
        json!({ "factor": 2.0, "rope_type": "linear", "rope_theta": 5e5 })
    );
    config.eos = vec![2, 9];
    config.pad = Some(0);
    config.vocab_size = 100;
    let out = config.to_json(HostDtype::BF16);
    assert_eq!((&out["eos_token_id"], &out["pad_token_id"]), (&json!([2, 9]), &json!(0)));
    let mut again = ModelConfig::from_json("config.json", out).unwrap();
    assert_eq!(again.ropes[0].kind, RopeKind::Linear { factor: 2.0 });
    again.raw = config.raw.clone();
    again.dtype = config.dtype;
    assert_eq!(again, config);
}

#[test]
fn new_keys_are_saved_under_old_names_too() {
    let rope = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 32, "rope_theta": 5e5 });
    let config = with("llama", json!({ "rope_parameters": rope })).unwrap();
    let mut out = config.to_json(HostDtype::F32);
    assert_eq!(out["rope_theta"], 5e5);
    assert_eq!(out["rope_scaling"]["rope_type"], "llama3");
    assert!(out["rope_scaling"].get("rope_theta").is_none());
    out.remove("rope_parameters");
    assert_eq!(ModelConfig::from_json("config.json", out).unwrap().ropes, config.ropes);
}

#[test]
fn a_fresh_llama_equals_its_own_json() {
    let fresh = ModelConfig::llama(96, 32, 48, 2, 4, 2, 128, true);
    assert_eq!(ModelConfig::from_json("config.json", fresh.raw.clone()).unwrap(), fresh);
    assert_eq!(fresh.to_json(HostDtype::F32), fresh.raw);
}

#[test]
fn no_value_of_any_key_makes_the_reader_panic() {
    let rope = |kind: &str| {
        json!({ "rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32, "attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1,
                "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": true, "partial_rotary_factor": 1.0 })
    };
    let odd = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(7),
        json!(0.5),
        json!(1e-300),
        json!(1e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!("x"),
        json!([]),
        json!([null, -1, 1e99, "x"]),
        json!({}),
        json!({ "rope_type": {}, "factor": [] }),
    ];
    let (mut good, mut bad) = (0, 0);
    for kind in ["default", "linear", "llama3", "yarn"] {
        for family in families::FAMILIES {
            let mut map = base(family.model_type);
            let more = json!({ "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 8, "use_sliding_window": true,
                "max_window_layers": 1, "layer_types": ["full_attention", "full_attention", "full_attention"],
                "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "attention_bias": true,
                "mlp_bias": true, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "dtype": "float32",
                "torch_dtype": "float32", "rope_theta": 1e4, "initializer_range": 0.02, "attention_dropout": 0.0,
                "quantization_config": null, "original_max_position_embeddings": 32, "rope_scaling": null });
            map.extend(more.as_object().unwrap().clone());
            map.insert("rope_parameters".into(), rope(kind));
            let mut variants = Vec::new();
            for value in &odd {
                for key in map.keys() {
                    let mut changed = map.clone();
                    changed.insert(key.clone(), value.clone());
                    variants.push(changed);
                }
                for key in map["rope_parameters"].as_object().unwrap().keys() {
                    let mut changed = map.clone();
                    changed["rope_parameters"][key.as_str()] = value.clone();
                    variants.push(changed);
                }
            }
            for raw in variants {
                match ModelConfig::from_json("config.json", raw) {
                    Ok(config) => {
                        good += 1;
                        crate::model::specs::expected_params(&config);
                        for rope in &config.ropes {
                            rope_table(rope, config.head_dim, 2, false);
                        }
                        config.to_json(HostDtype::F16);
                    }
                    Err(_) => bad += 1,
                }
            }
        }
    }
    assert!(good > 1000 && bad > 1000, "{good} {bad}");
}
