//! Products of few rows (`kernels/matmul_few.cu`): the bits of the other kernels, in all modes.

use std::sync::Arc;

use temper::autograd::{Cx, ParamGrads, Tape};
use temper::config::MatmulChoice;
use temper::device::{DType, Device, Layout, cpu::Cpu};
use temper::error::Result;
use temper::ops::activation::{Act, Glu};
use temper::ops::case::Rng;
use temper::ops::linear_glu::{fused_by, linear_glu};
use temper::ops::matmul::{linear, product_by};
use temper::ops::mlp::DenseLayer;
use temper::ops::norm_linear::fused;
use temper::ops::own::OwnKernel;
use temper::ops::rmsnorm::{Norm, NormInput, NormWeight};
use temper::tensor::{Id, ParamSetId, Tensor};

fn context(device: impl Device + 'static) -> Cx {
    let mut cx = Cx::new(Arc::new(device), DType::BF16).unwrap();
    cx.matmul = MatmulChoice::Own;
    cx
}

fn random(cx: &Cx, seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let values: Vec<f32> = Rng(seed).array(shape, 1.0).data.iter().map(|v| *v as f32).collect();
    Tensor::from_f32(&cx.pool, "t", dtype, shape, &values).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.to_f32().unwrap().iter().map(|v| v.to_bits()).collect()
}

/// Bits of a product, and of one with a bias that is added to what is there.
fn products(cx: &Cx, kernel: OwnKernel, c: DType, [m, n, k]: [usize; 3]) -> Result<Vec<u32>> {
    let (a, b) = (random(cx, 1, &[m, k], DType::BF16), random(cx, 2, &[n, k], DType::BF16));
    let bias = random(cx, 3, &[n], DType::BF16);
    let (plain, added) = (random(cx, 4, &[m, n], c), random(cx, 5, &[m, n], c));
    product_by(cx, kernel, Layout::NT, &plain, (&a, &b), None, false)?;
    product_by(cx, kernel, Layout::NT, &added, (&a, &b), Some(&bias), true)?;
    Ok([bits(&plain), bits(&added)].concat())
}

/// Ragged in every direction; unaligned rows; several stages; two warps' columns and more.
const SHAPES: [[usize; 3]; 7] = [
    [1, 1, 1],
    [1, 40, 64],
    [7, 33, 100],
    [16, 24, 1088],
    [17, 50, 72],
    [33, 16, 200],
    [64, 20, 520],
];

#[test]
fn a_product_of_few_rows_has_the_bits_of_the_other_kernel() {
    for c in [DType::BF16, DType::F32] {
        for shape in SHAPES {
            let cx = context(Cpu::new());
            let few = products(&cx, OwnKernel::FewRows, c, shape).unwrap();
            assert!(few == products(&cx, OwnKernel::Tile, c, shape).unwrap(), "{c:?} {shape:?}");
        }
    }
}

#[test]
fn on_hopper_it_has_these_bits_too() {
    for c in [DType::BF16, DType::F32] {
        for [m, n, k] in SHAPES {
            let shape = [m, n, k.next_multiple_of(8)]; // rows of 16 bytes
            let tile = products(&context(Cpu::new()), OwnKernel::Tile, c, shape).unwrap();
            for device in [Cpu::new().with_wgmma(), Cpu::strict(3).with_wgmma()] {
                let few = products(&context(device), OwnKernel::FewHopper, c, shape).unwrap();
                assert!(few == tile, "{c:?} {shape:?}");
            }
        }
    }
    // More rows than a block takes, 64 or 128, with columns and rows left over.
    for shape in [[65, 40, 72], [130, 33, 136], [300, 72, 64], [1000, 20, 80]] {
        let tile = products(&context(Cpu::new()), OwnKernel::Tile, DType::BF16, shape).unwrap();
        for device in [Cpu::new().with_wgmma(), Cpu::strict(4).with_wgmma()] {
            let few = products(&context(device), OwnKernel::FewHopper, DType::BF16, shape).unwrap();
            assert!(few == tile, "{shape:?}");
        }
    }
    // Rows that bulk copies cannot read.
    let refused = products(
        &context(Cpu::new().with_wgmma()),
        OwnKernel::FewHopper,
        DType::BF16,
        [7, 33, 100],
    );
    assert!(refused.is_err());
}

#[test]
fn strict_mode_gives_the_same_bits_and_finds_nothing() {
    for shape in SHAPES {
        let few = products(&context(Cpu::new()), OwnKernel::FewRows, DType::BF16, shape).unwrap();
        for seed in 0..2 {
            let strict = context(Cpu::strict(seed));
            let strict = products(&strict, OwnKernel::FewRows, DType::BF16, shape).unwrap();
            assert!(few == strict, "seed {seed}, {shape:?}");
        }
    }
}

