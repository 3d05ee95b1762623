//! The rollout engine: its log-probs are the trainer's, whatever else runs; and what the sampler
//! samples.

use temper::autograd::Cx;
use temper::device::DType;
use temper::model::batch::Sequence;
use temper::model::decoder::Decoder;
use temper::model::layout::ModelConfig;
use temper::ops::case::Rng;
use temper::ops::head::head_logps;
use temper::ops::sample::sample;
use temper::rollout::sample::Sampling;
use temper::rollout::{Completion, Engine, EngineOptions, Finish, Request};
use temper::tensor::Tensor;

use crate::support::{bits, cpu, cpu_in};

const VOCAB: usize = 96;

fn model(dtype: DType) -> (Cx, Decoder) {
    let cx = cpu_in(dtype);
    let model = Decoder::builder(ModelConfig::llama(VOCAB, 64, 160, 2, 4, 2, 256, true))
        .positions(128)
        .build(&cx)
        .unwrap();
    model.params.initialise(0.2, 11).unwrap();
    (cx, model)
}

/// The trainer's log-probs of a completion, with logits times `scale`.
fn trained(
    cx: &mut Cx,
    model: &Decoder,
    prompt: &[u32],
    completion: &[u32],
    scale: f32,
) -> (Vec<f32>, Vec<f32>) {
    let ids: Vec<u32> = prompt.iter().chain(completion).copied().collect();
    let target: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
    let sequence = [Sequence { ids: &ids, target: Some(&target) }];
    let batch = temper::model::batch::Batch::new(cx, &sequence, VOCAB).unwrap();
    let hidden = model.target_hidden(cx, &batch).unwrap();
    let out = head_logps(cx, &hidden, &model.head, &batch.targets, scale).unwrap();
    (out.logp.to_f32().unwrap(), out.entropy.to_f32().unwrap())
}

fn requests(rng: &mut Rng, groups: usize, n: usize) -> Vec<Request> {
    let lengths = [1, 2, 20, 63, 64, 65, 66, 100, 129, 150];
    (0..groups)
        .map(|g| Request {
            prompt: (0..lengths[g % lengths.len()]).map(|_| rng.below(VOCAB) as u32).collect(),
            n,
            number: (g * n) as u32,
        })
        .collect()
}

/// One random way of running the same requests; completions by (request, member).
fn run(
    cx: &mut Cx,
    model: &mut Decoder,
    sampling: &Sampling,
    requests: &[Request],
    rng: &mut Rng,
) -> (Vec<Completion>, usize) {
    let mut options = EngineOptions::new(40, sampling.clone(), vec![5, 17], 3 + rng.below(30));
    options.max_step_tokens = 1 + rng.below(200);
    options.pages = Some(4 + rng.below(40));
    let mut engine = Engine::new(cx, model, options, 200).unwrap();
    // Requests come in any order; their numbers go with them.
    let mut order: Vec<usize> = (0..requests.len()).collect();
    (1..order.len()).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
    for i in &order {
        engine.submit(&requests[*i]).unwrap();
    }
    let mut all = Vec::new();
    while engine.has_work() {
        engine.shuffle_pages(rng.bits());
        all.extend(engine.step(cx, model).unwrap().done);
    }
    all.iter_mut().for_each(|c| c.request = order[c.request]);
    all.sort_by_key(|c| (c.request, c.member));
    (all, engine.counts.preempted)
}

fn exact(dtype: DType) {
    let (mut cx, mut model) = model(dtype);
    let mut rng = Rng(41);
    let requests = requests(&mut rng, 32, 8);
    let sampling = Sampling { temperature: 0.7, seed: 9, ..Sampling::greedy() };
    let (first, mut preempted) = run(&mut cx, &mut model, &sampling, &requests, &mut rng);
    assert_eq!(first.len(), 256);
    for c in &first {
        let prompt = &requests[c.request].prompt;
        let (plain, _) = trained(&mut cx, &model, prompt, &c.ids, 1.0);
        let (scaled, entropy) = trained(&mut cx, &model, prompt, &c.ids, sampling.scale());
        assert_eq!(bits(&c.logps), bits(&plain));
        assert_eq!(bits(&c.logps_scaled), bits(&scaled));
        assert_eq!(bits(&c.entropies), bits(&entropy));
        assert_eq!(c.finish == Finish::Stop, [5, 17].contains(c.ids.last().unwrap()));
    }
    assert!(
        first.iter().any(|c| c.finish == Finish::Stop)
            && first.iter().any(|c| c.finish == Finish::Length)
    );
    assert!(first[0].ids != first[1].ids, "members of a group draw their own tokens");
    for _ in 0..3 {
        let (again, more) = run(&mut cx, &mut model, &sampling, &requests, &mut rng);
        preempted += more;
        assert!(
            again == first,
            "another batch composition, prefill chunking, page layout and order"
        );
    }
    assert!(preempted > 20, "{preempted} preemptions: the case was to have many");
    // What was seen goes along when a sequence starts again.
    let sampling = Sampling { top_p: 0.9, repetition_penalty: 1.3, ..sampling };
    let few = &requests[..10];
    let (first, _) = run(&mut cx, &mut model, &sampling, few, &mut rng);
    let (again, _) = run(&mut cx, &mut model, &sampling, few, &mut rng);
    assert!(again == first && first.len() == 80);
}

