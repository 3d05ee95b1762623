//! Quantised bases without training, and as policies of online RL.

use serde_json::{Value, json};
use temper::device::DType;
use temper::model::batch::Sequence;
use temper::model::decoder::Decoder;
use temper::ops::quant::Scheme;

use crate::support::{MODEL, bits, cpu_in, done, ids, json_lines, metrics, words, write_rows};

fn singles(list: &Value) -> Vec<f32> {
    list.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

#[test]
fn quantised_models_generate_and_score_with_the_trainers_bits() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = json!({ "prompt": "Ana had 21 stones and lost 2. How many are left?\n" });
    let data = write_rows(dir.path().join("rows.jsonl"), &[prompt]);
    let out = dir.path().join("out.jsonl");
    let mut all = Vec::new();
    for (flag, scheme) in [
        (None, None),
        (Some("--load-in-4bit"), Some(Scheme::Nf4 { double: false })),
        (Some("--load-in-8bit"), Some(Scheme::Int8)),
    ] {
        let command = |words: &str| {
            let text = words.to_string();
            let mut args: Vec<&str> = text.split_whitespace().collect();
            args.extend(["--model", MODEL, "--device", "cpu", "--output", out.to_str().unwrap()]);
            args.extend(flag);
            done(&args);
            json_lines(&out)
        };
        let made =
            command(&format!("generate --data {data} max_new_tokens=12 temperature=1 seed=3"));
        let completion = ids(&made[0]["completion_ids"]);
        let logps = singles(&made[0]["logps"]);
        assert_eq!(completion.len(), logps.len());
        // The same tokens through the trainer's forward over a packed batch.
        let mut cx = cpu_in(DType::F32);
        let model = Decoder::folder(MODEL).unwrap().storage(scheme).positions(128);
        let model = model.build(&cx).unwrap();
        let tokenizer = crate::support::tokenizer();
        let prompt = tokenizer.encode(made[0]["prompt"].as_str().unwrap(), true).unwrap();
        let whole = [prompt.clone(), completion.clone()].concat();
        let trained = model.logps(&mut cx, &[Sequence { ids: &whole, target: None }]).unwrap();
        assert_eq!(bits(&trained[0][prompt.len() - 1..]), bits(&logps), "{flag:?}: generate");
        // And through `temper score`.
        let row = write_rows(dir.path().join("whole.jsonl"), &[json!({ "input_ids": whole })]);
        let scored = command(&format!("score --data {row}"));
        assert_eq!(bits(&singles(&scored[0]["logps"])), bits(&trained[0]), "{flag:?}: score");
        all.push(logps);
    }
    assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2], "each storage is another");
}

#[test]
fn a_quantised_base_is_a_policy_of_online_rl() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize| json!({ "prompt": format!("Ana had 21 stones and lost {i}.\n") });
    let data = write_rows(dir.path().join("rows.jsonl"), &(1..9).map(row).collect::<Vec<_>>());
    for storage in ["load_in_4bit=true", "load_in_8bit=true"] {
        let out = dir.path().join(storage);
        let options = format!(
            "{storage} use_peft=true lora_target_modules=all-linear lora_dropout=0 max_steps=3 \
             num_generations=4 per_device_train_batch_size=8 gradient_accumulation_steps=1 \
             learning_rate=1e-2 max_completion_length=12 beta=0.1 logging_steps=1 device=cpu \
             reward_funcs=regex:^[a-z]"
        );
        temper::Training::new("grpo")
            .unwrap()
            .options(words(&options))
            .model(MODEL)
            .data([&data])
            .output(&out)
            .observer(temper::observer::Silent)
            .run()
            .unwrap();
        let log = metrics(&out);
        let of = |i: usize, name: &str| log[i][name].as_f64().unwrap();
        assert_eq!(log.len(), 3, "{storage}");
        // The sampler reads the same codes by the same products as the trainer, and the reference
        // is the base without the adapter.
        assert!((0..3).all(|i| of(i, "sampling/ratio_off_one_max") == 0.0), "{storage}: {log:?}");
        assert_eq!(of(0, "kl"), 0.0, "{storage}");
        assert!(of(1, "kl") > 0.0, "{storage}: the policy has moved");
    }
}

