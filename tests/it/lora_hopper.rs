//! Low-rank terms inside the products on Hopper and in those of few rows (`kernels/lora_hopper.cu`,
//! `kernels/matmul_few.cu`): the bits of `kernels/lora.cu`, in all modes, however many rows there
//! are.

use std::path::Path;
use std::sync::Arc;

use temper::autograd::Cx;
use temper::check::check_ops;
use temper::check::low_rank::{AdapterGroup, compare};
use temper::cli::launches::{LaunchCounts, MODES, per_layer};
use temper::config::MatmulChoice;
use temper::device::{DType, Device, cpu::Cpu};
use temper::methods::offline::sft::SftRun;
use temper::model::batch::Sequence;
use temper::model::decoder::Decoder;
use temper::model::layout::ModelConfig;
use temper::ops::case::Rng;
use temper::ops::lora_kernels::{Read, Segment, Wanted, lora_grads, lora_nt, steps_agree};
use temper::rollout::sample::Sampling;
use temper::rollout::{Engine, EngineOptions, Request};
use temper::tensor::Tensor;
use temper::train::tuning::{prepare, scheme};

use crate::support::{MODEL, bits, words};

fn context(device: impl Device + 'static) -> Cx {
    Cx::new(Arc::new(device), DType::BF16).unwrap()
}

fn random(cx: &Cx, seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let values: Vec<f32> = Rng(seed).array(shape, 1.0).data.iter().map(|v| *v as f32).collect();
    Tensor::from_f32(&cx.pool, "t", dtype, shape, &values).unwrap()
}

fn bits_of(t: &Tensor) -> Vec<u32> {
    bits(&t.to_f32().unwrap())
}

struct Case {
    n: usize,
    k: usize,
    /// start, end, rank
    segments: &'static [(usize, usize, usize)],
}

/// The most rows; others are taken from the front.
const ROWS: usize = 200;

/// Tiles 128, 192, 224 and 256 wide that cross the borders of segments; columns without an adapter;
/// steps of fewer than 64 ranks, of 64, and several of them.
const CASES: [Case; 6] = [
    Case { n: 8, k: 8, segments: &[(0, 8, 16)] },
    Case { n: 328, k: 72, segments: &[(0, 200, 16), (200, 264, 16), (264, 328, 16)] },
    Case { n: 200, k: 136, segments: &[(0, 104, 8), (104, 152, 8), (152, 200, 8)] },
    Case { n: 136, k: 64, segments: &[(8, 72, 64), (104, 136, 16)] },
    Case { n: 512, k: 72, segments: &[(0, 256, 80), (256, 512, 144)] },
    Case { n: 448, k: 200, segments: &[(0, 448, 32)] },
];

fn segments<'a>(case: &Case, b: &'a [Tensor]) -> Vec<Segment<'a>> {
    let place =
        |(&(start, end, _), b): (&(usize, usize, usize), &'a Tensor)| Segment { b, start, end };
    case.segments.iter().zip(b).map(place).collect()
}

/// Bits of y of the first `rows` rows, without and with a bias.
fn forward(device: impl Device + 'static, case: &Case, rows: usize) -> [Vec<u32>; 2] {
    let cx = context(device);
    let Case { n, k, .. } = *case;
    let ranks = case.segments.iter().map(|s| s.2).sum();
    let real = |seed, shape: &[usize]| random(&cx, seed, shape, DType::BF16);
    let x = real(1, &[ROWS, k]).rows(0, rows).unwrap();
    let t = real(3, &[ROWS, ranks]).rows(0, rows).unwrap();
    let (w, bias) = (real(2, &[n, k]), real(4, &[n]));
    let b: Vec<Tensor> = case
        .segments
        .iter()
        .map(|&(from, to, rank)| real(5 + from as u64, &[to - from, rank]))
        .collect();
    [None, Some(&bias)].map(|bias| {
        let y = real(9, &[rows, n]);
        lora_nt(&cx, &y, &x, &w, bias, &t, &segments(case, &b)).unwrap();
        bits_of(&y)
    })
}

#[test]
fn y_has_the_same_bits_however_many_rows_there_are_and_on_hopper() {
    for case in &CASES {
        // The kernel of `kernels/lora.cu`: too many rows for the one for few, and no Hopper.
        let want = forward(Cpu::new(), case, ROWS);
        let rows_of = |rows: usize| [0, 1].map(|i| want[i][..rows * case.n].to_vec());
        for rows in [1, 5, 17, 33, 64] {
            assert!(
                forward(Cpu::new(), case, rows) == rows_of(rows),
                "few {rows} {:?}",
                case.segments
            );
        }
        for rows in [65, ROWS] {
            let hopper = forward(Cpu::new().with_wgmma(), case, rows);
            assert!(hopper == rows_of(rows), "hopper {rows} {:?}", case.segments);
        }
    }
}

