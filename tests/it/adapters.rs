//! Adapter tests beyond PEFT's losses: bottleneck adapters against adapter-hub's library, prompts
//! in generation, merging, PiSSA's files, resuming.

use std::path::Path;

use serde_json::Value;
use temper::autograd::Cx;
use temper::checkpoint::{CheckpointWriter, checkpoint_path};
use temper::device::DType;
use temper::methods::offline::sft::Sft;
use temper::methods::offline::sft::SftRun;
use temper::model::adapter::{Adapter, folder};
use temper::model::batch::{Batch, Sequence, Vocab};
use temper::model::decoder::Decoder;
use temper::rollout::sample::Sampling;
use temper::rollout::{Engine, EngineOptions, Request};
use temper::tensor::Tensor;
use temper::train::Trainer;
use temper::train::state::{FolderParts, RunState};
use temper::train::tuning::prepare;

use crate::peft::{flat, largest_difference, logps, losses, model, trainer};
use crate::support::{
    self, MODEL, command, cpu, cpu_in, done, finish, fixture, json, metrics, strings, tokenizer,
};

fn run_of(keys: &[&str]) -> SftRun {
    SftRun::load(None, &strings(keys)).unwrap().0
}

fn new_model(cx: &Cx, keys: &[&str]) -> (Decoder, SftRun) {
    let run = run_of(keys);
    let dir = fixture("sft/model");
    let decoder = support::decoder(cx, &dir, 512);
    (prepare(cx, decoder, &run.peft, None, &dir, 42).unwrap(), run)
}

fn save(decoder: &Decoder, out: &Path) {
    let adapter = decoder.adapter.as_ref().unwrap();
    folder::write(out, adapter, &[], &mut |i| adapter.params.weight_view(i)?.to_f32()).unwrap();
}

#[test]
fn bottleneck_adapters_match_adapter_hub_and_round_trip() {
    let values: Value = json(fixture("adapter_hub/values.json"));
    let ids: Vec<Vec<u32>> = serde_json::from_value(losses()["ids"].clone()).unwrap();
    for (name, want) in values.as_object().unwrap() {
        let mut cx = cpu();
        let (run, dir) = (run_of(&["per_device_train_batch_size=4"]), fixture("sft/model"));
        let from = fixture("adapter_hub").join(name);
        let decoder = support::decoder(&cx, &dir, 512);
        let decoder = prepare(&cx, decoder, &run.peft, Some(&from), &dir, 42).unwrap();
        let found = logps(&mut cx, &decoder, &losses()["ids"]);
        let off = largest_difference(&found, &flat(&want["logps"]));

        let tmp = tempfile::tempdir().unwrap();
        save(&decoder, &tmp.path().join("again"));
        let json = |dir: &Path| -> Value { json(dir.join("adapter_config.json")) };
        let (theirs, ours) = (json(&from), json(&tmp.path().join("again")));
        for (key, value) in ours["config"].as_object().unwrap() {
            assert_eq!(value.to_string(), theirs["config"][key].to_string(), "{name}: {key}");
        }
        assert_eq!(ours["model_class"], theirs["model_class"]);
        let read = Adapter::load(&cx, &tmp.path().join("again"), &decoder.config, &decoder.params)
            .unwrap();
        let again = decoder.clone().with_adapter(Some(read)).unwrap();
        assert_eq!(logps(&mut cx, &again, &losses()["ids"]), found, "{name}: written and read");

        let mut sft =
            Sft::from_sequences(ids.iter().map(|r| (r.clone(), vec![true; r.len()])).collect())
                .unwrap();
        let mut trainer = Trainer::new(cx, decoder, run.training.clone(), ids.len()).unwrap();
        trainer.step(&mut sft).unwrap();
        let params = trainer.model.trained();
        let (mut error, mut square, mut count) = (0f64, 0f64, 0);
        for (i, spec) in params.specs.iter().enumerate() {
            let grad =
                params.state_view(&trainer.optimizer.grad, i).unwrap().unwrap().to_f32().unwrap();
            let want = want["grads"][&spec.name].as_array().unwrap();
            assert_eq!(grad.len(), want.len(), "{name}: {}", spec.name);
            for (g, w) in grad.iter().zip(want) {
                let w = w.as_f64().unwrap();
                error += (f64::from(*g) - w).powi(2);
                square += w * w;
            }
            count += 1;
        }
        assert_eq!(count, want["grads"].as_object().unwrap().len(), "{name}: parameters");
        let grads = (error / square).sqrt();
        println!("{name}: logps {off:.1e}, gradients {grads:.1e}");
        // Both sum in f32, in different orders.
        assert!(off <= 1e-5 && grads <= 1e-5, "{name}: logps {off:e}, gradients {grads:e}");
    }
}

