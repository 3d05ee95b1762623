//! The f64 definition of attention, and the cases that it is checked on. Layer 4.
//!
//! Invariant: written from the math, with nothing of the kernels' blocks, tiles or online softmax.

use std::sync::Arc;

use super::{Attention, AttentionPaged, AttnPlan, AttnShape, KvAppend, PAGE, Segment};
use crate::autograd::{F64, Round};
use crate::ops::case::{Arg, Case, Kind, PerfShape, Rng};

/// Softmax over the scores of one query and the weighted sum of the values. `seen` gives the rows
/// of k and v that the query sees. P is rounded where the tensor-core family rounds it; the simt
/// family keeps it in float.
fn one_query(
    round: Round,
    shape: &AttnShape,
    q: &[f64],
    seen: &[(&[f64], &[f64])],
    out: &mut [f64],
) {
    let mut p: Vec<f64> = seen
        .iter()
        .map(|(k, _)| {
            let s = dot(q, k) * f64::from(shape.scale);
            shape.softcap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
        })
        .collect();
    let largest = p.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
    p.iter_mut().for_each(|s| *s = (*s - largest).exp());
    let sum: f64 = p.iter().sum();
    for (w, (_, v)) in p.iter().zip(seen) {
        let w = if round == Round::Bf16 { round.at(*w) } else { *w } / sum;
        out.iter_mut().zip(*v).for_each(|(o, v)| *o += w * v);
    }
    out.iter_mut().for_each(|o| *o = round.at(*o));
}

/// Four chains, so that the compiler vectorises: a case is evaluated hundreds of times.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lane = [0.0; 4];
    for (a, b) in a.chunks_exact(4).zip(b.chunks_exact(4)) {
        (0..4).for_each(|i| lane[i] += a[i] * b[i]);
    }
    (lane[0] + lane[2]) + (lane[1] + lane[3])
}

/// The first position that a query sees.
fn first_seen(shape: &AttnShape, position: usize) -> usize {
    shape.window.map_or(0, |w| (position + 1).saturating_sub(w))
}

pub(super) fn packed(round: Round, shape: &AttnShape, plan: &AttnPlan, qkv: &F64) -> F64 {
    let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let mut out = F64::zeros(&[plan.rows, shape.heads * d]);
    for (i, s) in plan.segments.iter().enumerate() {
        let before = plan.before(i);
        for r in 0..s.len {
            for h in 0..shape.heads {
                let k = (shape.heads + h / group) * d;
                let v = k + shape.kv_heads * d;
                let seen: Vec<(&[f64], &[f64])> = (first_seen(shape, before + r)..=before + r)
                    .map(|p| match s.prefix {
                        Some(f) if p < before => plan.segments[f].start + p,
                        _ => s.start + p - before,
                    })
                    .map(|row| (&qkv.row(row)[k..k + d], &qkv.row(row)[v..v + d]))
                    .collect();
                let q = &qkv.row(s.start + r)[h * d..(h + 1) * d];
                one_query(
                    round,
                    shape,
                    q,
                    &seen,
                    &mut out.row_mut(s.start + r)[h * d..(h + 1) * d],
                );
            }
        }
    }
    out
}

/// Inputs: qkv, cache, page table, sequence and position of each row.
pub(super) fn paged(round: Round, shape: &AttnShape, x: &[F64]) -> F64 {
    let (qkv, cache, pages, sequence, position) = (&x[0], &x[1], &x[2], &x[3], &x[4]);
    let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let mut out = F64::zeros(&[qkv.row_count(), shape.heads * d]);
    for r in (0..qkv.row_count()).filter(|r| sequence.data[*r] >= 0.0) {
        for h in 0..shape.heads {
            let (k, last) = (h / group * d, position.index(r));
            let v = k + shape.kv_heads * d;
            let seen: Vec<(&[f64], &[f64])> = (first_seen(shape, last)..=last)
                .map(|p| {
                    cache.row(pages.row(sequence.index(r))[p / PAGE] as usize * PAGE + p % PAGE)
                })
                .map(|row| (&row[k..k + d], &row[v..v + d]))
                .collect();
            let q = &qkv.row(r)[h * d..(h + 1) * d];
            one_query(round, shape, q, &seen, &mut out.row_mut(r)[h * d..(h + 1) * d]);
        }
    }
    out
}

/// Segments from (length, prefix).
pub fn segments(of: &[(usize, Option<usize>)]) -> Vec<Segment> {
    let mut start = 0;
    of.iter()
        .map(|&(len, prefix)| {
            start += len;
            Segment { start: start - len, len, prefix }
        })
        .collect()
}

pub fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttnShape {
    AttnShape {
        heads,
        kv_heads,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
        softcap: None,
        window: None,
    }
}

