//! Supervised fine-tuning from a program: rows of prompts and completions in, a model folder out.
//!
//! `cargo run --example sft` trains the tiny model of the tests in a second; name your own model
//! folder and rows instead.

use temper::{Result, Training};

fn main() -> Result<()> {
    let out = std::env::temp_dir().join("temper-example-sft");
    let finished = Training::new("sft")?
        .option("learning_rate", 1e-3)
        .option("max_length", 64)
        .option("max_steps", 5)
        .option("logging_steps", 1)
        .model("tests/fixtures/sft/model")
        .data(["tests/fixtures/sft/prompt_completion.jsonl"])
        .output(out)
        .overwrite(true)
        .run()?;
    println!("loss {:.3}", finished.summary.loss);
    Ok(())
}