#[test]
fn strict_mode_finds_nothing_in_y_and_gives_the_same_bits() {
    for case in &CASES {
        for rows in [5, 64, 130] {
            let fast = forward(Cpu::new().with_wgmma(), case, rows);
            let strict = forward(Cpu::strict(rows as u64).with_wgmma(), case, rows);
            assert!(fast == strict, "{rows} {:?}", case.segments);
        }
    }
}

/// Bits of dx, dx added to, dA, dA added to, each dB, with dx and without it.
fn backward(device: impl Device + 'static, case: &Case, rows: usize) -> Vec<Vec<u32>> {
    let cx = context(device);
    let Case { n, k, .. } = *case;
    let ranks = case.segments.iter().map(|s| s.2).sum();
    let real = |seed, shape: &[usize]| random(&cx, seed, shape, DType::BF16);
    let float = |seed, shape: &[usize]| random(&cx, seed, shape, DType::F32);
    let (x, w, t) = (real(1, &[rows, k]), real(2, &[n, k]), real(3, &[rows, ranks]));
    let (dy, dt, a) = (real(4, &[rows, n]), real(5, &[rows, ranks]), real(6, &[ranks, k]));
    let b: Vec<Tensor> =
        case.segments.iter().map(|&(from, to, rank)| real(7, &[to - from, rank])).collect();
    let read = Read { x: &x, dt: &dt, dy: &dy, t: &t };
    let mut all = Vec::new();
    for (with_dx, add) in [(true, false), (true, true), (false, true)] {
        let (dx, da) = (real(8, &[rows, k]), float(9, &[ranks, k]));
        let db: Vec<Tensor> = b.iter().map(|b| float(10, b.shape())).collect();
        // The first dB is added to where the others are not.
        let slots: Vec<_> =
            db.iter().enumerate().map(|(i, t)| Some((t, add != (i == 0)))).collect();
        let to = Wanted {
            dx: with_dx.then_some((&dx, add)),
            w: with_dx.then_some(&w),
            a: &a,
            da: Some((&da, add)),
            db: &slots,
        };
        lora_grads(&cx, &to, &read, &segments(case, &b)).unwrap();
        all.extend([&dx, &da].into_iter().chain(&db).map(bits_of));
    }
    all
}

#[test]
fn the_gradients_on_hopper_have_the_bits_of_the_other_kernels() {
    for case in &CASES {
        for rows in [5, ROWS] {
            let want = backward(Cpu::new(), case, rows);
            let hopper = backward(Cpu::new().with_wgmma(), case, rows);
            assert!(want == hopper, "{rows} {:?}", case.segments);
            let strict = backward(Cpu::strict(3).with_wgmma(), case, rows);
            assert!(want == strict, "strict {rows} {:?}", case.segments);
        }
    }
}

#[test]
fn steps_of_ranks_agree_where_no_step_would_be_cut_elsewhere() {
    for ranks in [&[16][..], &[8, 8, 8], &[16, 16, 16], &[32, 8, 8], &[64, 16], &[8, 8, 16], &[24]]
    {
        assert!(steps_agree(ranks.iter().copied()), "{ranks:?}");
    }
    for ranks in [&[4][..], &[12], &[8, 16], &[24, 24], &[16, 8, 16], &[3, 5]] {
        assert!(!steps_agree(ranks.iter().copied()), "{ranks:?}");
    }
}

#[test]
fn every_case_of_a_layer_with_pairs_passes_on_hopper() {
    for device in [Cpu::new().with_wgmma(), Cpu::strict(1).with_wgmma()] {
        let device: Arc<dyn Device> = Arc::new(device);
        let outcomes = check_ops(&device, "lora_linear", |_| {});
        assert!(outcomes.iter().any(|o| o.dtype == DType::BF16));
        let failed: Vec<String> = outcomes
            .iter()
            .filter_map(|o| o.failure.as_ref().map(|f| format!("{} {}: {f}", o.op, o.case)))
            .collect();
        assert!(failed.is_empty(), "{}", failed.join("\n"));
    }
}

