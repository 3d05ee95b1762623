//! Families whose blocks differ from Llama's: training against TRL
//! (tests/fixtures/make_family_sft.py), rollouts with the trainer's bits, adapters, quantised bases
//! and the memory plan. Their log-probs and greedy tokens are compared in the tests of all golden
//! folders.

use std::path::Path;

use serde_json::{Value, json};
use temper::autograd::{Cx, Recompute};
use temper::device::DType;
use temper::methods::offline::sft::{Sft, SftRun};
use temper::model::batch::{Batch, Sequence};
use temper::model::builder::InitialWeights;
use temper::model::decoder::Decoder;
use temper::model::folder::load_config;
use temper::model::layout::{ModelConfig, NormPlace, Task};
use temper::model::rope::{RopeConfig, RopeKind};
use temper::model::specs::expected_params;
use temper::ops::case::Rng;
use temper::ops::head::head_logps;
use temper::ops::rmsnorm::NormWeight;
use temper::ops::rope::NormOver;
use temper::rollout::sample::Sampling;
use temper::rollout::{Engine, EngineOptions, Request, generate};
use temper::train::Trainer;
use temper::train::plan::{Plan, PlanRequest};
use temper::train::tuning::{prepare, scheme};

use crate::support::{self, MODEL, bits, cpu, cpu_in, decoder, fixture, golden, words};

/// The golden folders with the vocabulary of `sft/model`.
const FAMILIES: [&str; 6] = ["gemma2", "gemma3", "granite", "lfm2", "lfm2_bias", "olmo2"];
const VOCAB: usize = 320;

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs().max(1e-12)
}

#[test]
fn families_of_other_blocks_train_as_trl_does() {
    let all: Value = support::json(fixture("family_sft.json"));
    let keys = "learning_rate=1e-3 per_device_train_batch_size=4 max_steps=20 \
                train_sampling_strategy=sequential lr_scheduler_type=linear";
    let (run, _) = SftRun::load(None, &words(keys)).unwrap();
    let rows = support::rows("sft/text.jsonl");
    let mut report = String::new();
    let (mut worst_loss, mut worst_norm) = (0f64, 0f64);
    for case in FAMILIES {
        let want = &all[case];
        let cx = cpu();
        let model = decoder(&cx, golden(case), 512);
        let (mut sft, _) =
            support::with_inputs(&model.config, &rows, |i| Sft::new(&run.method, i).unwrap());
        let count = temper::methods::Method::rows(&sft);
        let mut trainer = Trainer::new(cx, model, run.training.clone(), count).unwrap();
        let (mut loss, mut norm) = (0f64, 0f64);
        for i in 0..20 {
            let step = trainer.step(&mut sft).unwrap();
            let of = |key: &str| want[key][i].as_f64().unwrap();
            loss = loss.max(relative(f64::from(step.loss), of("loss")));
            norm = norm.max(relative(f64::from(step.grad_norm), of("grad_norm")));
        }
        report += &format!("{case}: loss {loss:.1e}, grad_norm {norm:.1e}\n");
        (worst_loss, worst_norm) = (worst_loss.max(loss), worst_norm.max(norm));
    }
    println!("{report}");
    assert!(worst_loss <= 1e-5 && worst_norm <= 1e-4, "{report}");
}

/// Log-probs and entropies of a completion, as training computes them.
fn trained(
    cx: &mut Cx,
    model: &Decoder,
    prompt: &[u32],
    completion: &[u32],
    scale: f32,
) -> (Vec<u32>, Vec<u32>) {
    let ids: Vec<u32> = prompt.iter().chain(completion).copied().collect();
    let target: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
    let sequence = [Sequence { ids: &ids, target: Some(&target) }];
    let batch = Batch::new(cx, &sequence, VOCAB).unwrap();
    let hidden = model.target_hidden(cx, &batch).unwrap();
    let out = head_logps(cx, &hidden, &model.head, &batch.targets, scale).unwrap();
    (bits(&out.logp.to_f32().unwrap()), bits(&out.entropy.to_f32().unwrap()))
}

#[test]
fn rollouts_of_other_blocks_have_the_trainers_bits() {
    rollouts_have_the_trainers_bits(&FAMILIES);
}

