//! The cases of the attention ops. Layer 4.
//!
//! Invariant: ragged lengths, shared prefixes, windows and every head size are covered.

use super::oracle::{segments, shape};
use super::packed::Attention;
use super::paged::AttentionPaged;
use super::plan::AttnPlan;
use super::shape::{AttnShape, PAGE};
use crate::autograd::F64;
use crate::ops::case::{Arg, Case, Kind, PerfShape, Rng};

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |label: &str, shape: AttnShape, of: &[(usize, Option<usize>)], grad: bool| {
        let Ok(plan) = AttnPlan::on_host(&segments(of)) else { return };
        let cols = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        // Each gradient takes 288 evaluations of the oracle, so the long cases are forward only;
        // the tests in tests/it/attention.rs compare their gradients with an f64 backward.
        let qkv = Arg { grad, ..Arg::real(rng.array(&[plan.rows, cols], 1.0)) };
        let mut case = Case::new(label, Attention { plan, shape }, vec![qkv]);
        // delta reads the rounded out; P, dS and the gradient are rounded. Errors of dS do not
        // average out where P is near one and dP - delta cancels, so a few more roundings than the
        // four stores are allowed.
        case.roundings = 6.0;
        cases.push(case);
    };
    add("lengths 1 3 17", shape(2, 2, 16), &[(1, None), (3, None), (17, None)], true);
    add("length 70", shape(1, 1, 16), &[(70, None)], true);
    add(
        "two of three share a prompt",
        shape(2, 1, 16),
        &[(9, None), (5, Some(0)), (12, Some(0)), (4, None)],
        true,
    );
    add(
        "the prompt comes last",
        shape(2, 2, 32),
        &[(6, Some(2)), (3, Some(2)), (8, None), (1, Some(2))],
        true,
    );
    add("7 heads a kv head", shape(7, 1, 16), &[(5, None), (19, None)], true);
    let capped = AttnShape { softcap: Some(1.5), ..shape(2, 1, 16) };
    add("softcap", capped, &[(11, None), (8, Some(0))], true);
    let windowed = AttnShape { window: Some(5), ..shape(2, 1, 16) };
    add("window 5", windowed, &[(13, None), (9, Some(0)), (2, None)], true);
    for d in [64, 80, 96, 128, 256] {
        add(&format!("head size {d}"), shape(2, 1, d), &[(4, None), (9, None)], true);
    }
    for n in [64, 65, 128, 129] {
        add(&format!("length {n}"), shape(2, 1, 32), &[(n, None), (2, None)], false);
    }
    add(
        "prompt of 70",
        shape(2, 1, 32),
        &[(70, None), (61, Some(0)), (1, Some(0)), (66, Some(0))],
        false,
    );
    let windowed = AttnShape { window: Some(20), ..shape(2, 1, 32) };
    add("window 20 of 150", windowed, &[(100, None), (50, Some(0))], false);
    let capped = AttnShape { softcap: Some(20.0), window: Some(70), ..shape(2, 1, 256) };
    add("head size 256, softcap, window", capped, &[(140, None)], false);
    add("head size 128, length 130", shape(2, 2, 128), &[(130, None)], false);
    cases
}

pub fn paged_cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    let windowed = AttnShape { window: Some(40), softcap: Some(5.0), ..shape(4, 2, 32) };
    for (label, shape) in
        [("group 2", shape(4, 2, 64)), ("group 7", shape(7, 1, 16)), ("window, softcap", windowed)]
    {
        let (pages, table) = (7, [5.0, 2.0, 0.0, 6.0, 1.0, 3.0]);
        let d = shape.head_dim;
        // Sequence 1 decodes one row, sequence 0 prefills a chunk, one row is padding.
        let mut sequence = vec![1, -1];
        let mut position = vec![129, 0];
        sequence.extend([0; 5]);
        position.extend([0, 1, 62, 63, 64]);
        let inputs = vec![
            Arg::real(rng.array(&[7, (shape.heads + 2 * shape.kv_heads) * d], 1.0)).no_grad(),
            Arg::real(rng.array(&[pages * PAGE, 2 * shape.kv_heads * d], 1.0)).no_grad(),
            Arg {
                value: F64::new(&[2, 3], table.to_vec()),
                kind: Kind::Int,
                grad: false,
                param: false,
            },
            Arg::ints(&sequence),
            Arg::ints(&position),
        ];
        cases.push(Case::new(label, AttentionPaged { shape }, inputs));
    }
    cases
}

fn perf_shape(s: &PerfShape) -> AttnShape {
    shape(s.heads, s.kv_heads, s.head_dim)
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let lengths = vec![(s.length, None); s.sequences];
    let Ok(plan) = AttnPlan::on_host(&segments(&lengths)) else { return vec![] };
    let qkv = Arg::real(rng.array(&[s.tokens(), s.qkv()], 1.0));
    vec![Case::new("packed sequences", Attention { plan, shape: perf_shape(s) }, vec![qkv])]
}

/// A decode step: the last token of each sequence.
pub fn paged_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let each = s.length.div_ceil(PAGE);
    let table: Vec<f64> = (0..s.sequences * each).map(|i| i as f64).collect();
    let width = 2 * s.kv_heads * s.head_dim;
    let inputs = vec![
        Arg::real(rng.array(&[s.sequences, s.qkv()], 1.0)).no_grad(),
        Arg::real(rng.array(&[table.len() * PAGE, width], 1.0)).no_grad(),
        Arg { value: F64::new(&[s.sequences, each], table), ..Arg::ints(&[]) },
        Arg::ints(&(0..s.sequences as i32).collect::<Vec<_>>()),
        Arg::ints(&vec![s.length as i32 - 1; s.sequences]),
    ];
    vec![Case::new("a decode step", AttentionPaged { shape: perf_shape(s) }, inputs)]
}