/// A model with trained pairs, stirred so that nothing of them is zero.
fn stirred(cx: &Cx, keys: &str) -> Decoder {
    let run = SftRun::load(None, &words(&format!("use_peft=true {keys}"))).unwrap().0;
    let base = Decoder::folder(MODEL).unwrap().storage(scheme(&run.peft)).positions(512);
    let model =
        prepare(cx, base.build(cx).unwrap(), &run.peft, None, Path::new(MODEL), 42).unwrap();
    let (params, mut rng) = (model.trained(), Rng(12));
    for i in 0..params.specs.len() {
        let mut values = params.weight_view(i).unwrap().to_f32().unwrap();
        values.iter_mut().for_each(|v| *v += 0.1 * rng.normal() as f32);
        params.store(i, &values).unwrap();
    }
    model
}

/// Prompts of 1, 3 and 87 tokens, in steps of few rows and of many; then the same tokens in one
/// forward of the trainer. On Hopper with every choice of products but the library's.
#[test]
fn generation_on_hopper_has_the_trainers_bits_with_pairs_in_every_layer() {
    for (keys, storage, matmul) in [
        ("lora_r=16", "", MatmulChoice::Auto),
        ("lora_r=8", "", MatmulChoice::Exact),
        ("lora_r=16", "load_in_4bit=true", MatmulChoice::Own),
    ] {
        let mut cx = context(Cpu::new().with_wgmma());
        cx.matmul = matmul;
        let mut model = stirred(&cx, &format!("lora_target_modules=all-linear {keys} {storage}"));
        let sampling = Sampling { temperature: 1.0, seed: 3, ..Sampling::greedy() };
        let prompts: Vec<Vec<u32>> = vec![vec![5, 9, 11], vec![7], (3..90).collect()];
        let requests = Request::numbered(prompts.clone(), 3);
        let mut seen = Vec::new();
        for (rows, tokens) in [(9, 200), (2, 7)] {
            let mut options = EngineOptions::new(12, sampling.clone(), vec![], rows);
            options.max_step_tokens = tokens;
            let mut engine = Engine::new(&cx, &mut model, options, 128).unwrap();
            let mut all = engine.generate(&mut cx, &model, &requests).unwrap();
            all.sort_by_key(|c| (c.request, c.member));
            for c in &all {
                let prompt = &prompts[c.request];
                let ids = [prompt.as_slice(), &c.ids].concat();
                let target: Vec<bool> = (0..ids.len()).map(|i| i >= prompt.len()).collect();
                let row = [Sequence { ids: &ids, target: Some(&target) }];
                let trained = model.logps(&mut cx, &row).unwrap();
                assert_eq!(bits(&trained[0]), bits(&c.logps), "{keys} {storage}");
            }
            seen.push(all);
        }
        assert!(seen[0] == seen[1], "another batch, the same completions");
    }
}

fn total(counts: &(LaunchCounts, LaunchCounts)) -> usize {
    counts.0.values().chain(counts.1.values()).sum()
}

#[test]
fn a_layer_with_pairs_takes_28_launches_on_hopper() {
    let config = ModelConfig::llama(96, 64, 160, 3, 4, 2, 256, true);
    let of =
        |name: &str| per_layer(&config, MODES.iter().find(|m| m.name == name).unwrap()).unwrap();
    let hopper = of("LoRA, Hopper");
    assert_eq!(hopper.0.values().sum::<usize>(), 13, "{hopper:?}");
    assert_eq!(total(&hopper), 28, "{hopper:?}");
    assert_eq!(total(&of("LoRA on 4 bits, Hopper")), 36);
    let launched = |of: &LaunchCounts, name: &str| -> usize {
        of.iter().filter(|(kernel, _)| kernel.contains(name)).map(|(_, n)| n).sum()
    };
    // A step of 64 rows.
    assert_eq!(launched(&hopper.0, "few_lora_nt"), 4, "{hopper:?}");
    assert_eq!(launched(&hopper.1, "hopper_lora_nn"), 4, "{hopper:?}");
    assert_eq!(launched(&hopper.0, "library product") + launched(&hopper.1, "library"), 0);
    assert_eq!(total(&of("LoRA, library products")), 50);
    assert_eq!(total(&of("LoRA, own products")), 32);
}

#[test]
fn the_self_check_of_low_rank_terms_finds_equal_bits() {
    let device: Arc<dyn Device> = Arc::new(Cpu::new().with_wgmma());
    let group = AdapterGroup { rows: 70, k: 40, columns: &[72, 136], rank: 16 };
    let (case, differ) = compare(&device, &group).unwrap();
    assert!(differ.is_empty(), "{differ:?}");
    assert!(case.contains("rows 70 k 40 columns [72, 136] rank 16; y "), "{case}");
}
