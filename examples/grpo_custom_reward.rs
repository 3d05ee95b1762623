//! Reinforcement learning with a reward that is a Rust closure: here completions of letters and
//! spaces are good, and the more so the shorter.
//!
//! `cargo run --example grpo_custom_reward` takes a few seconds.

use temper::{Result, Training};

fn main() -> Result<()> {
    let letters = |text: &str| text.chars().all(|c| c.is_alphabetic() || c == ' ');
    Training::new("grpo")?
        .option("learning_rate", 1e-3)
        .option("num_generations", 4)
        .option("max_completion_length", 12)
        .option("max_steps", 3)
        .option("logging_steps", 1)
        .reward("letters", move |row| Some(f64::from(letters(&row.text()))))
        .reward("short", |row| Some(-0.1 * row.ids().len() as f64))
        .model("tests/fixtures/sft/model")
        .data(["tests/fixtures/sft/prompt_completion.jsonl"])
        .output(std::env::temp_dir().join("temper-example-grpo"))
        .overwrite(true)
        .run()
        .map(|finished| println!("{} steps", finished.total_steps))
}