#[test]
fn many_columns_take_blocks_of_several_warps_with_the_same_bits() {
    // With two multiprocessors: 2, 4 and 8 warps a block, the last with all of them copying.
    for n in [160, 320, 1200] {
        let cx = context(Cpu::new());
        let few = products(&cx, OwnKernel::FewRows, DType::BF16, [3, n, 80]).unwrap();
        assert!(few == products(&cx, OwnKernel::Tile, DType::BF16, [3, n, 80]).unwrap(), "{n}");
    }
    let strict = products(&context(Cpu::strict(1)), OwnKernel::FewRows, DType::F32, [3, 1200, 80]);
    let cx = context(Cpu::new());
    assert!(strict.unwrap() == products(&cx, OwnKernel::Tile, DType::F32, [3, 1200, 80]).unwrap());
}

#[test]
fn more_rows_than_it_knows_are_refused() {
    let cx = context(Cpu::new());
    let e = products(&cx, OwnKernel::FewRows, DType::BF16, [65, 8, 16]).unwrap_err().to_string();
    assert!(e.contains("few rows"), "{e}");
}

#[test]
fn the_widths_of_hopper_have_the_bits_of_few_rows() {
    let shape = [40, 264, 136];
    let few = products(&context(Cpu::new()), OwnKernel::FewRows, DType::BF16, shape).unwrap();
    for width in [128, 192, 224, 256] {
        let cx = context(Cpu::new().with_wgmma());
        let wide = products(&cx, OwnKernel::Hopper(width), DType::BF16, shape).unwrap();
        assert!(few == wide, "{width}");
    }
}

#[test]
fn on_hopper_the_fused_op_has_the_bits_of_the_other_kernel() {
    for ([m, f, k], act) in
        [([1, 8, 64], Act::Silu), ([13, 50, 72], Act::GeluTanh), ([64, 36, 200], Act::Gelu)]
    {
        let bits_of = |device: Cpu, kernel| {
            let cx = context(device);
            let x = random(&cx, 1, &[m, k], DType::BF16);
            let w = random(&cx, 2, &[2 * f, k], DType::BF16);
            let bias = random(&cx, 3, &[2 * f], DType::BF16);
            let y = random(&cx, 4, &[m, f], DType::BF16);
            fused_by(&cx, kernel, &y, (&x, &w, Some(&bias)), act).unwrap();
            bits(&y)
        };
        let few = bits_of(Cpu::new(), OwnKernel::FewRows);
        for device in [Cpu::new().with_wgmma(), Cpu::strict(5).with_wgmma()] {
            assert!(few == bits_of(device, OwnKernel::FewHopper), "{m} {f} {k}");
        }
    }
}

/// The bits of the fused op and of the two ops.
fn glu_bits(device: impl Device + 'static, [m, f, k]: [usize; 3], act: Act) -> [Vec<u32>; 2] {
    let mut cx = context(device);
    let x = random(&cx, 1, &[m, k], DType::BF16);
    let w = random(&cx, 2, &[2 * f, k], DType::BF16);
    let bias = random(&cx, 3, &[2 * f], DType::BF16);
    let fused = linear_glu(&mut cx, &x, &w, Some(&bias), act).unwrap();
    let gate_up = linear(&mut cx, &x, &w, Some(&bias)).unwrap();
    let apart = cx.apply1(Glu { act }, &[&gate_up]).unwrap();
    [bits(&fused), bits(&apart)]
}

#[test]
fn a_product_that_ends_in_a_gated_activation_has_the_bits_of_the_two_ops() {
    for act in [Act::Silu, Act::GeluTanh, Act::Gelu] {
        for shape in [[1, 8, 16], [5, 13, 72], [17, 40, 100], [64, 24, 520]] {
            let [fused, apart] = glu_bits(Cpu::new(), shape, act);
            assert!(fused == apart, "{act:?} {shape:?}");
            assert!(fused == glu_bits(Cpu::strict(3), shape, act)[0], "strict {act:?} {shape:?}");
        }
    }
}

#[test]
fn on_the_tape_it_is_two_ops_with_the_same_bits() {
    let mut cx = context(Cpu::new());
    let (x, w) = (random(&cx, 1, &[3, 16], DType::BF16), random(&cx, 2, &[8, 16], DType::BF16));
    let free = bits(&linear_glu(&mut cx, &x, &w, None, Act::Silu).unwrap());
    let gradient = Tensor::new(&cx.pool, "gradient", DType::F32, &[8, 16]).unwrap();
    cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![Some(gradient)]);
    let w = w.with_id(Id::Param { set: ParamSetId::Model, index: 0 });
    cx.tape = Some(Tape::default());
    let taped = linear_glu(&mut cx, &x, &w, None, Act::Silu).unwrap();
    assert!(free == bits(&taped));
    assert_eq!(cx.tape.unwrap().len(), 2);
}

