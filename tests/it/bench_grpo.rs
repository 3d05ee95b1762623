//! `temper bench grpo` at a small size, on the CPU.

use serde_json::Value;

use crate::support::done;

fn bench(more: &[&str]) -> Value {
    let sizes = "bench grpo --device cpu --prompts 2 --completions 4 --prompt-tokens 9 --new-tokens 6 \
                 --batch 4 --repeat 1 --json";
    let args: Vec<&str> = sizes.split_whitespace().chain(more.iter().copied()).collect();
    serde_json::from_str(&done(&args)).unwrap()
}

#[test]
fn a_step_of_grpo_is_timed_by_its_parts() {
    let result = bench(&["--reference"]);
    let number = |name: &str| result[name].as_f64().unwrap_or_else(|| panic!("{name}: {result}"));
    assert_eq!(number("completions"), 8.0);
    // The prompts' shared rows once, then each completion behind its prompt's last token.
    let own = 8.0 * (number("completion_tokens") + 1.0);
    assert_eq!(number("tokens_through_the_update"), 2.0 * 8.0 + own);
    assert_eq!(number("ratio_off_one_max"), 0.0, "the sampler's log-probs are the trainer's");
    let parts = result["parts"].as_array().unwrap();
    let names: Vec<&str> = parts.iter().map(|p| p["part"].as_str().unwrap()).collect();
    assert_eq!(names, ["generate", "score", "reference", "train", "optimizer"]);
    // The parts are the step: what the clock of the step has left is the optimizer's.
    let sum: f64 = parts.iter().map(|p| p["of_step"].as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    for part in parts.iter().filter(|p| p["part"] != "score") {
        let floor = part["roofline_seconds"].as_f64().unwrap();
        assert!(floor > 0.0 && part["seconds"].as_f64().unwrap() > 0.0, "{part}");
    }
    let plain = bench(&["--lora", "4", "--option", "loss_type=grpo"]);
    assert_eq!(plain["parts"][2]["roofline_seconds"], Value::Null, "no reference, no floor");
    let few = plain["trained_parameters"].as_f64().unwrap();
    assert!(few < plain["parameters"].as_f64().unwrap() / 10.0);
}
