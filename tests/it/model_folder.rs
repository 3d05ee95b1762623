//! Model folders against the golden ones of transformers (tests/fixtures/make_models.py), and
//! against bad ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use temper::model::folder::{
    generation_config, load_config, load_weights, tokenizer_files, write_folder,
};
use temper::model::layout::ModelConfig;
use temper::model::rope::RopeKind;
use temper::model::specs::{Role, expected_params};
use temper::ops::rope::NormOver;
use temper::tensor::safetensors::{HostDtype, SafeFolder, TensorSpec, write};

use crate::support::{golden, json};

const CASES: [&str; 24] = [
    "gemma2",
    "gemma3",
    "granite",
    "lfm2",
    "lfm2_bias",
    "llama3_rope",
    "llama_bf16",
    "llama_biases",
    "llama_gqa",
    "llama_linear",
    "llama_sharded",
    "llama_tied",
    "llama_v4",
    "ministral",
    "ministral3",
    "mistral_window",
    "olmo2",
    "phi3",
    "phi3_long",
    "phi4_mini",
    "qwen2",
    "qwen2_yarn",
    "qwen3",
    "smollm3",
];

type Weights = BTreeMap<String, (HostDtype, Vec<usize>, Vec<u8>)>;

fn weights(dir: &Path, config: &ModelConfig) -> temper::error::Result<Weights> {
    let mut all = Weights::new();
    load_weights(dir, config, &mut |spec, view| {
        assert_eq!(spec.shape, view.shape);
        all.insert(spec.name.clone(), (view.dtype, view.shape.to_vec(), view.bytes.to_vec()));
        Ok(())
    })?;
    Ok(all)
}

/// A copy of a single-file fixture whose tensors `change` may edit, add or remove.
fn altered(case: &str, change: impl Fn(&mut Weights)) -> (tempfile::TempDir, ModelConfig) {
    let from = golden(case);
    let mut all = Weights::new();
    let folder = SafeFolder::open(&from).unwrap();
    for name in folder.names() {
        let view = folder.get(name).unwrap();
        all.insert(name.into(), (view.dtype, view.shape.to_vec(), view.bytes.to_vec()));
    }
    change(&mut all);
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let specs: Vec<TensorSpec> = all
        .iter()
        .map(|(name, (dtype, shape, _))| TensorSpec {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
        })
        .collect();
    write(dir.path().join("model.safetensors"), &specs, &[], &mut |_, t| {
        Ok(all[&t.name].2.clone())
    })
    .unwrap();
    let config = ModelConfig::load(dir.path()).unwrap();
    (dir, config)
}

fn load_error(dir: &Path, config: &ModelConfig) -> String {
    weights(dir, config).unwrap_err().to_string()
}

#[test]
fn every_golden_folder_loads_completely() {
    for case in CASES {
        let config = load_config(golden(case)).unwrap();
        let loaded = weights(&golden(case), &config).unwrap();
        let stored: Vec<String> =
            SafeFolder::open(golden(case)).unwrap().names().map(String::from).collect();
        assert_eq!(loaded.keys().cloned().collect::<Vec<_>>(), stored, "{case}");
        assert!(loaded.values().all(|(dtype, _, _)| Some(*dtype) == config.dtype), "{case}");
    }
    let all = std::fs::read_dir(golden(""))
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap());
    let mut all: Vec<String> = all.collect();
    all.sort();
    assert_eq!(all, CASES, "a folder that no test reads");
}

#[test]
fn golden_configs_mean_what_they_were_made_with() {
    let load = |case| load_config(golden(case)).unwrap();
    let llama = load("llama_gqa");
    assert_eq!(
        (llama.vocab_size, llama.hidden_size, llama.num_heads, llama.num_kv_heads),
        (96, 32, 2, 1)
    );
    assert_eq!(
        (llama.head_dim, llama.eos.as_slice(), llama.rms_norm_eps),
        (16, [2].as_slice(), 1e-5)
    );
    assert!(load("llama_tied").tie_word_embeddings && load("qwen2").tie_word_embeddings);
    let biases = load("llama_biases");
    assert!(biases.qkv_bias && biases.o_bias && biases.mlp_bias && load("qwen2").qkv_bias);
    assert_eq!((load("qwen3").head_dim, load("qwen3").qk_norm), (16, Some(NormOver::Head)));
    assert_eq!(load("mistral_window").sliding_window, [Some(16); 2]);
    assert_eq!(load("llama_linear").ropes[0].kind, RopeKind::Linear { factor: 4.0 });
    assert!(matches!(load("qwen2_yarn").ropes[0].kind, RopeKind::Yarn { factor: 4.0, .. }));
    let v4 = load("llama_v4");
    assert_eq!(v4.ropes, load("llama3_rope").ropes);
    assert_eq!(
        (v4.eos.as_slice(), v4.head_dim, v4.dtype),
        ([2, 3].as_slice(), 16, Some(HostDtype::BF16))
    );
}