/// Every method that generates, over a base of each storage: at its first step a policy is its
/// reference and its own sampler, to the bit.
#[test]
fn every_online_method_takes_a_quantised_base() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize| {
        json!({
            "prompt": format!("Ana had 21 stones and lost {i}.\n"),
            "completion": format!("21 - {i} = {}.", 21 - i),
        })
    };
    let data = write_rows(dir.path().join("rows.jsonl"), &(1..9).map(row).collect::<Vec<_>>());
    let length = "max_completion_length=12";
    let teacher = format!("teacher_model_name_or_path={MODEL}");
    let group = format!("{length} num_generations=4");
    let methods = [
        ("grpo", format!("{group} beta=0.1")),
        ("rloo", format!("{group} beta=0.1")),
        ("reinforce", format!("{group} beta=0.1")),
        ("ppo", format!("{length} num_ppo_epochs=1")),
        ("ppo", format!("{length} num_ppo_epochs=1 value_model=lora")),
        ("ppo", format!("{length} num_ppo_epochs=1 value_model=shared")),
        ("online-dpo", "max_new_tokens=12".into()),
        ("gkd", format!("max_new_tokens=12 {teacher} lmbda=1")),
        ("on-policy-distill", format!("max_completion_length=12 {teacher}")),
    ];
    for storage in ["load_in_4bit=true use_bnb_nested_quant=true", "load_in_8bit=true"] {
        for (i, (method, keys)) in methods.iter().enumerate() {
            let out = dir.path().join(format!("{storage}{i}"));
            let options = format!(
                "{storage} use_peft=true lora_target_modules=all-linear lora_dropout=0 \
                 max_steps=3 per_device_train_batch_size=8 gradient_accumulation_steps=1 \
                 learning_rate=1e-2 logging_steps=1 save_strategy=no device=cpu {keys}"
            );
            let run = temper::Training::new(method).unwrap().options(words(&options));
            let mut run = run.model(MODEL).data([&data]).output(&out);
            if !keys.contains("teacher") {
                // Completions differ in it, so that every step learns.
                run =
                    run.reward("digits", |row| Some(f64::from(row.ids().iter().sum::<u32>() % 97)));
            }
            run.observer(temper::observer::Silent).run().unwrap();
            let log = metrics(&out);
            assert_eq!(log.len(), 3, "{method}");
            let of = |i: usize, name: &str| {
                let value = log[i][name].as_f64();
                value.unwrap_or_else(|| panic!("{method} has no {name}: {:?}", log[i]))
            };
            for i in 0..3 {
                assert!(of(i, "loss").is_finite() && of(i, "grad_norm").is_finite(), "{method}");
                match *method {
                    // One step a generation: every ratio is of the same weights.
                    "grpo" | "rloo" | "reinforce" => {
                        assert_eq!(of(i, "sampling/ratio_off_one_max"), 0.0, "{method} {storage}");
                    }
                    "ppo" => {
                        assert_eq!(of(i, "val/ratio"), 1.0, "{method} {storage}");
                        assert_eq!(of(i, "val/ratio_var"), 0.0, "{method} {storage}");
                    }
                    _ => {}
                }
            }
            // The sampler's log-probs less those of the reference's own forward.
            match *method {
                "ppo" | "online-dpo" => assert_eq!(of(0, "objective/kl"), 0.0, "{method}"),
                "grpo" => assert_eq!(of(0, "kl"), 0.0, "{method}"),
                _ => {}
            }
            assert!((0..3).any(|i| of(i, "grad_norm") > 0.0), "{method} learns: {log:?}");
        }
    }
}
