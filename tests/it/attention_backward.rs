//! The backward of attention with wgmma, on the CPU twins of its instructions: against the f64
//! backward, in strict mode, accumulating into a gradient, alone and in a batch.

use std::sync::Arc;

use temper::autograd::{Cx, F64, ParamGrads, Tape};
use temper::config::AttentionChoice;
use temper::device::{DType, cpu::Cpu};
use temper::ops::attention::oracle::{gradient, segments, shape};
use temper::ops::attention::{AttnPlan, AttnShape, attention};
use temper::ops::case::Rng;
use temper::tensor::{Id, ParamSetId, Tensor};

use crate::support::bits;

type Lengths = [(usize, Option<usize>)];

/// A prompt that ends inside a block of 64 positions, answers to it that are shorter, a row long
/// and longer than a tile, and two sequences of their own: more steps than stages, ragged ends.
const SHARED: &Lengths =
    &[(70, None), (61, Some(0)), (1, Some(0)), (150, Some(0)), (300, None), (3, None)];

fn random(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.normal() as f32).collect()
}

struct Problem {
    shape: AttnShape,
    of: Vec<(usize, Option<usize>)>,
    qkv: Vec<f32>,
    dout: Vec<f32>,
}

impl Problem {
    fn new(shape: AttnShape, of: &Lengths) -> Problem {
        let (rows, mut rng) = (of.iter().map(|s| s.0).sum::<usize>(), Rng(17));
        let qkv = random(&mut rng, rows * (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
        let dout = random(&mut rng, rows * shape.heads * shape.head_dim);
        Problem { shape, of: of.to_vec(), qkv, dout }
    }

    /// The gradient of qkv after `times` backwards of the same upstream gradient, and what f64
    /// makes of one.
    fn run(&self, device: Cpu, times: usize) -> (Vec<f32>, Vec<f64>) {
        let mut cx = Cx::new(Arc::new(device), DType::BF16).unwrap();
        cx.attention = AttentionChoice::Wgmma;
        let s = self.shape;
        let plan = AttnPlan::new(&cx, &segments(&self.of)).unwrap();
        let tensor = |values: &[f32]| {
            let cols = values.len() / plan.rows;
            Tensor::from_f32(&cx.pool, "test", cx.dtype, &[plan.rows, cols], values).unwrap()
        };
        let (qkv, dout) = (tensor(&self.qkv), tensor(&self.dout));
        let qkv = qkv.with_id(Id::Param { set: ParamSetId::Model, index: 0 });
        let grad = Tensor::new(&cx.pool, "gradient", cx.dtype, qkv.shape()).unwrap();
        cx.param_grads[ParamSetId::Model] = ParamGrads::new(vec![Some(grad.clone())]);
        cx.tape = Some(Tape::default());
        let outs: Vec<_> = (0..times)
            .map(|_| (attention(&mut cx, &qkv, &plan, s).unwrap(), dout.clone()))
            .collect();
        cx.backward(outs).unwrap();
        let wide = |t: &Tensor| {
            F64::new(t.shape(), t.to_f32().unwrap().iter().map(|v| f64::from(*v)).collect())
        };
        (grad.to_f32().unwrap(), gradient(&s, &plan, &wide(&qkv), &wide(&dout)).data)
    }
}

/// Of two lists, relative to the length of the second.
fn distance(got: &[f32], want: &[f64]) -> f64 {
    let square = |v: f64| v * v;
    let error: f64 = got.iter().zip(want).map(|(a, b)| square(f64::from(*a) - b)).sum();
    (error / want.iter().map(|v| square(*v)).sum::<f64>()).sqrt()
}

fn shapes() -> Vec<AttnShape> {
    let mut all = vec![shape(2, 1, 64), shape(7, 1, 64), shape(2, 1, 128)];
    for d in [64, 128] {
        all.push(AttnShape { window: Some(50), ..shape(2, 1, d) });
        all.push(AttnShape { softcap: Some(3.0), ..shape(2, 2, d) });
        all.push(AttnShape { softcap: Some(2.0), window: Some(100), ..shape(2, 1, d) });
    }
    all
}

#[test]
fn wgmma_gradients_agree_with_the_f64_backward() {
    for s in shapes() {
        let (got, want) = Problem::new(s, SHARED).run(Cpu::new(), 1);
        let error = distance(&got, &want);
        println!("{s:?} error {error:.2e}");
        // P, dS, out and the gradient are rounded to bf16: as the mma.sync family.
        assert!(error < 6e-3, "{s:?}: {error}");
    }
}

#[test]
fn wgmma_gradients_have_the_same_bits_in_strict_mode() {
    for s in
        [shape(3, 1, 64), AttnShape { softcap: Some(3.0), window: Some(70), ..shape(2, 1, 128) }]
    {
        let problem = Problem::new(s, &[(70, None), (61, Some(0)), (150, Some(0)), (3, None)]);
        let fast = bits(&problem.run(Cpu::new(), 1).0);
        for seed in [1, 2] {
            assert_eq!(fast, bits(&problem.run(Cpu::strict(seed), 1).0), "seed {seed}, {s:?}");
        }
    }
}

#[test]
fn wgmma_gradients_are_added_to_what_is_there() {
    for s in [shape(2, 1, 64), shape(2, 1, 128)] {
        let (got, want) =
            Problem::new(s, &[(70, None), (61, Some(0)), (140, None)]).run(Cpu::new(), 2);
        let twice: Vec<f64> = want.iter().map(|v| 2.0 * v).collect();
        let error = distance(&got, &twice);
        assert!(error < 6e-3, "{s:?}: {error}");
    }
}

#[test]
fn wgmma_gradients_of_a_sequence_do_not_depend_on_its_batch() {
    for s in [shape(2, 1, 64), shape(2, 1, 128)] {
        let all = Problem::new(s, &[(67, None), (200, None), (129, None)]);
        let cols = [s.heads + 2 * s.kv_heads, s.heads].map(|n| n * s.head_dim);
        let part = |values: &[f32], cols: usize| values[67 * cols..267 * cols].to_vec();
        let alone = Problem {
            shape: s,
            of: vec![(200, None)],
            qkv: part(&all.qkv, cols[0]),
            dout: part(&all.dout, cols[1]),
        };
        let want = part(&all.run(Cpu::new(), 1).0, cols[0]);
        assert_eq!(bits(&want), bits(&alone.run(Cpu::new(), 1).0), "{s:?}");
    }
}