#[test]
fn a_new_adapter_starts_as_adapter_hub_starts_it() {
    for (kind, zero, count) in
        [("seq_bn", false, 324), ("double_seq_bn", false, 648), ("par_bn", true, 2144)]
    {
        let cx = cpu();
        let (decoder, _) = new_model(&cx, &["use_peft=true", &format!("peft_type={kind}")]);
        let adapter = decoder.adapter.as_ref().unwrap();
        assert_eq!(
            (adapter.params.trained_count(), adapter.starts_at_zero()),
            (count, zero),
            "{kind}"
        );
    }
}

#[test]
fn what_is_generated_behind_a_tuned_prompt_has_the_trainers_log_probs() {
    let mut cx = cpu();
    let (mut decoder, _) = model(&cx, "sft/model", "prompt", &[]);
    let sampling =
        Sampling { temperature: 1.0, seed: 3, repetition_penalty: 1.1, ..Sampling::greedy() };
    let prompts: Vec<Vec<u32>> = vec![vec![5, 9, 11], vec![7], (3..90).collect()];
    let mut options = EngineOptions::new(12, sampling, vec![], 4);
    options.max_step_tokens = 20; // the longest prompt goes in in pieces
    let mut engine = Engine::new(&cx, &mut decoder, options, 102).unwrap();
    let requests: Vec<Request> = (0..3)
        .map(|i| Request { prompt: prompts[i].clone(), n: 2, number: 2 * i as u32 })
        .collect();
    let completions = engine.generate(&mut cx, &decoder, &requests).unwrap();
    assert_eq!(completions.len(), 6);
    for c in completions {
        let prompt = &prompts[c.request];
        let ids = [prompt.as_slice(), &c.ids].concat();
        let target: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
        let trained =
            decoder.logps(&mut cx, &[Sequence { ids: &ids, target: Some(&target) }]).unwrap();
        assert_eq!(trained[0], c.logps, "prompt {}", c.request);
    }
    let bad = Request { prompt: vec![decoder.config.vocab_size as u32], n: 1, number: 0 };
    assert!(engine.submit(&bad).unwrap_err().to_string().contains("use the model's own tokenizer"));
    // A prompt matters, and a model without it refuses the engine.
    let plain = decoder.clone().with_adapter(None).unwrap();
    engine.submit(&requests[0]).unwrap();
    assert!(engine.step(&mut cx, &plain).err().unwrap().to_string().contains("made for"));
    let ids = &losses()["ids"];
    assert!(
        largest_difference(&logps(&mut cx, &plain, ids), &logps(&mut cx, &decoder, ids)) > 0.01
    );
}

#[test]
fn behind_a_prompt_the_first_token_is_a_target_where_its_mask_says_so() {
    let cx = cpu();
    let ids = [5u32, 6, 7, 8];
    let rows = |target: Option<&[bool]>, virtuals| {
        let batch =
            Batch::new(&cx, &[Sequence { ids: &ids, target }], Vocab { tokens: 10, virtuals })
                .unwrap();
        (batch.rows, batch.target_rows.to_vec::<i32>().unwrap(), batch.target_ids)
    };
    let mask = [true, false, true, true];
    assert_eq!(rows(Some(&mask), 3), (7, vec![2, 4, 5], vec![5, 7, 8]));
    assert_eq!(rows(None, 3), (7, vec![3, 4, 5], vec![6, 7, 8]));
    assert_eq!(rows(Some(&mask), 0), (4, vec![1, 2], vec![7, 8]));
    assert!(
        Batch::new(
            &cx,
            &[Sequence { ids: &[10], target: None }],
            Vocab { tokens: 10, virtuals: 3 }
        )
        .is_err()
    );
}