#[test]
fn scores_cover_rows_of_many_lengths() {
    #[derive(serde::Deserialize)]
    struct Score {
        rows: Vec<Row>,
    }
    #[derive(serde::Deserialize)]
    struct Row {
        input_ids: Vec<usize>,
        logps: Vec<f64>,
    }
    for case in CASES {
        let config = load_config(golden(case)).unwrap();
        let score = json(golden(case).join("score.json"));
        let score: Score = serde_json::from_value(score).unwrap();
        assert_eq!(
            score.rows.iter().map(|r| r.input_ids.len()).collect::<Vec<_>>(),
            [5, 18, 41, 70],
            "{case}"
        );
        for row in score.rows {
            assert_eq!(row.logps.len() + 1, row.input_ids.len());
            assert!(
                row.input_ids.iter().all(|id| *id < config.vocab_size)
                    && row.logps.iter().all(|l| *l < 0.0)
            );
        }
    }
}

#[test]
fn a_folder_written_and_read_again_has_the_same_bits() {
    for case in CASES {
        let from = golden(case);
        let config = load_config(&from).unwrap();
        let before = weights(&from, &config).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        write_folder(&out, &config, &[], None, config.dtype.unwrap(), &mut |spec| {
            Ok(before[&spec.name].2.clone())
        })
        .unwrap();
        let again = load_config(&out).unwrap();
        assert_eq!(weights(&out, &again).unwrap(), before, "{case}");
        let raw = again.raw.clone();
        assert_eq!(ModelConfig { raw: config.raw.clone(), ..again }, config, "{case}");
        for (key, value) in &config.raw {
            assert!(key == "rope_scaling" || raw.get(key) == Some(value), "{case}: {key} changed");
        }
        for key in ["dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters"] {
            assert!(raw.contains_key(key), "{case}: {key}");
        }
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "{case}: something was left beside the folder"
        );
    }
}

