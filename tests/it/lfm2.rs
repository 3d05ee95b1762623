//! LFM2: short convolutions in the place of attention. Log-probs of transformers, shared prompts,
//! generation in all ways, adapters of PEFT, online RL, GGUF files, and what config.json may say.
//! Losses of TRL, greedy tokens and the memory plan are compared in the tests of all families.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use temper::autograd::{Cx, Recompute, Tape};
use temper::device::DType;
use temper::gguf::convert::convert;
use temper::gguf::read::GgufFile;
use temper::methods::offline::sft::{Sft, SftRun};
use temper::model::batch::{Batch, Group, Sequence};
use temper::model::decoder::Decoder;
use temper::model::folder::load_config;
use temper::model::layout::{Mixer, ModelConfig};
use temper::model::specs::{Proj, Role, expected_params};
use temper::ops::case::Rng;
use temper::ops::head::head_logps;
use temper::rollout::sample::Sampling;
use temper::rollout::{Engine, EngineOptions, Request};
use temper::tensor::{ParamSetId, Tensor};
use temper::train::Trainer;
use temper::train::tuning::prepare;

use crate::agreement::{adapter_is_pefts, difference};
use crate::support::{
    self, MODEL, bits, cpu, cpu_in, decoder, done, fixture, golden, metrics, words, write_rows,
};

/// As transformers saves it; with biases, four taps and the hub's keys.
const CASES: [&str; 2] = ["lfm2", "lfm2_bias"];
const VOCAB: usize = 320;

fn read(raw: Value) -> temper::error::Result<ModelConfig> {
    ModelConfig::from_json("config.json", raw.as_object().unwrap().clone())
}

#[test]
fn log_probs_are_those_of_transformers() {
    for case in CASES {
        let mut cx = cpu();
        let model = decoder(&cx, golden(case), 128);
        let worst = difference(&mut cx, &model, &support::json(golden(case).join("score.json")));
        println!("{case}: {worst:.1e}");
        assert!(worst <= 5e-5, "{case}: {worst:.1e}");
    }
}

/// config.json of LFM2-1.2B on the hub, without what says nothing here.
fn hub() -> Value {
    json!({
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": 65536,
        "block_auto_adjust_ff_dim": true, "block_dim": 2048, "block_ff_dim": 12288,
        "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-5,
        "conv_L_cache": 3, "conv_bias": false, "conv_dim": 2048, "eos_token_id": 7,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048, "norm_eps": 1e-5,
        "max_position_embeddings": 128000, "num_attention_heads": 32, "num_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16"
    })
}

#[test]
fn the_hubs_config_says_layers_and_sizes() {
    let config = read(hub()).unwrap();
    let attends = |i: &usize| config.mixers[*i] == Mixer::Attention;
    assert_eq!((0..16).filter(attends).collect::<Vec<_>>(), [2, 5, 8, 10, 12, 14]);
    assert_eq!(config.mixers[0], Mixer::ShortConv { taps: 3, bias: false });
    assert_eq!((config.intermediate_size, config.head_dim, config.num_kv_heads), (8192, 64, 8));
    assert!(config.tie_word_embeddings && config.rms_norm_eps == 1e-5);
    let total: usize = expected_params(&config).iter().map(|s| s.len()).sum();
    assert_eq!(total, 1_170_340_608, "the model's size on its card is 1.17B");
    let with = |key: &str, value: Value| {
        let mut raw = hub();
        raw[key] = value;
        read(raw)
    };
    let mlp = |key: &str, value: Value| with(key, value).unwrap().intermediate_size;
    assert_eq!(mlp("block_ff_dim", json!(6656)), 4608); // LFM2-350M
    assert_eq!(mlp("block_auto_adjust_ff_dim", json!(false)), 12288);
    assert_eq!(mlp("block_ffn_dim_multiplier", json!(1.3)), 10752);
    assert_eq!(mlp("block_ffn_dim_multiplier", Value::Null), 8192);
    assert!(!with("tie_embedding", json!(false)).unwrap().tie_word_embeddings);
    let all = with("full_attn_idxs", Value::Null).unwrap();
    assert!(all.conv_taps().is_none(), "attention everywhere, as in transformers");
    let listed = with("layer_types", json!(vec!["conv"; 16])).unwrap();
    assert!(!listed.mixers.contains(&Mixer::Attention), "layer_types goes first");
    for (key, value, problem) in [
        ("conv_L_cache", json!(0), "conv_L_cache is 0; it must be an integer from 1 to 64"),
        ("full_attn_idxs", json!([2, 16]), "full_attn_idxs has 16; it must be the number of a"),
        (
            "layer_types",
            json!(vec!["conv"; 3]),
            "layer_types has 3 entries, num_hidden_layers is 16",
        ),
        ("layer_types", json!(vec!["mamba"; 16]), "supported: full_attention and conv"),
        ("block_ffn_dim_multiplier", json!(-1), "block_ffn_dim_multiplier is -1; it must be"),
        ("block_ff_dim", json!("many"), "block_ff_dim is \"many\"; it must be an integer"),
    ] {
        let error = with(key, value).unwrap_err().to_string();
        assert!(error.contains(problem), "{key}: {error}");
    }
}

