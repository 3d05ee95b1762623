//! LoRA on the token embedding and on the head: exact in generation, in files, in a resumed run.
//! Its losses are compared with PEFT's in `peft::`, merged models in `adapters::`.

use std::path::Path;

use serde_json::json;
use temper::Training;
use temper::autograd::Cx;
use temper::checkpoint::{CheckpointWriter, checkpoint_path};
use temper::device::DType;
use temper::methods::offline::sft::SftRun;
use temper::model::adapter::config::Targets;
use temper::model::adapter::target::{TargetRules, bound};
use temper::model::adapter::{Adapter, folder};
use temper::model::batch::Sequence;
use temper::model::decoder::Decoder;
use temper::model::layout::ModelConfig;
use temper::observer::Silent;
use temper::ops::case::Rng;
use temper::rollout::sample::Sampling;
use temper::rollout::{Engine, EngineOptions, Request};
use temper::train::Trainer;
use temper::train::state::{FolderParts, RunState};
use temper::train::tuning::{prepare, scheme};

use crate::peft::{largest_difference, logps, losses, model, trainer};
use crate::support::{MODEL, bits, cpu, cpu_in, fixture, json, metrics, words, write_rows};

const ENDS: &str =
    "use_peft=true lora_target_modules=q_proj,down_proj,embed_tokens,lm_head lora_r=4";

fn new_model(cx: &Cx, keys: &str) -> (Decoder, SftRun) {
    let run = SftRun::load(None, &words(keys)).unwrap().0;
    let base = Decoder::folder(MODEL).unwrap().storage(scheme(&run.peft)).positions(512);
    let base = base.build(cx).unwrap();
    (prepare(cx, base, &run.peft, None, Path::new(MODEL), 42).unwrap(), run)
}

/// Every trained value moved, so that nothing of the adapter is zero.
fn stir(model: &Decoder) {
    let (params, mut rng) = (model.trained(), Rng(12));
    for i in 0..params.specs.len() {
        let mut values = params.weight_view(i).unwrap().to_f32().unwrap();
        values.iter_mut().for_each(|v| *v += 0.1 * rng.normal() as f32);
        params.store(i, &values).unwrap();
    }
}

#[test]
fn a_new_pair_changes_nothing_and_a_moved_one_is_the_trainers_in_generation() {
    for (dtype, more) in [
        (DType::F32, ""),
        (DType::F32, "load_in_4bit=true"),
        (DType::F32, "load_in_8bit=true"),
        (DType::BF16, ""),
    ] {
        let mut cx = cpu_in(dtype);
        let (mut decoder, _) = new_model(&cx, &format!("{ENDS} {more}"));
        let ids = &losses()["ids"];
        let plain = decoder.clone().with_adapter(None).unwrap();
        let base = logps(&mut cx, &plain, ids);
        assert_eq!(logps(&mut cx, &decoder, ids), base, "{dtype:?} {more}: zero at first");
        assert!(decoder.reference(&cx).unwrap().adapter.is_none(), "the reference is the base");
        stir(&decoder);
        assert!(largest_difference(&logps(&mut cx, &decoder, ids), &base) > 0.1);
        let sampling = Sampling { temperature: 1.0, seed: 3, ..Sampling::greedy() };
        let prompts: Vec<Vec<u32>> = vec![vec![5, 9, 11], vec![7], (3..90).collect()];
        let requests = Request::numbered(prompts.clone(), 3);
        let mut seen = Vec::new();
        for (rows, tokens) in [(9, 200), (2, 7)] {
            let mut options = EngineOptions::new(24, sampling.clone(), vec![], rows);
            options.max_step_tokens = tokens;
            let mut engine = Engine::new(&cx, &mut decoder, options, 128).unwrap();
            let mut all = engine.generate(&mut cx, &decoder, &requests).unwrap();
            all.sort_by_key(|c| (c.request, c.member));
            for c in &all {
                let prompt = &prompts[c.request];
                let ids = [prompt.as_slice(), &c.ids].concat();
                let target: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
                let row = [Sequence { ids: &ids, target: Some(&target) }];
                let trained = decoder.logps(&mut cx, &row).unwrap();
                assert_eq!(bits(&trained[0]), bits(&c.logps), "{dtype:?} {more}");
            }
            seen.push(all);
        }
        assert!(seen[0] == seen[1], "another batch, the same completions");
    }
}