pub(super) fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |label: &str, shape: AttnShape, of: &[(usize, Option<usize>)], grad: bool| {
        let Ok(plan) = AttnPlan::on_host(&segments(of)) else { return };
        let cols = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        // Gradients have 288 evaluations of the reference each, so the long cases are forward only;
        // the tests in tests/it/attention.rs compare their gradients with those of an f64 backward.
        let qkv = Arg { grad, ..Arg::real(rng.array(&[plan.rows, cols], 1.0)) };
        let mut case = Case::new(label, Attention { plan, shape }, vec![qkv]);
        // delta reads the rounded out; P, dS and the gradient are rounded: errors of dS do not
        // average out where P is near one and dP - delta cancels, so a few more than the four
        // stores are allowed.
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

pub(super) fn paged_cases(rng: &mut Rng) -> Vec<Case> {
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

pub(super) fn append_cases(rng: &mut Rng) -> Vec<Case> {
    let op = KvAppend { heads: 3, kv_heads: 1, head_dim: 16 };
    let inputs = vec![
        Arg::real(rng.array(&[4, 5 * 16], 1.0)).no_grad(),
        Arg::real(rng.array(&[128, 2 * 16], 1.0)).no_grad(),
        Arg::ints(&[70, 3, -1, 127]),
    ];
    let mut case = Case::new("four tokens, one nowhere", op, inputs);
    case.exact = true;
    vec![case]
}

/// The gradient of qkv in f64, for cases too long for finite differences.
pub fn gradient(shape: &AttnShape, plan: &Arc<AttnPlan>, qkv: &F64, dout: &F64) -> F64 {
    let (d, group, scale) = (shape.head_dim, shape.heads / shape.kv_heads, f64::from(shape.scale));
    let mut g = F64::zeros(&qkv.shape);
    for (i, s) in plan.segments.iter().enumerate() {
        let before = plan.before(i);
        for (r, h) in (0..s.len).flat_map(|r| (0..shape.heads).map(move |h| (r, h))) {
            let (row, k) = (s.start + r, (shape.heads + h / group) * d);
            let v = k + shape.kv_heads * d;
            let q = &qkv.row(row)[h * d..(h + 1) * d];
            let up = &dout.row(row)[h * d..(h + 1) * d];
            let rows: Vec<usize> = (first_seen(shape, before + r)..=before + r)
                .map(|p| match s.prefix {
                    Some(f) if p < before => plan.segments[f].start + p,
                    _ => s.start + p - before,
                })
                .collect();
            let mut slope = vec![scale; rows.len()];
            let mut p: Vec<f64> =
                rows.iter().map(|j| dot(q, &qkv.row(*j)[k..k + d]) * scale).collect();
            if let Some(c) = shape.softcap.map(f64::from) {
                for (s, slope) in p.iter_mut().zip(&mut slope) {
                    let t = (*s / c).tanh();
                    (*s, *slope) = (c * t, scale * (1.0 - t * t));
                }
            }
            let largest = p.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
            p.iter_mut().for_each(|s| *s = (*s - largest).exp());
            let sum: f64 = p.iter().sum();
            p.iter_mut().for_each(|s| *s /= sum);
            let dp: Vec<f64> = rows.iter().map(|j| dot(up, &qkv.row(*j)[v..v + d])).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for (t, &j) in rows.iter().enumerate() {
                let ds = p[t] * (dp[t] - delta) * slope[t];
                for c in 0..d {
                    g.row_mut(j)[v + c] += p[t] * up[c];
                    g.row_mut(j)[k + c] += ds * q[c];
                    g.row_mut(row)[h * d + c] += ds * qkv.row(j)[k + c];
                }
            }
        }
    }
    g
}

fn perf_shape(s: &PerfShape) -> AttnShape {
    shape(s.heads, s.kv_heads, s.head_dim)
}

pub(super) fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let lengths = vec![(s.length, None); s.sequences];
    let Ok(plan) = AttnPlan::on_host(&segments(&lengths)) else { return vec![] };
    let qkv = Arg::real(rng.array(&[s.tokens(), s.qkv()], 1.0));
    vec![Case::new("packed sequences", Attention { plan, shape: perf_shape(s) }, vec![qkv])]
}

/// A decode step: the last token of each sequence.
pub(super) fn paged_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
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

pub(super) fn append_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let slots = s.tokens().next_multiple_of(PAGE);
    let inputs = vec![
        Arg::real(rng.array(&[s.tokens(), s.qkv()], 1.0)).no_grad(),
        Arg::real(rng.array(&[slots, 2 * s.kv_heads * s.head_dim], 1.0)).no_grad(),
        Arg::ints(&(0..s.tokens() as i32).collect::<Vec<_>>()),
    ];
    let op = KvAppend { heads: s.heads, kv_heads: s.kv_heads, head_dim: s.head_dim };
    vec![Case::new("a prefill", op, inputs)]
}
