//! The self-check of low-rank terms on Hopper: inside the products against the kernels that every
//! device has, and against additions to the products. Layer 8.
//!
//! Invariant: the sizes are those of a model, for which a block has many tiles; the cases of the ops
//! are small.

use std::sync::Arc;

use super::{CheckOutcome, check_hopper};
use crate::autograd::Cx;
use crate::config::MatmulChoice;
use crate::device::{DType, Device, Layout};
use crate::error::Result;
use crate::ops::case::Rng;
use crate::ops::fastest::median;
use crate::ops::lora_kernels as fused;
use crate::ops::matmul::product;
use crate::tensor::Tensor;

/// The projections that share an input: rows, inner size, columns of each, rank.
pub struct AdapterGroup {
    pub rows: usize,
    pub k: usize,
    pub columns: &'static [usize],
    pub rank: usize,
}

/// Of Qwen3-0.6B, 2 x 2,048 tokens.
const GROUPS: [AdapterGroup; 5] = [
    AdapterGroup { rows: 4096, k: 1024, columns: &[2048, 1024, 1024], rank: 16 },
    AdapterGroup { rows: 4000, k: 1024, columns: &[2048, 1024, 1024], rank: 8 },
    AdapterGroup { rows: 4096, k: 2048, columns: &[1024], rank: 16 },
    AdapterGroup { rows: 4096, k: 1024, columns: &[3072, 3072], rank: 16 },
    AdapterGroup { rows: 4096, k: 3072, columns: &[1024], rank: 64 },
];
/// Rows of y that are computed beside all: of decode steps and of short prompts.
const FEW: [usize; 4] = [1, 40, 64, 65];
/// Timed runs, after one that is not timed.
const RUNS: usize = 3;

/// On a device with the Hopper kernels, compares y, dx and the gradients of A and B bit for bit. The
/// name of the case has the times.
pub fn check_low_rank(
    device: &Arc<dyn Device>,
    each: impl FnMut(&CheckOutcome),
) -> Vec<CheckOutcome> {
    check_hopper(device, "low rank", &GROUPS, |group| compare(device, group), each)
}

/// The name of the case, and what differs.
pub fn compare(device: &Arc<dyn Device>, group: &AdapterGroup) -> Result<(String, Vec<String>)> {
    let operands = Tensors::new(device, group)?;
    let mut differ = Vec::new();
    operands.forward(fused::Kernels::Tile, group.rows)?;
    let expected = operands.y.to_bytes()?;
    for rows in FEW.into_iter().chain([group.rows]) {
        operands.y.zero()?;
        operands.forward(fused::Kernels::Fastest, rows)?;
        let bytes = rows * operands.y.cols() * 2;
        if operands.y.to_bytes()?[..bytes] != expected[..bytes] {
            differ.push(format!("y of {rows} rows"));
        }
    }
    operands.backward(fused::Kernels::Tile)?;
    let expected = operands.gradients()?;
    operands.backward(fused::Kernels::Fastest)?;
    for ((name, got), (_, want)) in operands.gradients()?.into_iter().zip(expected) {
        if got != want {
            differ.push(name);
        }
    }
    let AdapterGroup { rows, k, columns, rank } = group;
    let mut case = format!("rows {rows} k {k} columns {columns:?} rank {rank}");
    let forward = operands.time(|o| o.forward(fused::Kernels::Fastest, *rows))?;
    let backward = operands.time(|o| o.backward(fused::Kernels::Fastest))?;
    let (forward_apart, backward_apart) =
        (operands.time(Tensors::forward_apart)?, operands.time(Tensors::backward_apart)?);
    case += &format!("; y {forward:.0} us, by additions {forward_apart:.0}");
    case += &format!("; gradients {backward:.0} us, by products {backward_apart:.0}");
    Ok((case, differ))
}

/// All operands and results of a group.
struct Tensors {
    cx: Cx,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    t: Tensor,
    b: Vec<Tensor>,
    y: Tensor,
    dy: Tensor,
    dt: Tensor,
    dx: Tensor,
    da: Tensor,
    db: Vec<Tensor>,
}

