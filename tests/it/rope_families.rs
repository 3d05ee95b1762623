//! Families that differ in rope and in loading: training against TRL
//! (tests/fixtures/make_family_sft.py), adapters on fused projections against PEFT
//! (make_fused_peft.py), rollouts with the trainer's bits, quantised bases and the memory plan.
//! Their log-probs and greedy tokens are compared in the tests of all golden folders.

use std::path::Path;

use serde_json::Value;
use temper::autograd::{Cx, Recompute};
use temper::methods::offline::sft::{Sft, SftRun};
use temper::model::batch::Sequence;
use temper::model::builder::InitialWeights;
use temper::model::decoder::Decoder;
use temper::model::folder::load_config;
use temper::rollout::sample::Sampling;
use temper::rollout::{EngineOptions, generate};
use temper::train::Trainer;
use temper::train::plan::{Plan, PlanRequest};
use temper::train::tuning::{prepare, scheme};

use crate::agreement::{adapter_is_pefts, relative, trained_as};
use crate::support::{self, MODEL, bits, cpu, decoder, fixture, golden, words};

/// The golden folders with the vocabulary of `sft/model`, and the longest sequence of a run on each:
/// that of phi4_mini must stay within its original length, since TRL's batches do.
const FAMILIES: [&str; 6] =
    ["ministral", "ministral3", "phi3", "phi3_long", "phi4_mini", "smollm3"];
const VOCAB: usize = 320;
const LONGEST: usize = 240;

#[test]
fn families_of_other_ropes_train_as_trl_does() {
    let all: Value = support::json(fixture("family_sft.json"));
    let mut report = String::new();
    let (mut worst_loss, mut worst_norm) = (0f64, 0f64);
    for case in FAMILIES {
        let cx = cpu();
        let model = decoder(&cx, golden(case), LONGEST);
        let (loss, norm) = trained_as(cx, model, "learning_rate=1e-3", &all[case]);
        report += &format!("{case}: loss {loss:.1e}, grad_norm {norm:.1e}\n");
        (worst_loss, worst_norm) = (worst_loss.max(loss), worst_norm.max(norm));
    }
    println!("{report}");
    assert!(worst_loss <= 1e-5 && worst_norm <= 1e-4, "{report}");
}

#[test]
fn rollouts_of_other_ropes_have_the_trainers_bits() {
    crate::families::rollouts_have_the_trainers_bits(&FAMILIES);
}

const LORA: &str = "use_peft=true lora_target_modules=all-linear";

/// Keys of runs: all weights, adapters, quantised bases.
fn kinds() -> Vec<String> {
    let mut kinds = vec![String::new(), LORA.into(), "use_peft=true".into()];
    for more in [
        "use_dora=true",
        "init_lora_weights=pissa lora_dropout=0",
        "load_in_4bit=true",
        "load_in_8bit=true",
    ] {
        kinds.push(format!("{LORA} {more}"));
    }
    for kind in ["ia3", "prompt_tuning num_virtual_tokens=5", "seq_bn"] {
        kinds.push(format!("use_peft=true peft_type={kind}"));
    }
    kinds.into_iter().map(|k| format!("{k} per_device_train_batch_size=2")).collect()
}

fn prepared(cx: &Cx, case: &str, run: &SftRun) -> Decoder {
    let dir = golden(case);
    let base = Decoder::folder(&dir).unwrap().storage(scheme(&run.peft));
    let base = base.positions(128).build(cx).unwrap();
    prepare(cx, base, &run.peft, None, Path::new(MODEL), 42).unwrap()
}

fn sequences() -> Vec<(Vec<u32>, Vec<bool>)> {
    let row =
        |r: usize| ((0..40).map(|i| ((r * 7 + i * 3) % VOCAB) as u32).collect(), vec![true; 40]);
    (0..4).map(row).collect()
}

