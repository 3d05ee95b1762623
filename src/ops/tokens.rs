//! Sampled tokens that stay on the device between two steps of generation: the last one of each
//! slot. Layer 4.
//!
//! Invariant: copies are exact. Math: `kernels/tokens.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels::{self, SAMPLE_INFO};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::tensor::Tensor;

/// `given` I32 `[n]` with each negative value `-1 - slot` replaced by `latest[slot]`.
pub fn take_tokens(cx: &Cx, given: &Tensor, latest: &Tensor) -> Result<Tensor> {
    let rows = given.numel();
    let ids = Tensor::new(&cx.pool, "token ids", DType::I32, &[rows])?;
    let args = kernels::TakeTokensArgs { ids: ids.out(), given, latest, rows: rows as i32 };
    kernels::take_tokens(&*cx.device, Launch::flat(rows), args)?;
    Ok(ids)
}

/// Stores the token of each row in `latest`, at the slot named by its row of `info` I32 [n, 3] (as
/// for [`sample`](crate::ops::sample::sample); sequence number -1 is padding).
pub fn keep_tokens(cx: &Cx, token: &Tensor, info: &Tensor, latest: &Tensor) -> Result<()> {
    let rows = token.numel();
    if info.numel() != SAMPLE_INFO * rows {
        return Err(Error::op("keep_tokens", format!("{token:?}, rows {info:?}")));
    }
    let args = kernels::KeepTokensArgs {
        latest: latest.out(),
        token,
        info,
        rows: rows as i32,
        ints: SAMPLE_INFO as i32,
    };
    kernels::keep_tokens(&*cx.device, Launch::flat(rows), args)
}

#[derive(Debug)]
pub struct TakeTokens;

#[derive(Debug)]
pub struct KeepTokens;

impl Op for TakeTokens {
    fn name(&self) -> &'static str {
        "take_tokens"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        Ok(Fwd { outputs: vec![take_tokens(cx, x[0], x[1])?], saved: vec![] })
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let id = |v: f64| if v < 0.0 { x[1].data[(-1.0 - v) as usize] } else { v };
        vec![F64::from_fn(&[x[0].data.len()], |r| id(x[0].data[r]))]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { bytes: 3.0 * x[0].bytes() as f64, flops: 0.0 }
    }
}

impl Op for KeepTokens {
    fn name(&self) -> &'static str {
        "keep_tokens"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        keep_tokens(cx, x[0], x[1], x[2])?;
        Ok(Fwd { outputs: vec![x[2].clone()], saved: vec![] })
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let mut latest = x[2].clone();
        for (token, info) in x[0].data.iter().zip(x[1].data.chunks(SAMPLE_INFO)) {
            if info[0] >= 0.0 {
                latest.data[info[2] as usize] = *token;
            }
        }
        vec![latest]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(&x[..2], x[0].bytes())
    }
}

pub fn take_cases(rng: &mut Rng) -> Vec<Case> {
    vec![take_case(rng, 1, 3), take_case(rng, 300, 40)]
}

pub fn take_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    vec![take_case(rng, s.sequences, s.sequences)]
}

fn take_case(rng: &mut Rng, rows: usize, slots: usize) -> Case {
    let given: Vec<i32> = (0..rows)
        .map(|r| if r % 3 == 0 { rng.below(900) as i32 } else { -1 - rng.below(slots) as i32 })
        .collect();
    let latest: Vec<i32> = (0..slots).map(|_| rng.below(900) as i32).collect();
    let inputs = vec![Arg::ints(&given), Arg::ints(&latest)];
    Case { exact: true, ..Case::new(format!("{rows} rows of {slots} slots"), TakeTokens, inputs) }
}

pub fn keep_cases(rng: &mut Rng) -> Vec<Case> {
    vec![keep_case(rng, 3), keep_case(rng, 300)]
}

pub fn keep_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    vec![keep_case(rng, s.sequences)]
}

/// Every fourth row is padding; the others fill the slots in reverse order.
fn keep_case(rng: &mut Rng, rows: usize) -> Case {
    let token: Vec<i32> = (0..rows).map(|_| rng.below(900) as i32).collect();
    let info: Vec<i32> = (0..rows as i32)
        .flat_map(|r| if r % 4 == 3 { [-1, 0, 0] } else { [r, 7, rows as i32 - 1 - r] })
        .collect();
    let latest = vec![-5; rows];
    let inputs = vec![Arg::ints(&token), Arg::ints(&info), Arg::ints(&latest)];
    Case { exact: true, ..Case::new(format!("{rows} rows"), KeepTokens, inputs) }
}
