//! What attention guarantees beyond its cases: exactness across packing, prefill and decode, and
//! long gradients.

use std::time::Instant;

use temper::autograd::{Cx, F64, ParamGrads, Tape};
use temper::config::AttentionChoice;
use temper::device::DType;
use temper::ops::attention::oracle::{gradient, segments, shape};
use temper::ops::attention::{
    AttnPlan, AttnShape, PAGE, PagedRows, attention, attention_decode, attention_paged,
};
use temper::ops::case::Rng;
use temper::ops::rope_append::rope_append;
use temper::tensor::{Id, ParamSetId, Tensor};

use crate::support::cpu_in;

const SIMT: [(AttentionChoice, DType); 2] =
    [(AttentionChoice::Simt, DType::F32), (AttentionChoice::Simt, DType::BF16)];

const ALL: [(AttentionChoice, DType); 4] = [
    SIMT[0],
    SIMT[1],
    (AttentionChoice::TensorCore, DType::BF16),
    (AttentionChoice::Wgmma, DType::BF16),
];

fn context((choice, dtype): (AttentionChoice, DType)) -> Cx {
    let mut cx = cpu_in(dtype);
    cx.attention = choice;
    cx
}

fn random(cx: &Cx, rng: &mut Rng, rows: usize, cols: usize) -> Tensor {
    let values: Vec<f32> = (0..rows * cols).map(|_| rng.normal() as f32).collect();
    Tensor::from_f32(&cx.pool, "test", cx.dtype, &[rows, cols], &values).unwrap()
}

fn width(s: &AttnShape) -> usize {
    (s.heads + 2 * s.kv_heads) * s.head_dim
}

fn bits(t: &Tensor) -> Vec<Vec<u32>> {
    let all: Vec<u32> = t.to_f32().unwrap().iter().map(|v| v.to_bits()).collect();
    all.chunks(t.cols()).map(<[u32]>::to_vec).collect()
}

/// Rows of `from` in this order as a new tensor.
fn gather(cx: &Cx, from: &Tensor, rows: &[usize]) -> Tensor {
    let all = from.to_f32().unwrap();
    let picked: Vec<f32> =
        rows.iter().flat_map(|r| all[r * from.cols()..(r + 1) * from.cols()].to_vec()).collect();
    Tensor::from_f32(&cx.pool, "test", cx.dtype, &[rows.len(), from.cols()], &picked).unwrap()
}

/// Runs two sequences through the cache in chunks from `chunk`, pages in a random order, and
/// compares all bits.
fn paged_equals_training(
    kind: (AttentionChoice, DType),
    s: AttnShape,
    decodes: bool,
    mut chunk: impl FnMut(&mut Rng) -> usize,
) {
    let (mut cx, mut rng) = (context(kind), Rng(5));
    let lengths = [135, 66];
    let qkv = random(&cx, &mut rng, 201, width(&s));
    let plan = AttnPlan::sequences(&cx, &lengths).unwrap();
    let want = bits(&attention(&mut cx, &qkv, &plan, s).unwrap());

    let max_pages = 3;
    let mut order: Vec<i32> = (0..6).collect();
    (1..6).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
    let pages = Tensor::from_host(&cx.pool, "pages", DType::I32, &[2, max_pages], &order).unwrap();
    // What no token was written to is NaN: it must not be read.
    let cache = random(&cx, &mut rng, 6 * PAGE, 2 * s.kv_heads * s.head_dim);
    let nan = vec![f32::NAN; cache.numel()];
    let cache = Tensor::from_f32(&cx.pool, "cache", cx.dtype, cache.shape(), &nan).unwrap();
    let mut done = [0, 0];
    while done != lengths {
        let (mut rows, mut sequence, mut position, mut slots) = (vec![], vec![], vec![], vec![]);
        for q in 0..2 {
            let n = chunk(&mut rng).min(lengths[q] - done[q]);
            for p in done[q]..done[q] + n {
                rows.push(q * lengths[0] + p);
                sequence.push(q as i32);
                position.push(p as i32);
                slots.push(order[q * max_pages + p / PAGE] * PAGE as i32 + (p % PAGE) as i32);
            }
            done[q] += n;
        }
        if rows.is_empty() {
            continue;
        }
        let part = gather(&cx, &qkv, &rows);
        let [sequence, position, slots] =
            [sequence, position, slots].map(|v| cx.ints("rows", &v).unwrap());
        // Without a table nothing turns.
        let at = PagedRows {
            slots: &slots,
            page_table: &pages,
            sequences: &sequence,
            positions: &position,
        };
        let got = if decodes {
            let next = [Some(&qkv), Some(&cache)]; // with one row left, a block fetches them
            attention_decode(&mut cx, &part, &cache, None, None, at, s, next)
        } else {
            let (q, kv) = (s.heads, s.kv_heads);
            rope_append(&mut cx, &part, &cache, None, &position, &slots, q, kv, None).unwrap();
            attention_paged(&mut cx, &part, &cache, at, s)
        };
        let got = bits(&got.unwrap());
        for (r, got) in rows.iter().zip(&got) {
            assert_eq!(got, &want[*r], "row {r}, {kind:?}, {s:?}");
        }
    }
}

