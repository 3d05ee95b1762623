//! The moments of AdamW and Muon over a parameter arena, in the chosen precision. Layer 6.
//!
//! Invariant: `new` gives zeros; a step updates exactly one of the ranges given to `new`;
//! `named_tensors` is the whole state that a resumed run needs.

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::ops::adamw::{AdamW, Slice, adamw};
use crate::ops::adamw8::{Maps, Slice8, adamw8};
use crate::ops::quant::BLOCK8;
use crate::tensor::Tensor;

/// The storage of the moments, chosen by `optim` in the run file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MomentKind {
    F32,
    /// BF16, rounded stochastically.
    Bf16,
    /// 8-bit codes with one float scale per block of 256 (`adamw_8bit`).
    Blockwise8,
    /// F32. The second moment covers only the ranges that AdamW trains; elsewhere the first moment
    /// is Muon's running mean.
    Muon,
}

pub enum Moments {
    F32 { m: Tensor, v: Tensor },
    Bf16 { m: Tensor, v: Tensor },
    Blockwise8(Box<Blockwise8>),
    Muon(MuonMoments),
}

/// `m` has the layout of the arena; `v` holds one range after the other.
pub struct MuonMoments {
    pub m: Tensor,
    pub v: Tensor,
    ranges: Vec<(usize, usize)>,
}

/// Alignment of a range in `v`, in values: a whole number of 16-byte packs.
const ALIGN: usize = 128;

/// `m` and `v` are codes in the layout of the arena. The scales are stored range after range; each
/// range has its own blocks.
pub struct Blockwise8 {
    pub m: Tensor,
    pub v: Tensor,
    pub m_absmax: Tensor,
    pub v_absmax: Tensor,
    maps: Maps,
    ranges: Vec<(usize, usize)>,
}

/// The part of the arena that a step updates, without its moments.
pub struct Target<'a> {
    /// See [`Slice`]: the float master weights, the weights that kernels read, and the gradient,
    /// each restricted to the range.
    pub master: Option<&'a Tensor>,
    pub weight: &'a Tensor,
    pub grad: &'a Tensor,
}

impl<'a> Target<'a> {
    fn slice(&self, m: &'a Tensor, v: &'a Tensor) -> Slice<'a> {
        Slice { master: self.master, weight: self.weight, m, v, grad: self.grad }
    }
}

impl Moments {
    /// Zero moments for an arena of `len` values. `ranges` (from, to) are those with which
    /// [`Moments::step`] will be called.
    pub fn new(
        cx: &Cx,
        len: usize,
        ranges: &[(usize, usize)],
        kind: MomentKind,
    ) -> Result<Moments> {
        let zeros = |dtype, n: usize| -> Result<Tensor> {
            let t = Tensor::new(&cx.pool, "adam moments", dtype, &[n])?;
            t.zero()?;
            Ok(t)
        };
        Ok(match kind {
            MomentKind::F32 => {
                Moments::F32 { m: zeros(DType::F32, len)?, v: zeros(DType::F32, len)? }
            }
            MomentKind::Bf16 => {
                Moments::Bf16 { m: zeros(DType::BF16, len)?, v: zeros(DType::BF16, len)? }
            }
            MomentKind::Muon => {
                let values: usize = ranges.iter().map(|r| aligned(*r)).sum();
                Moments::Muon(MuonMoments {
                    m: zeros(DType::F32, len)?,
                    v: zeros(DType::F32, values)?,
                    ranges: ranges.to_vec(),
                })
            }
            MomentKind::Blockwise8 => {
                let mut end = 0;
                for &(from, to) in ranges {
                    if from < end || to < from || to > len {
                        return Err(Error::op(
                            "adamw8",
                            format!("ranges {ranges:?} do not ascend within {len} values"),
                        ));
                    }
                    end = to;
                }
                let blocks = ranges.iter().map(|r| blocks(*r)).sum();
                Moments::Blockwise8(Box::new(Blockwise8 {
                    m: zeros(DType::U8, len)?,
                    v: zeros(DType::U8, len)?,
                    m_absmax: zeros(DType::F32, blocks)?,
                    v_absmax: zeros(DType::F32, blocks)?,
                    maps: Maps::new(cx)?,
                    ranges: ranges.to_vec(),
                }))
            }
        })
    }

    pub fn kind(&self) -> MomentKind {
        match self {
            Moments::F32 { .. } => MomentKind::F32,
            Moments::Bf16 { .. } => MomentKind::Bf16,
            Moments::Blockwise8(_) => MomentKind::Blockwise8,
            Moments::Muon(_) => MomentKind::Muon,
        }
    }

    /// One AdamW step of the range `from..to`; `hyper` comes from [`crate::ops::adamw::hyper`].
    pub fn step(
        &self,
        cx: &Cx,
        group: &AdamW,
        range: (usize, usize),
        at: &Target,
        hyper: &Tensor,
    ) -> Result<()> {
        let (from, to) = range;
        match self {
            Moments::F32 { m, v } | Moments::Bf16 { m, v } => {
                adamw(cx, group, &at.slice(&m.rows(from, to)?, &v.rows(from, to)?), hyper)
            }
            Moments::Blockwise8(s) => {
                let place = place("adamw8", &s.ranges, range)?;
                let first: usize = s.ranges[..place].iter().map(|r| blocks(*r)).sum();
                let end = first + blocks(range);
                let (m, v) = (s.m.rows(from, to)?, s.v.rows(from, to)?);
                let slice = Slice8 {
                    values: at.slice(&m, &v),
                    m_absmax: &s.m_absmax.rows(first, end)?,
                    v_absmax: &s.v_absmax.rows(first, end)?,
                };
                adamw8(cx, group, &slice, &s.maps, hyper)
            }
            Moments::Muon(s) => {
                let place = place("muon", &s.ranges, range)?;
                let first: usize = s.ranges[..place].iter().map(|r| aligned(*r)).sum();
                let v = s.v.rows(first, first + to - from)?;
                adamw(cx, group, &at.slice(&s.m.rows(from, to)?, &v), hyper)
            }
        }
    }

    /// The tensors that a checkpoint saves, by name, with their dtypes and shapes. To restore,
    /// upload into them.
    pub fn named_tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Moments::F32 { m, v } | Moments::Bf16 { m, v } => vec![("m", m), ("v", v)],
            Moments::Muon(s) => vec![("m", &s.m), ("v", &s.v)],
            Moments::Blockwise8(s) => {
                vec![("m", &s.m), ("v", &s.v), ("m_absmax", &s.m_absmax), ("v_absmax", &s.v_absmax)]
            }
        }
    }

    pub fn bytes(&self) -> usize {
        self.named_tensors().iter().map(|(_, t)| t.bytes()).sum()
    }
}

fn blocks((from, to): (usize, usize)) -> usize {
    (to - from).div_ceil(BLOCK8)
}

fn aligned((from, to): (usize, usize)) -> usize {
    (to - from).next_multiple_of(ALIGN)
}

/// The index of `range` among the ranges given to [`Moments::new`]. Error: it is not one of them.
fn place(op: &'static str, ranges: &[(usize, usize)], range: (usize, usize)) -> Result<usize> {
    ranges.iter().position(|r| *r == range).ok_or_else(|| {
        Error::op(op, format!("a step of {range:?}: the moments were made for {ranges:?}"))
    })
}
