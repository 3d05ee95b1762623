//! Distillation: a divergence of the student's distribution from the teacher's over the whole
//! vocabulary. Layer 4.
//!
//! Invariant: memory is one chunk of logits per model, whatever the vocabulary and the number of
//! rows; a row's divergence does not depend on the chunk. Gradients are computed while the chunk is
//! in memory. Math: `kernels/distill.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::expect_cols;
use crate::ops::head::Head;
use crate::ops::head_pass::{chunk_rows, chunks, slices};
use crate::ops::head_terms::{self, gradients_of, logits_of, oracle_row, slots_in_forward, terms};
use crate::ops::logit_map::LogitMap;
use crate::tensor::Tensor;

/// The student's rows and head, the teacher's rows and head, and a weight per row, F32 `[n]`.
pub struct DistillIn<'a> {
    /// [n, d] real
    pub student: &'a Tensor,
    /// [vocab, d] real
    pub student_head: &'a Head,
    /// [n, e] real; e may differ from d
    pub teacher: &'a Tensor,
    /// [vocab, e] real
    pub teacher_head: &'a Head,
    pub weight: &'a Tensor,
}

/// `loss = sum_i weight[i] D_i` F32 `[1]`, and D F32 `[n]`: KL(teacher, student) at `beta` 0,
/// KL(student, teacher) at 1, the generalised Jensen-Shannon divergence between. Logits are scaled
/// by `scale` (1 / temperature). Only `loss` carries a gradient, for the student, and its upstream
/// must be 1.
pub fn distill(cx: &mut Cx, x: &DistillIn, beta: f32, scale: f32) -> Result<(Tensor, Tensor)> {
    let (student, teacher) = (x.student_head, x.teacher_head);
    let maps = [student.map, teacher.map];
    let pairs = [student.pair.is_some(), teacher.pair.is_some()];
    let op = Distill { beta, scale, maps, chunk: chunk_rows(cx, &student.weight), pairs };
    let own = student.pair.as_ref().map(|p| p.narrow(cx, x.student)).transpose()?;
    let theirs = teacher.pair.as_ref().map(|p| p.narrow_alone(cx, x.teacher)).transpose()?;
    let mut inputs = vec![x.student, &student.weight, x.teacher, &teacher.weight, x.weight];
    inputs.extend(student.with_narrow(own.as_ref()));
    inputs.extend(teacher.with_narrow(theirs.as_ref()));
    cx.apply_many(op, &inputs).map(Into::into)
}

#[derive(Debug)]
pub struct Distill {
    pub beta: f32,
    pub scale: f32,
    /// The logit maps of the student and of the teacher.
    pub maps: [LogitMap; 2],
    pub chunk: usize,
    /// Whether the student's and the teacher's head have a LoRA pair.
    pub pairs: [bool; 2],
}

/// Index of the first input of the pairs: t and B of the student's, then of the teacher's.
const PAIRS: usize = 5;

impl Distill {
    /// The inputs of the student's pair and of the teacher's.
    fn split<'a, T>(&self, x: &'a [T]) -> [&'a [T]; 2] {
        let (own, theirs) = x[PAIRS..].split_at(2 * usize::from(self.pairs[0]));
        [own, theirs]
    }
}

fn check(x: &[&Tensor]) -> Result<()> {
    let hint = "check hidden_size in config.json";
    expect_cols("distill", "the student's head", x[1], x[0].cols(), hint)?;
    let hint = "check hidden_size in its config.json";
    expect_cols("distill", "the teacher's head", x[3], x[2].cols(), hint)?;
    if x[1].row_count() != x[3].row_count() {
        let message =
            format!("{:?} and {:?}: student and teacher need the same vocabulary", x[1], x[3]);
        return Err(Error::op("distill", message));
    }
    if x[2].row_count() != x[0].row_count() || x[4].numel() != x[0].row_count() {
        let message = format!(
            "{:?} needs as many rows of the teacher ({:?}) and weights ({:?})",
            x[0], x[2], x[4]
        );
        return Err(Error::op("distill", message));
    }
    Ok(())
}

