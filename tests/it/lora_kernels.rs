//! The fused low-rank kernels against naive f64, in fast and strict mode: one to three segments,
//! ranks that are and are not aligned for copies, columns without an adapter, accumulation, strided
//! operands.

use std::sync::Arc;

use temper::autograd::{Cx, F64, Round};
use temper::device::{DType, cpu::Cpu};
use temper::ops::case::Rng;
use temper::ops::lora_kernels::{Read, Segment, Wanted, lora_dt, lora_grads, lora_nt, lora_t};
use temper::tensor::Tensor;

use crate::support::cpu;

fn product(
    a: &F64,
    b: &F64,
    at: impl Fn(&F64, &F64, usize, usize, usize) -> f64,
    m: usize,
    n: usize,
    k: usize,
) -> F64 {
    F64::from_fn(&[m, n], |i| (0..k).map(|p| at(a, b, i / n, i % n, p)).sum())
}
fn nt(a: &F64, b: &F64) -> F64 {
    product(a, b, |a, b, r, c, p| a.row(r)[p] * b.row(c)[p], a.row_count(), b.row_count(), a.cols())
}
fn nn(a: &F64, b: &F64) -> F64 {
    product(a, b, |a, b, r, c, p| a.row(r)[p] * b.row(p)[c], a.row_count(), b.cols(), a.cols())
}
fn tn(a: &F64, b: &F64) -> F64 {
    product(a, b, |a, b, r, c, p| a.row(p)[r] * b.row(p)[c], a.cols(), b.cols(), a.row_count())
}
fn plus(a: &F64, b: &F64) -> F64 {
    F64::from_fn(&a.shape, |i| a.data[i] + b.data[i])
}
fn columns(a: &F64, from: usize, to: usize) -> F64 {
    let w = to - from;
    F64::from_fn(&[a.row_count(), w], |i| a.row(i / w)[from + i % w])
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    /// start, end, rank
    segments: &'static [(usize, usize, usize)],
    /// Extra columns between a matrix' rows in memory.
    pad: usize,
}

const CASES: [Case; 6] = [
    Case { m: 5, n: 7, k: 9, segments: &[(0, 7, 3)], pad: 0 },
    Case { m: 1, n: 16, k: 32, segments: &[(0, 16, 8)], pad: 0 },
    Case { m: 70, n: 144, k: 40, segments: &[(0, 64, 16), (64, 96, 8), (96, 144, 8)], pad: 8 },
    Case { m: 33, n: 50, k: 21, segments: &[(3, 20, 4), (25, 50, 5)], pad: 3 },
    Case { m: 131, n: 200, k: 64, segments: &[(128, 200, 40)], pad: 0 },
    Case { m: 18, n: 90, k: 130, segments: &[(0, 30, 12), (30, 60, 4), (60, 90, 140)], pad: 1 },
];

/// A tensor of `dtype` with the values (rounded to it) and `pad` columns between rows, and the
/// values as they lie there.
fn put(cx: &Cx, a: F64, dtype: DType, pad: usize) -> (Tensor, F64) {
    let (rows, cols) = (a.row_count(), a.cols());
    let round = if dtype == DType::BF16 { Round::Bf16 } else { Round::F32 };
    let a = F64::from_fn(&[rows, cols], |i| round.at(a.data[i]));
    let mut wide = vec![f32::NAN; rows * (cols + pad)];
    for r in 0..rows {
        for c in 0..cols {
            wide[r * (cols + pad) + c] = a.row(r)[c] as f32;
        }
    }
    let t = Tensor::from_f32(&cx.pool, "t", dtype, &[rows, cols + pad], &wide).unwrap();
    (if pad == 0 { t } else { t.columns(0, cols).unwrap() }, a)
}

/// f32: sums of some hundred terms of size one, 2e-6 of the norm as for every op; bf16: one
/// rounding when stored, and the float sums of the tensor core below that.
fn close(got: &Tensor, want: &F64, label: &str) -> Vec<u32> {
    let values = got.to_f32().unwrap();
    let tolerance = if got.dtype() == DType::BF16 { 2f64.powi(-8) } else { 2e-6 };
    let norm = want.data.iter().map(|v| v * v).sum::<f64>().sqrt();
    let error =
        values.iter().zip(&want.data).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
    assert!(error <= tolerance * norm, "{label}: error {error:.3e}, norm {norm:.3e}");
    values.iter().map(|v| v.to_bits()).collect()
}

