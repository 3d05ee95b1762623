//! The short convolution on the paged path: what later tokens need of a row goes to the cache, and
//! comes from there. Layer 4.
//!
//! Invariant: a row has the bits of [`short_conv`](super::short_conv::short_conv), however the
//! tokens before it came into the cache and wherever their pages lie.

use super::short_conv::{convolved, gated, sizes};
use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::attention::{PAGE, PagedRows};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::{expect_cols, row_packs};
use crate::tensor::Tensor;

/// Writes b x of row `r` of `bcx` [n, 3 h] to row `slots[r]` of `cache` [pages * 64, h] real, and
/// returns y [n, h] as [`short_conv`](super::short_conv::short_conv) has it. A row of padding gives
/// 0. Not on the tape.
pub fn short_conv_paged(
    cx: &mut Cx,
    bcx: &Tensor,
    cache: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    rows: PagedRows,
) -> Result<Tensor> {
    ShortConvPaged { bias: bias.is_some() }.run(cx, bcx, cache, w, bias, rows)
}

#[derive(Debug)]
pub struct ShortConvPaged {
    pub bias: bool,
}

impl ShortConvPaged {
    fn run(
        &self,
        cx: &Cx,
        bcx: &Tensor,
        cache: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        at: PagedRows,
    ) -> Result<Tensor> {
        let (h, taps) = sizes("short_conv_paged", bcx, w, bias)?;
        expect_cols("short_conv_paged", "cache", cache, h, "a cache row is b x of one token")?;
        let rows = bcx.row_count();
        let counts = [at.slots, at.sequences, at.positions].iter().all(|t| t.numel() == rows);
        if !counts || !cache.is_contiguous() {
            let message = format!("{bcx:?}, cache {cache:?}, slots {:?}", at.slots);
            return Err(Error::op("short_conv_paged", message));
        }
        let launch = row_packs(rows, h, bcx.dtype());
        let args = kernels::ShortConvAppendArgs {
            cache: cache.out(),
            bcx,
            slots: at.slots,
            rows: rows as i32,
            h: h as i32,
        };
        kernels::short_conv_append(&*cx.device, launch, args)?;
        let y = cx.real("convolution", &[rows, h])?;
        let args = kernels::ShortConvPagedArgs {
            y: y.out(),
            bcx,
            cache,
            w,
            bias,
            page_table: at.page_table,
            row_sequence: at.sequences,
            row_position: at.positions,
            rows: rows as i32,
            h: h as i32,
            taps: taps as i32,
            max_pages: at.page_table.cols() as i32,
        };
        kernels::short_conv_paged(&*cx.device, launch, args)?;
        Ok(y)
    }

    /// bcx, cache, w, the bias, then slots, page table, sequences and positions.
    fn split<'a, T>(&self, x: &'a [T]) -> (Option<&'a T>, &'a [T]) {
        (self.bias.then(|| &x[3]), &x[3 + usize::from(self.bias)..])
    }
}

impl Op for ShortConvPaged {
    fn name(&self) -> &'static str {
        "short_conv_paged"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (bias, t) = self.split(x);
        let rows = PagedRows { slots: t[0], page_table: t[1], sequences: t[2], positions: t[3] };
        let y = self.run(cx, x[0], x[1], x[2], bias.copied(), rows)?;
        Ok(Fwd { outputs: vec![y, x[1].clone()], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let (bias, t) = self.split(x);
        let (u, mut cache) = (gated(round, &x[0]), x[1].clone());
        for row in (0..u.row_count()).filter(|row| t[0].data[*row] >= 0.0) {
            cache.row_mut(t[0].index(row)).copy_from_slice(u.row(row));
        }
        let at = |row: usize, d: usize| {
            let position = t[3].index(row).checked_sub(d)?;
            let page = t[1].row(t[2].index(row))[position / PAGE] as usize;
            Some(cache.row(page * PAGE + position % PAGE))
        };
        let mut y = convolved(round, &x[0], &x[2], bias, &|row, d| {
            if t[2].data[row] < 0.0 { None } else { at(row, d) }
        });
        for row in (0..u.row_count()).filter(|row| t[2].data[*row] < 0.0) {
            y.row_mut(row).fill(0.0);
        }
        vec![y, cache]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (rows, h, taps) = (x[0].row_count(), x[2].row_count(), x[2].cols());
        let bytes = x[0].bytes() + rows * h * (2 + taps) * x[0].dtype().size();
        Cost { bytes: bytes as f64, flops: (rows * h * (2 * taps + 2)) as f64 }
    }
}

/// `rows` new tokens of each sequence: those of sequence `i` stand from position `first[i]` on. The
/// last row of the step is padding.
fn case(rng: &mut Rng, first: &[usize], new: usize, h: usize, taps: usize, bias: bool) -> Case {
    let width = first.iter().map(|f| (f + new).div_ceil(PAGE)).max().unwrap_or(1);
    let pages = first.len() * width;
    // Pages in a backward order.
    let page = |sequence: usize, at: usize| pages - 1 - (sequence * width + at);
    let (mut slots, mut sequences, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for (i, from) in first.iter().enumerate() {
        for position in *from..from + new {
            slots.push((page(i, position / PAGE) * PAGE + position % PAGE) as i32);
            sequences.push(i as i32);
            positions.push(position as i32);
        }
    }
    for (column, padding) in [(&mut slots, -1), (&mut sequences, -1), (&mut positions, 0)] {
        column.push(padding);
    }
    let table: Vec<f64> = (0..pages).map(|i| page(i / width, i % width) as f64).collect();
    let mut inputs = vec![
        Arg::real(rng.array(&[slots.len(), 3 * h], 1.0)),
        Arg::real(rng.array(&[pages * PAGE, h], 1.0)),
        Arg::real(rng.array(&[h, 1, taps], (taps as f64).powf(-0.5))),
    ];
    if bias {
        inputs.push(Arg::real(rng.array(&[h], 0.5)));
    }
    let mut tables = [&slots, &slots, &sequences, &positions].map(|v| Arg::ints(v));
    tables[1].value = F64::new(&[first.len(), width], table);
    inputs.extend(tables);
    let inputs = inputs.into_iter().map(Arg::no_grad).collect();
    let label = format!("{new} tokens from {first:?} on, h {h}, {taps} taps");
    Case::new(label, ShortConvPaged { bias }, inputs)
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    vec![
        case(rng, &[0, 1, 2, 63, 64, 65, 130], 1, 32, 3, false),
        case(rng, &[0, 62, 5], 9, 40, 4, true),
        case(rng, &[0], 70, 5, 3, true),
    ]
}

/// A decode step.
pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let case = case(rng, &vec![s.length - 1; s.sequences], 1, s.hidden, 3, false);
    let label = format!("{} sequences, h {}, 3 taps", s.sequences, s.hidden);
    vec![Case { label, ..case }]
}