#[test]
fn grpo_with_pairs_on_embedding_and_head_samples_what_it_trains() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize| json!({ "prompt": format!("Ana had 21 stones and lost {i}.\n") });
    let data = write_rows(dir.path().join("rows.jsonl"), &(1..9).map(row).collect::<Vec<_>>());
    let out = dir.path().join("out");
    let options = format!(
        "{ENDS} lora_dropout=0 max_steps=4 num_generations=4 per_device_train_batch_size=8 \
         gradient_accumulation_steps=1 learning_rate=1e-2 max_completion_length=12 beta=0.1 \
         logging_steps=1 device=cpu reward_funcs=regex:^[a-z]"
    );
    let run = Training::new("grpo").unwrap().options(words(&options));
    run.model(MODEL).data([&data]).output(&out).observer(Silent).run().unwrap();
    let log = metrics(&out);
    let of = |i: usize, name: &str| log[i][name].as_f64().unwrap();
    assert!((0..4).all(|i| of(i, "sampling/ratio_off_one_max") == 0.0), "{log:?}");
    assert!(of(0, "kl") == 0.0 && of(3, "kl") > 0.0, "{log:?}");
}

#[test]
fn resumed_with_pairs_on_embedding_and_head_has_the_same_bits() {
    let keys = format!("{ENDS} max_steps=6 learning_rate=1e-2 lora_dropout=0.1");
    let start = || {
        let cx = cpu();
        let (decoder, run) = new_model(&cx, &keys);
        trainer(cx, decoder, &run)
    };
    let weights = |t: &Trainer| t.model.trained().weights.to_vec::<u32>().unwrap();
    let tmp = tempfile::tempdir().unwrap();
    let (mut whole, mut sft) = start();
    for step in 1..=6u64 {
        whole.step(&mut sft).unwrap();
        let mut writer = CheckpointWriter::new(tmp.path(), step, 0).unwrap();
        whole.write_state(&mut writer, &FolderParts::default(), &RunState::default()).unwrap();
        writer.finish().unwrap();
    }
    let (mut resumed, mut sft) = start();
    resumed.read_state(&checkpoint_path(tmp.path(), 3)).unwrap();
    (3..6).for_each(|_| drop(resumed.step(&mut sft).unwrap()));
    assert!(weights(&resumed) == weights(&whole));
    // The checkpoint is an adapter folder, with PEFT's shapes.
    let cx = cpu();
    let (plain, _) = new_model(&cx, "");
    let dir = checkpoint_path(tmp.path(), 6);
    let read = Adapter::load(&cx, &dir, &plain.config, &plain.params).unwrap();
    let file =
        temper::tensor::safetensors::SafeFolder::open_file(dir.join("adapter_model.safetensors"))
            .unwrap();
    let shape = |name: &str| file.get(&format!("base_model.model.{name}")).unwrap().shape;
    assert_eq!(shape("model.embed_tokens.lora_embedding_A"), [4, 320]);
    assert_eq!(shape("model.embed_tokens.lora_embedding_B"), [32, 4]);
    assert_eq!(shape("lm_head.lora_A.weight"), [4, 32]);
    assert_eq!(shape("lm_head.lora_B.weight"), [320, 4]);
    assert!(read.params.weights.to_vec::<u32>().unwrap() == weights(&whole));
}

