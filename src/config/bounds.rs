//! The largest and the smallest number that an option may be. Layer 1.
//!
//! Invariant: a number that passes can be cast to f32, and multiplied by the other factors of a
//! batch, without overflow; so this check comes before the rules of any section.

use toml::Value as Toml;

/// Rows, generations, repetitions: several of them are multiplied, and held in memory together.
const FACTOR: i64 = 1 << 15;
/// Tokens of a row, ranks, layers, and other counts.
const COUNT: i64 = 1 << 20;
/// Steps and rows of a whole run.
const STEPS: i64 = 1_000_000_000_000;
const BYTES: i64 = 1 << 40;
const NUMBER: f64 = 1e9;

const FACTORS: [&str; 13] = [
    "lora_r",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "precompute_ref_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "num_ppo_epochs",
    "num_mini_batches",
    "dynamic_sampling",
    "max_sequences",
    "n",
];

/// What is wrong with the number, or one of the numbers, that the option is set to.
pub(super) fn problem(name: &str, kind: &str, value: &Toml) -> Option<String> {
    if name == "seed" {
        return None; // any number is fine
    }
    let most = match name {
        name if FACTORS.contains(&name) => FACTOR,
        name if name.ends_with("_bytes") => BYTES,
        "max_steps" => STEPS,
        _ if kind.contains("share") => STEPS,
        _ => COUNT,
    };
    let outside = outside(value, most)?;
    Some(format!("{name} = {value}: {outside}"))
}

fn outside(value: &Toml, most: i64) -> Option<String> {
    match value {
        Toml::Integer(i) if *i > most => Some(format!("must be at most {most}")),
        Toml::Float(f) if f.abs() > NUMBER => {
            Some(format!("must be between -{NUMBER} and {NUMBER}"))
        }
        Toml::Array(items) => items.iter().find_map(|item| outside(item, most)),
        _ => None,
    }
}
