//! Rows of logits with several slices (kernels/common/logits.cuh): head and sampler process them
//! slice by slice without an effect on a row's bits.

use std::sync::Arc;

use temper::autograd::Cx;
use temper::device::DType;
use temper::device::cpu::Cpu;
use temper::kernels::LOGIT_SLICE;
use temper::ops::case::Rng;
use temper::ops::head::{Head, head_logps, head_rows, mean_logits};
use temper::ops::logit_map::LogitMap;
use temper::ops::sample::{Draw, Sampling, sample, seen_words};
use temper::tensor::Tensor;

use crate::support::{bits, cpu};

fn floats(cx: &Cx, name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_host(&cx.pool, name, DType::F32, shape, values).unwrap()
}

fn gauss(rng: &mut Rng, n: usize, spread: f64) -> Vec<f32> {
    (0..n).map(|_| (rng.normal() * spread) as f32).collect()
}

fn draw_bits(d: &Draw) -> [u32; 5] {
    let floats = [d.logp, d.logp_scaled, d.logp_truncated, d.entropy].map(f32::to_bits);
    [d.token, floats[0], floats[1], floats[2], floats[3]]
}

/// Word w of the tokens that the sequence of row r has: some of them.
fn seen_word(r: usize, w: usize) -> u32 {
    ((r + 1) * (w + 3)) as u32 & 0x4021
}

/// The draws of the given rows of `logits`; number and position go with the row.
fn draws(cx: &mut Cx, how: &Sampling, logits: &[f32], vocab: usize, rows: &[usize]) -> Vec<Draw> {
    let chosen: Vec<f32> =
        rows.iter().flat_map(|r| &logits[r * vocab..(r + 1) * vocab]).copied().collect();
    let logits = floats(cx, "logits", &[rows.len(), vocab], &chosen);
    let who: Vec<i32> =
        rows.iter().enumerate().flat_map(|(i, r)| [*r as i32, 3 + *r as i32, i as i32]).collect();
    let (who, seed) = (cx.ints("who", &who).unwrap(), cx.ints("seed", &[17, 5]).unwrap());
    let words = seen_words(vocab);
    let seen: Vec<u32> =
        rows.iter().flat_map(|r| (0..words).map(move |w| seen_word(*r, w))).collect();
    let seen = Tensor::from_host(&cx.pool, "seen", DType::I32, &[rows.len(), words], &seen);
    sample(cx, how, &logits, &who, &seed, Some(&seen.unwrap())).unwrap().download().unwrap()
}

fn ways() -> Vec<Sampling> {
    let plain = Sampling { temperature: 1.0, ..Sampling::greedy() };
    vec![
        Sampling::greedy(),
        plain.clone(),
        Sampling { temperature: 0.7, ..plain.clone() },
        Sampling { top_k: 40, ..plain.clone() },
        Sampling { top_p: 0.9, ..plain.clone() },
        Sampling { min_p: 0.05, repetition_penalty: 1.3, ..plain.clone() },
        Sampling { temperature: 1.3, top_k: 900, top_p: 0.8, repetition_penalty: 1.1, ..plain },
    ]
}

#[test]
fn a_draw_of_several_slices_does_not_see_its_batch() {
    let (vocab, n) = (2 * LOGIT_SLICE + 903, 7);
    let logits = gauss(&mut Rng(3), n * vocab, 2.5);
    let mut cx = cpu();
    for how in ways() {
        let all = draws(&mut cx, &how, &logits, vocab, &[0, 1, 2, 3, 4, 5, 6]);
        for rows in [vec![4], vec![6, 0], vec![5, 3, 1]] {
            for (draw, r) in draws(&mut cx, &how, &logits, vocab, &rows).iter().zip(&rows) {
                assert_eq!(draw_bits(draw), draw_bits(&all[*r]), "row {r} of {rows:?}, {how:?}");
            }
        }
    }
}

#[test]
fn sampler_and_head_agree_bit_for_bit_over_slices() {
    let (vocab, n, d) = (3 * LOGIT_SLICE + 77, 6, 8);
    let mut rng = Rng(4);
    let mut cx = cpu();
    let x = floats(&cx, "x", &[n, d], &gauss(&mut rng, n * d, 1.0));
    let w = floats(&cx, "w", &[vocab, d], &gauss(&mut rng, vocab * d, 1.0));
    for map in [LogitMap::PLAIN, LogitMap { divisor: 1.7, softcap: Some(3.0) }] {
        let head = Head { map, ..Head::plain(w.clone()) };
        let logits = head.logits(&cx, &x).unwrap().to_f32().unwrap();
        assert!(map == LogitMap::PLAIN || logits.iter().all(|l| l.abs() <= 3.0));
        for how in ways() {
            let drawn = draws(&mut cx, &how, &logits, vocab, &[0, 1, 2, 3, 4, 5]);
            let tokens: Vec<i32> = drawn.iter().map(|d| d.token as i32).collect();
            let target = cx.ints("target", &tokens).unwrap();
            let plain = head_logps(&mut cx, &x, &head, &target, 1.0).unwrap();
            let scaled = head_logps(&mut cx, &x, &head, &target, how.scale()).unwrap();
            let of = |pick: fn(&Draw) -> f32| bits(&drawn.iter().map(pick).collect::<Vec<_>>());
            assert_eq!(of(|d| d.logp), bits(&plain.logp.to_f32().unwrap()), "{how:?}");
            assert_eq!(of(|d| d.logp_scaled), bits(&scaled.logp.to_f32().unwrap()), "{how:?}");
            assert_eq!(of(|d| d.entropy), bits(&scaled.entropy.to_f32().unwrap()), "{how:?}");
        }
    }
}