/// PEFT saves the weights of an embedding and a head that have LoRA with the adapter.
#[test]
fn a_folder_with_the_bases_weights_is_read_where_they_are_the_bases() {
    let cx = cpu();
    let name = "lora_ends";
    let base = losses()["runs"][name]["base"].as_str().unwrap().to_string();
    let dir = fixture("peft").join(name);
    let file = dir.join("adapter_model.safetensors");
    let names = temper::tensor::safetensors::SafeFolder::open_file(&file).unwrap();
    assert!(names.names().any(|n| n.ends_with("lm_head.base_layer.weight")));
    let (decoder, _) = model(&cx, &base, name, &[]);
    // On a base of other weights the adapter would be another model than PEFT's.
    let other = decoder.params.by_name("lm_head.weight").unwrap();
    let n = decoder.params.specs[other].len();
    decoder.params.store(other, &vec![0.5; n]).unwrap();
    let error = Adapter::load(&cx, &dir, &decoder.config, &decoder.params).err().unwrap();
    assert!(error.to_string().contains("differs from"), "{error}");
    // What is written holds the pairs alone.
    let tmp = tempfile::tempdir().unwrap();
    let (decoder, _) = model(&cx, &base, name, &[]);
    let (adapter, out) = (decoder.adapter.as_ref().unwrap(), tmp.path().join("again"));
    folder::write(&out, adapter, &[], &mut |i| adapter.params.weight_view(i)?.to_f32()).unwrap();
    let again =
        temper::tensor::safetensors::SafeFolder::open_file(out.join("adapter_model.safetensors"))
            .unwrap();
    assert!(again.names().all(|n| n.contains("lora_")));
    for n in again.names() {
        assert_eq!(again.get(n).unwrap().bytes, names.get(n).unwrap().bytes, "{n}");
    }
    assert_eq!(
        json(out.join("adapter_config.json"))["target_modules"],
        json(dir.join("adapter_config.json"))["target_modules"]
    );
}

#[test]
fn what_does_not_go_with_pairs_on_embedding_and_head_is_refused() {
    let refusal = |keys: &str| {
        let cx = cpu();
        let run = SftRun::load(None, &words(keys)).unwrap().0;
        let base = Decoder::folder(MODEL).unwrap().positions(8).build(&cx).unwrap();
        prepare(&cx, base, &run.peft, None, Path::new(MODEL), 1).err().unwrap().to_string()
    };
    for (keys, said) in [
        (format!("{ENDS} use_dora=true"), "support only plain LoRA"),
        (format!("{ENDS} init_lora_weights=pissa lora_dropout=0"), "support only plain LoRA"),
        ("use_peft=true peft_type=ia3 lora_target_modules=lm_head".into(), "support only LoRA"),
        ("use_peft=true lora_target_modules=embed_toknes".into(), "did you mean embed_tokens?"),
        (format!("{ENDS} ensure_weight_tying=true"), "pairs of their own"),
        (
            "use_peft=true lora_target_modules=lm_head layers_to_transform=1".into(),
            "matches no module",
        ),
    ] {
        let text = refusal(&keys);
        assert!(text.contains(said), "{keys}: {text}");
    }
    // Trained whole, it gets no pair, as in PEFT.
    let cx = cpu();
    let (decoder, _) = new_model(&cx, &format!("{ENDS} lora_modules_to_save=lm_head"));
    let adapter = decoder.adapter.as_ref().unwrap();
    assert!(adapter.head.is_none() && adapter.embedding.is_some());
    assert!(adapter.params.by_name("base_model.model.lm_head.weight").is_some());
}

/// What PEFT 0.19.1's `check_target_module_exists` finds of the modules outside of the blocks.
#[test]
fn embedding_and_head_are_bound_where_peft_binds_them() {
    let model = ModelConfig::load(Path::new("tests/fixtures/sft/model")).unwrap();
    let names = |names: &[&str]| Targets::Names(names.iter().map(|s| s.to_string()).collect());
    let find = |targets: &Targets, layers: Option<&[usize]>, saved: &[String]| {
        let rules = TargetRules { targets, excluded: None, layers, saved };
        bound(&rules, &model).map(|b| (b.projections.len(), b.embedding, b.head))
    };
    let (layers, saved) = (model.num_layers, ["lm_head".to_string()]);
    for (targets, found) in [
        (names(&["q_proj", "lm_head"]), (layers, false, true)),
        (names(&["model.embed_tokens"]), (0, true, false)),
        (names(&["embed_tokens", "lm_head"]), (0, true, true)),
        (Targets::Pattern(r".*(v_proj|embed_tokens)".into()), (layers, true, false)),
        (Targets::AllLinear, (7 * layers, false, false)),
    ] {
        assert_eq!(find(&targets, None, &[]).unwrap(), found, "{targets:?}");
    }
    let both = names(&["v_proj", "embed_tokens", "lm_head"]);
    assert_eq!(find(&both, Some(&[1]), &[]).unwrap(), (1, false, false), "no layer's");
    assert_eq!(find(&both, None, &saved).unwrap(), (layers, true, false), "trained fully");
    assert!(find(&names(&["embed"]), None, &[]).is_err(), "a whole part of the name");
}
