//! Runs of PPO with each kind of value model. Gradients and starts are in the module's own tests.

use std::path::Path;

use serde_json::{Value, json};
use temper::Training;
use temper::observer::Silent;

use crate::support::{MODEL, metrics, words, write_rows};

const LORA: &str = "use_peft=true lora_target_modules=all-linear lora_dropout=0 lora_r=4";
const COMMON: &str = "per_device_train_batch_size=4 gradient_accumulation_steps=2 logging_steps=1 \
                      max_completion_length=12 device=cpu reward_funcs=regex:^[a-z]";

fn prompts(dir: &Path) -> String {
    let row = |i: usize| json!({ "prompt": format!("Ana had 21 stones and lost {i}.\n") });
    write_rows(dir.join("prompts.jsonl"), &(1..17).map(row).collect::<Vec<_>>())
}

fn ppo(dir: &Path, out: &Path, keys: &str, resume: bool) -> temper::Result<Vec<Value>> {
    let run = Training::new("ppo")?.options(words(&format!("{COMMON} {keys}"))).model(MODEL);
    run.data([prompts(dir)]).output(out).observer(Silent).resume(resume).run()?;
    Ok(metrics(out))
}

#[test]
fn ppo_of_every_kind_of_critic_resumes_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, keys) in [
        ("lora", format!("{LORA} value_model=lora")),
        ("dora", format!("{LORA} use_dora=true value_model=lora value_lora_r=2")),
        ("qlora", format!("{LORA} load_in_4bit=true value_model=lora optim=adamw_8bit")),
        ("qlora own", format!("{LORA} load_in_8bit=true value_model=own")),
        ("lora shared", format!("{LORA} value_model=shared")),
        ("ia3", "use_peft=true peft_type=ia3 value_model=lora value_lora_r=3".into()),
    ] {
        // A generation serves two steps, so step 3 is in the middle of one.
        let keys = format!("{keys} num_ppo_epochs=2 max_steps=6 save_steps=3 learning_rate=1e-2");
        let (whole, part) = (dir.path().join(name), dir.path().join(format!("{name} resumed")));
        let log = ppo(dir.path(), &whole, &keys, false).unwrap();
        assert_eq!(log.len(), 6, "{name}");
        std::fs::create_dir_all(part.join("checkpoint-3")).unwrap();
        for file in ["config.toml", "metrics.jsonl", "completions.jsonl"] {
            std::fs::copy(whole.join(file), part.join(file)).unwrap();
        }
        for file in std::fs::read_dir(whole.join("checkpoint-3")).unwrap() {
            let file = file.unwrap();
            let to = part.join("checkpoint-3").join(file.file_name());
            std::fs::copy(file.path(), to).unwrap();
        }
        let again = ppo(dir.path(), &part, &keys, true).unwrap();
        for file in ["adapter_model.safetensors", "completions.jsonl"] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(&whole) == read(&part), "{name}: {file} differs after a resume");
        }
        for field in ["loss/value_avg", "val/grad_norm", "val/clipfrac_avg"] {
            let of = |log: &[Value]| log.iter().map(|l| l[field].clone()).collect::<Vec<_>>();
            assert_eq!(of(&again), of(&log), "{name}: {field}");
        }
        // The sampler's log-probs are the trainer's in the first pass over a generation.
        for i in [0, 2, 4] {
            let of = |field: &str| log[i][field].as_f64().unwrap();
            assert!(of("val/grad_norm") > 0.0, "{name}");
            assert!(of("objective/kl").is_finite(), "{name}");
        }
        assert_eq!(log[0]["objective/kl"].as_f64(), Some(0.0), "{name}: the reference is the base");
    }
}

#[test]
fn a_lora_critic_learns_its_returns() {
    let dir = tempfile::tempdir().unwrap();
    let keys = format!(
        "{LORA} value_model=lora num_ppo_epochs=2 kl_coef=0.01 max_steps=80 save_strategy=no \
         learning_rate=1e-2 temperature=1"
    );
    let log = ppo(dir.path(), &dir.path().join("out"), &keys, false).unwrap();
    let mean = |lines: &[Value], field: &str| {
        let values: Vec<f64> = lines.iter().filter_map(|l| l[field].as_f64()).collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    let value = |lines: &[Value]| mean(lines, "loss/value_avg");
    let (first, last) = (value(&log[..4]), value(&log[70..]));
    println!("value loss {first:.4} -> {last:.4}");
    assert!(last < 0.5 * first, "{first} -> {last}");
    let reward = |lines: &[Value]| mean(lines, "reward");
    let (first, last) = (reward(&log[..6]), reward(&log[68..]));
    println!("reward {first:.3} -> {last:.3}");
    assert!(last > first, "{first} -> {last}");
}

#[test]
fn a_lora_critic_needs_a_base_that_stays() {
    let dir = tempfile::tempdir().unwrap();
    for (keys, said) in [
        ("value_model=lora", "set use_peft=true"),
        (
            "use_peft=true peft_type=prompt_tuning value_model=lora",
            "this method takes no prompt tuning",
        ),
        ("value_lora_r=0 value_model=lora use_peft=true", "at least 1"),
    ] {
        let out = dir.path().join("refused");
        let error = ppo(dir.path(), &out, &format!("{keys} max_steps=1"), false).err().unwrap();
        assert!(error.to_string().contains(said), "{keys}: {error}");
        let _ = std::fs::remove_dir_all(&out);
    }
}
