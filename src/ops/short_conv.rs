//! The gated short convolution over a packed batch: it mixes positions in layers without attention.
//! Layer 4.
//!
//! Invariant: a row sees only the tokens before it in its own sequence, wherever their rows are; the
//! gradients of a row that several sequences share are added in a fixed order. Math and numerics:
//! `kernels/short_conv.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream, add_into};
use crate::device::DType;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::attention::Segment;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::{RowSums, column_warps, expect_cols, row_packs};
use crate::tensor::Tensor;

/// The rows that each row of a batch reads, and the rows that read it.
#[derive(Clone)]
pub struct ConvRows {
    /// I32 [rows, taps]: the row `d` tokens before; -1: there is none.
    back: Tensor,
    /// I32 `[rows + 1]`: where the pairs of each row begin in `next`.
    starts: Tensor,
    /// I32 [pairs, 2]: a row that reads this one, and how many tokens after it that is.
    next: Tensor,
}

impl ConvRows {
    /// For a convolution over a token and the `taps - 1` before it.
    pub fn new(cx: &Cx, segments: &[Segment], taps: usize) -> Result<ConvRows> {
        let back = rows_back(segments, taps);
        let (starts, next) = readers(&back, taps);
        let ints = |data: &[i32], cols: usize| {
            let shape = [data.len() / cols, cols];
            Tensor::from_host(&cx.pool, "convolution rows", DType::I32, &shape, data)
        };
        Ok(ConvRows {
            back: ints(&back, taps)?,
            starts: cx.ints("convolution rows", &starts)?,
            next: ints(&next, 2)?,
        })
    }
}

/// [rows, taps]: the row `d` tokens before, or -1.
fn rows_back(segments: &[Segment], taps: usize) -> Vec<i32> {
    let mut back = Vec::new();
    for segment in segments {
        let prefix = segment.prefix.map(|p| segments[p]);
        for at in 0..segment.len {
            back.extend((0..taps).map(|d| match (at.checked_sub(d), prefix) {
                (Some(own), _) => (segment.start + own) as i32,
                (None, Some(p)) if d - at <= p.len => (p.start + p.len + at - d) as i32,
                _ => -1,
            }));
        }
    }
    back
}

/// The pairs (row, d) that read each row, by d, then by row; and where those of each row begin.
fn readers(back: &[i32], taps: usize) -> (Vec<i32>, Vec<i32>) {
    let mut pairs: Vec<(i32, i32, i32)> = Vec::with_capacity(back.len());
    for (at, from) in back.iter().enumerate().filter(|(_, from)| **from >= 0) {
        pairs.push((*from, (at % taps) as i32, (at / taps) as i32));
    }
    pairs.sort_unstable();
    let starts = (0..=back.len() / taps)
        .map(|row| pairs.partition_point(|pair| (pair.0 as usize) < row) as i32)
        .collect();
    (starts, pairs.iter().flat_map(|(_, d, row)| [*row, *d]).collect())
}

/// `y = c conv(b x)` for the rows b|c|x of `bcx` [rows, 3 h] real, over the tokens in `rows`:
/// w [h, 1, taps] real, the last tap being the token's own; bias `[h]` real; y [rows, h].
pub fn short_conv(
    cx: &mut Cx,
    bcx: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    rows: &ConvRows,
) -> Result<Tensor> {
    let op = ShortConv { bias: bias.is_some() };
    let tables = [&rows.back, &rows.starts, &rows.next];
    let inputs: Vec<&Tensor> = [bcx, w].into_iter().chain(bias).chain(tables).collect();
    cx.apply1(op, &inputs)
}

#[derive(Debug)]
pub struct ShortConv {
    pub bias: bool,
}

/// Channels and taps, checked.
pub(super) fn sizes(
    op: &'static str,
    bcx: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
) -> Result<(usize, usize)> {
    let (h, taps) = (w.row_count(), w.cols());
    expect_cols(op, "bcx", bcx, 3 * h, "it is b | c | x, each as wide as the convolution")?;
    let fits = bias.is_none_or(|b| b.numel() == h) && bcx.is_contiguous() && w.is_contiguous();
    match fits {
        true => Ok((h, taps)),
        false => Err(Error::op(op, format!("{bcx:?}, filters {w:?}, bias {bias:?}"))),
    }
}