#[test]
fn adapters_and_quantised_bases_of_other_ropes_learn_and_generate() {
    for case in FAMILIES {
        for keys in kinds() {
            let keys = format!("{keys} learning_rate=1e-2");
            let (run, _) = SftRun::load(None, &words(&keys)).unwrap();
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
            // Two steps see all rows.
            let [start, end] = [0, 6].map(|i| first[i] + first[i + 1]);
            assert!(end < start && first.iter().all(|l| l.is_finite()), "{case} {keys}: {first:?}");
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
fn the_plan_of_other_ropes_is_their_high_water_mark() {
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
fn adapters_on_fused_projections_are_pefts() {
    let all: Value = support::json(fixture("fused_peft.json"));
    for (case, want) in all.as_object().unwrap() {
        let names = adapter_is_pefts(case, &fixture("fused_peft").join(case), "phi3", want);
        assert!(names.iter().any(|n| n.contains("qkv_proj")), "{case}");
    }
}

#[test]
fn parts_of_a_fused_projection_are_named_in_the_error() {
    let of = |keys: &str| {
        let (run, _) = SftRun::load(None, &words(keys)).unwrap();
        let cx = cpu();
        let base = decoder(&cx, golden("phi3"), 16);
        prepare(&cx, base, &run.peft, None, Path::new(MODEL), 1).map(|m| m.trained().specs.clone())
    };
    let error = of("use_peft=true lora_target_modules=q_proj,up_proj").unwrap_err().to_string();
    for part in
        ["q_proj is not a module of phi3: it is part of qkv_proj", "it is part of gate_up_proj"]
    {
        assert!(error.contains(part), "{error}");
    }
    // The default is the attention's input, as it is q_proj and v_proj elsewhere.
    let specs = of("use_peft=true").unwrap();
    assert!(specs.iter().all(|s| s.name.contains("qkv_proj.lora_")), "{specs:?}");
    assert_eq!(specs.len(), 2 * 2);
}

#[test]
fn one_run_has_one_choice_of_longropes_factors() {
    let mut cx = cpu();
    let ids: Vec<u32> = (0..40).collect();
    let logps = |cx: &mut Cx, model: &Decoder| {
        let sequence = [Sequence { ids: &ids, target: None }];
        bits(&model.logps(cx, &sequence).unwrap().concat())
    };
    // 256 is the original length: up to it the factors are the short ones, whatever the length.
    let mut short = decoder(&cx, golden("phi4_mini"), 64);
    let first = logps(&mut cx, &short);
    short.ensure_positions(&cx, 256).unwrap();
    assert_eq!(logps(&mut cx, &short), first);
    let error = short.ensure_positions(&cx, 257).unwrap_err().to_string();
    assert!(
        error.contains("a sequence of 257 tokens is longer than longrope's original"),
        "{error}"
    );
    assert_eq!(logps(&mut cx, &short), first, "an error changes nothing");
    let mut long = decoder(&cx, golden("phi4_mini"), 1);
    long.ensure_positions(&cx, 257).unwrap();
    let other = logps(&mut cx, &long);
    assert_ne!(other, first);
    long.ensure_positions(&cx, 400).unwrap();
    assert_eq!(logps(&mut cx, &long), other);
    // Another run chooses anew, either way.
    long.begin_run(&cx, 60).unwrap();
    assert_eq!(logps(&mut cx, &long), first);
    long.begin_run(&cx, 300).unwrap();
    assert_eq!(logps(&mut cx, &long), other);
}

#[test]
fn layouts_say_which_layers_turn_what() {
    let load = |case: &str| load_config(golden(case)).unwrap();
    let smol = load("smollm3");
    assert_eq!(smol.layer_rope, [Some(0), None, Some(0), None]);
    assert_eq!(smol.sliding_window, [None, Some(16), None, Some(16)]);
    let mini = load("phi4_mini");
    assert_eq!((mini.head_dim, mini.ropes[0].turned(mini.head_dim)), (16, 12));
    assert_eq!(mini.ropes[0].attention_factor(), (1.0 + 2f64.ln() / 256f64.ln()).sqrt());
    assert!(load("phi3_long").ropes[0].is_long(3));
    assert_eq!(load("ministral").sliding_window, [Some(16), None, Some(16), None]);
    assert_eq!(load("ministral3").ropes[0].query_scale.unwrap().beta, 0.5);
}