#[test]
fn tokenizer_and_generation_files_are_carried_over() {
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("tokenizer.json"), "{ \"odd\" :1}\r\n").unwrap();
    std::fs::write(source.path().join("tokenizer_config.json"), "{}").unwrap();
    std::fs::write(
        source.path().join("generation_config.json"),
        r#"{"top_p":0.9,"eos_token_id":[1,2]}"#,
    )
    .unwrap();
    std::fs::write(source.path().join("README.md"), "x").unwrap();
    let out = tempfile::tempdir().unwrap();
    let config = ModelConfig::llama(96, 32, 48, 2, 2, 1, 128, true);
    let files = tokenizer_files(source.path()).unwrap();
    let generation = generation_config(source.path()).unwrap();
    let mut zeros = |spec: &temper::model::specs::ParamSpec| Ok(vec![0; spec.len() * 4]);
    std::fs::write(out.path().join("metrics.jsonl"), "kept").unwrap();
    write_folder(out.path(), &config, &files, generation.clone(), HostDtype::F32, &mut zeros)
        .unwrap();
    let mut names: Vec<_> =
        std::fs::read_dir(out.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    names.sort();
    let expected = [
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    assert_eq!(std::fs::read(out.path().join("tokenizer.json")).unwrap(), b"{ \"odd\" :1}\r\n");
    assert_eq!(generation_config(out.path()).unwrap(), generation);
    let read = load_config(out.path()).unwrap();
    assert_eq!(read, config);
    assert!(
        weights(out.path(), &read)
            .unwrap()
            .values()
            .all(|(_, _, bytes)| bytes.iter().all(|b| *b == 0))
    );
}

#[test]
fn nan_is_neither_loaded_nor_saved() {
    let (dir, config) = altered("llama_bf16", |all| {
        let bytes = &mut all.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().2;
        bytes[2 * (64 * 3 + 5)..][..2].copy_from_slice(&[0xc0, 0x7f]);
    });
    let error = load_error(dir.path(), &config);
    assert!(
        error
            .contains("model.layers.1.mlp.up_proj.weight is NaN or infinite at [3, 5] (value 197)"),
        "{error}"
    );
    let out = dir.path().join("out");
    let mut infinite =
        |spec: &temper::model::specs::ParamSpec| HostDtype::F16.encode(&vec![1e6; spec.len()]);
    let error = write_folder(&out, &config, &[], None, HostDtype::F16, &mut infinite)
        .unwrap_err()
        .to_string();
    assert!(error.contains("model.embed_tokens.weight is NaN or infinite at [0, 0]"), "{error}");
    assert!(!out.exists() && std::fs::read_dir(dir.path()).unwrap().count() == 2);
}

#[test]
fn everything_that_does_not_fit_is_listed_at_once() {
    let (dir, mut config) = altered("qwen3", |all| {
        all.remove("model.layers.0.self_attn.k_norm.weight");
        let (dtype, shape, bytes) = all["model.norm.weight"].clone();
        all.insert("model.extra.weight".into(), (dtype, shape, bytes));
        all.insert(
            "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
            (HostDtype::F32, vec![1], vec![0; 4]),
        );
    });
    config.intermediate_size = 40;
    let error = load_error(dir.path(), &config);
    for part in [
        "missing: model.layers.0.self_attn.k_norm.weight [16]",
        "shape: model.layers.1.mlp.down_proj.weight is [32, 48], but config.json gives [32, 40]",
        "unexpected: model.extra.weight",
    ] {
        assert!(error.contains(part), "{part}\n{error}");
    }
    assert_eq!(error.lines().count(), 1 + 1 + 6 + 1, "{error}");
}

#[test]
fn a_tied_head_is_taken_as_transformers_takes_it() {
    // stored twice: one parameter
    let (dir, config) = altered("qwen2", |all| {
        let embed = all["model.embed_tokens.weight"].clone();
        all.insert("lm_head.weight".into(), embed);
    });
    assert!(load_config(dir.path()).unwrap().tie_word_embeddings);
    assert!(!weights(dir.path(), &config).unwrap().contains_key("lm_head.weight"));
    // stored under the head's name alone: still the embedding
    let (dir, config) = altered("qwen2", |all| {
        let embed = all.remove("model.embed_tokens.weight").unwrap();
        all.insert("lm_head.weight".into(), embed);
    });
    assert!(weights(dir.path(), &config).unwrap().contains_key("model.embed_tokens.weight"));
    // a head of its own: not tied, whatever config.json says
    let (dir, config) = altered("qwen2", |all| {
        let (dtype, shape, mut bytes) = all["model.embed_tokens.weight"].clone();
        bytes[0] ^= 1;
        all.insert("lm_head.weight".into(), (dtype, shape, bytes));
    });
    assert!(load_error(dir.path(), &config).contains("set tie_word_embeddings to false"));
    let untied = load_config(dir.path()).unwrap();
    assert!(
        !untied.tie_word_embeddings
            && weights(dir.path(), &untied).unwrap().contains_key("lm_head.weight")
    );
    assert_eq!(expected_params(&untied).last().unwrap().role, Role::Head);
    assert_eq!(untied.to_json(HostDtype::F32)["tie_word_embeddings"], false);
}

#[test]
fn bad_folders_are_clear_errors() {
    let dir = tempfile::tempdir().unwrap();
    let load =
        || load_config(dir.path()).and_then(|c| weights(dir.path(), &c)).unwrap_err().to_string();
    assert!(load().contains("has no config.json"));
    for (text, expected) in [
        ("", "is not a JSON object"),
        ("[]", "is not a JSON object"),
        ("{}", "has neither model_type nor architectures"),
        (r#"{"architectures":["GPT2LMHeadModel"]}"#, "supported: llama (LlamaForCausalLM), qwen2"),
        (r#"{"model_type":"llama"}"#, "vocab_size is missing"),
    ] {
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        assert!(load().contains(expected), "{text}: {}", load());
    }
    std::fs::copy(golden("llama_sharded").join("config.json"), dir.path().join("config.json"))
        .unwrap();
    assert!(load().contains("has no weights: looked for model.safetensors and"), "{}", load());
    let index = "model.safetensors.index.json";
    std::fs::copy(golden("llama_sharded").join(index), dir.path().join(index)).unwrap();
    assert!(load().contains("model-00001-of-00002.safetensors: is named in"), "{}", load());
    let whole = std::fs::read(golden("llama_bf16").join("model.safetensors")).unwrap();
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(dir.path().join("model.safetensors"), &whole[..length]).unwrap();
        assert!(load().contains("truncated"), "{length}: {}", load());
    }
    std::fs::write(dir.path().join("model.safetensors"), &whole).unwrap();
    assert!(
        load().contains(
            "shape: model.embed_tokens.weight is [96, 64], but config.json gives [96, 32]"
        ),
        "{}",
        load()
    );
}

/// By hand: `TEMPER_SAVED=/tmp/saved cargo test writes_folders -- --ignored`, then check_saved.py
/// on each.
#[test]
#[ignore = "writes folders for tests/fixtures/check_saved.py"]
fn writes_folders_for_transformers() {
    let root = PathBuf::from(
        std::env::var_os("TEMPER_SAVED").expect("TEMPER_SAVED names a folder to write to"),
    );
    for case in CASES {
        let config = load_config(golden(case)).unwrap();
        let all = weights(&golden(case), &config).unwrap();
        let dtype = config.dtype.unwrap();
        write_folder(root.join(case), &config, &[], None, dtype, &mut |s| {
            Ok(all[&s.name].2.clone())
        })
        .unwrap();
    }
    let fresh = ModelConfig::llama(96, 32, 48, 2, 2, 1, 128, true);
    let mut values =
        |spec: &temper::model::specs::ParamSpec| HostDtype::F32.encode(&vec![0.5; spec.len()]);
    write_folder(root.join("fresh"), &fresh, &[], None, HostDtype::F32, &mut values).unwrap();
}
