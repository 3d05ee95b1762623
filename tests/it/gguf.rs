//! GGUF files against the `gguf` package, the golden folders and the Python tokenizers;
//! inconsistent and truncated files.

use std::path::{Path, PathBuf};

use temper::data::tokenizer::Tokenizer;
use temper::gguf::blocks::GgufType;
use temper::gguf::convert::convert;
use temper::gguf::read::GgufFile;
use temper::gguf::tokenizer::tokenizer_of;
use temper::model::batch::Sequence;
use temper::tensor::safetensors::HostDtype;

use crate::support::{cpu, decoder, done, finish, fixture, floats, golden, ids, json, temper};

fn file(name: &str) -> PathBuf {
    fixture("gguf").join(name)
}

/// Log-probs of rows of a golden folder's score.json by the model in `dir`, and the wanted ones.
fn log_probs(dir: &Path, case: &str, longest: usize) -> (Vec<f32>, Vec<f64>) {
    let score = json(golden(case).join("score.json"));
    let rows: Vec<_> = score["rows"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|r| ids(&r["input_ids"]).len() <= longest)
        .collect();
    assert!(!rows.is_empty());
    let mut cx = cpu();
    let model = decoder(&cx, dir, 128);
    let tokens: Vec<Vec<u32>> = rows.iter().map(|r| ids(&r["input_ids"])).collect();
    let sequences: Vec<Sequence> =
        tokens.iter().map(|ids| Sequence { ids, target: None }).collect();
    let got = model.logps(&mut cx, &sequences).unwrap().concat();
    (got, rows.iter().flat_map(|r| floats(&r["logps"])).collect())
}

fn furthest(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

#[test]
fn every_type_widens_to_the_bits_of_the_gguf_package() {
    let file = GgufFile::open(&file("types.gguf")).unwrap();
    let want = json(fixture("gguf/types.json"));
    let mut seen = Vec::new();
    for tensor in file.tensors() {
        assert_eq!(tensor.shape, [2, 512]);
        let bits: Vec<u32> = file.values(tensor).unwrap().iter().map(|v| v.to_bits()).collect();
        assert_eq!(bits, ids(&want[&tensor.name]), "{}", tensor.name);
        seen.push(tensor.dtype.name());
    }
    assert_eq!(seen.join(", "), GgufType::names());
}

#[test]
fn narrowing_gives_the_blocks_of_the_gguf_package() {
    let file = GgufFile::open(&file("types.gguf")).unwrap();
    let values = file.values(file.tensor("F32.weight").unwrap()).unwrap();
    for (dtype, name) in [
        (GgufType::F16, "F16.weight"),
        (GgufType::BF16, "BF16.weight"),
        (GgufType::Q8_0, "Q8_0.weight"),
        (GgufType::Q4_0, "Q4_0.weight"),
    ] {
        let mut back = vec![0f32; values.len()];
        dtype.widen(&dtype.narrow(&values).unwrap(), &mut back);
        assert_eq!(back, file.values(file.tensor(name).unwrap()).unwrap(), "{name}");
    }
    assert_eq!(GgufType::Q4K.narrow(&values), None);
}

#[test]
fn a_converted_golden_model_has_its_log_probs() {
    let dtypes = [
        ("llama_gqa", HostDtype::F32),
        ("llama_tied", HostDtype::BF16),
        ("llama3_rope", HostDtype::BF16),
        ("llama_linear", HostDtype::F16),
        ("llama_biases", HostDtype::BF16),
        ("qwen2", HostDtype::F32),
        ("qwen2_yarn", HostDtype::BF16),
        ("qwen3", HostDtype::BF16),
    ];
    for (case, dtype) in dtypes {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let written = convert(&file(&format!("{case}.gguf")), &out, None).unwrap();
        assert!(written.exact && written.dtype == dtype, "{case}: {:?}", written.dtype);
        let (got, want) = log_probs(&out, case, 70);
        let (own, _) = log_probs(&golden(case), case, 70);
        // The weights have the bits of the folder's, so the log-probs do too.
        assert_eq!(got, own, "{case}");
        assert!(furthest(&got, &want) < 5e-5, "{case}: {}", furthest(&got, &want));
        assert_eq!(Tokenizer::load(&out).unwrap().encode("ab", false).unwrap(), [95]);
    }
}

#[test]
fn a_mistral_file_is_a_llama_without_a_window() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let written = convert(&file("mistral_window.gguf"), &out, None).unwrap();
    assert_eq!(written.config.family.model_type, "llama");
    let (got, want) = log_probs(&out, "mistral_window", 16); // its window
    assert!(furthest(&got, &want) < 5e-5);
}