fn shapes() -> [AttnShape; 3] {
    [
        shape(4, 2, 32),
        AttnShape { window: Some(50), ..shape(2, 1, 64) },
        AttnShape { softcap: Some(3.0), window: Some(100), ..shape(7, 1, 16) },
    ]
}

/// Head sizes, groups and masks of the decoding kernel, in turns of one and of several pages.
fn decode_shapes() -> [AttnShape; 3] {
    [
        shape(7, 1, 64),
        AttnShape { softcap: Some(3.0), window: Some(100), ..shape(4, 2, 64) },
        AttnShape { window: Some(70), ..shape(4, 2, 128) },
    ]
}

#[test]
fn attention_decode_equals_training() {
    for kind in ALL {
        for s in shapes().into_iter().chain(decode_shapes()) {
            paged_equals_training(kind, s, false, |_| 1);
            paged_equals_training(kind, s, true, |_| 1);
        }
    }
}

#[test]
fn attention_prefill_in_chunks_equals_training() {
    for kind in ALL {
        shapes()
            .into_iter()
            .for_each(|s| paged_equals_training(kind, s, false, |rng| rng.below(90)));
    }
}

/// A shared prompt packed once gives each row the bits that it has when prompt and answer are one
/// sequence.
fn sharing_changes_no_bits(kind: (AttentionChoice, DType), s: AttnShape) {
    let (mut cx, mut rng) = (context(kind), Rng(6));
    let (prompt, answers) = (75, [40, 1, 70]);
    let qkv = random(&cx, &mut rng, 186, width(&s));
    let shared =
        [(prompt, None), (answers[0], Some(0)), (answers[1], Some(0)), (answers[2], Some(0))];
    let plan = AttnPlan::new(&cx, &segments(&shared)).unwrap();
    let got = bits(&attention(&mut cx, &qkv, &plan, s).unwrap());
    // The same sequences unpacked, behind one that shifts all tiles.
    let (mut rows, mut first): (Vec<usize>, usize) = ((0..11).collect(), prompt);
    let mut lengths = vec![11];
    for n in answers {
        rows.extend((0..prompt).chain(first..first + n));
        lengths.push(prompt + n);
        first += n;
    }
    let plan = AttnPlan::sequences(&cx, &lengths).unwrap();
    let unpacked = gather(&cx, &qkv, &rows);
    let want = bits(&attention(&mut cx, &unpacked, &plan, s).unwrap());
    for (r, want) in rows.iter().zip(&want).skip(11) {
        assert_eq!(&got[*r], want, "row {r}, {kind:?}, {s:?}");
    }
}

#[test]
fn attention_of_a_shared_prompt_equals_unpacked() {
    for kind in ALL {
        shapes().into_iter().for_each(|s| sharing_changes_no_bits(kind, s));
    }
}

