//! Reinforcement learning with a reward that is a Rust closure: here the share of a completion's
//! characters that are letters.
//!
//! `cargo run --example grpo_custom_reward` takes a few seconds.

use temper::{Result, Training};

fn main() -> Result<()> {
    Training::new("grpo")?
        .option("learning_rate", 1e-3)
        .option("num_generations", 4)
        .option("max_completion_length", 12)
        .option("max_steps", 3)
        .reward("letters", |row| {
            let letters = row.text().chars().filter(|c| c.is_alphabetic()).count();
            Some(letters as f64 / row.text().chars().count().max(1) as f64)
        })
        .model("tests/fixtures/sft/model")
        .data(["tests/fixtures/sft/prompt_completion.jsonl"])
        .output(std::env::temp_dir().join("temper-example-grpo"))
        .overwrite(true)
        .run()
        .map(|finished| println!("{} steps", finished.total_steps))
}