#[test]
fn tokenizers_of_metadata_give_the_ids_of_python() {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(fixture("gguf/tokenizers")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        let dir = tempfile::tempdir().unwrap();
        let found = tokenizer_of(&GgufFile::open(&path).unwrap(), 1000).unwrap();
        for (name, bytes) in &found.files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let want = json(path.with_extension("json"));
        for (i, text) in want["texts"].as_array().unwrap().iter().enumerate() {
            let text = text.as_str().unwrap();
            for (key, special) in [("ids", false), ("special", true)] {
                let got = tokenizer.encode(text, special).unwrap();
                assert_eq!(got, ids(&want[key][i]), "{name}, {key}: {text:?}");
            }
        }
        assert_eq!(tokenizer.eos_token(), Some("<|im_end|>"));
        names.push(name);
    }
    assert_eq!(names.len(), 9);
}

/// A golden folder with a tokenizer: made from its file.
fn with_tokenizer(dir: &Path, case: &str) -> PathBuf {
    let out = dir.join(case);
    convert(&file(&format!("{case}.gguf")), &out, None).unwrap();
    out
}

#[test]
fn an_exported_model_reads_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["llama3_rope", "llama_biases", "llama_tied", "qwen2_yarn", "qwen3"] {
        let model = with_tokenizer(dir.path(), case);
        let out = dir.path().join(format!("{case}.gguf"));
        let args = ["export", "--gguf", model.to_str().unwrap(), out.to_str().unwrap(), "--type"];
        done(&[&args[..], &["bf16"]].concat()); // their own dtype: nothing is rounded
        let again = dir.path().join(format!("{case}-again"));
        convert(&out, &again, None).unwrap();
        let (a, b) = (log_probs(&model, case, 70).0, log_probs(&again, case, 70).0);
        assert_eq!(a, b, "{case}");
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            assert_eq!(json(model.join(name)), json(again.join(name)), "{case}: {name}");
        }
        // What python wrote and what is written here say the same of the model.
        let (a, b) = (GgufFile::open(&file(&format!("{case}.gguf"))), GgufFile::open(&out));
        let (a, b) = (a.unwrap(), b.unwrap());
        for key in a.keys().filter(|k| k.contains("rope") || k.contains("attention")) {
            assert_eq!(a.number(key).ok(), b.number(key).ok(), "{case}: {key}");
        }
        for tensor in a.tensors() {
            let own = b.tensor(&tensor.name).unwrap();
            let (x, y) = (a.values(tensor).unwrap(), b.values(own).unwrap());
            let off = x.iter().zip(&y).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // rope_freqs comes from another order of f32 steps
            assert!(
                off <= if tensor.name.starts_with("rope") { 1e-5 } else { 0.0 },
                "{}",
                tensor.name
            );
        }
    }
}

#[test]
fn export_measures_each_type_and_replaces_nothing_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("sft/model");
    let out = dir.path().join("m.gguf");
    let (model, shown) = (model.to_str().unwrap(), out.to_str().unwrap());
    for stored in ["f32", "f16", "bf16", "q8_0", "q4_0"] {
        // Random weights of this size leave a log-prob uncertain by more than a trained model's:
        // by about the type's relative step (2^-4 of four bits) times log-probs of up to 100.
        let limit = match stored {
            "f32" => "1e-4",
            "q4_0" => "20",
            _ => "2",
        };
        let args = ["export", "--gguf", model, shown, "--type", stored, "--limit", limit];
        let (code, _, err) = temper(&args);
        assert_eq!(code, Some(0), "{stored}: {err}");
        assert!(err.contains("log-probs differ by"), "{err}");
        let (code, _, err) = temper(&["export", "--gguf", model, shown, "--type", stored]);
        assert_eq!(code, Some(2));
        assert!(err.contains("exists"), "{err}");
        let file = GgufFile::open(&out).unwrap();
        let q = file.tensor("blk.0.attn_q.weight").unwrap();
        assert_eq!(q.dtype.name().to_lowercase(), stored);
        assert_eq!(file.tensor("output_norm.weight").unwrap().dtype, GgufType::F32);
        std::fs::remove_file(&out).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left over");
    }
    let template = std::fs::read_to_string(fixture("sft/model/chat_template.jinja")).unwrap();
    done(&["export", "--gguf", model, shown, "--type", "f32"]);
    let file = GgufFile::open(&out).unwrap();
    assert_eq!(file.text("tokenizer.chat_template").unwrap(), Some(template.as_str()));
    let (code, _, err) =
        temper(&["export", "--gguf", model, shown, "--type", "q5_1", "--overwrite"]);
    assert_eq!(code, Some(2));
    assert!(err.contains("must be f32, f16, bf16, q8_0 or q4_0"), "{err}");
}

