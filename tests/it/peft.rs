//! Adapters against PEFT 0.19.1 and TRL 1.16.0: every run of `tests/fixtures/peft/losses.json`,
//! from the same folder.

use std::path::PathBuf;

use serde_json::Value;
use temper::autograd::Cx;
use temper::methods::Method;
use temper::methods::offline::OfflineMethod;
use temper::methods::offline::sft::Sft;
use temper::methods::offline::sft::SftRun;
use temper::model::adapter::{Adapter, folder};
use temper::model::batch::Sequence;
use temper::model::decoder::Decoder;
use temper::train::Trainer;
use temper::train::tuning::prepare;

use crate::support::{cpu, decoder, fixture, json, rows, with_inputs};

pub fn losses() -> Value {
    json(fixture("peft/losses.json"))
}

/// The base with an adapter of the fixture on it, as `temper sft --adapter` makes it.
pub fn model(cx: &Cx, base: &str, name: &str, keys: &[String]) -> (Decoder, SftRun) {
    let (run, _) = SftRun::load(None, keys).unwrap();
    let dir = fixture(base);
    let base = decoder(cx, &dir, 512);
    let adapter = fixture("peft").join(name);
    (prepare(cx, base, &run.peft, Some(&adapter), &dir, 42).unwrap(), run)
}

pub fn logps(cx: &mut Cx, model: &Decoder, ids: &Value) -> Vec<f64> {
    let rows: Vec<Vec<u32>> = serde_json::from_value(ids.clone()).unwrap();
    let sequences: Vec<Sequence> = rows.iter().map(|ids| Sequence { ids, target: None }).collect();
    model.logps(cx, &sequences).unwrap().concat().into_iter().map(f64::from).collect()
}

pub fn flat(v: &Value) -> Vec<f64> {
    v.as_array()
        .unwrap()
        .iter()
        .flat_map(|r| r.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()))
        .collect()
}

/// Relative to b where that is above 1: these models' log-probs go down to -30.
pub fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max)
}

fn keys(all: &Value, run: &Value) -> Vec<String> {
    let common = [
        "per_device_train_batch_size=4",
        "train_sampling_strategy=sequential",
        "max_steps=20",
        "use_peft=true",
    ];
    let mut keys: Vec<String> = common.iter().map(|s| s.to_string()).collect();
    keys.push(format!("learning_rate={}", all["learning_rate"]));
    keys.extend(run["config"].as_object().unwrap().iter().map(|(k, v)| format!("{k}={v}")));
    keys
}

pub fn trainer(cx: Cx, model: Decoder, run: &SftRun) -> (Trainer, OfflineMethod<Sft>) {
    let rows = rows("sft/messages.jsonl");
    let (sft, _) = with_inputs(&model.config, &rows, |i| Sft::new(&run.method, i).unwrap());
    let n = Method::rows(&sft);
    (Trainer::new(cx, model, run.training.clone(), n).unwrap(), sft)
}

fn bits(decoder: &Decoder) -> Vec<u32> {
    decoder.params.weights.to_vec::<u32>().unwrap()
}

#[test]
fn every_adapter_has_pefts_logits_and_losses_on_a_fixed_base() {
    let all = losses();
    let mut report = String::new();
    let mut worst = 0f64;
    for (name, run) in all["runs"].as_object().unwrap() {
        let mut cx = cpu();
        let (decoder, config) = model(&cx, run["base"].as_str().unwrap(), name, &keys(&all, run));
        assert_eq!(
            decoder.trained().trained_count() as u64,
            run["trainable"].as_u64().unwrap(),
            "{name}: trainable"
        );
        let total = decoder.params.count()
            + decoder.adapter.as_ref().map_or(0, |a| a.params.trained_count());
        assert_eq!(
            total as u64,
            run["all"].as_u64().unwrap() + untrained_copies(&decoder),
            "{name}: all"
        );
        let start =
            largest_difference(&logps(&mut cx, &decoder, &all["ids"]), &flat(&run["start"]));
        let before = bits(&decoder);
        let (mut trainer, mut sft) = trainer(cx, decoder, &config);
        let (mut loss, mut norm) = (0f64, 0f64);
        for i in 0..20 {
            let step = trainer.step(&mut sft).unwrap();
            let relative = |a: f64, field: &str| (a / run[field][i].as_f64().unwrap() - 1.0).abs();
            loss = loss.max(relative(f64::from(step.loss), "loss"));
            norm = norm.max(relative(f64::from(step.grad_norm), "grad_norm"));
        }
        let end = largest_difference(
            &logps(&mut trainer.cx, &trainer.model, &all["ids"]),
            &flat(&run["end"]),
        );
        assert_eq!(bits(&trainer.model), before, "{name}: the base's weights changed");
        report += &format!(
            "{name}: logps {start:.1e} at the start, {end:.1e} at the end; loss {loss:.1e}, norm {norm:.1e}\n"
        );
        worst = worst.max(loss);
        // PEFT decomposes in f32: its own log-probs under PiSSA are 1.7e-5 from those of a
        // decomposition in f64.
        let limit = if name.starts_with("pissa") { 3e-5 } else { 1e-5 };
        assert!(start <= limit, "{report}");
    }
    println!("{report}");
    assert!(worst <= 1e-5, "{report}");
}

/// PEFT counts biases of the base that it trains in place once; here they are copies, of whole
/// units.
fn untrained_copies(decoder: &Decoder) -> u64 {
    let Some(adapter) = &decoder.adapter else { return 0 };
    let biases =
        adapter.params.trained().map(|i| &adapter.params.specs[i]).filter(|s| s.role.is_bias());
    biases.map(|s| s.len() as u64).sum()
}