#[test]
fn an_untied_head_is_saved_under_both_names_of_its_key() {
    let mut config = load_config(golden("lfm2_bias")).unwrap();
    assert!(config.tie_word_embeddings && config.raw.contains_key("tie_embedding"));
    config.tie_word_embeddings = false;
    let saved = config.to_json(temper::tensor::safetensors::HostDtype::F32);
    assert_eq!([&saved["tie_embedding"], &saved["tie_word_embeddings"]], [&json!(false); 2]);
    assert!(!read(Value::Object(saved)).unwrap().tie_word_embeddings);
}

/// Prompts of which some are shorter than the filters, with completions of one token and more.
fn groups(rng: &mut Rng) -> Vec<(Vec<u32>, Vec<Vec<u32>>)> {
    let mut tokens = |n: usize| (0..n).map(|_| rng.below(VOCAB) as u32).collect::<Vec<u32>>();
    let sizes: [(usize, &[usize]); 5] =
        [(1, &[4, 9]), (2, &[1, 3, 6]), (3, &[5, 1]), (70, &[12, 1, 2, 30]), (4, &[8])];
    sizes.map(|(n, own)| (tokens(n), own.iter().map(|m| tokens(*m)).collect())).into()
}

/// Log-probs of a batch and the gradients of all parameters, from the same upstream numbers.
fn gradients(cx: &mut Cx, model: &Decoder, batch: &Batch) -> (Vec<u32>, Vec<f32>) {
    let (arena, slots) = model.params.gradients(cx).unwrap();
    cx.param_grads[ParamSetId::Model] = slots;
    cx.tape = Some(Tape::default());
    let hidden = model.target_hidden(cx, batch).unwrap();
    let mut rng = Rng(99);
    let numbers: Vec<f32> = (0..hidden.numel()).map(|_| rng.normal() as f32).collect();
    let up = Tensor::from_f32(&cx.pool, "up", hidden.dtype(), hidden.shape(), &numbers).unwrap();
    cx.backward(vec![(hidden.clone(), up)]).unwrap();
    cx.param_grads[ParamSetId::Model].finish().unwrap();
    let logps = head_logps(cx, &hidden, &model.head, &batch.targets, 1.0).unwrap().logp;
    (bits(&logps.to_f32().unwrap()), arena.to_f32().unwrap())
}

#[test]
fn a_shared_prompt_gives_the_bits_and_the_gradients_of_whole_rows() {
    for case in CASES {
        for dtype in [DType::F32, DType::BF16] {
            let mut cx = cpu_in(dtype);
            let model = decoder(&cx, golden(case), 128);
            let groups = groups(&mut Rng(3));
            let mut whole = Vec::new();
            for (prompt, completions) in &groups {
                for own in completions {
                    let ids = [prompt.as_slice(), own].concat();
                    let target: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
                    whole.push((ids, target));
                }
            }
            let sequences: Vec<Sequence> =
                whole.iter().map(|(ids, t)| Sequence { ids, target: Some(t) }).collect();
            let shared: Vec<Group> = groups
                .iter()
                .map(|(prompt, own)| Group {
                    prompt,
                    completions: own.iter().map(|ids| Sequence { ids, target: None }).collect(),
                })
                .collect();
            // A completion's first token is a target too.
            let all: Vec<Vec<bool>> =
                groups.iter().flat_map(|g| &g.1).map(|own| vec![true; own.len()]).collect();
            let mut masks = all.iter();
            let shared: Vec<Group> = shared
                .into_iter()
                .map(|mut group| {
                    for sequence in &mut group.completions {
                        sequence.target = masks.next().map(Vec::as_slice);
                    }
                    group
                })
                .collect();
            let apart = Batch::new(&cx, &sequences, VOCAB).unwrap();
            let together = Batch::grouped(&cx, &shared, VOCAB).unwrap();
            assert!(together.rows < apart.rows);
            let (want, wide) = gradients(&mut cx, &model, &apart);
            let (got, narrow) = gradients(&mut cx, &model, &together);
            assert_eq!(got, want, "{case} {dtype:?}: log-probs");
            let again = gradients(&mut cx, &model, &together).1;
            assert_eq!(bits(&narrow), bits(&again), "{case} {dtype:?}: the same bits always");
            let error: f64 =
                narrow.iter().zip(&wide).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
            let size: f64 = wide.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>().sqrt();
            // bf16: what reaches a shared row is rounded once for all that read it.
            let limit = if dtype == DType::F32 { 2e-6 } else { 2e-2 };
            assert!(error <= limit * size, "{case} {dtype:?}: {:.1e}", error / size);
        }
    }
}

