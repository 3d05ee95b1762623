//! The levels of attention: how each is launched. Layer 4.
//!
//! Invariant: all compute the same function, of whole tiles only; from level 4 on the same bits.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels::{self, Boxes};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::tensor::Tensor;

/// Causal attention by one level: q, k, v and the output [heads * t, 64], head after head.
#[derive(Debug)]
pub struct AttentionLevel {
    pub level: usize,
    pub shape: HeadsShape,
}

/// Heads (of all sequences) and positions of each.
#[derive(Clone, Copy, Debug)]
pub struct HeadsShape {
    pub heads: usize,
    pub t: usize,
}

/// The head size of all levels, and the divisor of t.
const DIM: usize = 64;
const ROWS: usize = 128;

const NAMES: [&str; 6] = [
    "level_attention_1",
    "level_attention_2",
    "level_attention_3",
    "level_attention_4",
    "level_attention_5",
    "level_attention_6",
];

impl AttentionLevel {
    const SCALE: f32 = 0.125; // DIM^-0.5

    /// Number of (query, key) pairs of all heads under the mask.
    fn pairs(&self) -> f64 {
        let HeadsShape { heads, t } = self.shape;
        heads as f64 * t as f64 * (t as f64 + 1.0) / 2.0
    }

    /// Level 1: the scores in memory.
    fn three_kernels(&self, cx: &Cx, o: &Tensor, x: &[&Tensor]) -> Result<()> {
        let HeadsShape { heads, t } = self.shape;
        let (device, rows) = (&*cx.device, heads * t);
        let s = cx.scratch("scores", DType::F32, &[rows, t])?;
        let (heads, t_i32, scale) = (heads as i32, t as i32, Self::SCALE);
        let args = kernels::LevelAttention1ScoresArgs {
            s: s.out(),
            q: x[0],
            k: x[1],
            heads,
            t: t_i32,
            scale,
        };
        kernels::level_attention_1_scores(device, Launch::flat(rows * t), args)?;
        let args = kernels::LevelAttention1SoftmaxArgs { s: s.out(), rows: rows as i32, t: t_i32 };
        kernels::level_attention_1_softmax(device, Launch::warps(rows), args)?;
        let args = kernels::LevelAttention1OutArgs { o: o.out(), s: &s, v: x[2], heads, t: t_i32 };
        kernels::level_attention_1_out(device, Launch::flat(rows * DIM), args)
    }

    fn launch(&self, cx: &Cx, o: &Tensor, x: &[&Tensor]) -> Result<()> {
        let HeadsShape { heads, t } = self.shape;
        let device = &*cx.device;
        let blocks = |rows: usize| Launch::grid([t / rows, heads, 1]);
        let flat = Launch::blocks([(heads * t).div_ceil(128), 1, 1], 128, 0);
        let (heads, t, scale) = (heads as i32, t as i32, Self::SCALE);
        let [q, k, v] = [x[0], x[1], x[2]];
        let args = kernels::LevelAttention2Args { o: o.out(), q, k, v, heads, t, scale };
        let [q, k, v] = [q, k, v].map(|t| Boxes::swizzled(t, 64));
        let boxes = kernels::LevelAttention5Args { o: o.out(), q, k, v, heads, t, scale };
        match self.level {
            1 => self.three_kernels(cx, o, x),
            2 => kernels::level_attention_2(device, flat, args),
            3 => kernels::level_attention_3(device, blocks(128), args),
            4 => kernels::level_attention_4(device, blocks(64), args),
            5 => kernels::level_attention_5(device, blocks(64), boxes),
            6 => kernels::level_attention_6(device, blocks(128), boxes),
            other => Err(Error::op("level_attention", format!("there is no level {other}"))),
        }
    }
}

impl Op for AttentionLevel {
    fn name(&self) -> &'static str {
        NAMES[self.level - 1]
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let HeadsShape { heads, t } = self.shape;
        let fits = |x: &&Tensor| x.shape() == [heads * t, DIM] && x.is_contiguous();
        if !x.iter().all(fits) || !t.is_multiple_of(ROWS) {
            let message = format!(
                "{x:?} for {:?}; q, k and v are [heads * t, {DIM}] without gaps, \
                 t a multiple of {ROWS}",
                self.shape
            );
            return Err(Error::op(self.name(), message));
        }
        let o = cx.real("level", &[heads * t, DIM])?;
        self.launch(cx, &o, x)?;
        Ok(Fwd { outputs: vec![o], saved: vec![] })
    }

    /// P is rounded where the tensor cores take it as an operand.
    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let (q, k, v) = (&x[0], &x[1], &x[2]);
        let mut out = F64::zeros(&[q.row_count(), DIM]);
        for r in 0..q.row_count() {
            let seen = r / self.shape.t * self.shape.t..=r;
            let dot = |key: usize| q.row(r).iter().zip(k.row(key)).map(|(q, k)| q * k).sum::<f64>();
            let s: Vec<f64> = seen.clone().map(|key| dot(key) * f64::from(Self::SCALE)).collect();
            let largest = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = s.iter().map(|s| (s - largest).exp()).collect();
            let sum: f64 = p.iter().sum();
            for (p, key) in p.iter().zip(seen) {
                let p = if round == Round::Bf16 { round.at(*p) } else { *p } / sum;
                out.row_mut(r).iter_mut().zip(v.row(key)).for_each(|(o, v)| *o += p * v);
            }
            out.row_mut(r).iter_mut().for_each(|o| *o = round.at(*o));
        }
        vec![out]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost { flops: 4.0 * DIM as f64 * self.pairs(), ..Cost::memory(x, x[0].bytes()) }
    }
}

fn case(rng: &mut Rng, level: usize, heads: usize, t: usize) -> Case {
    let shape = HeadsShape { heads, t };
    let inputs = (0..3).map(|_| Arg::real(rng.array(&[heads * t, DIM], 1.0)).no_grad()).collect();
    Case::new(format!("heads {heads} t {t}"), AttentionLevel { level, shape }, inputs)
}

/// One tile of queries; more steps than stages.
pub(super) fn cases<const N: usize>(rng: &mut Rng) -> Vec<Case> {
    vec![case(rng, N, 3, 128), case(rng, N, 1, 512)]
}

/// As many heads and positions as the batch has, with positions rounded up to whole tiles.
pub(super) fn perf<const N: usize>(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    vec![case(rng, N, s.sequences * s.heads, s.length.next_multiple_of(ROWS))]
}
