//! The quickstart's pipeline, much shortened, end to end; its data; its checker.

use std::collections::BTreeSet;
use std::path::Path;

use temper::data::tokenizer::Tokenizer;
use temper::quickstart::data::{self, is_right};
use temper::quickstart::{self, QuickstartOptions, QuickstartOutcome, QuickstartScale};

use crate::support::{cpu, done, json, json_lines};

fn tiny() -> QuickstartScale {
    let keys = |more: &str| {
        let common = "learning_rate=2e-3 per_device_train_batch_size=2 max_length=96 packing=true max_steps=6 logging_steps=2";
        common.split(' ').chain(more.split(' ')).map(str::to_string).collect()
    };
    let short = |text: &str| {
        text.split_whitespace().chain(["logging_steps=1"]).map(str::to_string).collect()
    };
    QuickstartScale {
        vocab: 400,
        hidden: 32,
        intermediate: 64,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        pretraining_rows: 200,
        sft_rows: 100,
        pairs: 16,
        chains: 16,
        held_out: 12,
        pretrain: keys("warmup_steps=2"),
        sft: keys("assistant_only_loss=true"),
        lora: keys("assistant_only_loss=true use_peft=true lora_dropout=0"),
        reward: short("per_device_train_batch_size=4 max_steps=2"),
        dpo: short("per_device_train_batch_size=4 max_steps=2"),
        ppo: short(
            "per_device_train_batch_size=4 num_ppo_epochs=2 max_completion_length=8 max_steps=2",
        ),
        grpo: short(
            "per_device_train_batch_size=8 num_generations=4 max_completion_length=8 max_steps=2 \
             reward_funcs=numeric_match",
        ),
    }
}

fn pipeline(dir: &Path, overwrite: bool) -> temper::error::Result<QuickstartOutcome> {
    let cx = cpu();
    quickstart::run(
        cx,
        &QuickstartOptions { output: dir.to_path_buf(), overwrite, seed: 5, scale: tiny() },
    )
}