/// Checks every kernel on a case; the bits of all results.
fn run(device: Cpu, dtype: DType, case: &Case) -> Vec<Vec<u32>> {
    let cx = Cx::new(Arc::new(device), dtype).unwrap();
    let (Case { m, n, k, segments, pad }, mut rng) = (case, Rng(17));
    let (m, n, k, pad) = (*m, *n, *k, *pad);
    let ranks: usize = segments.iter().map(|s| s.2).sum();
    let label = format!("m {m} n {n} k {k} {segments:?} {}", dtype.name());
    let mut array = |rows, cols, pad| put(&cx, rng.array(&[rows, cols], 1.0), dtype, pad);
    let ((x, hx), (w, hw), (t, ht), (a, ha)) =
        (array(m, k, pad), array(n, k, 0), array(m, ranks, pad), array(ranks, k, 0));
    let ((dy, hdy), (bias, hbias)) = (array(m, n, pad), array(1, n, 0));
    let b: Vec<(Tensor, F64)> =
        segments.iter().map(|(from, to, r)| array(to - from, *r, 0)).collect();
    let list: Vec<Segment> = segments
        .iter()
        .zip(&b)
        .map(|(&(start, end, _), b)| Segment { b: &b.0, start, end })
        .collect();
    let offsets: Vec<usize> =
        (0..segments.len()).map(|i| segments[..i].iter().map(|s| s.2).sum()).collect();
    let mut bits = Vec::new();

    // Bd, as a plain matrix.
    let mut diagonal = F64::zeros(&[n, ranks]);
    for ((&(from, to, rank), (_, hb)), offset) in segments.iter().zip(&b).zip(&offsets) {
        for r in from..to {
            diagonal.row_mut(r)[*offset..offset + rank].copy_from_slice(hb.row(r - from));
        }
    }
    let y = cx.real("y", &[m, n]).unwrap();
    let plain = plus(&nt(&hx, &hw), &nt(&ht, &diagonal));
    lora_nt(&cx, &y, &x, &w, None, &t, &list).unwrap();
    bits.push(close(&y, &plain, &format!("{label}: y")));
    let biased = F64::from_fn(&[m, n], |i| plain.data[i] + hbias.data[i % n]);
    lora_nt(&cx, &y, &x, &w, Some(&bias.reshape(&[n]).unwrap()), &t, &list).unwrap();
    bits.push(close(&y, &biased, &format!("{label}: y with bias")));

    let dt = cx.real("dt", &[m, ranks]).unwrap();
    let scales: Vec<f32> = (0..segments.len()).map(|i| 0.5 + i as f32).collect();
    let columns_of = |i: usize| vec![scales[i]; segments[i].2];
    let column_scales: Vec<f32> = (0..segments.len()).flat_map(columns_of).collect();
    let scale = Tensor::from_f32(&cx.pool, "s", DType::F32, &[ranks], &column_scales).unwrap();
    lora_dt(&cx, &dt, &dy, &list, &scale).unwrap();
    let mut want = F64::zeros(&[m, ranks]);
    for (i, (&(from, to, rank), (_, hb))) in segments.iter().zip(&b).enumerate() {
        let part = nn(&columns(&hdy, from, to), hb);
        for r in 0..m {
            for c in 0..rank {
                want.row_mut(r)[offsets[i] + c] = f64::from(scales[i]) * part.row(r)[c];
            }
        }
    }
    bits.push(close(&dt, &want, &format!("{label}: dt")));

    let narrow = cx.real("t", &[m, ranks]).unwrap();
    lora_t(&cx, &narrow, &x, &a, &scale).unwrap();
    let plain = nt(&hx, &ha);
    let scaled =
        F64::from_fn(&plain.shape, |i| f64::from(column_scales[i % ranks]) * plain.data[i]);
    bits.push(close(&narrow, &scaled, &format!("{label}: t")));

    let (dt, hdt) = put(&cx, want, dtype, pad);
    let dx = cx.real("dx", &[m, k]).unwrap();
    let read = Read { x: &x, dt: &dt, dy: &dy, t: &t };
    let none = vec![None; list.len()];
    let nothing = Wanted { dx: None, w: Some(&w), a: &a, da: None, db: &none };
    let whole = plus(&nn(&hdy, &hw), &nn(&hdt, &ha));
    lora_grads(&cx, &Wanted { dx: Some((&dx, false)), ..nothing }, &read, &list).unwrap();
    bits.push(close(&dx, &whole, &format!("{label}: dx")));
    lora_grads(&cx, &Wanted { dx: Some((&dx, true)), ..nothing }, &read, &list).unwrap();
    bits.push(close(&dx, &plus(&whole, &whole), &format!("{label}: dx twice")));

    let da = cx.float("da", &[ranks, k]).unwrap();
    let db: Vec<Tensor> =
        segments.iter().map(|(from, to, r)| cx.float("db", &[to - from, *r]).unwrap()).collect();
    let hda = tn(&hdt, &hx);
    let hdb: Vec<F64> = segments
        .iter()
        .zip(&offsets)
        .map(|(&(from, to, rank), o)| tn(&columns(&hdy, from, to), &columns(&ht, *o, o + rank)))
        .collect();
    // First dA alone, then dA again with dx and all dB, then the last dB alone once more.
    lora_grads(&cx, &Wanted { da: Some((&da, false)), ..nothing }, &read, &list).unwrap();
    let all: Vec<_> = db.iter().map(|t| Some((t, false))).collect();
    let (again, to_dx) = (Some((&da, true)), Some((&dx, false)));
    let everything = Wanted { dx: to_dx, w: Some(&w), a: &a, da: again, db: &all };
    lora_grads(&cx, &everything, &read, &list).unwrap();
    let mut last = none.clone();
    last[db.len() - 1] = Some((&db[db.len() - 1], true));
    lora_grads(&cx, &Wanted { db: &last, ..nothing }, &read, &list).unwrap();
    bits.push(close(&dx, &whole, &format!("{label}: dx with the others")));
    bits.push(close(&da, &plus(&hda, &hda), &format!("{label}: da")));
    for (i, (got, want)) in db.iter().zip(&hdb).enumerate() {
        let want = if i + 1 == db.len() { plus(want, want) } else { want.clone() };
        bits.push(close(got, &want, &format!("{label}: db {i}")));
    }
    bits
}

