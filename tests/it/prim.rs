//! The functions of `kernels/prim/` against f64, over the whole range of float, and Philox against
//! its published vectors.

use std::sync::Arc;

use temper::device::{DType, Launch, Pool, cpu::Cpu};
use temper::kernels;
use temper::tensor::Tensor;

const EXP: i32 = 0;
const LOG: i32 = 1;
const TANH: i32 = 2;
const ERF: i32 = 3;
const SIGMOID: i32 = 4;
const EXP2_FAST: i32 = 5;

fn on(device: Cpu, which: i32, x: &[f32]) -> Vec<f32> {
    let pool = Pool::new(Arc::new(device));
    let input = Tensor::from_host(&pool, "x", DType::F32, &[x.len()], x).unwrap();
    let y = Tensor::new(&pool, "y", DType::F32, &[x.len()]).unwrap();
    kernels::prim_unary(
        &**pool.device(),
        Launch::flat(x.len()),
        kernels::PrimUnaryArgs { y: y.out(), x: &input, which, n: x.len() as i64 },
    )
    .unwrap();
    y.to_vec().unwrap()
}

fn apply(which: i32, x: &[f32]) -> Vec<f32> {
    on(Cpu::new(), which, x)
}

/// Every 509th of all bit patterns without the NaNs: all binades, denormals and both signs.
fn all_floats() -> Vec<f32> {
    (0..=u32::MAX).step_by(509).map(f32::from_bits).filter(|v| !v.is_nan()).collect()
}

/// Evenly spaced, where the functions bend.
fn dense(from: f32, to: f32) -> Vec<f32> {
    (0..2_000_000).map(|i| from + (to - from) * i as f32 / 2e6).collect()
}

/// Distance in units of the last place of the float nearest to `want` (the smallest denormal at
/// least).
fn ulps(got: f32, want: f64) -> f64 {
    let nearest = want as f32;
    if nearest.is_infinite() || got.is_infinite() {
        // Overflow may come one float early or late.
        let edge = f64::from(f32::MAX);
        let clamp = |v: f64| v.clamp(-edge * (1.0 + 2f64.powi(-24)), edge * (1.0 + 2f64.powi(-24)));
        return (clamp(f64::from(got)) - clamp(want)).abs() / 2f64.powi(104);
    }
    let exponent = ((nearest.to_bits() >> 23) & 0xff) as i32;
    (f64::from(got) - want).abs() / 2f64.powi(exponent.max(1) - 150)
}

fn worst(which: i32, x: &[f32], f: impl Fn(f64) -> f64) -> (f64, f32) {
    let y = apply(which, x);
    let mut worst = (0.0, 0.0);
    for (x, y) in x.iter().zip(&y) {
        let error = ulps(*y, f(f64::from(*x)));
        if error > worst.0 || error.is_nan() {
            worst = (error, *x);
        }
    }
    println!("{} at {:e}", worst.0, worst.1);
    worst
}

fn within(limit: f64, which: i32, from: f32, to: f32, f: impl Fn(f64) -> f64) {
    for x in [all_floats(), dense(from, to)] {
        let (error, at) = worst(which, &x, &f);
        assert!(error <= limit, "{error} ulp at {at:e}, {limit} promised");
    }
}

/// e^{-x^2} times a series of positive terms: no cancellation.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[test]
fn exp_is_as_accurate_as_its_comment_says() {
    within(1.1, EXP, -104.0, 89.0, f64::exp);
}

#[test]
fn exp2_fast_is_as_accurate_as_its_comment_says() {
    let inside = |x: Vec<f32>| x.into_iter().filter(|v| (-126.0..=127.0).contains(v)).collect();
    let kept: [Vec<f32>; 2] = [inside(all_floats()), inside(dense(-126.0, 127.0))];
    for x in kept {
        let (error, at) = worst(EXP2_FAST, &x, f64::exp2);
        assert!(error <= 2.0, "{error} ulp at {at:e}");
    }
    let edge = apply(EXP2_FAST, &[0.0, -0.0, -126.5, -1e30, f32::NEG_INFINITY]);
    assert_eq!(edge, [1.0, 1.0, 0.0, 0.0, 0.0], "and alpha is exactly 1 where a base stays");
}

