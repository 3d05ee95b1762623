//! Recorded and replayed decode steps, and tokens that are read one step late, change no
//! completion. The fused rope, and the host's time per step.

use std::path::Path;

use temper::autograd::Cx;
use temper::cli::launches::decode_step;
use temper::device::DType;
use temper::methods::offline::sft::SftRun;
use temper::model::decoder::Decoder;
use temper::model::layout::ModelConfig;
use temper::ops::case::Rng;
use temper::ops::rmsnorm::{Norm, NormWeight};
use temper::ops::rope::{NormOver, QkNorm, RopeTable, rope};
use temper::ops::rope_append::rope_append;
use temper::rollout::sample::Sampling;
use temper::rollout::{Completion, Counts, Engine, EngineOptions, Finish, Request};
use temper::tensor::Tensor;
use temper::train::tuning::{prepare, scheme};

use crate::support::{cpu, cpu_in, fixture, strings};

const VOCAB: usize = 96;

fn model(cx: &Cx, seed: u64) -> Decoder {
    let model = Decoder::builder(ModelConfig::llama(VOCAB, 64, 160, 2, 4, 2, 256, true))
        .positions(256)
        .build(cx)
        .unwrap();
    model.params.initialise(0.2, seed).unwrap();
    model
}

fn requests(rng: &mut Rng, groups: usize, n: usize) -> Vec<Request> {
    let prompts = (0..groups).map(|g| {
        let length = [1, 2, 20, 63, 64, 65, 100, 129][g % 8];
        (0..length).map(|_| rng.below(VOCAB) as u32).collect()
    });
    Request::numbered(prompts.collect::<Vec<_>>(), n)
}

fn engine(cx: &Cx, model: &mut Decoder, options: &EngineOptions, replay: bool) -> Engine {
    let options = EngineOptions { replay: Some(replay), ahead: Some(replay), ..options.clone() };
    Engine::new(cx, model, options, 200).unwrap()
}

fn completed(
    engine: &mut Engine,
    cx: &mut Cx,
    model: &Decoder,
    requests: &[Request],
) -> Vec<Completion> {
    engine.generate(cx, model, requests).unwrap()
}

/// Completions of the same requests, launched or replayed, read at once or late, with random
/// numbers of sequences, pieces of prompts and pages.
fn same_in_all_ways(dtype: DType, sampling: &Sampling) {
    let mut cx = cpu_in(dtype);
    let mut model = model(&cx, 11);
    let mut rng = Rng(17);
    let requests = requests(&mut rng, 16, 5);
    let mut options = EngineOptions::new(40, sampling.clone(), vec![5, 17], 80);
    let want = completed(&mut engine(&cx, &mut model, &options, false), &mut cx, &model, &requests);
    assert!(want.len() == 80 && want.iter().any(|c| c.finish == Finish::Stop));
    assert!(want.iter().any(|c| c.finish == Finish::Length));
    let mut total = Counts::default();
    for (replay, ahead) in [(true, false), (false, true), (true, true), (true, true)] {
        options.max_sequences = 8 + rng.below(25);
        options.max_step_tokens = options.max_sequences + rng.below(200);
        options.pages = Some(6 + rng.below(14));
        (options.replay, options.ahead) = (Some(replay), Some(ahead));
        let mut engine = Engine::new(&cx, &mut model, options.clone(), 200).unwrap();
        let found = completed(&mut engine, &mut cx, &model, &requests);
        assert!(found == want, "replay {replay}, ahead {ahead}");
        assert_eq!(engine.counts.replayed > 20, replay, "{:?}", engine.counts);
        assert_eq!(engine.counts.tokens_out, want.iter().map(|c| c.ids.len()).sum::<usize>());
        total.preempted += engine.counts.preempted;
        // A second generation replays what the first one recorded.
        let steps = engine.counts.replayed;
        assert!(completed(&mut engine, &mut cx, &model, &requests) == want);
        assert!(!replay || engine.counts.replayed > 2 * steps, "the graphs are there already");
    }
    assert!(total.preempted > 0, "{total:?}: the case was to have preemptions");
}

