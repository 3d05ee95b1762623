//! The CPU twins of Hopper's instructions (`kernels/prim/tma.cuh`, `wgmma.cuh`): their numbers are
//! right, and strict mode catches each bug planted in `kernels/shim/planted_hopper.cu`.

use std::sync::Arc;

use temper::autograd::Cx;
use temper::check::check_ops;
use temper::config::MatmulChoice;
use temper::device::{DType, Device, Launch, Layout, Pool, cpu::Cpu};
use temper::error::Result;
use temper::kernels::{self, Boxes, hopper_bug};
use temper::ops::case::Rng;
use temper::ops::matmul::product;
use temper::tensor::Tensor;

const SIDE: usize = 64;
const STEPS: usize = 5;

/// -1, 0 or 1: all sums are exact.
fn value(seed: usize, i: usize) -> f32 {
    ((i.wrapping_mul(2_654_435_761) >> 7) + seed * 31 + i / 97) as f32 % 3.0 - 1.0
}

fn matrix(seed: usize) -> Vec<f32> {
    (0..SIDE * SIDE * STEPS).map(|i| value(seed, i % 100_003)).collect()
}

fn run(device: Cpu, bug: i32) -> Result<Vec<f32>> {
    let pool = Pool::new(Arc::new(device));
    let shape = [SIDE, SIDE * STEPS];
    let a = Tensor::from_f32(&pool, "a", DType::BF16, &shape, &matrix(1))?;
    let b = Tensor::from_f32(&pool, "b", DType::BF16, &shape, &matrix(2))?;
    let c = Tensor::new(&pool, "c", DType::BF16, &[SIDE, SIDE])?;
    let boxes = |t| Boxes::swizzled(t, SIDE);
    let steps = STEPS as i32;
    let args = kernels::PlantedHopperArgs { a: boxes(&a), b: boxes(&b), c: boxes(&c), steps };
    kernels::planted_hopper(&**pool.device(), Launch::grid([1, 1, 1]), bug as usize, args)?;
    c.to_f32()
}

/// The planted bug is an error whose text has `part`, with each seed.
fn caught(bug: i32, part: &str) {
    for seed in 0..4 {
        match run(Cpu::strict(seed), bug) {
            Err(e) => assert!(e.to_string().contains(part), "\"{part}\" is missing in: {e}"),
            Ok(c) => panic!("seed {seed}: not caught, c = {:?}", &c[..8]),
        }
    }
}

/// The planted bug shows as NaN, with each seed.
fn poisoned(bug: i32) {
    for seed in 0..4 {
        let c = run(Cpu::strict(seed), bug).unwrap();
        assert!(c.iter().any(|v| v.is_nan()), "seed {seed}: {:?}", &c[..8]);
    }
}

#[test]
fn the_correct_twin_has_the_right_numbers_in_both_modes() {
    let (a, b, k) = (matrix(1), matrix(2), SIDE * STEPS);
    let dot = |i: usize| -> f32 {
        let (r, c) = (i / SIDE, i % SIDE);
        (0..k).map(|p| a[r * k + p] * b[c * k + p]).sum()
    };
    let want: Vec<f32> = (0..SIDE * SIDE).map(dot).collect();
    assert!(want.iter().all(|v| v.abs() <= 256.0), "exact as bf16");
    assert!(want.iter().any(|v| *v != want[0]), "and not all the same");
    assert_eq!(run(Cpu::new(), hopper_bug::NONE).unwrap(), want);
    for seed in 0..4 {
        assert_eq!(run(Cpu::strict(seed), hopper_bug::NONE).unwrap(), want, "seed {seed}");
    }
}

#[test]
fn a_missing_mbarrier_wait_is_an_error() {
    caught(hopper_bug::NO_WAIT, "mbarrier");
}

#[test]
fn a_wait_for_the_wrong_parity_is_an_error() {
    caught(hopper_bug::WRONG_PARITY, "mbarrier");
}

#[test]
fn a_descriptor_outside_shared_memory_is_an_error() {
    caught(hopper_bug::OUTSIDE_SHARED, "operand A of a wgmma");
}

#[test]
fn a_descriptor_that_leaves_its_tile_is_an_error() {
    caught(hopper_bug::OUTSIDE_TILE, "not the start of 16 k in a tile");
}

#[test]
fn a_store_before_the_proxy_fence_writes_poison() {
    poisoned(hopper_bug::NO_PROXY_FENCE);
}

#[test]
fn a_stage_that_is_released_before_its_wgmma_ended_is_an_error() {
    caught(hopper_bug::EARLY_RELEASE, "which a wgmma of threads 128-255 may still read");
}

#[test]
fn a_wrong_count_of_expected_bytes_is_an_error() {
    caught(hopper_bug::WRONG_BYTES, "mbarrier");
}

#[test]
fn accumulators_that_are_read_before_the_wait_are_poison() {
    caught(hopper_bug::NO_WGMMA_WAIT, "mbarrier");
}

#[test]
fn a_missing_wgmma_fence_is_an_error() {
    caught(hopper_bug::NO_WGMMA_FENCE, "without a wgmma_fence");
}

#[test]
fn a_store_that_nobody_waits_for_is_an_error() {
    caught(hopper_bug::STORE_NOT_AWAITED, "that it never waited for");
}

