//! The levels of the matrix product: how each is launched. Layer 4.
//!
//! Invariant: all compute the same function, of whole tiles only; from level 6 on the same bits.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::{Device, Launch};
use crate::error::{Error, Result};
use crate::kernels::{self, Boxes};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::tensor::Tensor;

/// `c = a b` by one level: a [m, k], b [k, n]; the largest tile divides m, n and k.
#[derive(Debug)]
pub struct MatmulLevel {
    pub level: usize,
}

/// Rows, columns and depth of the largest tile.
const TILE: [usize; 3] = [128, 256, 64];

const NAMES: [&str; 8] = [
    "level_matmul_1",
    "level_matmul_2",
    "level_matmul_3",
    "level_matmul_4",
    "level_matmul_5",
    "level_matmul_6",
    "level_matmul_7",
    "level_matmul_8",
];

impl MatmulLevel {
    fn launch(
        &self,
        device: &dyn Device,
        c: &Tensor,
        x: [&Tensor; 2],
        size: [usize; 3],
    ) -> Result<()> {
        let ([a, b], [m, n, k]) = (x, size);
        let tiles = |rows: usize, cols: usize| Launch::grid([n / cols, m / rows, 1]);
        let args = |c| {
            let (m, n, k) = (m as i32, n as i32, k as i32);
            kernels::LevelMatmul1Args { c, a, b, m, n, k }
        };
        let (boxes_a, boxes_b) = (Boxes::swizzled(a, 128), Boxes::swizzled(b, 64));
        let (mi, ni, ki) = (m as i32, n as i32, k as i32);
        match self.level {
            1 => kernels::level_matmul_1(device, Launch::flat(m * n), args(c.out())),
            2 => kernels::level_matmul_2(device, Launch::flat(m * n), args(c.out())),
            3 => kernels::level_matmul_3(device, tiles(32, 32), args(c.out())),
            4 => kernels::level_matmul_4(device, tiles(128, 128), args(c.out())),
            5 => kernels::level_matmul_5(device, tiles(128, 128), args(c.out())),
            6 => kernels::level_matmul_6(device, tiles(128, 128), args(c.out())),
            7 => {
                let (a, b, m, n, k) = (boxes_a, boxes_b, mi, ni, ki);
                let args = kernels::LevelMatmul7Args { c: c.out(), a, b, m, n, k };
                kernels::level_matmul_7(device, tiles(128, 128), args)
            }
            8 => {
                let blocks = (m / 128 * (n / 256)).min(device.capabilities().multiprocessors);
                let (a, b, m, n, k) = (boxes_a, boxes_b, mi, ni, ki);
                let args = kernels::LevelMatmul8Args { c: Boxes::swizzled(c, 16), a, b, m, n, k };
                kernels::level_matmul_8(device, Launch::grid([blocks, 1, 1]), args)
            }
            other => Err(Error::op("level_matmul", format!("there is no level {other}"))),
        }
    }
}

impl Op for MatmulLevel {
    fn name(&self) -> &'static str {
        NAMES[self.level - 1]
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (a, b) = (x[0], x[1]);
        let size = [a.row_count(), b.cols(), a.cols()];
        let whole = size.iter().zip(TILE).all(|(size, tile)| size.is_multiple_of(tile));
        if !whole || b.row_count() != a.cols() || !a.is_contiguous() || !b.is_contiguous() {
            let message = format!(
                "{a:?} by {b:?}; a level multiplies whole tiles without gaps: \
                 m, n, k are multiples of {TILE:?}"
            );
            return Err(Error::op(self.name(), message));
        }
        let c = cx.real("level", &[size[0], size[1]])?;
        self.launch(&*cx.device, &c, [a, b], size)?;
        Ok(Fwd { outputs: vec![c], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let (a, b) = (&x[0], &x[1]);
        let mut c = F64::zeros(&[a.row_count(), b.cols()]);
        for r in 0..a.row_count() {
            for (k, factor) in a.row(r).iter().enumerate() {
                c.row_mut(r).iter_mut().zip(b.row(k)).for_each(|(c, b)| *c += factor * b);
            }
            c.row_mut(r).iter_mut().for_each(|c| *c = round.at(*c));
        }
        vec![c]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (m, n, k) = (x[0].row_count(), x[1].cols(), x[0].cols());
        Cost { flops: 2.0 * (m * n * k) as f64, ..Cost::memory(x, m * n * x[0].dtype().size()) }
    }
}

fn case(rng: &mut Rng, level: usize, [m, n, k]: [usize; 3]) -> Case {
    let a = Arg::real(rng.array(&[m, k], 1.0)).no_grad();
    let b = Arg::real(rng.array(&[k, n], (k as f64).powf(-0.5))).no_grad();
    Case::new(format!("m {m} n {n} k {k}"), MatmulLevel { level }, vec![a, b])
}

/// A tile of one step; more steps than stages; several tiles for each of the CPU's blocks.
pub(super) fn cases<const N: usize>(rng: &mut Rng) -> Vec<Case> {
    [[128, 256, 64], [128, 256, 448], [256, 768, 128]].map(|size| case(rng, N, size)).into()
}

/// A square of size `hidden`, rounded up to whole tiles.
pub(super) fn perf<const N: usize>(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let side = s.hidden.next_multiple_of(256);
    vec![case(rng, N, [side, side, side])]
}
