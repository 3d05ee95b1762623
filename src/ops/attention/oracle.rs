//! The f64 definition of attention. Layer 4.
//!
//! Invariant: written from the math, without the kernels' blocks, tiles or online softmax.

use std::sync::Arc;

use super::plan::{AttnPlan, Segment};
use super::shape::{AttnShape, PAGE};
use crate::autograd::{F64, Round};

/// Softmax over the scores of one query and the weighted sum of the values. `seen` lists the rows
/// of k and v that the query sees. P is rounded where the tensor-core kernels round it; the simt
/// kernels keep it in float.
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

/// The rows of k and v that row `r` of segment `i` sees.
fn seen_rows(
    shape: &AttnShape,
    plan: &AttnPlan,
    i: usize,
    r: usize,
) -> impl Iterator<Item = usize> {
    let (s, before) = (plan.segments[i], plan.before(i));
    let prefix = s.prefix.map_or(0, |f| plan.segments[f].start);
    (first_seen(shape, before + r)..=before + r)
        .map(move |p| if p < before { prefix + p } else { s.start + p - before })
}

pub(super) fn packed(round: Round, shape: &AttnShape, plan: &AttnPlan, qkv: &F64) -> F64 {
    let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    let mut out = F64::zeros(&[plan.rows, shape.heads * d]);
    for (i, s) in plan.segments.iter().enumerate() {
        for r in 0..s.len {
            for h in 0..shape.heads {
                let k = (shape.heads + h / group) * d;
                let v = k + shape.kv_heads * d;
                let seen: Vec<(&[f64], &[f64])> = seen_rows(shape, plan, i, r)
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

/// The gradient of qkv in f64, for cases too long for finite differences.
pub fn gradient(shape: &AttnShape, plan: &Arc<AttnPlan>, qkv: &F64, dout: &F64) -> F64 {
    let (d, group, scale) = (shape.head_dim, shape.heads / shape.kv_heads, f64::from(shape.scale));
    let mut g = F64::zeros(&qkv.shape);
    for (i, s) in plan.segments.iter().enumerate() {
        for (r, h) in (0..s.len).flat_map(|r| (0..shape.heads).map(move |h| (r, h))) {
            let (row, k) = (s.start + r, (shape.heads + h / group) * d);
            let v = k + shape.kv_heads * d;
            let q = &qkv.row(row)[h * d..(h + 1) * d];
            let up = &dout.row(row)[h * d..(h + 1) * d];
            let rows: Vec<usize> = seen_rows(shape, plan, i, r).collect();
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
