//! Completions of a few prompts: open a context and a model, tokenise, generate, decode.
//!
//! `cargo run --example generate`; a first argument names another model folder.

use std::path::PathBuf;
use std::sync::Arc;

use temper::model::open::open_model;
use temper::rollout::sample::Sampling;
use temper::rollout::stop::stop_ids;
use temper::rollout::{EngineOptions, generate};
use temper::{Cx, Result, Silent, Tokenizer, TrainingConfig};

fn main() -> Result<()> {
    let dir = std::env::args().nth(1).unwrap_or("tests/fixtures/sft/model".into());
    let dir = PathBuf::from(dir);
    let mut cx = Cx::open(&TrainingConfig::default(), Arc::new(Silent))?;
    let mut model = open_model(&cx, &dir, None)?;
    let tokenizer = Tokenizer::load(&dir)?;
    let texts = ["Ana has 5 stones", "How many are left?"];
    let prompts: Vec<Vec<u32>> =
        texts.iter().map(|text| tokenizer.encode(text, true)).collect::<Result<_>>()?;
    let stop = stop_ids(&tokenizer, &model.config, &[])?;
    let options = EngineOptions::new(16, Sampling::greedy(), stop, prompts.len());
    let completions = generate(&mut cx, &mut model, &prompts, &options, |_, _| {})?;
    for (text, completion) in texts.iter().zip(&completions) {
        println!("{text:?} -> {:?}", tokenizer.decode(&completion.ids, true)?);
    }
    Ok(())
}