fn arrivals(device: Cpu, bug: usize) -> Result<Vec<f32>> {
    const N: usize = 64;
    let pool = Pool::new(Arc::new(device));
    let input: Vec<f32> = (0..N).map(|i| i as f32).collect();
    let x = Tensor::from_host(&pool, "x", DType::F32, &[N], &input)?;
    let y = Tensor::new(&pool, "y", DType::F32, &[N])?;
    let args = kernels::PlantedCopyArrivalArgs { y: y.out(), x: &x, n: N as i32 };
    let at = Launch::blocks([1, 1, 1], N as u32, 4 * N + 8);
    kernels::planted_copy_arrival(&**pool.device(), at, bug, args)?;
    y.to_vec()
}

#[test]
fn copies_that_arrive_at_an_mbarrier_land_there() {
    let want: Vec<f32> = (0..64).rev().map(|i| i as f32).collect();
    assert_eq!(arrivals(Cpu::new(), 0).unwrap(), want);
    for seed in 0..4 {
        assert_eq!(arrivals(Cpu::strict(seed), 0).unwrap(), want);
        let e = arrivals(Cpu::strict(seed), 1).unwrap_err().to_string();
        assert!(e.contains("whose mbarrier nobody waited for"), "{e}");
    }
}

// --- the matrix product ---

const LAYOUTS: [(Layout, DType); 4] = [
    (Layout::NT, DType::BF16),
    (Layout::NN, DType::BF16),
    (Layout::NT, DType::F32),
    (Layout::TN, DType::F32),
];

/// `c` after the product of fixed random operands, by the engine's own kernel.
fn product_bits(device: Cpu, (layout, dtype): (Layout, DType), shape: [usize; 3]) -> Vec<u32> {
    let mut cx = Cx::new(Arc::new(device), DType::BF16).unwrap();
    cx.matmul = MatmulChoice::Own;
    let [m, n, k] = shape;
    let mut rng = Rng(5);
    let mut put = |rows: usize, cols: usize, dtype| {
        let values: Vec<f32> =
            rng.array(&[rows, cols], 1.0).data.iter().map(|v| *v as f32).collect();
        Tensor::from_f32(&cx.pool, "t", dtype, &[rows, cols], &values).unwrap()
    };
    let a = if layout == Layout::TN { put(k, m, DType::BF16) } else { put(m, k, DType::BF16) };
    let b = if layout == Layout::NT { put(n, k, DType::BF16) } else { put(k, n, DType::BF16) };
    let bias = put(1, n, DType::BF16).reshape(&[n]).unwrap();
    let (plain, c) = (put(m, n, dtype), put(m, n, dtype));
    product(&cx, layout, &plain, &a, &b, None, false).unwrap();
    product(&cx, layout, &c, &a, &b, Some(&bias), true).unwrap();
    let all = [plain.to_f32().unwrap(), c.to_f32().unwrap()].concat();
    all.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn the_product_on_hopper_has_the_bits_of_the_other_one() {
    for what in LAYOUTS {
        // Tiles 128, 224, 192 and 256 wide.
        for shape in [[8, 8, 8], [130, 200, 72], [264, 136, 200], [384, 512, 72]] {
            let other = product_bits(Cpu::new(), what, shape);
            let hopper = product_bits(Cpu::new().with_wgmma(), what, shape);
            assert!(other == hopper, "{what:?} {shape:?}");
            let strict = product_bits(Cpu::strict(2).with_wgmma(), what, shape);
            assert!(other == strict, "strict {what:?} {shape:?}");
        }
    }
}

#[test]
fn a_gradient_that_is_split_along_k_is_the_sum_of_its_parts() {
    // 4 tiles of 32 steps, cut into 4 parts each.
    let (what, shape) = ((Layout::TN, DType::F32), [136, 136, 2048]);
    let floats = |bits: Vec<u32>| -> Vec<f32> { bits.into_iter().map(f32::from_bits).collect() };
    let split = product_bits(Cpu::new().with_wgmma(), what, shape);
    for seed in 0..2 {
        assert!(split == product_bits(Cpu::strict(seed).with_wgmma(), what, shape), "seed {seed}");
    }
    let (split, whole) = (floats(split), floats(product_bits(Cpu::new(), what, shape)));
    assert!(split != whole, "it is split");
    // Float sums of 2048 terms in another order.
    let norm =
        |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let error =
        norm(&mut split.iter().zip(&whole).map(|(s, w)| s - w)) / norm(&mut whole.iter().copied());
    assert!(error < 2e-6, "{error:e}");
}

#[test]
fn every_case_of_a_linear_layer_passes_with_the_product_on_hopper() {
    for device in [Cpu::new().with_wgmma(), Cpu::strict(1).with_wgmma()] {
        let device: Arc<dyn Device> = Arc::new(device);
        let outcomes = check_ops(&device, "linear", |_| {});
        assert!(outcomes.iter().any(|o| o.op == "linear" && o.dtype == DType::BF16));
        let failed: Vec<String> = outcomes
            .iter()
            .filter_map(|o| o.failure.as_ref().map(|f| format!("{} {}: {f}", o.op, o.case)))
            .collect();
        assert!(failed.is_empty(), "{}", failed.join("\n"));
    }
}