#[test]
fn replayed_and_late_steps_change_no_completion() {
    let sampling = Sampling { temperature: 0.8, seed: 9, ..Sampling::greedy() };
    same_in_all_ways(DType::F32, &sampling);
    same_in_all_ways(DType::BF16, &sampling);
}

#[test]
fn replayed_and_late_steps_remember_what_was_seen() {
    let sampling =
        Sampling { temperature: 0.9, top_p: 0.9, repetition_penalty: 1.3, ..Sampling::greedy() };
    same_in_all_ways(DType::F32, &sampling);
}

#[test]
fn tokens_are_read_a_step_late_and_none_is_wasted_at_the_length() {
    let mut cx = cpu();
    let mut model = model(&cx, 11);
    let options = EngineOptions::new(3, Sampling::greedy(), vec![], 4);
    let mut engine = engine(&cx, &mut model, &options, true);
    for number in 0..2 {
        engine.submit(&Request { prompt: vec![7], n: 1, number }).unwrap();
    }
    let mut counts = Vec::new();
    while engine.has_work() {
        counts.push(engine.step(&mut cx, &model).unwrap().tokens.len());
    }
    assert_eq!(counts, [0, 2, 2, 2]);
    // Three steps of two rows: the fourth call only read.
    assert_eq!((engine.counts.steps, engine.counts.tokens_in, engine.counts.tokens_out), (3, 6, 6));
    // What is on its way when everything is forgotten comes to nobody.
    engine.submit(&Request { prompt: vec![3, 4], n: 2, number: 0 }).unwrap();
    engine.step(&mut cx, &model).unwrap();
    engine.abort();
    let again =
        completed(&mut engine, &mut cx, &model, &[Request { prompt: vec![7], n: 1, number: 0 }]);
    assert_eq!((again.len(), again[0].ids.len()), (1, 3));
}

#[test]
fn a_graph_serves_new_weights_and_not_another_model_or_sampling() {
    let mut cx = cpu();
    let (mut first, mut second) = (model(&cx, 11), model(&cx, 12));
    let sampling = Sampling { temperature: 1.0, seed: 4, ..Sampling::greedy() };
    let options = EngineOptions::new(20, sampling.clone(), vec![], 8);
    let requests = requests(&mut Rng(3), 2, 4);
    let fresh = |cx: &mut Cx, model: &mut Decoder, sampling: &Sampling| {
        let options = EngineOptions { sampling: sampling.clone(), ..options.clone() };
        completed(&mut engine(cx, model, &options, false), cx, model, &requests)
    };
    let mut replaying = engine(&cx, &mut first, &options, true);
    let old = fresh(&mut cx, &mut first, &sampling);
    assert!(completed(&mut replaying, &mut cx, &first, &requests) == old);
    // What the pool gives out after the recording is not the graph's to write to.
    let fill = |name: &str| Tensor::from_f32(&cx.pool, name, DType::F32, &[5000], &[7.5; 5000]);
    let others: Vec<Tensor> = (0..40).map(|_| fill("somebody else's").unwrap()).collect();
    // An optimizer step writes the weights where they are.
    first.params.initialise(0.2, 13).unwrap();
    let new = fresh(&mut cx, &mut first, &sampling);
    assert!(new != old && completed(&mut replaying, &mut cx, &first, &requests) == new);
    assert!(others.iter().all(|t| t.to_f32().unwrap() == [7.5; 5000]));
    let other = fresh(&mut cx, &mut second, &sampling);
    assert!(other != new && completed(&mut replaying, &mut cx, &second, &requests) == other);
    replaying.options.sampling = Sampling::greedy();
    let greedy = fresh(&mut cx, &mut second, &Sampling::greedy());
    assert!(completed(&mut replaying, &mut cx, &second, &requests) == greedy);
    replaying.set_seed(99);
    replaying.options.sampling = Sampling { seed: 99, ..sampling };
    let reseeded = fresh(&mut cx, &mut second, &replaying.options.sampling);
    assert!(
        reseeded != other && completed(&mut replaying, &mut cx, &second, &requests) == reseeded
    );
    // The rope table moves when it grows.
    second.ensure_positions(&cx, 400).unwrap();
    assert!(completed(&mut replaying, &mut cx, &second, &requests) == reseeded);
}