#[test]
fn an_adapter_is_merged_before_it_is_exported() {
    let dir = tempfile::tempdir().unwrap();
    let (adapter, merged) = (dir.path().join("adapter"), dir.path().join("merged"));
    let [adapter, merged] = [&adapter, &merged].map(|p| p.to_str().unwrap().to_string());
    let model = fixture("sft/model");
    let model = model.to_str().unwrap();
    let data = fixture("sft/prompt_completion.jsonl");
    done(&[
        "sft",
        "--model",
        model,
        "--data",
        data.to_str().unwrap(),
        "--output",
        &adapter,
        "use_peft=true",
        "max_steps=4",
        "learning_rate=0.01",
    ]);
    done(&["merge", "--model", model, "--adapter", &adapter, "--output", &merged]);
    let [a, b, c] = ["a.gguf", "b.gguf", "c.gguf"].map(|n| dir.path().join(n));
    done(&["export", "--gguf", &merged, a.to_str().unwrap(), "--type", "f32"]);
    done(&["export", "--gguf", &adapter, b.to_str().unwrap(), "--type", "f32"]);
    done(&["export", "--gguf", model, c.to_str().unwrap(), "--type", "f32", "--adapter", &adapter]);
    let [a, b, c] = [a, b, c].map(|p| GgufFile::open(&p).unwrap());
    let base = temper::tensor::safetensors::SafeFolder::open(fixture("sft/model")).unwrap();
    assert!(base.get("model.embed_tokens.weight").is_some());
    for tensor in a.tensors() {
        let want = a.values(tensor).unwrap();
        for other in [&b, &c] {
            assert_eq!(other.values(other.tensor(&tensor.name).unwrap()).unwrap(), want);
        }
    }
}

/// Converts bytes that are no good file; the message.
fn refused(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path().join("x.gguf"), dir.path().join("out"));
    std::fs::write(&path, bytes).unwrap();
    let error = match convert(&path, &out, None) {
        Ok(_) => panic!("converted"),
        Err(e) => e.to_string(),
    };
    assert!(error.contains("x.gguf"), "{error}");
    assert!(!out.join("config.json").exists() && !out.join("model.safetensors").exists());
    error
}

/// `bytes` with those at the first `find` replaced.
fn with(bytes: &[u8], find: &[u8], put: &[u8]) -> Vec<u8> {
    let at = bytes.windows(find.len()).position(|w| w == find).unwrap();
    let mut out = bytes.to_vec();
    out[at..at + put.len()].copy_from_slice(put);
    out
}