/// Of golden folders with the vocabulary of `sft/model`.
pub fn rollouts_have_the_trainers_bits(cases: &[&str]) {
    for case in cases {
        for dtype in [DType::F32, DType::BF16] {
            let mut cx = cpu_in(dtype);
            let mut model = decoder(&cx, golden(case), 160);
            let mut rng = Rng(5);
            // Longer than a window and than a page of the cache.
            let requests: Vec<Request> = [1, 15, 64, 90]
                .iter()
                .enumerate()
                .map(|(g, n)| Request {
                    prompt: (0..*n).map(|_| rng.below(VOCAB) as u32).collect(),
                    n: 2,
                    number: 2 * g as u32,
                })
                .collect();
            let sampling = Sampling { temperature: 0.7, seed: 9, ..Sampling::greedy() };
            let mut options = EngineOptions::new(30, sampling.clone(), vec![], 5);
            options.max_step_tokens = 37;
            let mut engine = Engine::new(&cx, &mut model, options, 160).unwrap();
            let done = engine.generate(&mut cx, &model, &requests).unwrap();
            assert_eq!(done.len(), 8);
            for c in &done {
                let prompt = &requests[c.request].prompt;
                let (plain, _) = trained(&mut cx, &model, prompt, &c.ids, 1.0);
                let (scaled, entropy) = trained(&mut cx, &model, prompt, &c.ids, sampling.scale());
                assert_eq!(bits(&c.logps), plain, "{case} {dtype:?}");
                assert_eq!(bits(&c.logps_scaled), scaled, "{case} {dtype:?}");
                assert_eq!(bits(&c.entropies), entropy, "{case} {dtype:?}");
            }
        }
    }
}

const LORA: &str = "use_peft=true lora_target_modules=all-linear";

/// Keys of runs: all weights, adapters, quantised bases.
fn kinds() -> Vec<String> {
    let mut kinds: Vec<String> =
        ["", LORA].into_iter().map(|k| format!("{k} per_device_train_batch_size=2")).collect();
    for more in ["use_dora=true", "load_in_4bit=true", "load_in_8bit=true"] {
        kinds.push(format!("{LORA} {more} per_device_train_batch_size=2"));
    }
    for kind in ["ia3", "prompt_tuning num_virtual_tokens=5"] {
        kinds.push(format!("use_peft=true peft_type={kind} per_device_train_batch_size=2"));
    }
    kinds
}

fn prepared(cx: &Cx, case: &str, run: &SftRun) -> Decoder {
    let base = Decoder::folder(&golden(case))
        .unwrap()
        .storage(scheme(&run.peft))
        .positions(128)
        .build(cx)
        .unwrap();
    prepare(cx, base, &run.peft, None, Path::new(MODEL), 42).unwrap()
}

fn sequences() -> Vec<(Vec<u32>, Vec<bool>)> {
    let row =
        |r: usize| ((0..40).map(|i| ((r * 7 + i * 3) % VOCAB) as u32).collect(), vec![true; 40]);
    (0..4).map(row).collect()
}

#[test]
fn adapters_and_quantised_bases_of_other_blocks_learn_and_generate() {
    for case in FAMILIES {
        for keys in kinds() {
            let (run, _) =
                SftRun::load(None, &words(&format!("{keys} learning_rate=1e-2"))).unwrap();
            let losses = |recompute| {
                let mut cx = cpu();
                cx.set_rng(0, 0, 0).unwrap();
                cx.recompute = recompute;
                let model = prepared(&cx, case, &run);
                let mut sft = Sft::from_sequences(sequences()).unwrap();
                let mut trainer = Trainer::new(cx, model, run.training.clone(), 4).unwrap();
                let losses: Vec<f32> =
                    (0..8).map(|_| trainer.step(&mut sft).unwrap().loss).collect();
                (losses, trainer)
            };
            let (first, mut trainer) = losses(Recompute::Off);
            // Two batches are an epoch.
            assert!(first[6] + first[7] < first[0] + first[1], "{case} {keys}: {first:?}");
            assert_eq!(first, losses(Recompute::Layers).0, "{case} {keys}: recomputed");
            let requests: [Vec<u32>; 2] = [vec![5, 9, 11], (3..40).collect()];
            let greedy = |n| EngineOptions::new(12, Sampling::greedy(), vec![], n);
            let (cx, model) = (&mut trainer.cx, &mut trainer.model);
            cx.tape = None;
            let one = generate(cx, model, &requests, &greedy(1), |_, _| {}).unwrap();
            let two = generate(cx, model, &requests, &greedy(2), |_, _| {}).unwrap();
            for (one, two) in one.iter().zip(&two) {
                assert_eq!(one.ids, two.ids, "{case} {keys}");
                assert_eq!(bits(&one.logps), bits(&two.logps), "{case} {keys}");
            }
        }
    }
}