#[test]
fn a_short_pipeline_runs_end_to_end_and_the_same_seed_gives_the_same_bits() {
    let tmp = tempfile::tempdir().unwrap();
    let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
    let outcome = pipeline(&a, false).unwrap();
    let steps: Vec<(&str, u64)> = outcome.stages.iter().map(|r| (r.name, r.steps)).collect();
    let rest = [("lora", 6), ("reward", 2), ("dpo", 2), ("ppo", 2), ("grpo", 2)];
    assert_eq!(steps, [&[("pretrained", 6), ("sft", 6)], &rest[..]].concat());
    assert_eq!(
        outcome.scores.iter().map(|s| s.model).collect::<Vec<_>>(),
        ["pretrained", "sft", "lora", "dpo", "ppo", "grpo"]
    );
    assert_eq!((outcome.chain_scores.len(), outcome.judged.len()), (2, 2));
    assert!(std::fs::read_to_string(a.join("report.html")).unwrap().contains("temper quickstart"));
    let text = outcome.to_string();
    assert!(text.contains("exact_match") && text.contains("tokens/s"), "{text}");
    for stage in ["pretrained", "sft"] {
        let dir = a.join(stage);
        for file in [
            "config.json",
            "config.toml",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
        ] {
            assert!(dir.join(file).is_file(), "{stage}/{file}");
        }
        let metrics = json_lines(dir.join("metrics.jsonl"));
        assert_eq!(metrics.len(), 3);
        for key in ["step", "loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_second"]
        {
            assert!(metrics[0][key].is_number(), "{stage}: {key}");
        }
    }
    // The table's measure is that of `temper eval`, under the same name.
    for (file, scores) in
        [("heldout.jsonl", &outcome.scores), ("heldout_chains.jsonl", &outcome.chain_scores)]
    {
        let score = scores.iter().find(|s| s.model == "sft").unwrap();
        let (model, rows, found) = (a.join("sft"), a.join("data").join(file), tmp.path().join("f"));
        let measure = format!("reward_funcs={}", temper::quickstart::MEASURE);
        let out = done(&[
            "eval",
            "--model",
            model.to_str().unwrap(),
            "--data",
            rows.to_str().unwrap(),
            "--output",
            found.to_str().unwrap(),
            "--device",
            "cpu",
            "max_new_tokens=40",
            &measure,
        ]);
        assert!(out.starts_with("exact_match "), "{out}");
        let found = json(&found);
        assert_eq!(found["metrics"]["exact_match"]["value"], score.exact_match());
        assert_eq!(found["metrics"]["exact_match"]["rows"], score.right.len());
    }
    // A number that is met often is one token, a turn's head is three.
    let tokenizer = Tokenizer::load(&a.join("sft")).unwrap();
    assert_eq!(tokenizer.encode("12", false).unwrap().len(), 1);
    assert_eq!(tokenizer.encode("<|im_start|>assistant\n", false).unwrap().len(), 3);

    // A folder that holds a run is refused; --overwrite replaces it by the same bits.
    let refused = pipeline(&a, false).unwrap_err().to_string();
    assert!(refused.contains("--overwrite"), "{refused}");
    let bits = |dir: &Path| {
        let read = |stage: &str| std::fs::read(dir.join(stage)).unwrap();
        [
            "sft/model.safetensors",
            "lora/adapter_model.safetensors",
            "ppo/model.safetensors",
            "grpo/model.safetensors",
        ]
        .map(read)
    };
    let first = bits(&a);
    pipeline(&a, true).unwrap();
    pipeline(&b, false).unwrap();
    assert!(first == bits(&a) && first == bits(&b), "the same seed gave other bits");
    for file in ["pretrain.jsonl", "sft.jsonl", "heldout.jsonl"] {
        assert!(!json_lines(a.join("data").join(file)).is_empty());
        let read = |dir: &Path| std::fs::read(dir.join("data").join(file)).unwrap();
        assert!(read(&a) == read(&b), "{file}");
    }
}

#[test]
fn held_out_questions_are_nowhere_in_the_training_data() {
    for seed in [42, 1, 2] {
        let scale = QuickstartScale::full();
        let texts = data::pretraining(seed, scale.pretraining_rows);
        let training = [
            data::training(seed, scale.sft_rows),
            data::preferences(seed, scale.pairs),
            data::chains(seed, scale.chains),
        ]
        .concat();
        let asked = [
            data::held_out_problems(seed, scale.held_out),
            data::held_out_chains(seed, scale.held_out),
        ]
        .concat();
        assert!(asked.len() >= 200);
        let questions: BTreeSet<&str> = training.iter().map(|p| p.question.as_str()).collect();
        let keys: BTreeSet<&str> = training.iter().map(|p| p.key.as_str()).collect();
        let different: BTreeSet<&str> = asked.iter().map(|p| p.question.as_str()).collect();
        assert_eq!(different.len(), asked.len(), "a question is asked twice");
        let all = texts.join("\n");
        assert!(
            !all.contains('?') && !all.contains("The answer is"),
            "the pretraining text has no questions"
        );
        for p in &asked {
            assert!(p.held_out() && !keys.contains(p.key.as_str()), "{p:?}");
            assert!(
                !questions.contains(p.question.as_str()) && !all.contains(&p.question),
                "{p:?}"
            );
            assert!(
                !all.contains(&p.told) || p.told == p.work,
                "told in the pretraining text: {p:?}"
            );
        }
    }
}

#[test]
fn only_the_last_answer_counts() {
    assert!(is_right("7+5=12. The answer is 12.", "12"));
    assert!(is_right("The answer is 3. The answer is 12.", "12"));
    assert!(!is_right("The answer is 12. The answer is 3.", "12"));
    assert!(!is_right("7+5=12.", "12"));
}
