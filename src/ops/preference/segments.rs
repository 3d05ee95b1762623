//! Sums over the segments of a packed batch: log-probs of sequences from those of tokens. Layer 4.
//!
//! Invariant: each segment is summed in a fixed order, which depends on its length alone.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::tensor::Tensor;

/// Sums of `weights x values` over segments: values, weights F32 `[n]`; `starts` I32 [s + 1],
/// ascending, the last at most n; segment k is `starts[k]..starts[k + 1]`. Returns F32 `[s]`;
/// gradients flow to `values` alone.
pub fn segment_sums(
    cx: &mut Cx,
    values: &Tensor,
    weights: &Tensor,
    starts: &Tensor,
) -> Result<Tensor> {
    cx.apply1(SegmentSums, &[values, weights, starts])
}

#[derive(Debug)]
pub struct SegmentSums;

impl Op for SegmentSums {
    fn name(&self) -> &'static str {
        "segment_sums"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (values, weights, starts) = (x[0], x[1], x[2]);
        if values.numel() != weights.numel() || starts.numel() < 2 {
            let message = format!(
                "{values:?} needs as many weights ({weights:?}), and {starts:?} a start and an end"
            );
            return Err(Error::op("segment_sums", message));
        }
        let segments = starts.numel() - 1;
        let sums = cx.float("sequence sums", &[segments])?;
        let args = kernels::SegmentSumsFwdArgs {
            sums: sums.out(),
            values,
            weights: Some(weights),
            starts,
            segments: segments as i32,
        };
        kernels::segment_sums_fwd(&*cx.device, Launch::warps(segments), args)?;
        let saved = vec![weights.clone(), starts.clone()];
        Ok(Fwd { outputs: vec![sums], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let (Some(dy), Some((dx, accumulate))) = (&dy[0], g.slot(0)?) else { return Ok(()) };
        let (weights, starts) = (&node.saved[0], &node.saved[1]);
        let (segments, n) = (dy.numel() as i32, dx.numel());
        let args = kernels::SegmentSumsBwdArgs {
            dvalues: dx.out(),
            dsums: dy,
            weights: Some(weights),
            starts,
            segments,
            n: n as i32,
            accumulate: i32::from(accumulate),
        };
        kernels::segment_sums_bwd(&*cx.device, Launch::flat(n), args)
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let segment = |k: usize| x[2].index(k)..x[2].index(k + 1);
        let sum = |k: usize| segment(k).map(|i| x[0].data[i] * x[1].data[i]).sum();
        vec![F64::from_fn(&[x[2].data.len() - 1], sum)]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, 4 * x[2].numel())
    }
}

pub fn segment_cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, starts) in [(1, vec![0, 1]), (40, vec![0, 7, 7, 12, 40]), (700, vec![3, 300, 301, 690])]
    {
        let weights = F64::from_fn(&[n], |_| [0.0, 1.0, 0.5][rng.below(3)]);
        let values = Arg::watched(rng.array(&[n], 2.0));
        let inputs = vec![values, Arg::float(weights), Arg::ints(&starts)];
        cases.push(Case::new(format!("n {n} segments {}", starts.len() - 1), SegmentSums, inputs));
    }
    cases
}

pub fn segment_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let starts: Vec<i32> = (0..=s.sequences).map(|i| (i * s.length) as i32).collect();
    let inputs = vec![
        Arg::float(rng.array(&[s.tokens()], 2.0)),
        Arg::float(F64::from_fn(&[s.tokens()], |_| 1.0)),
        Arg::ints(&starts),
    ];
    vec![Case::new("sequences", SegmentSums, inputs)]
}