#[test]
fn the_plan_of_other_blocks_is_their_high_water_mark() {
    for case in FAMILIES {
        let model = load_config(golden(case)).unwrap();
        for (keys, recompute) in [
            ("per_device_train_batch_size=2".to_string(), Recompute::Off),
            ("per_device_train_batch_size=2".to_string(), Recompute::Layers),
            (format!("{LORA} load_in_4bit=true per_device_train_batch_size=2"), Recompute::Off),
        ] {
            let (run, _) = SftRun::load(None, &words(&keys)).unwrap();
            let mut cx = cpu();
            cx.set_rng(0, 0, 0).unwrap();
            cx.recompute = recompute;
            let base = Decoder::builder(model.clone())
                .weights(InitialWeights::Random { seed: 1 })
                .storage(scheme(&run.peft))
                .positions(40)
                .build(&cx)
                .unwrap();
            let trained = prepare(&cx, base, &run.peft, None, Path::new("model"), 1).unwrap();
            let mut sft = Sft::from_sequences(sequences()).unwrap();
            let mut trainer = Trainer::new(cx, trained, run.training.clone(), 4).unwrap();
            for _ in 0..2 {
                trainer.step(&mut sft).unwrap();
            }
            let actual = trainer.cx.pool.in_use().1;
            let request = PlanRequest {
                samples: None,
                model: &model,
                dir: Path::new("model"),
                adapter: None,
                peft: run.peft.clone(),
                training: run.training.clone(),
                length: 40,
                tokens: 80,
                reference: false,
                online: None,
                sequences: None,
            };
            let planned = Plan::new(&cpu(), &request, recompute).unwrap().peak;
            assert!(
                relative(planned as f64, actual as f64) <= 0.05,
                "{case} {keys} {recompute:?}: planned {planned}, used {actual}"
            );
        }
    }
}

#[test]
fn layouts_say_what_sets_a_family_apart() {
    let load = |case: &str| load_config(golden(case)).unwrap();
    let gemma = load("gemma2");
    assert_eq!((gemma.norm_weight, gemma.norm_place), (NormWeight::PlusOne, NormPlace::Both));
    assert_eq!(gemma.sliding_window, [Some(16), None, Some(16), None]);
    assert_eq!((gemma.attention_softcap, gemma.logits.softcap), (Some(4.0), Some(6.0)));
    assert_eq!(gemma.attention_scale, 24f32.powf(-0.5));
    assert!(gemma.tie_word_embeddings);
    let scale = gemma.embedding_scale.unwrap();
    let root = 32f32.sqrt();
    assert_eq!(scale.factors(DType::F32), (root, 1.0));
    assert_eq!(scale.factors(DType::BF16), (5.65625, 1.0)); // the nearest bf16
    let gemma = load("gemma3");
    assert_eq!((gemma.attention_softcap, gemma.logits.softcap), (None, None));
    assert_eq!(gemma.qk_norm, Some(NormOver::Head));
    assert_eq!(gemma.sliding_window, [Some(16), None, Some(16), None]);
    let ropes: Vec<&RopeConfig> =
        gemma.layer_rope.iter().map(|rope| &gemma.ropes[rope.unwrap()]).collect();
    assert!(ropes[0].theta == 1e4 && ropes[0].kind == RopeKind::Default);
    assert!(ropes[1].theta == 1e6 && ropes[1].kind == RopeKind::Linear { factor: 8.0 });
    let granite = load("granite");
    assert_eq!(granite.embedding_scale.unwrap().factors(DType::BF16), (1.0, 3.0));
    assert_eq!((granite.attention_scale, granite.residual_scale), (0.2, 0.4));
    assert_eq!(granite.logits.divisor, 2.5);
    let olmo = load("olmo2");
    assert_eq!((olmo.norm_place, olmo.qk_norm), (NormPlace::After, Some(NormOver::Heads)));
    let names: Vec<String> = expected_params(&olmo).into_iter().map(|s| s.name).collect();
    assert!(!names.iter().any(|n| n.contains("input_layernorm")), "{names:?}");
}