/// The gradient of qkv from the tape, and its relative distance from the f64 backward.
fn gradient_error(
    kind: (AttentionChoice, DType),
    s: AttnShape,
    of: &[(usize, Option<usize>)],
) -> f64 {
    let (mut cx, mut rng) = (context(kind), Rng(7));
    let plan = AttnPlan::new(&cx, &segments(of)).unwrap();
    let qkv = random(&cx, &mut rng, plan.rows, width(&s))
        .with_id(Id::Param { set: ParamSetId::Model, index: 0 });
    let dout = random(&cx, &mut rng, plan.rows, s.heads * s.head_dim);
    let grad = Tensor::new(&cx.pool, "gradient", cx.dtype, qkv.shape()).unwrap();
    cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![Some(grad.clone())]);
    cx.tape = Some(Tape::default());
    let out = attention(&mut cx, &qkv, &plan, s).unwrap();
    cx.backward(vec![(out, dout.clone())]).unwrap();
    let wide = |t: &Tensor| {
        F64::new(t.shape(), t.to_f32().unwrap().iter().map(|v| f64::from(*v)).collect())
    };
    let want = gradient(&s, &plan, &wide(&qkv), &wide(&dout));
    let difference: f64 =
        wide(&grad).data.iter().zip(&want.data).map(|(a, b)| (a - b) * (a - b)).sum();
    (difference / want.data.iter().map(|v| v * v).sum::<f64>()).sqrt()
}

#[test]
fn attention_gradients_of_long_segments() {
    let shared = [(70, None), (61, Some(0)), (1, Some(0)), (66, Some(0)), (130, None)];
    for kind in ALL {
        let limit = if kind.1 == DType::F32 { 2e-6 } else { 6e-3 };
        for s in shapes().into_iter().chain([shape(2, 1, 80), shape(2, 1, 128), shape(1, 1, 256)]) {
            let error = gradient_error(kind, s, &shared);
            println!("{kind:?} {s:?} error {error:.2e}");
            assert!(error < limit, "{kind:?} {s:?}: {error}");
        }
    }
}

#[test]
fn attention_plans_that_are_wrong_say_so() {
    let cx = context(SIMT[0]);
    for (of, word) in [
        (vec![(3, Some(7))], "not there"),
        (vec![(3, None), (2, Some(0)), (2, Some(1))], "one level"),
        (vec![(0, None)], "0 rows"),
        (vec![], "0 rows"),
    ] {
        let error = AttnPlan::new(&cx, &segments(&of)).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let mut gap = segments(&[(3, None), (4, None)]);
    gap[1].start = 4;
    assert!(AttnPlan::new(&cx, &gap).unwrap_err().to_string().contains("expected row 3"));
}

/// Prints GFLOP/s on this machine (4 D flops a pair forward, 10 D backward): `cargo test speed --
/// --nocapture`.
#[test]
fn attention_speed_is_printed() {
    for (kind, d) in [(SIMT[0], 32), (SIMT[0], 64), (SIMT[0], 128), (SIMT[1], 64)] {
        let (mut cx, mut rng, s) = (context(kind), Rng(8), shape(4, 2, d));
        let plan = AttnPlan::sequences(&cx, &[256; 4]).unwrap();
        let qkv = random(&cx, &mut rng, plan.rows, width(&s))
            .with_id(Id::Param { set: ParamSetId::Model, index: 0 });
        let dout = random(&cx, &mut rng, plan.rows, s.heads * d);
        let grad = Tensor::new(&cx.pool, "gradient", cx.dtype, qkv.shape()).unwrap();
        let flops = plan.pairs * (s.heads * d) as f64 / 1e9;
        let (mut forward, mut backward) = (0.0f64, 0.0f64);
        for _ in 0..4 {
            cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![Some(grad.clone())]);
            cx.tape = Some(Tape::default());
            let t = Instant::now();
            let out = attention(&mut cx, &qkv, &plan, s).unwrap();
            forward = forward.max(4.0 * flops / t.elapsed().as_secs_f64());
            let t = Instant::now();
            cx.backward(vec![(out, dout.clone())]).unwrap();
            backward = backward.max(10.0 * flops / t.elapsed().as_secs_f64());
        }
        let name = cx.device.name();
        println!(
            "{kind:?} D {d} on {name}: forward {forward:.1}, backward {backward:.1} GFLOP/s in all"
        );
    }
}
