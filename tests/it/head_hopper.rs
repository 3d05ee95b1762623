//! The head's statistics and gradient at the ends of a product's tiles (`kernels/head_hopper.cu`), on
//! the CPU twins of Hopper: the bits of stored logits.

use std::sync::Arc;

use temper::autograd::{Cx, ParamGrads, Tape};
use temper::check::head::compare;
use temper::config::MatmulChoice;
use temper::device::cpu::Cpu;
use temper::device::dry_run::DryRun;
use temper::device::{Capabilities, DType, Device, MemoryInfo};
use temper::ops::case::Rng;
use temper::ops::head::{Head, HeadLogps, HeadLoss, head_loss, head_rows};
use temper::ops::logit_map::LogitMap;
use temper::ops::sample::{Draw, Sampling, sample_rows};
use temper::tensor::{Id, ParamSetId, Tensor};

/// Rows, hidden size, vocabulary: edges of tiles in each direction, more than one slice, both heights
/// of tiles, and consumers with several tiles.
const SHAPES: [[usize; 3]; 6] =
    [[1, 8, 8], [65, 64, 136], [130, 200, 264], [192, 72, 1160], [385, 40, 520], [70, 136, 2176]];

fn context(device: impl Device + 'static) -> Cx {
    let mut cx = Cx::new(Arc::new(device), DType::BF16).unwrap();
    cx.matmul = MatmulChoice::Own;
    cx
}

fn bits(t: &Tensor) -> Vec<u32> {
    match t.dtype() {
        DType::I32 => t.to_vec::<i32>().unwrap().iter().map(|v| *v as u32).collect(),
        _ => t.to_f32().unwrap().iter().map(|v| v.to_bits()).collect(),
    }
}

fn values(seed: u64, n: usize, scale: f64) -> Vec<f32> {
    Rng(seed).array(&[n], scale).data.iter().map(|v| *v as f32).collect()
}

/// What a test varies.
#[derive(Clone, Copy, Debug)]
struct Variation {
    shape: [usize; 3],
    scale: f32,
    /// Rows whose logits are stored at once; twice as many if none are.
    chunk: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Loss,
    LogProbs,
    /// With the entropy's gradient.
    Entropy,
}

/// All results and gradients of a head.
fn results(device: Cpu, v: Variation) -> Vec<Vec<u32>> {
    let [rows, k, vocab] = v.shape;
    let mut cx = context(device);
    let real = |cx: &Cx, seed, shape: &[usize], scale| {
        let values = values(seed, shape.iter().product(), scale);
        Tensor::from_f32(&cx.pool, "t", DType::BF16, shape, &values).unwrap()
    };
    let id = |index| Id::Param { set: ParamSetId::Model, index };
    let x = real(&cx, 1, &[rows, k], 1.0).with_id(id(0));
    let w = real(&cx, 2, &[vocab, k], 4.0 * (k as f64).powf(-0.5)).with_id(id(1));
    let slot =
        |shape: &[usize]| Some(Tensor::new(&cx.pool, "gradient", DType::F32, shape).unwrap());
    cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![slot(&[rows, k]), slot(&[vocab, k])]);
    cx.tape = Some(Tape::default());
    let mut rng = Rng(5);
    let targets: Vec<i32> = (0..rows).map(|_| rng.below(vocab) as i32).collect();
    let target = cx.ints("targets", &targets).unwrap();
    let float = |seed, scale| {
        Tensor::from_f32(&cx.pool, "t", DType::F32, &[rows], &values(seed, rows, scale)).unwrap()
    };
    let (weight, by_entropy) = (float(3, 1.0), float(4, 0.2));
    let (scale, map, chunk) = (v.scale, LogitMap::PLAIN, v.chunk);
    let (out, seeds) = match v.kind {
        Kind::Loss => {
            let op = HeadLoss { scale, map, chunk };
            let [loss, logp, entropy, best] =
                cx.apply_many(op, &[&x, &w, &target, &weight]).unwrap();
            let one = Tensor::from_f32(&cx.pool, "t", DType::F32, &[1], &[1.0]).unwrap();
            ([logp, entropy, best], vec![(loss, one)])
        }
        kind => {
            let op = HeadLogps { scale, map, chunk, square: false };
            let out: [Tensor; 3] = cx.apply_many(op, &[&x, &w, &target]).unwrap();
            let mut seeds = vec![(out[0].clone(), weight)];
            seeds.extend((kind == Kind::Entropy).then(|| (out[1].clone(), by_entropy)));
            (out, seeds)
        }
    };
    let mut all: Vec<Vec<u32>> = out.iter().map(bits).collect();
    cx.backward(seeds).unwrap();
    all.extend(cx.param_grads[ParamSetId::Model].slots.iter().flatten().map(bits));
    all
}

