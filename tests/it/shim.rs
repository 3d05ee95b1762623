//! The strict CPU mode catches what it promises to catch: each bug planted in
//! `kernels/shim/planted.cu` is found, and its correct twin passes with the right numbers. Fast
//! mode, strict mode and any number of threads give the same bits.

use std::sync::Arc;

use temper::check::run_case;
use temper::device::{DType, Device, Launch, Pool, cpu::Cpu};
use temper::error::Result;
use temper::kernels;
use temper::ops::case::Rng;
use temper::ops::registry::registry;
use temper::tensor::Tensor;

const N: usize = 64;

// All planted kernels have the same arguments.
type Planted = fn(&dyn Device, Launch, usize, kernels::PlantedDivergenceArgs<'_>) -> Result<()>;

fn input() -> Vec<f32> {
    (0..N).map(|i| i as f32 + 0.5).collect()
}

fn run_on(device: Cpu, kernel: Planted, d: usize, shared: usize) -> Result<Vec<f32>> {
    let pool = Pool::new(Arc::new(device));
    let x = Tensor::from_host(&pool, "x", DType::F32, &[N], &input())?;
    let y = Tensor::new(&pool, "y", DType::F32, &[N])?;
    let args = kernels::PlantedDivergenceArgs { y: y.out(), x: &x, n: N as i32 };
    kernel(&**pool.device(), Launch::blocks([1, 1, 1], N as u32, shared), d, args)?;
    y.to_vec()
}

fn strict(kernel: Planted, d: usize, shared: usize) -> Result<Vec<f32>> {
    run_on(Cpu::strict(3), kernel, d, shared)
}

/// The twin's result, after fast mode and four strict seeds agreed on it.
fn twin(kernel: Planted, shared: usize) -> Vec<f32> {
    let fast = run_on(Cpu::new(), kernel, 0, shared).unwrap();
    for seed in 0..4 {
        assert_eq!(run_on(Cpu::strict(seed), kernel, 0, shared).unwrap(), fast, "seed {seed}");
    }
    fast
}

/// The planted bug is an error whose text has all `parts`.
fn caught(kernel: Planted, d: usize, shared: usize, parts: &[&str]) {
    for seed in 0..4 {
        let text = match run_on(Cpu::strict(seed), kernel, d, shared) {
            Err(e) => e.to_string(),
            Ok(y) => panic!("seed {seed}: not caught, y = {y:?}"),
        };
        for part in parts {
            assert!(text.contains(part), "\"{part}\" is missing in: {text}");
        }
    }
}

fn reversed(scale: f32) -> Vec<f32> {
    input().iter().rev().map(|v| scale * v).collect()
}

#[test]
fn lanes_in_different_collectives_are_an_error_that_names_the_warp() {
    let swapped: Vec<f32> = (0..N).map(|i| (i ^ 1) as f32 + 0.5).collect();
    assert_eq!(twin(kernels::planted_divergence, 0), swapped);
    let parts = [
        "planted_divergence_1_f32",
        "divergent collectives in warp",
        "a shuffle",
        "a warp sync",
        "thread",
    ];
    caught(kernels::planted_divergence, 1, 0, &parts);
}

#[test]
fn a_collective_that_half_of_the_lanes_skip_is_an_error() {
    let parts = [
        "planted_divergence_2_f32",
        "some lanes skip",
        "threads 0-15 in a shuffle",
        "threads 16-31 ended",
    ];
    caught(kernels::planted_divergence, 2, 0, &parts);
}

#[test]
fn a_barrier_that_one_thread_skips_is_an_error_that_names_it() {
    assert_eq!(twin(kernels::planted_barrier, 4 * N), input());
    let parts = [
        "planted_barrier_1_f32",
        "some threads skip",
        "thread 5 ended",
        "threads 6-63 at a block barrier",
    ];
    caught(kernels::planted_barrier, 1, 4 * N, &parts);
}

#[test]
fn a_deadlock_is_an_error_that_says_who_waits_where() {
    assert_eq!(twin(kernels::planted_deadlock, 0), input());
    let parts = [
        "planted_deadlock_1_f32",
        "deadlock:",
        "threads 0-15 in a warp sync",
        "threads 16-31 at a block barrier",
    ];
    caught(kernels::planted_deadlock, 1, 0, &parts);
}

#[test]
fn unwritten_shared_memory_reads_as_nan() {
    assert_eq!(twin(kernels::planted_unwritten, 8 * N), reversed(1.0));
    assert!(strict(kernels::planted_unwritten, 1, 8 * N).unwrap().iter().all(|v| v.is_nan()));
}

#[test]
fn unwritten_device_memory_reads_as_nan() {
    for dtype in [DType::F32, DType::BF16] {
        let pool = Pool::new(Arc::new(Cpu::strict(0)));
        assert!(
            Tensor::new(&pool, "y", dtype, &[9])
                .unwrap()
                .to_f32()
                .unwrap()
                .iter()
                .all(|v| v.is_nan())
        );
    }
}

#[test]
fn a_write_past_the_end_of_a_buffer_is_an_error() {
    assert_eq!(twin(kernels::planted_bounds, 0), input());
    caught(
        kernels::planted_bounds,
        1,
        0,
        &["planted_bounds_1_f32", "past the end of a buffer of 256 bytes"],
    );
}

#[test]
fn a_write_before_the_start_of_a_buffer_is_an_error() {
    caught(
        kernels::planted_bounds,
        2,
        0,
        &["planted_bounds_2_f32", "before a buffer of 256 bytes"],
    );
}

#[test]
fn a_read_past_the_end_of_a_buffer_gives_nan() {
    assert_eq!(twin(kernels::planted_read, 0), input());
    let y = strict(kernels::planted_read, 1, 0).unwrap();
    assert!(y[N - 1].is_nan() && y[..N - 1].iter().all(|v| v.is_finite()), "{y:?}");
}

#[test]
fn a_write_past_the_launchs_shared_memory_is_an_error() {
    assert_eq!(twin(kernels::planted_shared, 4 * N), input());
    caught(
        kernels::planted_shared,
        1,
        4 * N,
        &["planted_shared_1_f32", "past the end of shared memory"],
    );
}

#[test]
fn an_async_copy_that_nothing_waits_for_is_an_error_that_names_a_thread() {
    assert_eq!(twin(kernels::planted_copy, 4 * N), input());
    caught(
        kernels::planted_copy,
        1,
        4 * N,
        &["planted_copy_1_f32", "thread", "async copies that it never waited for"],
    );
}

#[test]
fn an_async_copy_that_is_read_before_its_wait_gives_nan() {
    assert!(strict(kernels::planted_copy, 2, 4 * N).unwrap().iter().all(|v| v.is_nan()));
}

#[test]
fn a_misaligned_async_copy_is_an_error_that_names_the_thread() {
    caught(
        kernels::planted_copy,
        3,
        4 * N,
        &["planted_copy_3_f32", "thread 0", "not a multiple of 16"],
    );
}

#[test]
fn a_missing_barrier_changes_the_result_with_the_seed() {
    let right = twin(kernels::planted_race, 4 * N);
    assert_eq!(right, reversed(3.0));
    let runs: Vec<Vec<f32>> = (0..4)
        .map(|seed| run_on(Cpu::strict(seed), kernels::planted_race, 1, 4 * N).unwrap())
        .collect();
    assert!(runs.iter().all(|y| *y != right), "each seed shows it");
    assert!(runs[1..].iter().any(|y| *y != runs[0]), "and not all in the same way");
}

/// Outputs and gradients of every registered case, as bits.
fn everything(device: Arc<dyn Device>) -> Vec<(String, Vec<Vec<u64>>)> {
    let mut all = Vec::new();
    for entry in registry() {
        for variant in entry.variants {
            for &dtype in variant.dtypes {
                for (i, case) in (entry.cases)(&mut Rng(0x7e57)).iter().enumerate() {
                    let label =
                        format!("{} {} {} {}", entry.name, variant.name, dtype.name(), case.label);
                    let run = run_case(&device, case, dtype, variant, i as u64);
                    let run = run.unwrap_or_else(|e| panic!("{label}: {e}"));
                    let arrays = run.outputs.iter().chain(run.gradients.iter().flatten());
                    all.push((
                        label,
                        arrays.map(|a| a.iter().map(|v| v.to_bits()).collect()).collect(),
                    ));
                }
            }
        }
    }
    assert!(all.len() > 20, "the registry is not empty");
    all
}

fn compare(a: &[(String, Vec<Vec<u64>>)], b: &[(String, Vec<Vec<u64>>)]) {
    let different: Vec<&str> =
        a.iter().zip(b).filter(|(x, y)| x != y).map(|(x, _)| x.0.as_str()).collect();
    assert!(
        different.is_empty(),
        "{} of {} cases differ:\n{}",
        different.len(),
        a.len(),
        different.join("\n")
    );
    assert_eq!(a.len(), b.len());
}

#[test]
fn fast_and_strict_mode_give_the_same_bits_for_every_case() {
    let fast = everything(Arc::new(Cpu::new()));
    compare(&fast, &everything(Arc::new(Cpu::strict(1))));
    compare(&fast, &everything(Arc::new(Cpu::strict(2))));
}

#[test]
fn one_and_two_threads_give_the_same_bits_for_every_case() {
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| everything(Arc::new(Cpu::new())))
    };
    compare(&with(1), &with(2));
}