#[test]
fn steps_of_every_kind_of_model_are_recorded() {
    const LORA: [&str; 2] = ["use_peft=true", "lora_target_modules=all-linear"];
    let kinds: [&[&str]; 10] = [
        &[],
        &LORA,
        &[LORA[0], LORA[1], "use_dora=true"],
        &[LORA[0], LORA[1], "load_in_4bit=true"],
        &[LORA[0], LORA[1], "load_in_8bit=true"],
        &[LORA[0], "lora_target_modules=q_proj,embed_tokens,lm_head"],
        &["use_peft=true", "peft_type=ia3"],
        &["use_peft=true", "peft_type=prompt_tuning", "num_virtual_tokens=5"],
        &["use_peft=true", "peft_type=seq_bn"],
        &["use_peft=true", "peft_type=par_bn"],
    ];
    let dir = fixture("sft/model");
    let requests = Request::numbered([vec![5, 9, 11], vec![7], (3..70).collect()], 2);
    for keys in kinds {
        let mut cx = cpu();
        let run = SftRun::load(None, &strings(keys)).unwrap().0;
        let base = Decoder::folder(&dir)
            .unwrap()
            .storage(scheme(&run.peft))
            .positions(256)
            .build(&cx)
            .unwrap();
        let mut model = prepare(&cx, base, &run.peft, None, Path::new(&dir), 42).unwrap();
        let sampling = Sampling { temperature: 1.0, seed: 2, ..Sampling::greedy() };
        let options = EngineOptions::new(12, sampling, vec![], 6);
        let mut launched = engine(&cx, &mut model, &options, false);
        let mut replayed = engine(&cx, &mut model, &options, true);
        let want = completed(&mut launched, &mut cx, &model, &requests);
        assert!(completed(&mut replayed, &mut cx, &model, &requests) == want, "{keys:?}");
        assert!(replayed.counts.replayed > 5, "{keys:?}: {:?}", replayed.counts);
    }
}

/// q, k and v of every row, by rope and by the fused form that writes to a cache.
/// Of each head `turned` values turn; where it is odd, q is scaled by its position, too.
fn fused_rope_has_the_bits_of_rope(
    dtype: DType,
    [heads, kv, dim]: [usize; 3],
    normed: Option<(NormWeight, NormOver)>,
    turned: usize,
) {
    let mut cx = cpu_in(dtype);
    let mut rng = Rng(8);
    let mut real = |cx: &Cx, shape: &[usize]| {
        Tensor::from_f32(&cx.pool, "x", dtype, shape, &values(&mut rng, shape)).unwrap()
    };
    let (rows, width) = (33, (heads + 2 * kv) * dim);
    let qkv = real(&cx, &[rows, width]);
    let width_of = |heads: usize| match normed {
        Some((_, NormOver::Heads)) => heads * dim,
        _ => dim,
    };
    let (q, k) = (real(&cx, &[width_of(heads)]), real(&cx, &[width_of(kv)]));
    let mut rng = Rng(9);
    let mut float = |shape: &[usize]| {
        Tensor::from_f32(&cx.pool, "table", DType::F32, shape, &values(&mut rng, shape)).unwrap()
    };
    let (shape, scaled) = ([50, turned / 2], turned % 2 == 1);
    let table = (turned > 0).then(|| RopeTable {
        cosine: float(&shape),
        sine: float(&shape),
        q_scale: scaled.then(|| float(&shape[..1])),
    });
    let table = table.as_ref();
    let position: Vec<i32> = (0..rows as i32).map(|r| r * 7 % 50).collect();
    let slots: Vec<i32> = (0..rows as i32).map(|r| if r == 4 { -1 } else { 40 - r }).collect();
    let position = cx.ints("position", &position).unwrap();
    let cache = Tensor::new(&cx.pool, "cache", dtype, &[41, 2 * kv * dim]).unwrap();
    cache.zero().unwrap();
    let norm = || {
        let (weight, over) = normed?;
        Some(QkNorm { q: &q, k: &k, norm: Norm { eps: 1e-6, weight }, over })
    };
    let want = rope(&mut cx, &qkv, table, &position, heads, kv, norm()).unwrap();
    let want = want.to_f32().unwrap();
    let places = cx.ints("slots", &slots).unwrap();
    rope_append(&mut cx, &qkv, &cache, table, &position, &places, heads, kv, norm()).unwrap();
    let (found, cached) = (qkv.to_f32().unwrap(), cache.to_f32().unwrap());
    let keys = 2 * kv * dim;
    for (r, slot) in slots.iter().enumerate() {
        let want = &want[r * width..][..width];
        let (want_q, want_kv) = want.split_at(heads * dim);
        assert_eq!(&found[r * width..][..heads * dim], want_q, "row {r} of {dtype:?}");
        if *slot >= 0 {
            assert_eq!(&cached[*slot as usize * keys..][..keys], want_kv, "row {r}");
        }
    }
    assert!(cached[..keys * 7].iter().all(|v| *v == 0.0), "no row has a slot below 8");
}