fn variations() -> impl Iterator<Item = Variation> {
    let kinds = [Kind::Loss, Kind::LogProbs, Kind::Entropy];
    SHAPES.into_iter().enumerate().flat_map(move |(i, shape)| {
        kinds.map(|kind| Variation { shape, scale: [1.0, 0.7][i % 2], chunk: 1000, kind })
    })
}

#[test]
fn a_head_without_logits_has_the_bits_of_stored_ones() {
    for v in variations() {
        let stored = results(Cpu::new(), v);
        let fused = results(Cpu::new().with_wgmma(), v);
        let names = ["log-prob", "entropy", "best", "gradient of x", "gradient of W"];
        for (name, (stored, fused)) in names.into_iter().zip(stored.iter().zip(&fused)) {
            assert!(stored == fused, "{name}, {v:?}");
        }
    }
}

#[test]
fn strict_mode_gives_the_same_bits_and_finds_nothing() {
    for (i, v) in variations().enumerate() {
        let fast = results(Cpu::new().with_wgmma(), v);
        let strict = results(Cpu::strict(i as u64).with_wgmma(), v);
        assert!(fast == strict, "{v:?}");
    }
}

#[test]
fn the_chunk_changes_no_row() {
    for kind in [Kind::Loss, Kind::Entropy] {
        let of = |chunk| Variation { shape: [300, 72, 264], scale: 0.7, chunk, kind };
        let whole = results(Cpu::new().with_wgmma(), of(1000));
        let parts = results(Cpu::new().with_wgmma(), of(37));
        assert!(whole[..4] == parts[..4], "{kind:?}");
    }
}

/// The head's kernels that a training step of these sizes launches on a GPU that computes nothing.
fn launches(wgmma: bool, choice: MatmulChoice, [k, vocab]: [usize; 2], v: &str) -> Vec<String> {
    let capabilities = Capabilities { wgmma, ..Capabilities::GPU };
    let device = Arc::new(DryRun::new("a GPU", capabilities, MemoryInfo { free: 0, total: 0 }));
    let mut cx = Cx::new(device.clone(), DType::BF16).unwrap();
    cx.matmul = choice;
    let real = |cx: &Cx, shape: &[usize]| Tensor::new(&cx.pool, "t", DType::BF16, shape).unwrap();
    let id = |index| Id::Param { set: ParamSetId::Model, index };
    let (x, w) = (real(&cx, &[64, k]).with_id(id(0)), real(&cx, &[vocab, k]).with_id(id(1)));
    let slot =
        |shape: &[usize]| Some(Tensor::new(&cx.pool, "gradient", DType::F32, shape).unwrap());
    cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![slot(&[64, k]), slot(&[vocab, k])]);
    cx.tape = Some(Tape::default());
    let target = cx.ints("targets", &[0; 64]).unwrap();
    let float = |n| Tensor::new(&cx.pool, "t", DType::F32, &[n]).unwrap();
    let (weight, one) = (float(64), float(1));
    let mut head = Head::plain(w);
    if v == "softcap" {
        head.map = LogitMap { divisor: 1.0, softcap: Some(30.0) };
    }
    let seeds = match v {
        "loss" => vec![(head_loss(&mut cx, &x, &head, &target, &weight, 1.0).unwrap().0, one)],
        _ => {
            let out = head_rows(&mut cx, &x, &head, &target, 1.0, v == "squares").unwrap();
            vec![(out.logp, weight)]
        }
    };
    cx.backward(seeds).unwrap();
    let all = device.take_launches().into_keys().filter(|name| name.contains("head_"));
    let without = |name: &str| name.rsplit_once('_').map(|(name, _dtype)| name.to_string());
    all.filter_map(|name| without(&name)).collect()
}