/// The mean that DPO reports, with a softcap from the logits themselves.
#[test]
fn mean_logits_are_the_mean_of_the_logits() {
    let (vocab, n, d) = (LOGIT_SLICE + 77, 37, 8);
    let mut rng = Rng(14);
    let cx = cpu();
    let x = floats(&cx, "x", &[n, d], &gauss(&mut rng, n * d, 1.0));
    let w = floats(&cx, "w", &[vocab, d], &gauss(&mut rng, vocab * d, 1.0));
    for softcap in [None, Some(2.0)] {
        let head = Head { map: LogitMap { divisor: 1.7, softcap }, ..Head::plain(w.clone()) };
        let logits = head.logits(&cx, &x).unwrap().to_f32().unwrap();
        let got = mean_logits(&cx, &x, &head).unwrap().to_f32().unwrap();
        for (row, got) in logits.chunks(vocab).zip(got) {
            let want = row.iter().map(|l| f64::from(*l)).sum::<f64>() / vocab as f64;
            assert!((f64::from(got) - want).abs() < 1e-5, "{softcap:?}: {got} {want}");
        }
    }
}

#[test]
fn truncated_draws_over_slices_stay_in_the_kept_set() {
    let (vocab, n) = (2 * LOGIT_SLICE + 5, 40);
    let logits = gauss(&mut Rng(9), n * vocab, 3.0);
    let mut cx = cpu();
    for how in ways() {
        let rows: Vec<usize> = (0..n).collect();
        for (r, draw) in draws(&mut cx, &how, &logits, vocab, &rows).iter().enumerate() {
            let row: Vec<f64> =
                logits[r * vocab..(r + 1) * vocab].iter().map(|l| f64::from(*l)).collect();
            let has = |t: u32| (seen_word(r, t as usize / 32) >> (t % 32)) & 1 == 1;
            let seen: Vec<u32> = (0..vocab as u32).filter(|t| how.penalises() && has(*t)).collect();
            let p = how.distribution(&row, &seen)[draw.token as usize];
            assert!(p > 0.0, "{how:?}: row {r} drew {}, which is left out", draw.token);
            assert!((f64::from(draw.logp_truncated) - p.ln()).abs() < 1e-4, "{how:?}: row {r}");
        }
    }
}

/// A vocabulary of more slices than a warp holds in one pack: strict mode and the fast build agree,
/// and the figures are those of f64.
#[test]
fn a_row_of_more_slices_than_a_pack_has_f64s_figures() {
    let vocab = 128 * LOGIT_SLICE + 2 * LOGIT_SLICE + 1;
    let mut rng = Rng(6);
    let w = gauss(&mut rng, vocab, 2.0);
    let best = vocab - 1;
    let mut rows = Vec::new();
    for device in [Cpu::new(), Cpu::strict(1)] {
        let mut cx = Cx::new(Arc::new(device), DType::F32).unwrap();
        let mut head = w.clone();
        head[best] = 12.0;
        let (x, head) = (floats(&cx, "x", &[1, 1], &[1.0]), floats(&cx, "w", &[vocab, 1], &head));
        let target = cx.ints("target", &[best as i32]).unwrap();
        let out = head_rows(&mut cx, &x, &Head::plain(head), &target, 0.9, true).unwrap();
        assert_eq!(out.best.to_vec::<i32>().unwrap(), [best as i32]);
        let square = out.log_square.unwrap();
        rows.push([out.logp, out.entropy, square].map(|t| t.to_f32().unwrap()[0]));
    }
    assert_eq!(bits(&rows[0]), bits(&rows[1]));
    let mut l: Vec<f64> = w.iter().map(|v| f64::from(*v) * f64::from(0.9f32)).collect();
    l[best] = 12.0 * f64::from(0.9f32);
    let lse = l.iter().map(|v| v.exp()).sum::<f64>().ln();
    let expected = [
        l[best] - lse,
        lse - l.iter().map(|v| (v - lse).exp() * v).sum::<f64>(),
        l.iter().map(|v| (2.0 * (v - lse)).exp()).sum::<f64>().ln(),
    ];
    for (got, want) in rows[0].iter().zip(expected) {
        assert!((f64::from(*got) - want).abs() < 1e-5, "{got} is not {want}");
    }
}