#[test]
fn an_adapter_that_is_written_reads_back_with_the_same_bits() {
    for name in
        ["lora_patterns", "lora_saves_head", "lora_bias_lora_only", "dora", "ia3", "prompt_text"]
    {
        let mut cx = cpu();
        let base = losses()["runs"][name]["base"].as_str().unwrap().to_string();
        let (decoder, _) = model(&cx, &base, name, &[]);
        let adapter = decoder.adapter.as_ref().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("adapter");
        folder::write(&out, adapter, &[], &mut |i| adapter.params.weight_view(i)?.to_f32())
            .unwrap();
        let read = Adapter::load(&cx, &out, &decoder.config, &decoder.params).unwrap();
        assert_eq!(read.config.kind, adapter.config.kind, "{name}");
        let again = Decoder::folder(&fixture(&base))
            .unwrap()
            .positions(512)
            .build(&cx)
            .unwrap()
            .with_adapter(Some(read))
            .unwrap();
        let ids = &losses()["ids"];
        let (a, b) = (logps(&mut cx, &decoder, ids), logps(&mut cx, &again, ids));
        assert_eq!(a, b, "{name}");
    }
}

fn refusal(keys: &[&str]) -> String {
    let keys: Vec<String> = keys.iter().map(|k| k.to_string()).collect();
    let cx = cpu();
    let run = match SftRun::load(None, &keys) {
        Ok((run, _)) => run,
        Err(e) => return e.to_string(),
    };
    let dir = fixture("sft/model");
    let decoder = Decoder::folder(&dir).unwrap().positions(512).build(&cx).unwrap();
    match prepare(&cx, decoder, &run.peft, None, &dir, 42) {
        Ok(_) => "accepted".into(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn an_adapter_that_would_train_nothing_is_refused_with_near_names() {
    for (keys, said) in [
        (vec!["use_peft=true", "lora_r=0"], "rank 0"),
        (vec!["use_peft=true", "lora_target_modules=q_porj,v_proj"], "did you mean q_proj?"),
        (vec!["use_peft=true", "lora_target_modules=.*nothing.*"], "matches no module"),
        (vec!["use_peft=true", "layers_to_transform=7"], "layer 7; the model has 2"),
        (vec!["use_peft=true", "rank_pattern=q_proj=0"], "a whole number from 1"),
        (vec!["use_peft=true", "lora_modules_to_save=embed_token"], "did you mean embed_tokens?"),
        (vec!["lora_r=8"], "use_peft is false"),
        (vec!["use_peft=true", "init_lora_weights=pissa"], "lora_dropout=0"),
        (
            vec!["use_peft=true", "init_lora_weights=pissa", "lora_dropout=0", "lora_r=64"],
            "rank 64 is too high for a",
        ),
        (vec!["use_peft=true", "init_lora_weights=svd"], "pissa_niter_N"),
        (
            vec!["use_peft=true", "peft_type=prompt_tuning", "num_virtual_tokens=0"],
            "an empty prompt",
        ),
        (
            vec!["use_peft=true", "peft_type=prompt_tuning", "lora_target_modules=q_proj"],
            "neither lora nor ia3",
        ),
        (vec!["use_peft=true", "peft_type=seq_bn", "non_linearity=tan"], "relu, swish, gelu"),
        (vec!["use_peft=true", "reduction_factor=4"], "not a bottleneck adapter"),
        (vec!["freeze=layers.9"], "matches no parameter"),
        (vec!["freeze=."], "no parameter is left to train"),
    ] {
        let text = refusal(&keys);
        assert!(text.contains(said), "{keys:?}: {text}");
    }
    // An adapter for another base: shapes and names are compared.
    let cx = cpu();
    let dir = fixture("models/qwen3");
    let decoder = Decoder::folder(&dir).unwrap().positions(64).build(&cx).unwrap();
    let other: PathBuf = fixture("peft/lora");
    let text =
        Adapter::load(&cx, &other, &decoder.config, &decoder.params).err().unwrap().to_string();
    assert!(
        text.contains("not for this model (its base was sft/model)") && text.contains("shape: "),
        "{text}"
    );
}

#[test]
fn what_is_frozen_keeps_its_bits_and_counts_in_no_norm() {
    let keys: Vec<String> =
        ["freeze=embed_tokens,q_proj,layers.1", "lr_multipliers=norm=0.5,mlp=2", "max_steps=3"]
            .map(String::from)
            .into();
    let (run, _) = SftRun::load(None, &keys).unwrap();
    let cx = cpu();
    let dir = fixture("sft/model");
    let decoder = Decoder::folder(&dir).unwrap().positions(512).build(&cx).unwrap();
    let decoder = prepare(&cx, decoder, &run.peft, None, &dir, 42).unwrap();
    let values = |d: &Decoder| -> Vec<(String, Vec<u32>)> {
        let specs = d.params.specs.iter().enumerate();
        specs
            .map(|(i, s)| (s.name.clone(), d.params.weight_view(i).unwrap().to_vec().unwrap()))
            .collect()
    };
    let before = values(&decoder);
    let (mut trainer, mut sft) = trainer(cx, decoder, &run);
    let step = trainer.step(&mut sft).unwrap();
    let mut square = 0f64;
    for i in trainer.model.params.trained() {
        let view = trainer.model.params.state_view(&trainer.optimizer.grad, i).unwrap().unwrap();
        square += view.to_f32().unwrap().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    }
    assert!((square.sqrt() / f64::from(step.grad_norm) - 1.0).abs() < 1e-5);
    trainer.step(&mut sft).unwrap();
    for ((name, old), (_, new)) in before.iter().zip(values(&trainer.model)) {
        let frozen = ["embed_tokens", "q_proj", "layers.1"].iter().any(|f| name.contains(f));
        assert_eq!(*old == new, frozen, "{name}");
    }
}