fn values(rng: &mut Rng, shape: &[usize]) -> Vec<f32> {
    (0..shape.iter().product()).map(|_| rng.normal() as f32).collect()
}

#[test]
fn rope_into_the_cache_has_the_bits_of_rope() {
    for dtype in [DType::F32, DType::BF16] {
        for heads in [[14, 2, 64], [4, 4, 128], [3, 1, 6]] {
            let dim = heads[2];
            let mut norms = vec![None];
            for weight in [NormWeight::Rounded, NormWeight::Once, NormWeight::PlusOne] {
                norms.extend([NormOver::Head, NormOver::Heads].map(|over| Some((weight, over))));
            }
            for turned in [dim, 0, dim / 4 * 2, dim + 1] {
                for norm in &norms {
                    fused_rope_has_the_bits_of_rope(dtype, heads, *norm, turned);
                }
            }
        }
    }
}

#[test]
fn a_download_has_what_memory_held_when_it_was_begun() {
    let cx = cpu();
    let x = Tensor::from_f32(&cx.pool, "x", DType::F32, &[3], &[1.0, 2.0, 3.0]).unwrap();
    let (first, dropped) = (x.begin_download().unwrap(), x.begin_download().unwrap());
    x.upload(&[4f32, 5.0, 6.0]).unwrap();
    drop(dropped);
    let second = x.begin_download().unwrap();
    x.zero().unwrap();
    assert_eq!(second.wait::<f32>().unwrap(), [4.0, 5.0, 6.0]);
    assert_eq!(first.wait::<f32>().unwrap(), [1.0, 2.0, 3.0]);
    let again = cx.device.end_download(0, &mut []).unwrap_err().to_string();
    assert!(again.contains("was not begun, or it has ended"), "{again}");
}

#[test]
fn a_replayed_decode_step_is_one_launch() {
    let mut config = ModelConfig::llama(512, 128, 384, 3, 4, 2, 256, true);
    let launched = decode_step(&config, 5, false).unwrap();
    let replayed = decode_step(&config, 5, true).unwrap();
    assert_eq!(replayed.launches.into_iter().collect::<Vec<_>>(), [("graph".to_string(), 1)]);
    let count = |name: &str| launched.launches.get(name).copied().unwrap_or(0);
    assert_eq!(count("rope_append_0_bf16"), 3, "{:?}", launched.launches);
    assert_eq!(count("few_glu_16_bf16"), 3, "gate, up and activation: {:?}", launched.launches);
    let three: usize = launched.launches.values().sum();
    config.num_layers = 2;
    config.sliding_window.truncate(2);
    config.layer_rope.truncate(2);
    let two: usize = decode_step(&config, 5, false).unwrap().launches.values().sum();
    assert_eq!(three - two, 8, "of a layer: {:?}", launched.launches);
}