impl Tensors {
    fn new(device: &Arc<dyn Device>, group: &AdapterGroup) -> Result<Tensors> {
        let mut cx = Cx::new(device.clone(), DType::BF16)?;
        cx.matmul = MatmulChoice::Auto;
        let mut rng = Rng(29);
        let values: Vec<f32> = (0..65_537).map(|_| rng.normal() as f32).collect();
        let (m, k, rank) = (group.rows, group.k, group.rank);
        let (n, ranks) = (group.columns.iter().sum(), rank * group.columns.len());
        let real = |rows: usize, cols: usize| {
            // Each matrix begins elsewhere in the values.
            let some = values.iter().copied().cycle().skip(31 * rows + cols);
            let some: Vec<f32> = some.take(rows * cols).collect();
            Tensor::from_f32(&cx.pool, "low rank", DType::BF16, &[rows, cols], &some)
        };
        let b = group.columns.iter().map(|cols| real(*cols, rank)).collect::<Result<_>>()?;
        let db = group.columns.iter().map(|cols| cx.float("low rank", &[*cols, rank]));
        Ok(Tensors {
            x: real(m, k)?,
            w: real(n, k)?,
            a: real(ranks, k)?,
            t: real(m, ranks)?,
            b,
            y: real(m, n)?,
            dy: real(m, n)?,
            dt: real(m, ranks)?,
            dx: real(m, k)?,
            da: cx.float("low rank", &[ranks, k])?,
            db: db.collect::<Result<_>>()?,
            cx,
        })
    }

    fn segments(&self) -> Vec<fused::Segment<'_>> {
        let mut end = 0;
        let place = |b| {
            let start = end;
            end += Tensor::row_count(b);
            fused::Segment { b, start, end }
        };
        self.b.iter().map(place).collect()
    }

    /// The first `rows` rows of y.
    fn forward(&self, kernels: fused::Kernels, rows: usize) -> Result<()> {
        let of = |t: &Tensor| t.rows(0, rows);
        let (y, x, t) = (of(&self.y)?, of(&self.x)?, of(&self.t)?);
        fused::lora_nt_by(&self.cx, kernels, &y, (&x, &self.w, None), &t, &self.segments())
    }

    fn forward_apart(&self) -> Result<()> {
        product(&self.cx, Layout::NT, &self.y, &self.x, &self.w, None, false)?;
        let mut rank = 0;
        for s in self.segments() {
            let t = self.t.columns(rank, rank + s.b.cols())?;
            rank += s.b.cols();
            product(&self.cx, Layout::NT, &self.y.columns(s.start, s.end)?, &t, s.b, None, true)?;
        }
        Ok(())
    }

    fn backward(&self, kernels: fused::Kernels) -> Result<()> {
        let db: Vec<_> = self.db.iter().map(|t| Some((t, false))).collect();
        let (dx, da, w) = (Some((&self.dx, false)), Some((&self.da, false)), Some(&self.w));
        let to = fused::Wanted { dx, w, a: &self.a, da, db: &db };
        let read = fused::Read { x: &self.x, dt: &self.dt, dy: &self.dy, t: &self.t };
        fused::lora_grads_by(&self.cx, kernels, &to, &read, &self.segments())
    }

    fn backward_apart(&self) -> Result<()> {
        product(&self.cx, Layout::NN, &self.dx, &self.dy, &self.w, None, false)?;
        product(&self.cx, Layout::NN, &self.dx, &self.dt, &self.a, None, true)?;
        product(&self.cx, Layout::TN, &self.da, &self.dt, &self.x, None, false)?;
        let mut rank = 0;
        for (s, db) in self.segments().iter().zip(&self.db) {
            let t = self.t.columns(rank, rank + s.b.cols())?;
            rank += s.b.cols();
            product(&self.cx, Layout::TN, db, &self.dy.columns(s.start, s.end)?, &t, None, false)?;
        }
        Ok(())
    }

    /// The bytes of dx, dA and each dB.
    fn gradients(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut all = vec![("dx".into(), self.dx.to_bytes()?), ("dA".into(), self.da.to_bytes()?)];
        for (i, db) in self.db.iter().enumerate() {
            all.push((format!("dB_{i}"), db.to_bytes()?));
        }
        Ok(all)
    }

    /// The median time in microseconds.
    fn time(&self, run: impl Fn(&Tensors) -> Result<()>) -> Result<f32> {
        run(self)?;
        let mut times = Vec::new();
        for _ in 0..RUNS {
            let from = self.cx.device.mark()?;
            run(self)?;
            times.push(1000.0 * self.cx.device.elapsed_ms(from, self.cx.device.mark()?)?);
        }
        Ok(median(&times).unwrap_or_default())
    }
}
