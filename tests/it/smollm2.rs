//! SmolLM2-135M-Instruct from its GGUF file: ids and log-probs against a forward in f64 that shares
//! no code with temper. It runs if TEMPER_SMOLLM2 names the file or a folder made from it.

use std::path::PathBuf;

use temper::data::tokenizer::Tokenizer;
use temper::gguf::convert::convert;
use temper::model::batch::Sequence;
use temper::model::layout::ModelConfig;

use crate::support::{cpu, decoder, fixture, floats, ids, json};

#[test]
fn smollm2_has_the_golden_ids_and_log_probs() {
    let Some(given) = std::env::var_os("TEMPER_SMOLLM2").map(PathBuf::from) else {
        println!(
            "skipped: set TEMPER_SMOLLM2 to SmolLM2-135M-Instruct.Q4_1.gguf, or to the folder made of it; \
             .ci/real_model.sh does both"
        );
        return;
    };
    let made = tempfile::tempdir().unwrap();
    let dir = match given.is_dir() {
        true => given,
        false => {
            convert(&given, made.path(), None).unwrap();
            made.path().to_path_buf()
        }
    };
    let golden = json(fixture("smollm2.json"));
    let config = ModelConfig::load(&dir).unwrap();
    assert!(config.tie_word_embeddings && config.num_layers == 30);
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let mut cx = cpu();
    let model = decoder(&cx, &dir, 128);
    assert_eq!(model.params.count() as u64, golden["parameters"].as_u64().unwrap());
    let mut off = 0f64;
    for row in golden["rows"].as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        let tokens = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokens, ids(&row["input_ids"]), "{text:?}");
        let sequence = [Sequence { ids: &tokens, target: None }];
        let got = model.logps(&mut cx, &sequence).unwrap().concat();
        let want = floats(&row["logps"]);
        assert_eq!(got.len(), want.len());
        let far = got.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs());
        off = far.fold(off, f64::max);
    }
    println!("the largest difference of a log-prob is {off:.1e}");
    // f32 through 30 layers against f64; 9.4e-6 was seen elsewhere.
    assert!(off < 5e-5, "{off}");
}