#[test]
fn the_check_of_a_norm_in_front_compares_two_kernels_with_one() {
    let device: Arc<dyn Device> = Arc::new(Cpu::new().with_wgmma());
    for (m, n, k, act) in [(3, 40, 64, None), (8, 48, 136, Some(Act::Silu))] {
        let (case, differ) = temper::check::norm::compare(&device, [m, n, k], act).unwrap();
        assert!(differ.is_empty() && case.contains(&format!("rows {m} n {n} k {k}")), "{case}");
    }
}

/// The bits of a layer behind a norm, and of the sum that is normed; in one kernel or in two.
fn normed_bits(
    device: Cpu,
    one: bool,
    [m, n, k]: [usize; 3],
    act: Option<Act>,
    residual: bool,
    norm: Norm,
) -> [Vec<u32>; 2] {
    let mut cx = context(device);
    let tensor = |seed, shape: &[usize]| random(&cx, seed, shape, DType::BF16);
    let (x, r, scale) = (tensor(1, &[m, k]), tensor(2, &[m, k]), tensor(3, &[k]));
    let (w, bias, y) = (tensor(4, &[n, k]), tensor(5, &[n]), tensor(6, &[m, n]));
    let (y, sum) = (if act.is_some() { tensor(6, &[m, n / 2]) } else { y }, tensor(7, &[m, k]));
    let input = NormInput { x: &x, residual: residual.then_some(&r), weight: &scale, norm };
    let layer = DenseLayer { weight: &w, bias: Some(&bias) };
    if one {
        assert!(input.fits(&cx, &w));
        fused(&cx, &y, residual.then_some(&sum), input, layer, act).unwrap();
        let sum = if residual { &sum } else { &x };
        return [bits(&y), bits(sum)];
    }
    let (rows, sum) = input.rows(&mut cx).unwrap();
    let mut y = linear(&mut cx, &rows, &w, layer.bias).unwrap();
    if let Some(act) = act {
        y = cx.apply1(Glu { act }, &[&y]).unwrap();
    }
    [bits(&y), bits(&sum)]
}

#[test]
fn a_norm_in_front_of_a_product_has_the_bits_of_two_kernels() {
    for (shape, act, residual, weight) in [
        ([1, 24, 64], None, false, NormWeight::Rounded),
        ([1, 40, 896], None, true, NormWeight::Rounded),
        ([8, 33, 136], None, true, NormWeight::Once),
        ([3, 70, 1032], None, true, NormWeight::PlusOne),
        ([1, 26, 72], Some(Act::Silu), true, NormWeight::Rounded),
        ([5, 80, 2048], Some(Act::GeluTanh), true, NormWeight::PlusOne),
        ([8, 34, 200], Some(Act::Gelu), false, NormWeight::Once),
    ] {
        let norm = Norm { eps: 1e-5, weight };
        let apart = normed_bits(Cpu::new(), false, shape, act, residual, norm);
        for device in [Cpu::new().with_wgmma(), Cpu::strict(11).with_wgmma()] {
            let one = normed_bits(device, true, shape, act, residual, norm);
            assert!(one == apart, "{shape:?} {act:?} {residual} {weight:?}");
        }
    }
}

#[test]
fn a_norm_is_not_computed_in_front_of_products_that_the_kernel_does_not_take() {
    let cx = context(Cpu::new().with_wgmma());
    let fits = |cx: &Cx, m: usize, k: usize, dtype: DType| {
        let (x, w) = (random(cx, 1, &[m, k], dtype), random(cx, 2, &[24, k], dtype));
        let scale = random(cx, 3, &[k], dtype);
        let input = NormInput { x: &x, residual: None, weight: &scale, norm: Norm::new(1e-5) };
        input.fits(cx, &w)
    };
    assert!(fits(&cx, 8, 2048, DType::BF16));
    assert!(!fits(&cx, 9, 64, DType::BF16), "more rows than a tile");
    assert!(!fits(&cx, 1, 2056, DType::BF16), "rows that registers do not hold");
    assert!(!fits(&cx, 1, 60, DType::BF16), "rows of broken packs");
    assert!(!fits(&cx, 1, 64, DType::F32));
    let mut library = context(Cpu::new().with_wgmma());
    library.matmul = MatmulChoice::Library;
    assert!(!fits(&library, 1, 64, DType::BF16), "products of the library");
    let mut taped = context(Cpu::new().with_wgmma());
    taped.tape = Some(Tape::default());
    assert!(!fits(&taped, 1, 64, DType::BF16), "training");
    assert!(!fits(&context(Cpu::new()), 1, 64, DType::BF16), "no wgmma");
}