/// What a config.json of the hub says, without the keys that transformers 5 adds.
#[test]
fn gemma_2s_defaults_are_those_of_transformers() {
    let raw = json!({
        "model_type": "gemma2", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256,
        "final_logit_softcapping": null, "sliding_window": 8
    });
    let read =
        |raw: &Value| ModelConfig::from_json("config.json", raw.as_object().unwrap().clone());
    let config = read(&raw).unwrap();
    assert_eq!(config.sliding_window, [Some(8), None, Some(8)]);
    assert_eq!((config.attention_softcap, config.logits.softcap), (Some(50.0), None));
    assert_eq!((config.attention_scale, config.rms_norm_eps), (1.0 / 16.0, 1e-6));
    assert_eq!((config.bos, config.eos.as_slice(), config.pad), (Some(2), [1].as_slice(), Some(0)));
    assert!(config.tie_word_embeddings);
    for (key, value, problem) in [
        ("use_bidirectional_attention", json!(true), "use_bidirectional_attention is true"),
        ("attn_logit_softcapping", json!(-1), "attn_logit_softcapping is -1; it must be a number"),
        ("query_pre_attn_scalar", json!(0), "query_pre_attn_scalar is 0; it must be a number"),
        ("sliding_window", json!(null), "sliding attention, but sliding_window is null"),
        ("hidden_activation", json!("relu"), "hidden_activation is \"relu\"; supported:"),
    ] {
        let mut bad = raw.clone();
        bad[key] = value;
        let error = read(&bad).unwrap_err().to_string();
        assert!(error.contains(problem), "{key}: {error}");
    }
}

/// As the hub's folders of Gemma 3 1B (v4 keys).
#[test]
fn gemma_3s_defaults_are_those_of_transformers() {
    let raw = json!({
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 100,
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "sliding_window_pattern": 3, "rope_theta": 1000000, "rope_local_base_freq": 10000,
        "rope_scaling": { "rope_type": "linear", "factor": 8.0 },
        "attn_logit_softcapping": null, "final_logit_softcapping": null
    });
    let read =
        |raw: &Value| ModelConfig::from_json("config.json", raw.as_object().unwrap().clone());
    let config = read(&raw).unwrap();
    let full = [false, false, true, false, false, true, false];
    assert_eq!(config.sliding_window, full.map(|f| (!f).then_some(512)));
    let of = |i: usize| &config.ropes[config.layer_rope[i].unwrap()];
    assert!(of(2).theta == 1e6 && of(2).kind == RopeKind::Linear { factor: 8.0 });
    assert!(of(3).theta == 1e4 && of(3).kind == RopeKind::Default);
    assert_eq!(config.logits.softcap, None);
    assert_eq!(config.family.class(Task::CausalLm), "Gemma3ForCausalLM");
    let reward = config.family.class(Task::SequenceClassification { labels: 1 });
    assert_eq!(reward, "Gemma3TextForSequenceClassification");
    let mut plain = raw.clone();
    plain.as_object_mut().unwrap().retain(|k, _| !k.contains("slid") && !k.contains("rope"));
    let config = read(&plain).unwrap();
    assert_eq!(config.sliding_window.iter().filter(|w| w.is_none()).count(), 1); // every sixth
    assert_eq!(config.sliding_window[0], Some(4096));
}

#[test]
fn bottleneck_adapters_on_blocks_with_other_norms_are_refused() {
    let (run, _) = SftRun::load(None, &words("use_peft=true peft_type=seq_bn")).unwrap();
    let cx = cpu();
    for (case, refused) in [("gemma3", true), ("olmo2", true), ("granite", false)] {
        let result =
            prepare(&cx, decoder(&cx, golden(case), 16), &run.peft, None, Path::new(MODEL), 1);
        match result {
            Ok(_) => assert!(!refused, "{case}"),
            Err(e) => {
                let e = e.to_string();
                assert!(
                    refused && e.contains("whose blocks normalise what they add"),
                    "{case}: {e}"
                );
            }
        }
    }
}
