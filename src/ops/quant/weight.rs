//! A frozen weight held in 4 or 8 bits. Layer 4.
//!
//! Invariant: each segment (one Hugging Face tensor of a fused parameter) is quantised on its own,
//! so its storage is what bitsandbytes would write for that tensor.

use super::{BLOCK4, BLOCK8, NF4, blockwise8_quantise, dynamic_map_tensor};
use crate::autograd::Cx;
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels::{self, DEQUANTISE_PACK};
use crate::tensor::Tensor;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// 4 bits in blocks of 64; `double`: the scales are 8-bit codes too
    /// (`bnb_4bit_use_double_quant`).
    Nf4 { double: bool },
    /// 8 bits, one scale per row.
    Int8,
}

/// The factors of the codes.
#[derive(Clone, Debug)]
pub enum Scales {
    /// A float per block of 64 (NF4) or per row (int8).
    Float(Tensor),
    /// `map[codes] * absmax[block of 256] + offset`, one code per block of 64.
    Nested { codes: Tensor, absmax: Tensor, offset: Tensor },
}

impl Scales {
    /// The float scales: those of the values or, if nested, those of the scales' codes.
    fn absmax(&self) -> &Tensor {
        match self {
            Scales::Float(absmax) | Scales::Nested { absmax, .. } => absmax,
        }
    }
}

/// The most segments that one launch dequantises.
const NF4_SEGMENTS: usize = 3;

#[derive(Clone, Debug)]
pub struct Segment {
    pub rows: usize,
    /// U8: two values per byte, the even one in the high half (NF4), or one in two's complement
    /// (int8).
    pub codes: Tensor,
    pub scales: Scales,
}

#[derive(Debug)]
pub struct QuantWeight {
    pub scheme: Scheme,
    /// [n, k], an HF `weight`: rows of all segments, columns.
    pub shape: [usize; 2],
    pub segments: Vec<Segment>,
    pub(super) nf4: Tensor,
    pub(super) dynamic: Tensor,
}

impl QuantWeight {
    /// Quantises w [n, k] (F32 or BF16), `segment_rows` rows at a time (they add up to n).
    pub fn from_tensor(
        cx: &Cx,
        w: &Tensor,
        segment_rows: &[usize],
        scheme: Scheme,
    ) -> Result<QuantWeight> {
        let (n, k) = (w.row_count(), w.cols());
        if w.shape().len() != 2
            || !w.is_contiguous()
            || segment_rows.iter().sum::<usize>() != n
            || n * k == 0
        {
            let what = format!(
                "{w:?} in segments of {segment_rows:?} rows: a contiguous matrix of that many rows"
            );
            return Err(Error::op("quantise", what));
        }
        let (nf4, dynamic) = maps(cx)?;
        let mut segments = Vec::with_capacity(segment_rows.len());
        let mut from = 0;
        for &rows in segment_rows {
            let part = w.rows(from, from + rows)?;
            from += rows;
            let (codes, scales) = match scheme {
                Scheme::Nf4 { double } => {
                    let (codes, absmax) = quantise_nf4(cx, &part, &nf4)?;
                    (
                        codes,
                        if double { nest(cx, &absmax, &dynamic)? } else { Scales::Float(absmax) },
                    )
                }
                Scheme::Int8 => quantise_int8(cx, &part)?,
            };
            segments.push(Segment { rows, codes, scales });
        }
        Ok(QuantWeight { scheme, shape: [n, k], segments, nf4, dynamic })
    }

    /// One weight with the rows of `a`, then those of `b`, and all their segments.
    pub fn beside(a: &QuantWeight, b: QuantWeight) -> Result<QuantWeight> {
        if a.scheme != b.scheme || a.shape[1] != b.shape[1] {
            let message = format!("{:?} beside {:?}: other columns or schemes", a.shape, b.shape);
            return Err(Error::op("quantise", message));
        }
        let segments = a.segments.iter().cloned().chain(b.segments).collect();
        let shape = [a.shape[0] + b.shape[0], a.shape[1]];
        Ok(QuantWeight {
            scheme: a.scheme,
            shape,
            segments,
            nf4: a.nf4.clone(),
            dynamic: a.dynamic.clone(),
        })
    }

    /// Bytes held: codes, scales, maps.
    pub fn bytes(&self) -> usize {
        let scales = |s: &Scales| match s {
            Scales::Float(absmax) => absmax.bytes(),
            Scales::Nested { codes, absmax, offset } => {
                codes.bytes() + absmax.bytes() + offset.bytes()
            }
        };
        let segments: usize =
            self.segments.iter().map(|s| s.codes.bytes() + scales(&s.scales)).sum();
        segments + self.nf4.bytes() + self.dynamic.bytes()
    }

    /// Writes the values, rounded once to the dtype of `out` [n, k], which is contiguous F32 or
    /// BF16.
    pub fn dequantise_into(&self, cx: &Cx, out: &Tensor) -> Result<()> {
        if out.shape() != self.shape || !out.is_contiguous() {
            let message = format!("a weight of shape {:?} into {out:?}", self.shape);
            return Err(Error::op("dequantise", message));
        }
        let (k, mut from) = (self.shape[1], 0);
        for segments in self.segments.chunks(NF4_SEGMENTS) {
            let rows: usize = segments.iter().map(|s| s.rows).sum();
            let part = out.rows(from, from + rows)?;
            from += rows;
            match self.scheme {
                Scheme::Nf4 { .. } => self.dequantise_nf4(cx, segments, &part)?,
                Scheme::Int8 => dequantise_int8(cx, segments, &part, k)?,
            }
        }
        Ok(())
    }