#[test]
fn log_probs_of_the_rollout_are_the_trainers_bit_for_bit() {
    exact(DType::F32);
}

#[test]
fn log_probs_of_the_rollout_are_the_trainers_bit_for_bit_in_bf16() {
    exact(DType::BF16);
}

#[test]
fn a_group_prefills_once_and_log_probs_are_of_what_was_sampled() {
    let (mut cx, mut model) = model(DType::F32);
    let prompt: Vec<u32> = (0..130).map(|i| (i * 7 % VOCAB) as u32).collect();
    let sampling = Sampling {
        temperature: 0.9,
        top_k: 20,
        top_p: 0.9,
        min_p: 0.02,
        repetition_penalty: 1.2,
        seed: 4,
    };
    let mut engine =
        Engine::new(&cx, &mut model, EngineOptions::new(5, sampling.clone(), vec![], 16), 200)
            .unwrap();
    let request = Request { prompt: prompt.clone(), n: 16, number: 0 };
    let all = engine.generate(&mut cx, &model, &[request]).unwrap();
    let counts = engine.counts;
    assert_eq!((counts.shared, counts.tokens_out), (15 * 129, 16 * 5));
    assert_eq!(
        counts.tokens_in,
        130 + 15 + 16 * 4,
        "the prompt once, its last token for each sibling, then the others"
    );
    for c in &all {
        for i in 0..c.ids.len() {
            // The distribution by the definition, from the trainer's log-probs of every token at
            // this place.
            let context: Vec<u32> = prompt.iter().chain(&c.ids[..i]).copied().collect();
            let logits: Vec<f64> = (0..VOCAB as u32)
                .map(|t| f64::from(trained(&mut cx, &model, &context, &[t], 1.0).0[0]))
                .collect();
            // log-probs are logits but for a constant, which a repetition penalty would not leave
            // out.
            let shift = logit_shift(&mut cx, &model, &context, &logits);
            let logits: Vec<f64> = logits.iter().map(|l| l + shift).collect();
            let p = sampling.distribution(&logits, &context);
            let want = p[c.ids[i] as usize].ln();
            assert!(
                (f64::from(c.logps_truncated[i]) - want).abs() < 1e-4,
                "{} {want}",
                c.logps_truncated[i]
            );
        }
        if c.member == 1 {
            break; // two members say it; each place costs a forward a token of the vocabulary
        }
    }
}

fn logit_shift(cx: &mut Cx, model: &Decoder, context: &[u32], logps: &[f64]) -> f64 {
    let batch =
        temper::model::batch::Batch::new(cx, &[Sequence { ids: context, target: None }], VOCAB)
            .unwrap();
    let hidden = model.hidden(cx, &batch).unwrap();
    let last = hidden.rows(context.len() - 1, context.len()).unwrap();
    let logits = model.logits(cx, &last).unwrap().to_f32().unwrap();
    f64::from(logits[0]) - logps[0]
}

#[test]
fn too_small_a_cache_and_too_long_a_prompt_are_errors() {
    let (mut cx, mut model) = model(DType::F32);
    let mut options = EngineOptions::new(10, Sampling::greedy(), vec![], 4);
    options.pages = Some(1);
    let error = Engine::new(&cx, &mut model, options.clone(), 100).err().unwrap().to_string();
    assert!(error.contains("pages"), "{error}");
    let mut engine = Engine::new(&cx, &mut model, options, 20).unwrap();
    let request = |n: usize| Request { prompt: vec![1; n], n: 1, number: 0 };
    assert!(engine.submit(&request(11)).unwrap_err().to_string().contains("the limit is 20"));
    assert!(engine.submit(&request(0)).unwrap_err().to_string().contains("no tokens"));
    let bad = Request { prompt: vec![VOCAB as u32], n: 1, number: 0 };
    assert!(
        engine.generate(&mut cx, &model, &[bad]).unwrap_err().to_string().contains("vocabulary")
    );
}

/// 99.9% quantile of chi-square with n degrees of freedom (Wilson and Hilferty), within 1% for n of
/// 2 and more.
fn chi_square_limit(n: usize) -> f64 {
    let n = n as f64;
    n * (1.0 - 2.0 / (9.0 * n) + 3.0902 * (2.0 / (9.0 * n)).sqrt()).powi(3)
}