#[test]
fn convolutions_generate_the_same_in_all_ways() {
    for case in CASES {
        for dtype in [DType::F32, DType::BF16] {
            let mut cx = cpu_in(dtype);
            let mut model = decoder(&cx, golden(case), 256);
            let mut rng = Rng(21);
            let prompt = |n: usize, rng: &mut Rng| -> Vec<u32> {
                (0..n).map(|_| rng.below(VOCAB) as u32).collect()
            };
            let prompts: Vec<Vec<u32>> =
                [1, 2, 3, 63, 64, 65, 66, 130].map(|n| prompt(n, &mut rng)).into();
            let requests = Request::numbered(prompts, 4);
            let sampling = Sampling { temperature: 0.8, seed: 9, ..Sampling::greedy() };
            let mut options = EngineOptions::new(40, sampling, vec![5, 17], 32);
            options.replay = Some(false);
            options.ahead = Some(false);
            let mut engine = Engine::new(&cx, &mut model, options.clone(), 200).unwrap();
            let want = engine.generate(&mut cx, &model, &requests).unwrap();
            assert!(engine.counts.shared > 0);
            let mut preempted = 0;
            for way in [(false, false), (true, true), (true, false), (false, true)] {
                (options.replay, options.ahead) = (Some(way.0), Some(way.1));
                options.max_sequences = 4 + rng.below(20);
                options.max_step_tokens = options.max_sequences + rng.below(60);
                options.pages = Some(6 + rng.below(8));
                let mut engine = Engine::new(&cx, &mut model, options.clone(), 200).unwrap();
                engine.shuffle_pages(rng.bits());
                let got = engine.generate(&mut cx, &model, &requests).unwrap();
                assert!(got == want, "{case} {dtype:?} {way:?}");
                preempted += engine.counts.preempted;
            }
            assert!(preempted > 0, "the case was to have preemptions");
        }
    }
}

#[test]
fn recomputed_convolutions_have_the_same_losses() {
    let (run, _) =
        SftRun::load(None, &words("learning_rate=1e-2 per_device_train_batch_size=2")).unwrap();
    let losses = |recompute| {
        let mut cx = cpu();
        cx.set_rng(0, 0, 0).unwrap();
        cx.recompute = recompute;
        let model = decoder(&cx, golden("lfm2_bias"), 64);
        let row = |r: usize| {
            ((0..40).map(|i| ((r * 7 + i * 3) % VOCAB) as u32).collect(), vec![true; 40])
        };
        let mut sft = Sft::from_sequences((0..4).map(row).collect()).unwrap();
        let mut trainer = Trainer::new(cx, model, run.training.clone(), 4).unwrap();
        (0..6).map(|_| trainer.step(&mut sft).unwrap().loss.to_bits()).collect::<Vec<_>>()
    };
    let off = losses(Recompute::Off);
    assert_eq!(off, losses(Recompute::Light));
    assert_eq!(off, losses(Recompute::Layers));
}

fn base_of(dir: &Path) -> String {
    let config = support::json(dir.join("adapter_config.json"));
    config["base_model_name_or_path"].as_str().unwrap().trim_start_matches("models/").into()
}

#[test]
fn adapters_on_convolutions_are_pefts() {
    let all: Value = support::json(fixture("conv_peft.json"));
    for (case, want) in all.as_object().unwrap() {
        let dir = fixture("conv_peft").join(case);
        adapter_is_pefts(case, &dir, &base_of(&dir), want);
    }
}