    /// One launch for up to [`NF4_SEGMENTS`] segments, one below the other in `out`.
    fn dequantise_nf4(&self, cx: &Cx, segments: &[Segment], out: &Tensor) -> Result<()> {
        let k = self.shape[1];
        let n = |i: usize| segments.get(i).map_or(0, |s| s.rows * k);
        let codes = |i: usize| segments.get(i).map(|s| &s.codes);
        let absmax = |i: usize| segments.get(i).map(|s| s.scales.absmax());
        let nested = |i: usize| match segments.get(i).map(|s| &s.scales) {
            Some(Scales::Nested { codes, offset, .. }) => (Some(codes), Some(offset)),
            _ => (None, None),
        };
        let (scales0, offset0) = nested(0);
        let (scales1, offset1) = nested(1);
        let (scales2, offset2) = nested(2);
        let args = kernels::Nf4DequantiseArgs {
            y: out.out(),
            map: &self.nf4,
            map8: scales0.map(|_| &self.dynamic),
            codes0: &segments[0].codes,
            codes1: codes(1),
            codes2: codes(2),
            absmax0: absmax(0),
            absmax1: absmax(1),
            absmax2: absmax(2),
            scales0,
            scales1,
            scales2,
            offset0,
            offset1,
            offset2,
            n0: n(0) as i64,
            n1: n(1) as i64,
            n2: n(2) as i64,
        };
        let widest = (0..segments.len()).map(n).max().unwrap_or(0);
        let mut at = Launch::flat(widest.div_ceil(DEQUANTISE_PACK));
        at.grid[1] = segments.len() as u32;
        kernels::nf4_dequantise(&*cx.device, at, args)
    }
}

/// One launch per segment, one below the other in `out`.
fn dequantise_int8(cx: &Cx, segments: &[Segment], out: &Tensor, k: usize) -> Result<()> {
    let mut from = 0;
    for s in segments {
        let part = out.rows(from, from + s.rows)?;
        from += s.rows;
        let args = kernels::Int8DequantiseArgs {
            y: part.out(),
            codes: &s.codes,
            absmax: s.scales.absmax(),
            rows: s.rows as i32,
            cols: k as i32,
        };
        let packs = Launch::flat(s.rows * k.div_ceil(DEQUANTISE_PACK));
        kernels::int8_dequantise(&*cx.device, packs, args)?;
    }
    Ok(())
}

pub(super) fn maps(cx: &Cx) -> Result<(Tensor, Tensor)> {
    Ok((
        Tensor::from_host(&cx.pool, "nf4 map", DType::F32, &[NF4.len()], &NF4)?,
        dynamic_map_tensor(cx, true)?,
    ))
}

fn quantise_nf4(cx: &Cx, x: &Tensor, map: &Tensor) -> Result<(Tensor, Tensor)> {
    let n = x.numel();
    let blocks = n.div_ceil(BLOCK4);
    let codes = Tensor::new(&cx.pool, "nf4 codes", DType::U8, &[n.div_ceil(2)])?;
    let absmax = cx.float("nf4 scales", &[blocks])?;
    let args =
        kernels::Nf4QuantiseArgs { codes: codes.out(), absmax: absmax.out(), x, map, n: n as i64 };
    kernels::nf4_quantise(&*cx.device, Launch::flat(blocks), args)?;
    Ok((codes, absmax))
}

/// Quantises the scales, minus their mean, in blocks of 256 by the dynamic map.
fn nest(cx: &Cx, absmax: &Tensor, dynamic: &Tensor) -> Result<Scales> {
    let offset = cx.float("nf4 offset", &[1])?;
    let n = i32::try_from(absmax.numel())
        .map_err(|_| Error::op("quantise", "a weight of 2^37 values or more"))?;
    let args = kernels::AbsmaxMeanArgs { mean: offset.out(), x: absmax, n };
    kernels::absmax_mean(&*cx.device, Launch::grid([1, 1, 1]), args)?;
    let (codes, absmax) = blockwise8_quantise(cx, absmax, Some(&offset), dynamic)?;
    debug_assert_eq!(absmax.numel(), codes.numel().div_ceil(BLOCK8));
    Ok(Scales::Nested { codes, absmax, offset })
}

fn quantise_int8(cx: &Cx, x: &Tensor) -> Result<(Tensor, Scales)> {
    let (rows, cols) = (x.row_count(), x.cols());
    let codes = Tensor::new(&cx.pool, "int8 codes", DType::U8, &[rows * cols])?;
    let absmax = cx.float("int8 scales", &[rows])?;
    let args = kernels::Int8QuantiseArgs {
        codes: codes.out(),
        absmax: absmax.out(),
        x,
        rows: rows as i32,
        cols: cols as i32,
    };
    kernels::int8_quantise(&*cx.device, Launch::warps(rows), args)?;
    Ok((codes, Scales::Float(absmax)))
}