impl ShortConv {
    /// bcx, w, the bias, then back, starts and next.
    fn split<'a, T>(&self, x: &'a [T]) -> (&'a T, &'a T, Option<&'a T>, &'a [T]) {
        (&x[0], &x[1], self.bias.then(|| &x[2]), &x[2 + usize::from(self.bias)..])
    }

    /// The gradients of the filters, then of the bias: F32 [h taps (+ h)].
    fn filter_gradients(
        &self,
        cx: &Cx,
        (bcx, dy, back): (&Tensor, &Tensor, &Tensor),
        (h, taps): (usize, usize),
    ) -> Result<Tensor> {
        let (rows, parts) = (dy.row_count(), taps + usize::from(self.bias));
        let sums = RowSums::new(cx, rows, h * parts, dy.dtype())?;
        let chunks = sums.partial.row_count();
        let args = kernels::ShortConvDwArgs {
            partial: sums.partial.out(),
            dy,
            bcx,
            back,
            rows: rows as i32,
            h: h as i32,
            taps: taps as i32,
            parts: parts as i32,
        };
        kernels::short_conv_dw(&*cx.device, column_warps(chunks * parts, h, dy.dtype()), args)?;
        let all = cx.float("filter gradients", &[h * parts])?;
        sums.finish(cx, &all, false)?;
        Ok(all)
    }
}

impl Op for ShortConv {
    fn name(&self) -> &'static str {
        "short_conv"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        let (bcx, w, bias, tables) = self.split(x);
        let (h, taps) = sizes("short_conv", bcx, w, bias.copied())?;
        let (rows, back) = (bcx.row_count(), tables[0]);
        if back.numel() != rows * taps || tables[1].numel() != rows + 1 {
            let message = format!("{bcx:?}, filters {w:?}, rows {back:?}");
            return Err(Error::op("short_conv", message));
        }
        let y = cx.real("convolution", &[rows, h])?;
        let args = kernels::ShortConvFwdArgs {
            y: y.out(),
            bcx,
            w,
            bias: bias.copied(),
            back,
            rows: rows as i32,
            h: h as i32,
            taps: taps as i32,
        };
        kernels::short_conv_fwd(&*cx.device, row_packs(rows, h, bcx.dtype()), args)?;
        let saved = if need.tape { x.iter().map(|t| (*t).clone()).collect() } else { vec![] };
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let (bcx, w, bias, tables) = self.split(&node.saved);
        let (rows, h, taps) = (bcx.row_count(), w.row_count(), w.cols());
        if let Some((dbcx, accumulate)) = g.slot(0)? {
            let args = kernels::ShortConvBwdArgs {
                dbcx: dbcx.out(),
                dy,
                bcx,
                w,
                bias,
                back: &tables[0],
                starts: &tables[1],
                next: &tables[2],
                rows: rows as i32,
                h: h as i32,
                taps: taps as i32,
                accumulate: i32::from(accumulate),
            };
            kernels::short_conv_bwd(&*cx.device, row_packs(rows, h, bcx.dtype()), args)?;
        }
        let wanted = g.wants(1) || self.bias && g.wants(2);
        if !wanted {
            return Ok(());
        }
        let all = self.filter_gradients(cx, (bcx, dy, &tables[0]), (h, taps))?;
        if let Some((dw, accumulate)) = g.slot(1)? {
            add_into(cx, &dw, &all.rows(0, h * taps)?, accumulate)?;
        }
        if self.bias
            && let Some((db, accumulate)) = g.slot(2)?
        {
            add_into(cx, &db, &all.rows(h * taps, h * taps + h)?, accumulate)?;
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let (bcx, w, bias, tables) = self.split(x);
        let taps = w.cols();
        let u = gated(round, bcx);
        let at = |row: usize, d: usize| {
            let from = tables[0].data[row * taps + d];
            (from >= 0.0).then(|| u.row(from as usize))
        };
        vec![convolved(round, bcx, w, bias, &at)]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (h, taps) = (x[1].row_count(), x[1].cols());
        let y = x[0].row_count() * h;
        let bytes = x[0].bytes() + y * x[0].dtype().size();
        Cost { bytes: bytes as f64, flops: (y * (2 * taps + 2)) as f64 }
    }
}