#[test]
fn the_choice_depends_on_device_context_sizes_and_map() {
    use MatmulChoice::{Auto, Exact, Library, Own};
    let fused = ["head_join", "head_stats", "hopper_head_grad_2", "hopper_head_parts_2"];
    let stored = ["head_grad", "head_slices_1", "head_stats"];
    for choice in [Auto, Exact, Own] {
        for kind in ["loss", "log-probs"] {
            assert_eq!(launches(true, choice, [896, 1160], kind), fused, "{choice:?} {kind}");
            assert_eq!(launches(false, choice, [896, 1160], kind), stored, "{choice:?} {kind}");
        }
    }
    assert_eq!(launches(true, Library, [896, 1160], "loss"), stored);
    // A second product of a long k takes longer than the logits' way through memory.
    let kept = ["head_grad", "head_join", "head_stats", "hopper_head_parts_2"];
    assert_eq!(launches(true, Own, [1024, 1160], "loss"), kept);
    assert_eq!(launches(true, Own, [1024, 1160], "log-probs"), fused);
    // Gradients whose rows do not begin at 16 bytes; a softcap; a statistic that tiles do not give.
    assert_eq!(launches(true, Own, [896, 1164], "log-probs"), stored);
    assert_eq!(launches(true, Own, [896, 1160], "softcap"), stored);
    assert_eq!(launches(true, Own, [896, 1160], "squares"), stored);
}

#[test]
fn the_self_check_of_the_head_passes_on_the_twins() {
    let device: Arc<dyn Device> = Arc::new(Cpu::new().with_wgmma());
    for entropy in [false, true] {
        let (case, differ) = compare(&device, [150, 40, 264], entropy).unwrap();
        assert!(differ.is_empty(), "{case}: {differ:?}");
        assert!(case.contains("; no logits: statistics "), "{case}");
    }
}

#[test]
fn draws_from_a_tile_s_statistics_are_those_from_logits() {
    let (rows, k, vocab) = (90, 40, 1160);
    let plain = Sampling { temperature: 1.0, seed: 5, ..Sampling::greedy() };
    let how = [
        plain.clone(),
        Sampling::greedy(),
        Sampling { top_k: 7, ..plain.clone() },
        Sampling { top_p: 0.8, min_p: 0.01, ..plain.clone() },
        Sampling { temperature: 0.7, ..plain },
    ];
    let draws = |device: Cpu, statistics: bool| {
        let mut cx = context(device);
        let real = |cx: &Cx, seed, shape: &[usize], scale| {
            let values = values(seed, shape.iter().product(), scale);
            Tensor::from_f32(&cx.pool, "t", DType::BF16, shape, &values).unwrap()
        };
        let hidden = real(&cx, 1, &[rows, k], 1.0);
        let head = Head::plain(real(&cx, 2, &[vocab, k], 0.5));
        let logits = head.rows_to_sample(&cx, &hidden, true).unwrap();
        assert_eq!(logits.parts.is_some(), statistics);
        let who: Vec<i32> =
            (0..rows as i32).flat_map(|r| [if r == 3 { -1 } else { r }, 2 * r, r]).collect();
        let who = cx.ints("who", &who).unwrap();
        let seed = cx.ints("seed", &[1, 2]).unwrap();
        let mut all = vec![bits(&logits.logits)];
        for how in &how {
            let logits = logits.rows(1, rows).unwrap();
            let who = who.view(4 * 3, DType::I32, &[3 * (rows - 1)]).unwrap();
            let draws = sample_rows(&mut cx, how, &logits, &who, &seed, None).unwrap();
            let each = draws.download().unwrap();
            let words = |d: &Draw| {
                let floats = [d.logp, d.logp_scaled, d.logp_truncated, d.entropy];
                [vec![d.token], floats.map(f32::to_bits).to_vec()].concat()
            };
            all.push(each.iter().flat_map(words).collect());
        }
        all
    };
    let stored = draws(Cpu::new(), false);
    assert!(stored == draws(Cpu::new().with_wgmma(), true));
    assert!(stored == draws(Cpu::strict(4).with_wgmma(), true));
}

#[test]
fn few_rows_and_scaled_logits_are_sampled_from_memory() {
    let cx = context(Cpu::new().with_wgmma());
    let hidden = Tensor::from_f32(&cx.pool, "t", DType::BF16, &[63, 8], &[0.5; 63 * 8]).unwrap();
    let head = Head::plain(hidden.rows(0, 8).unwrap());
    assert!(head.rows_to_sample(&cx, &hidden, true).unwrap().parts.is_none());
    let hidden = Tensor::from_f32(&cx.pool, "t", DType::BF16, &[64, 8], &[0.5; 64 * 8]).unwrap();
    assert!(head.rows_to_sample(&cx, &hidden, false).unwrap().parts.is_none());
    assert!(head.rows_to_sample(&cx, &hidden, true).unwrap().parts.is_some());
}