#[test]
fn dpo_of_a_tuned_prompt_starts_at_its_own_reference() {
    let tmp = tempfile::tempdir().unwrap();
    for kind in ["prompt_tuning", "seq_bn"] {
        let out = tmp.path().join(kind);
        let (data, to) = (fixture("preferences/plain.jsonl"), out.to_str().unwrap());
        done(
            &[
                &["dpo", "--model", MODEL, "--data", data.to_str().unwrap(), "--output", to][..],
                &["use_peft=true", "max_steps=3", "logging_steps=1", "learning_rate=1e-2"],
                &[&format!("peft_type={kind}")],
            ]
            .concat(),
        );
        let lines = metrics(&out);
        let losses: Vec<f64> = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
        // At its reference every margin is 0.
        assert!(
            (losses[0] - 2f64.ln()).abs() < 1e-6 && losses[2] != losses[0],
            "{kind}: {losses:?}"
        );
    }
}

#[test]
fn a_prompt_of_text_starts_as_the_texts_embeddings() {
    let cx = cpu();
    let keys = [
        "use_peft=true",
        "peft_type=prompt_tuning",
        "num_virtual_tokens=5",
        "prompt_tuning_init_text=12",
    ];
    let (decoder, _) = new_model(&cx, &keys);
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("12", true).unwrap();
    let adapter = decoder.adapter.as_ref().unwrap();
    let prompt = adapter.params.weight_view(0).unwrap().to_f32().unwrap();
    let embed = decoder.params.weight_view(0).unwrap().to_f32().unwrap();
    let hidden = decoder.config.hidden_size;
    for (row, id) in prompt.chunks(hidden).zip(ids.iter().cycle()) {
        assert_eq!(row, &embed[*id as usize * hidden..][..hidden]);
    }
    assert_eq!(adapter.params.trained_count(), 5 * hidden);
}

fn merge(base: &Path, adapter: &Path, out: &Path, more: &[&str]) -> (bool, String) {
    let mut command = command(&["merge", "--model"]);
    command.arg(base).arg("--adapter").arg(adapter).arg("--output").arg(out).args(more);
    let (code, said) = finish(&mut command);
    (code == Some(0), said)
}

#[test]
fn temper_merge_writes_the_adapted_model() {
    let all = losses();
    let ids = &all["ids"];
    let tmp = tempfile::tempdir().unwrap();
    let rms = |a: &[f64], b: &[f64]| {
        (a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.len() as f64).sqrt()
    };
    for (name, run) in all["runs"].as_object().unwrap() {
        let base = fixture(run["base"].as_str().unwrap());
        let out = tmp.path().join(name);
        let (done, said) = merge(&base, &fixture("peft").join(name), &out, &[]);
        if name.starts_with("prompt") {
            assert!(!done && said.contains("part of no weight"), "{name}: {said}");
            continue;
        }
        assert!(done, "{name}: {said}");
        let mut cx = cpu();
        let (decoder, _) = model(&cx, run["base"].as_str().unwrap(), name, &[]);
        let exact = logps(&mut cx, &decoder, ids);
        let merged = support::decoder(&cx, &out, 64);
        let off = largest_difference(&exact, &logps(&mut cx, &merged, ids));
        // Another order of sums.
        assert!(off <= 1e-5, "{name}: {off:e}");
        let mut cx = cpu_in(DType::BF16);
        let (decoder, _) = model(&cx, run["base"].as_str().unwrap(), name, &[]);
        let unmerged = rms(&exact, &logps(&mut cx, &decoder, ids));
        let merged = support::decoder(&cx, &out, 64);
        let merged = rms(&exact, &logps(&mut cx, &merged, ids));
        println!("{name}: f32 {off:.1e}; bf16 merged {merged:.1e}, unmerged {unmerged:.1e}");
        assert!(merged <= 2.0 * unmerged, "{name}: bf16 {merged:e}, unmerged {unmerged:e}");
    }
    let (hub, out) = (fixture("adapter_hub/seq_bn"), tmp.path().join("seq_bn"));
    let (done, said) = merge(&fixture("sft/model"), &hub, &out, &[]);
    assert!(
        !done && said.contains("part of no weight") && !out.join("config.json").exists(),
        "{said}"
    );
}