#[test]
fn a_lying_gguf_file_is_refused_with_its_place() {
    let good = std::fs::read(file("llama_gqa.gguf")).unwrap();
    let huge = u64::MAX.to_le_bytes();
    let at = |n: usize, put: &[u8]| {
        let mut out = good.clone();
        out[n..n + put.len()].copy_from_slice(put);
        out
    };
    let after = |name: &str, skip: usize, put: &[u8]| {
        let find = [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat();
        let from = good.windows(find.len()).position(|w| w == find).unwrap() + find.len() + skip;
        at(from, put)
    };
    let tensor = "blk.1.attn_q.weight"; // dimensions, 2 x u64, type, offset follow
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "truncated: the magic number"),
        (b"GG".to_vec(), "truncated: the magic number"),
        (at(0, b"GGML"), "is not a GGUF file"),
        (at(4, &1u32.to_le_bytes()), "version 1"),
        (at(4, &3u32.to_be_bytes()), "big-endian"),
        (at(8, &huge), "at byte 8: the number of tensors is 18446744073709551615, but only"),
        (at(16, &(1u64 << 40).to_le_bytes()), "at byte 16: the number of metadata values"),
        (at(24, &huge), "at byte 32: truncated: a text needs 18446744073709551615 bytes"),
        (after("general.architecture", 0, &99u32.to_le_bytes()), "unknown type 99"),
        (after("tokenizer.ggml.tokens", 8, &huge), "the number of items of a list is"),
        (after("tokenizer.ggml.tokens", 4, &77u32.to_le_bytes()), "unknown type 77"),
        (after(tensor, 0, &9u32.to_le_bytes()), "has 9 dimensions"),
        (after(tensor, 4, &0u64.to_le_bytes()), "has a dimension 0"),
        (after(tensor, 12, &(1u64 << 60).to_le_bytes()), "has too many values"),
        (
            after(tensor, 20, &10u32.to_le_bytes()),
            "has the unsupported type 10 (Q2_K); supported: F32, F16",
        ),
        (after(tensor, 20, &12u32.to_le_bytes()), "has rows of 32 values; Q4_K has blocks of 256"),
        (after(tensor, 24, &33u64.to_le_bytes()), "not a multiple of 32"),
        (after(tensor, 24, &(1u64 << 50).to_le_bytes()), "truncated, or a wrong offset"),
        (after(tensor, 24, &(u64::MAX - 31).to_le_bytes()), "truncated, or a wrong offset"),
        (after(tensor, 24, &0u64.to_le_bytes()), "overlaps the bytes of"),
        (with(&good, b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "appears twice"),
        (
            with(&good, b"blk.1.attn_q.weight", b"blk.9.attn_q.weight"),
            "missing: blk.1.attn_q.weight",
        ),
        (with(&good, b"tokenizer.ggml.pre", b"tokenizer.ggml.pro"), "has no tokenizer.ggml.pre"),
        (with(&good, b"gpt-2", b"gpt-9"), "\"gpt-9\", which is not supported"),
        (with(&good, b"llama.block_count", b"llama.block_cuunt"), "has no llama.block_count"),
        (
            with(&good, b"llama.rope.dimension_count", b"llama.rope.dimension_cuunt"),
            "llama.rope.dimension_cuunt",
        ),
        (
            after("general.architecture", 12, b"qwant"),
            "the unsupported architecture \"qwant\"; supported: llama",
        ),
    ];
    for (bytes, want) in cases {
        let error = refused(&bytes);
        assert!(error.contains(want), "{error}\n  lacks {want:?}");
        assert!(!error.contains("model_type"), "{error}");
    }
}

#[test]
fn a_truncated_gguf_file_is_refused_wherever_it_ends() {
    let good = std::fs::read(file("llama_linear.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    // The last bytes are padding.
    for n in (0..good.len() - 64).step_by(37) {
        std::fs::write(&path, &good[..n]).unwrap();
        let error = GgufFile::open(&path).unwrap_err().to_string();
        assert!(
            error.contains("x.gguf") && error.contains("truncated") || error.contains("follow"),
            "{error}"
        );
    }
}

#[test]
fn random_bytes_in_a_gguf_header_never_panic() {
    let good = std::fs::read(file("llama_linear.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    let mut state = 88172645463325252u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    let mut refused = 0;
    for _ in 0..2000 {
        let mut bytes = good.clone();
        for _ in 0..1 + next() % 3 {
            let at = next() % 4000;
            bytes[at] = next() as u8;
        }
        std::fs::write(&path, &bytes).unwrap();
        refused += usize::from(GgufFile::open(&path).is_err());
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn convert_says_what_it_wrote_and_keeps_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (input, shown) = (file("qwen3.gguf"), out.to_str().unwrap());
    let (code, _, err) = temper(&["convert", input.to_str().unwrap(), shown]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("qwen3: 2 layers, 96 tokens"), "{err}");
    assert!(err.contains("written as bfloat16, every value kept"), "{err}");
    let (code, err) =
        finish(&mut crate::support::command(&["convert", input.to_str().unwrap(), shown]));
    assert_eq!(code, Some(2));
    assert!(err.contains("already holds a model (config.json)"), "{err}");
    std::fs::remove_dir_all(&out).unwrap();
    let (code, _, err) = temper(&["convert", input.to_str().unwrap(), shown, "--dtype", "f16"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("written as float16, values rounded"), "{err}");
    let (code, _, err) = temper(&["convert", "no.gguf", dir.path().join("new").to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(err.contains("no.gguf"), "{err}");
}
