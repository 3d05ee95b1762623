//! GGUF files of families whose blocks differ from Llama's: files in the layout of llama.cpp's
//! converter (tests/fixtures/make_gguf.py), files of our own, and models that no GGUF file can
//! hold.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use temper::gguf::convert::convert;
use temper::gguf::read::GgufFile;
use temper::model::batch::Sequence;
use temper::tensor::safetensors::{HostDtype, SafeFolder};

use crate::support::{cpu, decoder, done, fixture, floats, golden, ids, json as read, temper};

/// Golden folders, by family.
const CASES: [&str; 10] = [
    "granite",
    "olmo2",
    "gemma2",
    "gemma3",
    "smollm3",
    "phi3",
    "phi3_long",
    "phi4_mini",
    "ministral3",
    "lfm2",
];

fn file(case: &str) -> PathBuf {
    fixture("gguf").join(format!("{case}.gguf"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Log-probs of the rows of a golden folder, of `longest` tokens at most, by the model in `dir`, and
/// those of transformers.
fn log_probs(dir: &Path, case: &str, longest: usize) -> (Vec<f32>, Vec<f64>) {
    let score = read(golden(case).join("score.json"));
    let rows = score["rows"].as_array().unwrap();
    // With the settings that the file's architecture has.
    let changed = fixture("gguf").join(format!("{case}.json"));
    let changed = changed.exists().then(|| read(changed));
    let wanted = |i: usize| match &changed {
        Some(changed) => floats(&changed["logps"][i]),
        None => floats(&rows[i]["logps"]),
    };
    let tokens: Vec<Vec<u32>> = rows.iter().map(|r| ids(&r["input_ids"])).collect();
    let chosen: Vec<usize> = (0..rows.len()).filter(|i| tokens[*i].len() <= longest).collect();
    let mut cx = cpu();
    let model = decoder(&cx, dir, 128);
    let sequences: Vec<Sequence> =
        chosen.iter().map(|i| Sequence { ids: &tokens[*i], target: None }).collect();
    let got = model.logps(&mut cx, &sequences).unwrap().concat();
    (got, chosen.into_iter().flat_map(wanted).collect())
}

fn furthest(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

/// Every tensor of two folders has the same bytes.
fn same_weights(a: &Path, b: &Path, case: &str) {
    let [x, y] = [a, b].map(|dir| SafeFolder::open(dir).unwrap());
    let names = |folder: &SafeFolder| folder.names().map(String::from).collect::<Vec<_>>();
    assert_eq!(names(&x), names(&y), "{case}");
    for name in names(&x) {
        assert_eq!(x.get(&name).unwrap().bytes, y.get(&name).unwrap().bytes, "{case}: {name}");
    }
}

#[test]
fn a_file_of_each_family_is_the_golden_model() {
    let dir = tempfile::tempdir().unwrap();
    for case in CASES {
        let out = dir.path().join(case);
        let written = convert(&file(case), &out, None).unwrap();
        assert!(written.exact && written.dtype == HostDtype::BF16, "{case}: {:?}", written.dtype);
        same_weights(&golden(case), &out, case);
        let (got, want) = log_probs(&out, case, 70);
        assert!(furthest(&got, &want) < 5e-5, "{case}: {}", furthest(&got, &want));
    }
}

#[test]
fn an_exported_family_reads_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for case in CASES {
        let model = dir.path().join(case);
        convert(&file(case), &model, None).unwrap();
        for stored in ["bf16", "f32"] {
            let out = dir.path().join(format!("{case}-{stored}.gguf"));
            done(&["export", "--gguf", text(&model), text(&out), "--type", stored]);
            let again = dir.path().join(format!("{case}-{stored}"));
            convert(&out, &again, Some(HostDtype::BF16)).unwrap();
            same_weights(&model, &again, case);
            for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
                assert_eq!(read(model.join(name)), read(again.join(name)), "{case}: {name}");
            }
        }
        // What python wrote and what is written here say the same.
        let out = dir.path().join(format!("{case}-bf16.gguf"));
        let [a, b] = [file(case), out].map(|path| GgufFile::open(&path).unwrap());
        for key in a.keys().filter(|k| !k.starts_with("tokenizer") && !k.starts_with("general")) {
            let same = match a.text(key) {
                Ok(text) => b.text(key).ok() == Some(text),
                Err(_) => b.number(key).ok() == a.number(key).ok(),
            };
            assert!(same, "{case}: {key} {:?} {:?}", a.get(key), b.get(key));
        }
        for tensor in a.tensors() {
            let own = b.tensor(&tensor.name).unwrap();
            assert_eq!(tensor.dtype, own.dtype, "{case}: {}", tensor.name);
            assert_eq!(
                a.values(tensor).unwrap(),
                b.values(own).unwrap(),
                "{case}: {}",
                tensor.name
            );
        }
        assert_eq!(a.tensors().len(), b.tensors().len(), "{case}");
    }
}

/// The golden folder, with the tokenizer of its file and with other settings.
fn folder(dir: &Path, case: &str, settings: &Value) -> PathBuf {
    let out = dir.join("model");
    let _ = std::fs::remove_dir_all(&out);
    // ministral and ministral3 have one vocabulary.
    let from = if case == "ministral" { "ministral3" } else { case };
    convert(&file(from), &out, None).unwrap();
    let mut config = read(golden(case).join("config.json"));
    for (key, value) in settings.as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(out.join("config.json"), config.to_string()).unwrap();
    std::fs::copy(golden(case).join("model.safetensors"), out.join("model.safetensors")).unwrap();
    out
}

#[test]
fn what_an_architecture_fixes_otherwise_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("x.gguf");
    for (case, settings, want) in [
        ("gemma2", json!({}), "query_pre_attn_scalar is 24, but there it is 16"),
        ("gemma3", json!({}), "query_pre_attn_scalar is 24, but there it is 16"),
        ("smollm3", json!({}), "with rope are [1, 0, 1, 0], but there they are [1, 1, 1, 0]"),
        (
            "gemma2",
            json!({ "query_pre_attn_scalar": 16, "hidden_activation": "gelu" }),
            "hidden_activation is gelu, but there it is gelu_pytorch_tanh",
        ),
        (
            "gemma2",
            json!({ "query_pre_attn_scalar": 16, "attn_logit_softcapping": null }),
            "attn_logit_softcapping is null",
        ),
        (
            "gemma3",
            json!({ "query_pre_attn_scalar": 16, "layer_types": [
                "full_attention", "sliding_attention", "full_attention", "full_attention",
            ] }),
            "at no fixed period",
        ),
        (
            "ministral3",
            json!({ "rope_parameters": {
                "rope_theta": 1e6, "rope_type": "default", "llama_4_scaling_beta": 0.5,
            } }),
            "q is scaled by its position, and the rope is not yarn",
        ),
    ] {
        let model = folder(dir.path(), case, &settings);
        let args = ["export", "--gguf", text(&model), text(&out), "--type", "bf16"];
        let (code, _, err) = temper(&args);
        assert_eq!(code, Some(1), "{case}: {err}");
        assert!(err.contains(want), "{err}\n  lacks {want:?}");
        assert!(!out.exists());
    }
}

#[test]
fn a_ministral_file_is_a_llama_without_windows() {
    let dir = tempfile::tempdir().unwrap();
    let model = folder(dir.path(), "ministral", &json!({}));
    let [out, again] = ["m.gguf", "again"].map(|name| dir.path().join(name));
    let args = ["export", "--gguf", text(&model), text(&out), "--type", "bf16"];
    let (code, _, err) = temper(&args);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("texts of more than 16 tokens will give different results"), "{err}");
    let written = convert(&out, &again, None).unwrap();
    assert_eq!(written.config.family.model_type, "llama");
    let (got, want) = log_probs(&again, "ministral", 16); // its window
    assert!(furthest(&got, &want) < 5e-5);
}