#[test]
fn pissa_starts_as_the_base_and_is_saved_as_a_plain_lora_of_the_base() {
    let ids = &losses()["ids"];
    let tmp = tempfile::tempdir().unwrap();
    for init in ["pissa", "pissa_niter_4"] {
        let mut cx = cpu();
        let keys = [
            "use_peft=true",
            "lora_dropout=0",
            "lora_r=4",
            "lora_target_modules=all-linear",
            "use_rslora=true",
        ];
        let mut keys: Vec<String> = keys.iter().map(|k| k.to_string()).collect();
        keys.extend([
            format!("init_lora_weights={init}"),
            "max_steps=3".into(),
            "learning_rate=1e-2".into(),
        ]);
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let (decoder, run) = new_model(&cx, &keys);
        let plain = decoder.clone().with_adapter(None).unwrap();
        let start = logps(&mut cx, &decoder, ids);
        let off = largest_difference(&start, &logps(&mut cx, &plain, ids));
        // Two terms that cancel, each as large as the product.
        assert!(off <= 1e-5, "{init}: {off:e}");
        let reference = decoder.reference(&cx).unwrap();
        assert!(reference.adapter.is_none(), "the reference is the base");
        let (mut trainer, mut sft) = trainer(cx, decoder, &run);
        (0..3).for_each(|_| drop(trainer.step(&mut sft).unwrap()));
        let trained = logps(&mut trainer.cx, &trainer.model, ids);
        assert!(largest_difference(&start, &trained) > 1e-3);
        let out = tmp.path().join(init);
        trainer.write_model(&out, &FolderParts::default()).unwrap();
        let cx = &mut trainer.cx;
        let lora = Adapter::load(cx, &out, &plain.config, &plain.params).unwrap();
        assert!(lora.config.raw["r"] == 8 && lora.config.raw["init_lora_weights"] == true);
        let loaded = plain.with_adapter(Some(lora)).unwrap();
        // The same products, in one sum of 2 r terms.
        assert!(largest_difference(&trained, &logps(cx, &loaded, ids)) <= 1e-5);
    }
}

#[test]
fn adapters_resume_with_the_same_bits() {
    let pissa = [
        "init_lora_weights=pissa_niter_2",
        "lora_dropout=0",
        "lora_target_modules=all-linear",
        "lora_r=4",
    ];
    for kind in [
        &pissa[..],
        &["peft_type=prompt_tuning", "num_virtual_tokens=3"],
        &["peft_type=double_seq_bn"],
        &["use_dora=true"],
        &["peft_type=ia3"],
    ] {
        let keys = [&["use_peft=true", "max_steps=6", "learning_rate=1e-2"], kind].concat();
        let start = || {
            let cx = cpu();
            let (decoder, run) = new_model(&cx, &keys);
            trainer(cx, decoder, &run)
        };
        let bits = |t: &Trainer| -> Vec<Vec<u32>> {
            let moments = t.optimizer.moments.named_tensors();
            let all = std::iter::once(&t.model.trained().weights)
                .chain(moments.into_iter().map(|(_, t)| t));
            all.map(|t: &Tensor| t.to_vec::<u32>().unwrap()).collect()
        };
        let tmp = tempfile::tempdir().unwrap();
        let (mut whole, mut sft) = start();
        for step in 1..=6u64 {
            whole.step(&mut sft).unwrap();
            let mut writer = CheckpointWriter::new(tmp.path(), step, 0).unwrap();
            whole.write_state(&mut writer, &FolderParts::default(), &RunState::default()).unwrap();
            writer.finish().unwrap();
        }
        for step in [1, 4] {
            let (mut resumed, mut sft) = start();
            resumed.read_state(&checkpoint_path(tmp.path(), step)).unwrap();
            (step..6).for_each(|_| drop(resumed.step(&mut sft).unwrap()));
            assert!(bits(&resumed) == bits(&whole), "{kind:?}: resumed at step {step}");
        }
    }
}