#[test]
fn log_is_as_accurate_as_its_comment_says() {
    let positive: Vec<f32> = all_floats().into_iter().filter(|v| *v > 0.0).collect();
    for x in [positive, dense(0.5, 2.0), dense(1e-3, 100.0)] {
        let (error, at) = worst(LOG, &x, f64::ln);
        assert!(error <= 0.9, "{error} ulp at {at:e}");
    }
}

#[test]
fn tanh_is_as_accurate_as_its_comment_says() {
    within(1.4, TANH, -10.0, 10.0, f64::tanh);
}

#[test]
fn sigmoid_is_as_accurate_as_its_comment_says() {
    within(2.5, SIGMOID, -104.0, 20.0, |x| 1.0 / (1.0 + (-x).exp()));
}

#[test]
fn erf_is_as_accurate_as_its_comment_says() {
    for x in [all_floats(), dense(-5.0, 5.0)] {
        let y = apply(ERF, &x);
        let (mut absolute, mut small) = (0.0f64, 0.0f64);
        for (x, y) in x.iter().zip(&y) {
            let want = erf(f64::from(*x));
            absolute = absolute.max((f64::from(*y) - want).abs());
            if x.abs() < 1.0 {
                small = small.max(ulps(*y, want));
            }
        }
        println!("erf: {absolute:e} absolute, {small} ulp inside 1");
        assert!(absolute <= 2e-7 && small <= 2.1, "{absolute:e}, {small} ulp inside 1");
    }
}

#[test]
fn infinities_zeros_and_nan_come_out_as_they_must() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let x = [inf, -inf, 0.0, -0.0, nan, -1.0, 1.0];
    let expected: [(i32, [f32; 7]); 5] = [
        (EXP, [inf, 0.0, 1.0, 1.0, nan, f32::exp(-1.0), f32::exp(1.0)]),
        (LOG, [inf, nan, -inf, -inf, nan, nan, 0.0]),
        (TANH, [1.0, -1.0, 0.0, 0.0, nan, f32::tanh(-1.0), f32::tanh(1.0)]),
        (ERF, [1.0, -1.0, 0.0, 0.0, nan, -0.842_700_8, 0.842_700_8]),
        (SIGMOID, [1.0, 0.0, 0.5, 0.5, nan, 0.268_941_4, 0.731_058_6]),
    ];
    for (which, want) in expected {
        let got = apply(which, &x);
        for ((x, g), w) in x.iter().zip(&got).zip(want) {
            let same = g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
            assert!(
                same || (g - w).abs() <= 4e-7 * w.abs(),
                "function {which} of {x}: {g}, expected {w}"
            );
            assert!(
                w != 0.0 || g.is_sign_negative() == w.is_sign_negative(),
                "function {which} of {x}: the zero's sign"
            );
        }
    }
}

#[test]
fn fast_and_strict_builds_of_the_functions_give_the_same_bits() {
    let x: Vec<f32> = all_floats().into_iter().step_by(97).collect();
    for which in EXP..=EXP2_FAST {
        let bits = |y: Vec<f32>| {
            y.iter().map(|v| if v.is_nan() { 0 } else { v.to_bits() }).collect::<Vec<_>>()
        };
        assert_eq!(bits(apply(which, &x)), bits(on(Cpu::strict(5), which, &x)), "function {which}");
    }
}

#[test]
fn philox_gives_the_published_vectors() {
    // Random123, kat_vectors, philox4x32 10: counter, key, result.
    let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    let (ones, zero) = (u32::MAX, 0u32);
    let cases: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
        ([zero; 4], [zero; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
    ];
    let input: Vec<u32> =
        cases.iter().flat_map(|(c, k, _)| k.iter().chain(c).copied().collect::<Vec<_>>()).collect();
    let want: Vec<u32> = cases.iter().flat_map(|c| c.2).collect();
    let pool = Pool::new(Arc::new(Cpu::new()));
    let x = Tensor::from_host(&pool, "x", DType::U32, &[3, 6], &input).unwrap();
    let y = Tensor::new(&pool, "y", DType::U32, &[3, 4]).unwrap();
    kernels::prim_philox(
        &**pool.device(),
        Launch::flat(3),
        kernels::PrimPhiloxArgs { y: y.out(), input: &x, n: 3 },
    )
    .unwrap();
    assert_eq!(y.to_vec::<u32>().unwrap(), want);
}