#[test]
fn fused_low_rank_products_are_the_naive_ones_in_every_mode() {
    for dtype in [DType::F32, DType::BF16] {
        for case in &CASES {
            let fast = run(Cpu::new(), dtype, case);
            assert_eq!(fast, run(Cpu::strict(1), dtype, case), "strict 1");
            assert_eq!(fast, run(Cpu::strict(2), dtype, case), "strict 2");
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let cx = cpu();
    let t = |rows, cols| cx.float("t", &[rows, cols]).unwrap();
    let (y, x, w, b) = (t(4, 6), t(4, 5), t(6, 5), t(3, 2));
    let at = |start, end| Segment { b: &b, start, end };
    let run =
        |t: &Tensor, s: &[Segment]| lora_nt(&cx, &y, &x, &w, None, t, s).unwrap_err().to_string();
    assert!(run(&t(4, 3), &[at(0, 3)]).contains("ranks"));
    assert!(run(&t(4, 2), &[at(4, 7)]).contains("columns 4..7 of 6"));
    assert!(run(&t(4, 4), &[at(0, 3), at(2, 5)]).contains("apart"));
    assert!(run(&t(3, 2), &[at(0, 3)]).contains("[4, 2] is expected"));
    assert!(lora_nt(&cx, &y, &x, &w, None, &t(4, 2), &[at(0, 3)]).is_ok());
}

#[test]
fn gradients_of_no_rows_are_zero_or_what_was_there() {
    let cx = cpu();
    let put = |rows: usize, cols: usize, value: f32| {
        let values = vec![value; rows * cols];
        Tensor::from_f32(&cx.pool, "t", DType::F32, &[rows, cols], &values).unwrap()
    };
    let (x, dy, t) = (put(0, 12, 0.0), put(0, 10, 0.0), put(0, 4, 0.0));
    let (a, b) = (put(4, 12, 1.0), put(10, 4, 1.0));
    let (da, db) = (put(4, 12, 7.0), put(10, 4, 7.0));
    let read = Read { x: &x, dt: &t, dy: &dy, t: &t };
    let list = [Segment { b: &b, start: 0, end: 10 }];
    let db_slot = [Some((&db, true))];
    let to = Wanted { dx: None, w: None, a: &a, da: Some((&da, false)), db: &db_slot };
    lora_grads(&cx, &to, &read, &list).unwrap();
    assert!(da.to_f32().unwrap().iter().all(|v| *v == 0.0));
    assert!(db.to_f32().unwrap().iter().all(|v| *v == 7.0));
}