/// b x of each row.
pub(super) fn gated(round: Round, bcx: &F64) -> F64 {
    let h = bcx.cols() / 3;
    F64::from_fn(&[bcx.row_count(), h], |i| {
        let row = bcx.row(i / h);
        round.at(row[i % h] * row[2 * h + i % h])
    })
}

/// y from the gated rows: `at(row, d)` is the one `d` tokens before.
pub(super) fn convolved<'a>(
    round: Round,
    bcx: &F64,
    w: &F64,
    bias: Option<&F64>,
    at: &dyn Fn(usize, usize) -> Option<&'a [f64]>,
) -> F64 {
    let (h, taps) = (bcx.cols() / 3, w.cols());
    F64::from_fn(&[bcx.row_count(), h], |i| {
        let (row, channel) = (i / h, i % h);
        let mut sum = bias.map_or(0.0, |b| b.data[channel]);
        for d in (0..taps).rev() {
            sum += at(row, d).map_or(0.0, |u| w.data[channel * taps + taps - 1 - d] * u[channel]);
        }
        round.at(bcx.row(row)[h + channel] * round.at(sum))
    })
}

fn case(
    rng: &mut Rng,
    (lengths, prefixes): (&[usize], &[Option<usize>]),
    h: usize,
    taps: usize,
    bias: bool,
) -> Case {
    let mut rows = 0;
    let segment = |(len, prefix): (&usize, &Option<usize>)| {
        rows += len;
        Segment { start: rows - len, len: *len, prefix: *prefix }
    };
    let segments: Vec<Segment> = lengths.iter().zip(prefixes).map(segment).collect();
    let back = rows_back(&segments, taps);
    let (starts, next) = readers(&back, taps);
    let mut inputs = vec![
        Arg::real(rng.array(&[rows, 3 * h], 1.0)),
        Arg::param(rng.array(&[h, 1, taps], (taps as f64).powf(-0.5))),
    ];
    if bias {
        inputs.push(Arg::param(rng.array(&[h], 0.5)));
    }
    inputs.extend([&back, &starts, &next].map(|v| Arg::ints(v)));
    let label = format!("segments of {lengths:?} after {prefixes:?}, h {h}, {taps} taps");
    Case { roundings: 6.0, ..Case::new(label, ShortConv { bias }, inputs) }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let none = [None; 4];
    vec![
        case(rng, (&[1], &none), 5, 3, false),
        case(rng, (&[7, 1, 2, 30], &none), 32, 3, false),
        case(rng, (&[40, 90, 33], &none), 150, 4, true),
        // Completions of a long prompt, of one shorter than the taps, and a sequence of its own.
        case(rng, (&[70, 3, 1, 9], &[None, Some(0), Some(0), Some(0)]), 24, 3, true),
        case(rng, (&[1, 5, 6, 4], &[None, Some(0), Some(0), None]), 17, 5, false),
        case(rng, (&[6, 3], &none), 8, 1, true),
    ]
}

/// A batch of a model.
pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let lengths = vec![s.length; s.sequences];
    let case = case(rng, (&lengths, &vec![None; s.sequences]), s.hidden, 3, false);
    let label = format!("{} x {} tokens, h {}, 3 taps", s.sequences, s.length, s.hidden);
    vec![Case { label, ..case }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_before_the_first_are_those_of_the_shared_prompt() {
        let segment = |start, len, prefix| Segment { start, len, prefix };
        let segments = [segment(0, 2, None), segment(2, 2, Some(0)), segment(4, 1, Some(0))];
        let back = rows_back(&segments, 4);
        let rows: Vec<&[i32]> = back.chunks(4).collect();
        assert_eq!(rows[1], [1, 0, -1, -1]);
        assert_eq!(rows[2..4], [[2, 1, 0, -1], [3, 2, 1, 0]]);
        assert_eq!(rows[4], [4, 1, 0, -1]);
        let (starts, next) = readers(&back, 4);
        // Row 0 by d, then by row: itself, row 1, the first rows of both completions, row 3.
        assert_eq!(next[..10], [0, 0, 1, 1, 2, 2, 4, 2, 3, 3]);
        assert_eq!(starts[..2], [0, 5]);
        assert_eq!(starts[5] as usize * 2, next.len());
    }
}
