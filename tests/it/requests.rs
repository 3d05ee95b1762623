//! Requests with different options in one engine.

use temper::autograd::Cx;
use temper::model::decoder::Decoder;
use temper::rollout::sample::Sampling;
use temper::rollout::{Completion, Engine, EngineOptions, Request, RequestOptions, SampledToken};

use crate::support::{MODEL, cpu, decoder};

const LONGEST: usize = 120;

fn engine(cx: &Cx, model: &mut Decoder, replay: bool) -> Engine {
    let mut options = EngineOptions::new(100, Sampling::greedy(), vec![2], 7);
    (options.replay, options.ahead) = (Some(replay), Some(replay));
    Engine::new(cx, model, options, LONGEST).unwrap()
}

/// What each request asks for: some alike, some not.
fn asked() -> Vec<(Request, RequestOptions)> {
    let plain = Sampling { temperature: 1.0, seed: 5, ..Sampling::greedy() };
    let samplings = [
        Sampling::greedy(),
        plain.clone(),
        Sampling { temperature: 0.7, seed: 6, ..plain.clone() },
        Sampling { top_k: 9, ..plain.clone() },
        Sampling { repetition_penalty: 1.4, ..plain.clone() },
        Sampling { seed: 77, ..plain.clone() },
        plain,
        Sampling::greedy(),
    ];
    let request = |(i, sampling): (usize, Sampling)| {
        let prompt = (0..3 + 5 * i as u32).map(|t| 10 + (t * 7 + i as u32) % 300).collect();
        let options = RequestOptions {
            max_new_tokens: 12 + 3 * i,
            sampling,
            stop: if i % 2 == 0 { vec![2] } else { vec![2, 40] },
            stop_strings: None,
            top_logprobs: if i % 3 == 0 { 4 } else { 0 },
            turns: false,
        };
        (Request { prompt, n: 1 + i % 2, number: 3 * i as u32 }, options)
    };
    samplings.into_iter().enumerate().map(request).collect()
}

/// Runs what was submitted to its end.
fn finish(
    engine: &mut Engine,
    cx: &mut Cx,
    model: &Decoder,
) -> (Vec<Completion>, Vec<SampledToken>) {
    let (mut done, mut tokens) = (Vec::new(), Vec::new());
    while engine.has_work() {
        let stepped = engine.step(cx, model).unwrap();
        done.extend(stepped.done);
        tokens.extend(stepped.tokens);
    }
    done.sort_by_key(|c| (c.request, c.member));
    (done, tokens)
}

/// Each request in an engine that has nothing else to do.
fn alone(cx: &mut Cx, model: &mut Decoder) -> Vec<Vec<Completion>> {
    let one = |(request, options): (Request, RequestOptions)| {
        let mut engine = engine(cx, model, false);
        engine.submit_with(&request, options).unwrap();
        finish(&mut engine, cx, model).0
    };
    asked().into_iter().map(one).collect()
}

#[test]
fn a_request_is_sampled_as_it_says_whatever_runs_beside_it() {
    let mut cx = cpu();
    let mut model = decoder(&cx, MODEL, 16);
    let want = alone(&mut cx, &mut model);
    for replay in [false, true] {
        let mut engine = engine(&cx, &mut model, replay);
        for (request, options) in asked() {
            engine.submit_with(&request, options).unwrap();
        }
        let (done, tokens) = finish(&mut engine, &mut cx, &model);
        let got: Vec<Vec<Completion>> =
            done.chunk_by(|a, b| a.request == b.request).map(<[_]>::to_vec).collect();
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            for (got, want) in got.iter().zip(want) {
                assert_eq!((&got.ids, &got.logps), (&want.ids, &want.logps), "request {i}");
                assert_eq!(got.finish, want.finish);
                let own: Vec<&SampledToken> =
                    tokens.iter().filter(|t| (t.request, t.member) == (i, got.member)).collect();
                assert!(own.iter().map(|t| t.token).eq(got.ids.iter().copied()));
                for token in own {
                    assert_eq!(token.top.len(), if i % 3 == 0 { 4 } else { 0 });
                    assert!(token.top.is_sorted_by(|a, b| a.1 >= b.1));
                    if let Some(best) = token.top.first() {
                        assert!(best.1 >= token.logp);
                    }
                    if let Some(own) = token.top.iter().find(|t| t.0 == token.token) {
                        assert_eq!(own.1, token.logp);
                    }
                }
            }
        }
    }
}

#[test]
fn a_cancelled_request_leaves_its_room_and_nothing_else() {
    let mut cx = cpu();
    let mut model = decoder(&cx, MODEL, 16);
    let want = alone(&mut cx, &mut model);
    for replay in [false, true] {
        let mut engine = engine(&cx, &mut model, replay);
        for round in 0..3 {
            for (request, options) in asked() {
                engine.submit_with(&request, options).unwrap();
            }
            for _ in 0..3 + round {
                engine.step(&mut cx, &model).unwrap();
            }
            // One that runs, with several members, and one that may wait still.
            [1, 6].iter().for_each(|i| engine.cancel(*i));
            let (done, tokens) = finish(&mut engine, &mut cx, &model);
            assert!(tokens.iter().all(|t| ![1, 6].contains(&t.request)));
            let left = done.iter().filter(|c| c.request != 1 && c.request != 6);
            for got in left {
                let want = &want[got.request][got.member];
                assert_eq!((&got.ids, &got.logps), (&want.ids, &want.logps));
            }
            assert!(done.iter().all(|c| ![1, 6].contains(&c.request)));
            assert_eq!(engine.load(), (0, 0));
        }
    }
}
