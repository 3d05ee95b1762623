//! The attention forward for Hopper on the CPU twins of wgmma and TMA: it has the bits of the
//! tensor-core kernels, whatever the packing, in fast and in strict mode.

use std::sync::Arc;

use temper::autograd::{Cx, Need, Op};
use temper::config::AttentionChoice;
use temper::device::{DType, Device, cpu::Cpu};
use temper::ops::attention::oracle::{segments, shape};
use temper::ops::attention::{Attention, AttnPlan, AttnShape, attention};
use temper::ops::case::Rng;
use temper::tensor::Tensor;

/// Lengths of segments, and the segment that each has as its prefix.
type Packing = &'static [(usize, Option<usize>)];

/// Ragged ends before, on and after the edges of 64 and 192 rows; a long one with a ragged end, for
/// which the ring goes round; prefixes that end inside a block, on its edge and after several.
const PACKINGS: [Packing; 5] = [
    &[(70, None), (700, Some(0)), (193, None)],
    &[(1, None), (63, None), (65, None), (128, None), (129, None)],
    &[(70, None), (61, Some(0)), (1, Some(0)), (130, Some(0)), (64, None)],
    &[(9, Some(2)), (150, Some(2)), (128, None), (3, None)],
    &[(200, None), (100, Some(0))],
];

/// Output and lse, as bits.
fn run(
    device: Arc<dyn Device>,
    choice: AttentionChoice,
    of: Packing,
    s: AttnShape,
    edit: impl Fn(&mut Vec<f32>),
) -> [Vec<u32>; 2] {
    let mut cx = Cx::new(device, DType::BF16).unwrap();
    cx.attention = choice;
    let plan = AttnPlan::new(&cx, &segments(of)).unwrap();
    let cols = (s.heads + 2 * s.kv_heads) * s.head_dim;
    let mut rng = Rng(11);
    let mut values: Vec<f32> = (0..plan.rows * cols).map(|_| rng.normal() as f32).collect();
    edit(&mut values);
    let qkv = Tensor::from_f32(&cx.pool, "qkv", DType::BF16, &[plan.rows, cols], &values).unwrap();
    let need = Need { tape: true, inputs: vec![true] };
    let fwd = Attention { plan, shape: s }.forward(&mut cx, &[&qkv], &need).unwrap();
    let bits = |t: &Tensor| t.to_f32().unwrap().iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    [bits(&fwd.outputs[0]), bits(&fwd.saved[2])]
}

fn shapes() -> Vec<AttnShape> {
    vec![
        shape(7, 1, 64),
        AttnShape { window: Some(20), ..shape(2, 1, 64) },
        AttnShape { window: Some(100), softcap: Some(4.0), ..shape(2, 2, 64) },
        shape(2, 1, 128),
        AttnShape { window: Some(65), ..shape(1, 1, 128) },
    ]
}

fn equals_the_tensor_core_family(device: impl Fn() -> Cpu) {
    for of in PACKINGS {
        for s in shapes() {
            let want = run(Arc::new(Cpu::new()), AttentionChoice::TensorCore, of, s, |_| ());
            let got = run(Arc::new(device()), AttentionChoice::Wgmma, of, s, |_| ());
            assert!(got == want, "{of:?} {s:?}");
        }
    }
}

#[test]
fn attention_hopper_has_the_bits_of_tensor_core() {
    equals_the_tensor_core_family(Cpu::new);
}

#[test]
fn attention_hopper_is_right_in_strict_mode() {
    equals_the_tensor_core_family(|| Cpu::strict(3));
}

#[test]
fn attention_auto_takes_wgmma_where_the_device_has_it() {
    let s = shape(2, 1, 64);
    let of = PACKINGS[1];
    let poisoned = || Cpu::strict(5).with_wgmma();
    let want = run(Arc::new(Cpu::new()), AttentionChoice::Wgmma, of, s, |_| ());
    assert!(run(Arc::new(poisoned()), AttentionChoice::Auto, of, s, |_| ()) == want);
}

/// A sequence of which every value is NaN leaves its neighbours alone, before and behind it.
#[test]
fn attention_hopper_keeps_a_neighbours_nan_out() {
    let of: Packing = &[(70, None), (90, None), (65, None)];
    let s = shape(2, 1, 64);
    let cols = (s.heads + 2 * s.kv_heads) * s.head_dim;
    let clean = run(Arc::new(Cpu::new()), AttentionChoice::Wgmma, of, s, |_| ());
    let dirty = run(Arc::new(Cpu::new()), AttentionChoice::Wgmma, of, s, |v| {
        v[70 * cols..160 * cols].fill(f32::NAN);
    });
    let width = s.heads * s.head_dim;
    for rows in [0..70, 160..225] {
        let of = |bits: &[Vec<u32>; 2]| bits[0][rows.start * width..rows.end * width].to_vec();
        assert!(of(&clean) == of(&dirty), "rows {rows:?}");
    }
}

#[test]
fn attention_with_a_scale_that_is_not_positive_says_so() {
    let mut cx = Cx::new(Arc::new(Cpu::new()), DType::BF16).unwrap();
    let plan = AttnPlan::sequences(&cx, &[3]).unwrap();
    for scale in [0.0, -1.0, f32::NAN] {
        let s = AttnShape { scale, ..shape(1, 1, 64) };
        let qkv = Tensor::from_f32(&cx.pool, "qkv", DType::BF16, &[3, 192], &[0.0; 576]).unwrap();
        let error = attention(&mut cx, &qkv, &plan, s).unwrap_err().to_string();
        assert!(error.contains("must be positive"), "{error}");
    }
}