#[test]
fn a_hundred_thousand_draws_follow_the_truncated_distribution() {
    const VOCAB: usize = 150;
    let plain = Sampling { temperature: 1.0, seed: 7, ..Sampling::greedy() };
    let cases = [
        plain.clone(),
        Sampling { temperature: 0.7, ..plain.clone() },
        Sampling { temperature: 1.4, ..plain.clone() },
        Sampling { top_k: 12, seed: 8, ..plain.clone() },
        Sampling { top_p: 0.8, seed: 9, ..plain.clone() },
        Sampling { min_p: 0.1, seed: 10, ..plain.clone() },
        Sampling { repetition_penalty: 1.5, seed: 11, ..plain.clone() },
        Sampling {
            temperature: 1.2,
            top_k: 60,
            top_p: 0.9,
            min_p: 0.02,
            repetition_penalty: 1.2,
            seed: 12,
        },
    ];
    let mut cx = cpu();
    let mut rng = Rng(5);
    let row: Vec<f32> = (0..VOCAB).map(|_| rng.normal() as f32 * 1.5).collect();
    let seen: Vec<u32> = (0..40).map(|_| rng.below(VOCAB) as u32).collect();
    let n = 1000;
    let logits =
        Tensor::from_host(&cx.pool, "logits", DType::F32, &[n, VOCAB], &row.repeat(n)).unwrap();
    for sampling in cases {
        let wide: Vec<f64> = row.iter().map(|l| f64::from(*l)).collect();
        let penalised: &[u32] = if sampling.penalises() { &seen } else { &[] };
        let expected = sampling.distribution(&wide, penalised);
        let seed = cx.ints("seed", &[sampling.seed as i32, 0]).unwrap();
        let words = VOCAB.div_ceil(32);
        let mut words_of = vec![0u32; words];
        seen.iter().for_each(|t| words_of[*t as usize / 32] |= 1 << (t % 32));
        let table = Tensor::new(&cx.pool, "seen", DType::I32, &[n, words]).unwrap();
        let mut counts = vec![0f64; VOCAB];
        for position in 0..100 {
            table.upload(&words_of.repeat(n)).unwrap();
            let who: Vec<i32> = (0..n as i32).flat_map(|r| [r, position, r]).collect();
            let who = cx.ints("who", &who).unwrap();
            let draws = sample(&mut cx, &sampling, &logits, &who, &seed, Some(&table))
                .unwrap()
                .download()
                .unwrap();
            for draw in draws {
                counts[draw.token as usize] += 1.0;
                let p = expected[draw.token as usize];
                assert!(p > 0.0, "{sampling:?}: a token outside of the kept set was drawn");
                assert!((f64::from(draw.logp_truncated) - p.ln()).abs() < 1e-4);
            }
        }
        // Cells of fewer than ten expected draws are put together.
        let total = 100.0 * n as f64;
        let (mut chi, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
        for (count, p) in counts.iter().zip(&expected).filter(|(_, p)| **p > 0.0) {
            if p * total < 10.0 {
                rest = (rest.0 + count, rest.1 + p * total);
                continue;
            }
            chi += (count - p * total).powi(2) / (p * total);
            cells += 1;
        }
        if rest.1 > 0.0 {
            chi += (rest.0 - rest.1).powi(2) / rest.1;
            cells += 1;
        }
        let limit = chi_square_limit(cells - 1);
        assert!(
            cells > 5 && chi < limit,
            "{sampling:?}: chi-square {chi} of {cells} cells, rejected above {limit}"
        );
    }
}

#[test]
fn truncation_keeps_what_transformers_keeps() {
    let logits = [1.0, 3.0, 2.0, -1.0, 2.5];
    let kept = |s: Sampling, seen: &[u32]| {
        let p = s.distribution(&logits, seen);
        (0..5).filter(|i| p[*i] > 0.0).collect::<Vec<_>>()
    };
    let plain = Sampling { temperature: 1.0, ..Sampling::greedy() };
    assert_eq!(kept(Sampling { top_k: 2, ..plain.clone() }, &[]), [1, 4]);
    // softmax: 0.479 (1), 0.290 (4), 0.176 (2), 0.065 (0), 0.009 (3)
    assert_eq!(kept(Sampling { top_p: 0.7, ..plain.clone() }, &[]), [1, 4]);
    assert_eq!(kept(Sampling { top_p: 0.4, ..plain.clone() }, &[]), [1]);
    assert_eq!(kept(Sampling { min_p: 0.3, ..plain }, &[]), [1, 2, 4]);
    assert_eq!(kept(Sampling::greedy(), &[]), [1]);
    assert_eq!(kept(Sampling { repetition_penalty: 2.0, ..Sampling::greedy() }, &[1, 1]), [4]);
}