#[test]
fn targets_are_named_as_in_the_model() {
    let of = |keys: &str| {
        let (run, _) = SftRun::load(None, &words(&format!("use_peft=true {keys}"))).unwrap();
        let cx = cpu();
        let base = decoder(&cx, golden("lfm2"), 16);
        let model = prepare(&cx, base, &run.peft, None, Path::new(MODEL), 1)?;
        let is = |role: Role| match role {
            Role::LoraB(proj) | Role::Ia3(proj) => Some(proj),
            _ => None,
        };
        Ok::<_, temper::error::Error>(
            model.trained().specs.iter().filter_map(|s| Some((s.layer?, is(s.role)?))).collect(),
        )
    };
    let count = |keys: &str| -> usize { of(keys).map(|v: Vec<(usize, Proj)>| v.len()).unwrap() };
    // Layers of attention: q, k, v, out; of convolution: in, out; of both: w1, w2, w3.
    assert_eq!(count("lora_target_modules=all-linear"), 3 * 5 + 7);
    assert_eq!(count("lora_target_modules=in_proj"), 3);
    assert_eq!(count("lora_target_modules=out_proj"), 4);
    assert_eq!(count("lora_target_modules=conv.out_proj,self_attn.q_proj"), 4);
    assert_eq!(count("lora_target_modules=w1,w2,w3"), 12);
    assert_eq!(count(""), 2, "q_proj and v_proj, PEFT's usual ones");
    assert_eq!(count("peft_type=ia3"), 2 + 4, "k_proj, v_proj, and w2 of every layer");
    let error = |keys: &str| of(keys).unwrap_err().to_string();
    for (keys, want) in [
        ("lora_target_modules=o_proj", "o_proj is called out_proj in lfm2; use that name"),
        ("lora_target_modules=down_proj", "down_proj is called w2 in lfm2; use that name"),
        ("lora_target_modules=experts", "q_proj, k_proj, v_proj, out_proj, in_proj, w1, w3, w2"),
        ("lora_target_modules=conv", "no layer has a module conv"),
        ("lora_target_modules=q_proj lora_modules_to_save=conv", "name the inner one: conv.conv"),
        ("lora_target_modules=q_proj lora_modules_to_save=in_proj", "in_proj is a projection"),
    ] {
        let error = error(keys);
        assert!(error.contains(want), "{keys}: {error}");
    }
    assert_eq!(count("lora_target_modules=q_proj lora_modules_to_save=conv.conv"), 1);
}

/// A golden folder with the tokenizer of `sft/model`.
fn whole_folder(dir: &Path, case: &str) -> PathBuf {
    let out = dir.join(case);
    std::fs::create_dir_all(&out).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden(case).join(name), out.join(name)).unwrap();
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(Path::new(MODEL).join(name), out.join(name)).unwrap();
    }
    out
}

#[test]
fn a_merged_convolution_is_the_adapted_one() {
    let dir = tempfile::tempdir().unwrap();
    for case in ["all", "bias", "vectors"] {
        let adapter = fixture("conv_peft").join(case);
        let model = whole_folder(dir.path(), &base_of(&adapter));
        let out = dir.path().join(format!("{case}-merged"));
        let text = |path: &Path| path.to_str().unwrap().to_string();
        let (model, adapter, output) = (text(&model), text(&adapter), text(&out));
        // The command itself compares log-probs.
        done(&[
            "merge",
            "--model",
            &model,
            "--adapter",
            &adapter,
            "--output",
            &output,
            "--dtype",
            "float32",
        ]);
        let mut cx = cpu();
        let merged = decoder(&cx, &out, 128);
        let want = &support::json(fixture("conv_peft.json"))[case]["start"];
        assert!(difference(&mut cx, &merged, want) <= 5e-5, "{case}");
    }
}