impl Op for Distill {
    fn name(&self) -> &'static str {
        "distill"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        check(x)?;
        let (hs, ws, ht, wt, weight) = (x[0], x[1], x[2], x[3], x[4]);
        let [own, theirs] = self.split(x);
        let (own, theirs) = (terms([hs, ws], own), terms([ht, wt], theirs));
        head_terms::check("distill", &own)?;
        head_terms::check("distill", &theirs)?;
        let (rows, vocab) = (hs.row_count(), ws.row_count());
        let size = self.chunk.min(rows.max(1));
        let (student, teacher) =
            (cx.float("logits chunk", &[size, vocab])?, cx.float("logits chunk", &[size, vocab])?);
        let (each, stats) = (
            cx.float("head rows", &[rows])?,
            cx.float("head rows", &[size, kernels::DISTILL_STATS])?,
        );
        let slices = slices(vocab);
        let part = cx.float("logit slices", &[size, kernels::DISTILL_PARTS, slices])?;
        let wants = |i: usize| need.inputs.get(i) == Some(&true);
        let wanted = [0, PAIRS].map(|i| [wants(i), wants(i + 1)]);
        let mut slots = slots_in_forward(cx, "distill", &own, &wanted)?;
        let dlogits =
            if need.tape { Some(cx.real("dlogits chunk", &[size, vocab])?) } else { None };
        for (from, to) in chunks(rows, self.chunk) {
            let n = to - from;
            let (s, t, st) = (student.rows(0, n)?, teacher.rows(0, n)?, stats.rows(0, n)?);
            logits_of(cx, &s, &own, (from, to))?;
            logits_of(cx, &t, &theirs, (from, to))?;
            self.maps[0].apply(cx, &s)?;
            self.maps[1].apply(cx, &t)?;
            let (by_slice, by_row) = (Launch::warps(n * slices), Launch::warps(n));
            let (count, width, pieces) = (n as i32, vocab as i32, slices as i32);
            let args = kernels::DistillSlicesArgs {
                part: part.out(),
                student: &s,
                teacher: &t,
                rows: count,
                vocab: width,
                slices: pieces,
                scale: self.scale,
            };
            kernels::distill_slices(&*cx.device, by_slice, args)?;
            let args = kernels::DistillSumsArgs {
                stats: st.out(),
                part: &part,
                rows: count,
                slices: pieces,
                scale: self.scale,
            };
            kernels::distill_sums(&*cx.device, by_row, args)?;
            let args = kernels::DistillRowsArgs {
                part: part.out(),
                student: &s,
                teacher: &t,
                stats: &st,
                rows: count,
                vocab: width,
                slices: pieces,
                beta: self.beta,
                scale: self.scale,
            };
            kernels::distill_rows(&*cx.device, by_slice, args)?;
            let values = each.rows(from, to)?;
            let args = kernels::DistillEachArgs {
                each: values.out(),
                stats: st.out(),
                part: &part,
                rows: count,
                slices: pieces,
                beta: self.beta,
            };
            kernels::distill_each(&*cx.device, by_row, args)?;
            let Some(dlogits) = &dlogits else { continue };
            let (dl, w) = (dlogits.rows(0, n)?, weight.rows(from, to)?);
            let args = kernels::DistillGradArgs {
                dlogits: dl.out(),
                student: &s,
                teacher: &t,
                stats: &st,
                weight: &w,
                rows: count,
                vocab: width,
                slices: pieces,
                beta: self.beta,
                scale: self.scale,
                slope: self.maps[0].slope(self.scale),
                softcap: self.maps[0].cap(),
            };
            kernels::distill_grad(&*cx.device, by_slice, args)?;
            gradients_of(cx, &dl, &own, &mut slots, (from, to))?;
        }
        let loss = cx.float("loss", &[1])?;
        let starts = cx.ints("starts", &[0, rows as i32])?;
        let args = kernels::SegmentSumsFwdArgs {
            sums: loss.out(),
            values: &each,
            weights: Some(weight),
            starts: &starts,
            segments: 1,
        };
        kernels::segment_sums_fwd(&*cx.device, Launch::warps(1), args)?;
        let saved = slots.into_iter().filter_map(|slot| Some(slot.rows?.0)).collect();
        Ok(Fwd { outputs: vec![loss, each], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        if dy[0].is_none() {
            return Err(Error::op("distill", "only the loss carries a gradient"));
        }
        let places = [0, PAIRS].into_iter().take(1 + usize::from(self.pairs[0]));
        let wanted: Vec<usize> = places.filter(|i| g.wants(*i)).collect();
        wanted.into_iter().zip(&node.saved).try_for_each(|(i, dx)| g.give(cx, i, dx.clone()))
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let b = f64::from(self.beta);
        let [own, theirs] = self.split(x);
        let logs = |h: &F64, w: &F64, pair: &[F64], r: usize, map: LogitMap| -> Vec<f64> {
            let z = oracle_row(h, w, pair, r).into_iter();
            let logits: Vec<f64> = z.map(|z| map.oracle(z) * f64::from(self.scale)).collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = top + logits.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
            logits.iter().map(|l| l - lse).collect()
        };
        let kl =
            |p: &[f64], q: &[f64]| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        let rows = F64::from_fn(&[x[0].row_count()], |r| {
            let s = logs(&x[0], &x[1], own, r, self.maps[0]);
            let t = logs(&x[2], &x[3], theirs, r, self.maps[1]);
            let m: Vec<f64> =
                s.iter().zip(&t).map(|(s, t)| ((1.0 - b) * s.exp() + b * t.exp()).ln()).collect();
            match b {
                0.0 => kl(&t, &s),
                1.0 => kl(&s, &t),
                _ => b * kl(&t, &m) + (1.0 - b) * kl(&s, &m),
            }
        });
        let loss = rows.data.iter().zip(&x[4].data).map(|(d, w)| d * w).sum();
        vec![F64::new(&[1], vec![loss]), rows]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, n, k, e) = (x[0].row_count(), x[1].row_count(), x[0].cols(), x[2].cols());
        Cost { flops: 2.0 * (m * n) as f64 * (k + e) as f64, ..Cost::memory(x, 12 * m * n) }
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for beta in [0.0f32, 0.1, 0.5, 0.9, 1.0] {
        for (rows, d, e, vocab, chunk, scale) in [
            (1, 4, 4, 3, 32, 1.0f32),
            (33, 16, 24, 130, 16, 1.0),
            (9, 24, 8, 1031, 4, 0.7),
            (3, 8, 4, 4999, 2, 0.9),
        ] {
            let inputs = vec![
                Arg::real(rng.array(&[rows, d], 1.0)),
                Arg::param(rng.array(&[vocab, d], 0.7)),
                Arg::real(rng.array(&[rows, e], 1.0)).no_grad(),
                Arg::real(rng.array(&[vocab, e], 0.7)).no_grad(),
                Arg::float(F64::from_fn(&[rows], |_| rng.uniform())),
            ];
            let label = format!(
                "beta {beta} rows {rows} d {d} e {e} vocab {vocab} chunk {chunk} scale {scale}"
            );
            let plain = [LogitMap::PLAIN; 2];
            let mapped = [
                LogitMap { divisor: 2.0, softcap: Some(4.0) },
                LogitMap { divisor: 0.7, softcap: None },
            ];
            for (maps, label) in [(plain, label.clone()), (mapped, label + " mapped")] {
                let pairs = [false; 2];
                let op = Distill { beta, scale, maps, chunk, pairs };
                let case = Case::new(label, op, inputs.clone());
                cases.push(Case { upstream: vec![Some(1.0), Some(0.0)], ..case });
            }
        }
    }
    // Generated after the others. The loss of a single row of three tokens is a difference of its
    // terms; with other random values than those above they may cancel beyond f32's tolerance,
    // which is relative to the loss.
    let (rows, d, e, vocab) = (33, 16, 24, 130);
    for beta in [0.0f32, 0.1, 0.5, 0.9, 1.0] {
        for pairs in [[true, false], [true, true]] {
            let mut inputs = vec![
                Arg::real(rng.array(&[rows, d], 1.0)),
                Arg::param(rng.array(&[vocab, d], 0.7)),
                Arg::real(rng.array(&[rows, e], 1.0)).no_grad(),
                Arg::real(rng.array(&[vocab, e], 0.7)).no_grad(),
                Arg::float(F64::from_fn(&[rows], |_| rng.uniform())),
            ];
            for _ in pairs.iter().filter(|pair| **pair) {
                inputs.push(Arg::real(rng.array(&[rows, 3], 0.5)));
                inputs.push(Arg::param(rng.array(&[vocab, 3], 0.5)));
            }
            if pairs[1] {
                for input in &mut inputs[PAIRS + 2..] {
                    *input = input.clone().no_grad();
                    input.param = false;
                }
            }
            let label = format!("beta {beta} rows {rows} vocab {vocab} pairs {pairs:?}");
            let op = Distill { beta, scale: 1.0, maps: [LogitMap::PLAIN; 2], chunk: 16, pairs };
            let case = Case::new(label, op, inputs);
            cases.push(Case { upstream: vec![Some(1.0), Some(0.0)], ..case });
        }
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let mut model = || {
        let x = Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0)).no_grad();
        [x, Arg::real(rng.array(&[s.vocab, s.hidden], 0.02)).no_grad()]
    };
    let mut inputs = [model(), model()].concat();
    inputs.push(Arg::float(F64::from_fn(&[s.tokens()], |_| 1.0)));
    let maps = [LogitMap::PLAIN; 2];
    let op = Distill { beta: 0.5, scale: 1.0, maps, chunk: 1024, pairs: [false; 2] };
    vec![Case::new("beta 0.5, chunks of 1024", op, inputs)]
}