#[test]
fn grpo_on_convolutions_samples_what_it_trains() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize| json!({ "prompt": format!("Ana had 21 stones and lost {i}.\n") });
    let data = write_rows(dir.path().join("rows.jsonl"), &(1..9).map(row).collect::<Vec<_>>());
    for (case, keys) in [
        ("lfm2", "dtype=float32"),
        ("lfm2_bias", "dtype=bfloat16"),
        ("lfm2", "use_peft=true lora_target_modules=all-linear lora_dropout=0 load_in_4bit=true"),
    ] {
        let model = whole_folder(dir.path(), case);
        let out = dir.path().join(format!("{case} {keys}"));
        let options = format!(
            "{keys} max_steps=4 num_generations=4 per_device_train_batch_size=8 \
             gradient_accumulation_steps=1 learning_rate=1e-2 max_completion_length=12 beta=0.1 \
             logging_steps=1 device=cpu reward_funcs=regex:^[a-z]"
        );
        temper::Training::new("grpo")
            .unwrap()
            .options(words(&options))
            .model(model.to_str().unwrap())
            .data([&data])
            .output(&out)
            .observer(temper::observer::Silent)
            .run()
            .unwrap();
        let log = metrics(&out);
        let of = |i: usize, name: &str| log[i][name].as_f64().unwrap();
        assert!((0..4).all(|i| of(i, "sampling/ratio_off_one_max") == 0.0), "{case}: {log:?}");
        assert!(of(0, "kl") == 0.0 && (1..4).any(|i| of(i, "kl") > 0.0), "{case}: {log:?}");
        assert!((0..4).any(|i| of(i, "grad_norm") > 0.0), "{case}: {log:?}");
    }
}

#[test]
fn a_file_says_which_layers_have_attention() {
    let dir = tempfile::tempdir().unwrap();
    let [model, out] = ["model", "out.gguf"].map(|name| dir.path().join(name));
    let text = |path: &Path| path.to_str().unwrap().to_string();
    convert(&fixture("gguf/lfm2.gguf"), &model, None).unwrap();
    done(&["export", "--gguf", &text(&model), &text(&out), "--type", "q8_0", "--limit", "1"]);
    let file = GgufFile::open(&out).unwrap();
    let heads = file.ints("lfm2.attention.head_count_kv").unwrap().unwrap();
    assert_eq!(heads, [0, 0, 1, 0]);
    let python = GgufFile::open(&fixture("gguf/lfm2.gguf")).unwrap();
    assert_eq!(python.ints("lfm2.attention.head_count_kv").unwrap().unwrap(), heads);
    // llama.cpp takes filters in F32 alone, without the dimension of 1.
    let filters = file.tensor("blk.0.shortconv.conv.weight").unwrap();
    assert_eq!((filters.dtype.name(), filters.shape.as_slice()), ("F32", [32, 3].as_slice()));
    assert_eq!(file.tensor("blk.0.shortconv.in_proj.weight").unwrap().dtype.name(), "Q8_0");
    // What llama.cpp has no place for.
    for (case, settings, want) in [
        ("lfm2_bias", json!({}), "conv_bias is true, but there it is false"),
        (
            "lfm2",
            json!({ "layer_types": ["conv", "conv", "conv", "conv"] }),
            "no layer has attention, but there some layers have it",
        ),
    ] {
        let mut config = load_config(golden(case)).unwrap();
        config.raw.extend(settings.as_object().unwrap().clone());
        let config = read(Value::Object(config.raw)).unwrap();
        let mut notes = Vec::new();
        let error = temper::gguf::entries::entries_of(Path::new("model"), &config, &mut notes);
        let error = error.err().unwrap().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn damaged_lists_of_a_file_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let good = std::fs::read(fixture("gguf/lfm2.gguf")).unwrap();
    let key = b"lfm2.attention.head_count_kv";
    let at = good.windows(key.len()).position(|w| w == key).unwrap() + key.len();
    // Its type, the type of its items, their count; then the items.
    let items = at + 4 + 4 + 8;
    assert_eq!(good[at + 8..at + 16], 4u64.to_le_bytes());
    for (offset, value, want) in [
        (items + 8, 0i32, "is 0 in every layer: no layer has attention"),
        (items, 2, "is 2 in one layer and 1 in another"),
        (items + 8, -1, "num_key_value_heads is -1"),
    ] {
        let mut bytes = good.clone();
        bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        let path = dir.path().join("bad.gguf");
        std::fs::write(&path, bytes).unwrap();
        let out = dir.path().join("out");
        let error = convert(&path, &out, None).err().unwrap().to_string();
        assert!(error.contains(want), "{error}");
        assert!(!out.exists());
    }
}

#[test]
fn inspect_shows_what_a_layer_has() {
    let text = done(&["inspect", "config", "--model", golden("lfm2").to_str().unwrap()]);
    assert!(text.contains("layers 0, 1, 3: a short convolution over 3 tokens"), "{text}");
    assert!(text.contains("layers 2: rope") && !text.contains("no rope"), "{text}");
    assert!(text.contains("model.layers.3.conv.conv.weight"), "{text}");
}
