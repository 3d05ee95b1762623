//! The head's passes over its rows: statistics and the gradient of logits, chunk by chunk. Layer 4.
//!
//! Invariant: a row's results do not depend on the chunk, and have the same bits in each [`HeadForm`],
//! unless a library's product with other bits computes stored logits (`matmul=auto`).

use crate::autograd::Cx;
use crate::device::{DType, Launch};
use crate::error::Result;
use crate::kernels;
use crate::ops::head_hopper::{self, Outputs};
use crate::ops::head_terms::{LogitTerm, RowGradient, logits_of};
use crate::ops::logit_map::LogitMap;
use crate::tensor::Tensor;

/// The longest k for which a second product is predicted to take less time than storing the first
/// one's logits and reading them (`docs/kernels.md`, The head without logits).
const SECOND_PRODUCT_K: usize = 960;

/// Rows of logits held at once: 4 MiB on a CPU (they stay in its cache), 1 or 2 GiB on a GPU, and at
/// least 256 rows, because each chunk reads the whole head, and reads and writes its whole
/// gradient.
pub(super) fn chunk_rows(cx: &Cx, w: &Tensor) -> usize {
    (cx.device.capabilities().work_bytes / 4 / w.row_count().max(1)).clamp(256, 16384)
}

/// Warps that share a row of logits.
pub(super) fn slices(vocab: usize) -> usize {
    vocab.div_ceil(kernels::LOGIT_SLICE)
}

/// The order of the sums of a slice (`load_form` in `kernels/common/logits.cuh`): in a bf16 run that
/// of a tile's statistics.
pub(super) fn slice_form(cx: &Cx) -> usize {
    usize::from(cx.dtype == DType::BF16)
}

/// The ranges of rows of each chunk.
pub fn chunks(rows: usize, chunk: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows.div_ceil(chunk)).map(move |i| (i * chunk, ((i + 1) * chunk).min(rows)))
}

/// What a pass over the rows is made for.
#[derive(Clone, Copy, PartialEq)]
pub enum HeadPurpose {
    /// Statistics alone.
    Statistics,
    /// Statistics with the sum of squares.
    Squares,
    /// Statistics, and at once the gradient.
    Loss,
    /// The gradient, its statistics known.
    Gradient,
}

/// Where logits and their statistics come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HeadForm {
    /// A product stores the logits, and the kernels of `head.cu` read them.
    Apart,
    /// The product's tiles give the statistics, and the logits are stored.
    Stored,
    /// The product's tiles give the statistics or the gradient, and no logits are stored.
    Absent,
}

impl HeadForm {
    /// The fastest form for these terms and this device.
    pub(super) fn of(
        cx: &Cx,
        terms: &[LogitTerm],
        map: LogitMap,
        purpose: HeadPurpose,
    ) -> HeadForm {
        match purpose {
            _ if !head_hopper::fits(cx, terms, map) => HeadForm::Apart,
            HeadPurpose::Squares => HeadForm::Apart,
            HeadPurpose::Loss if terms[0].rows.cols() > SECOND_PRODUCT_K => HeadForm::Stored,
            _ => HeadForm::Absent,
        }
    }

    /// The rows of a chunk, for `chunk` rows of logits in float: if only gradients are stored, their
    /// two bytes allow twice as many.
    pub(super) fn rows_at_once(self, chunk: usize) -> usize {
        if self == HeadForm::Absent { 2 * chunk } else { chunk }
    }

    /// The memory for the logits of `rows` rows, F32 [rows, vocab].
    pub(super) fn buffer(self, cx: &Cx, rows: usize, vocab: usize) -> Result<Option<Tensor>> {
        match self {
            HeadForm::Absent => Ok(None),
            _ => Ok(Some(cx.float("logits chunk", &[rows, vocab])?)),
        }
    }
}

/// Statistics at the ends of a product's tiles.
struct Statistics {
    /// F32 [rows, parts x TILE_STATS]
    parts: Tensor,
    /// F32 `[rows]`
    target_logit: Tensor,
}

/// Buffers of one pass over the rows.
pub struct LogitPass {
    pub logp: Tensor,
    pub lse: Tensor,
    pub entropy: Tensor,
    pub square: Option<Tensor>,
    pub best: Tensor,
    /// The statistics of the slices of the chunk's rows.
    part: Tensor,
    logits: Option<Tensor>,
    tiles: Option<Statistics>,
    /// Rows of a chunk.
    pub chunk: usize,
}

impl LogitPass {
    /// For `rows` rows, in chunks of `chunk` rows of logits.
    pub fn new(
        cx: &Cx,
        (rows, vocab): (usize, usize),
        chunk: usize,
        purpose: HeadPurpose,
        form: HeadForm,
    ) -> Result<LogitPass> {
        let squares = purpose == HeadPurpose::Squares;
        let chunk = form.rows_at_once(chunk);
        let most = chunk.min(rows.max(1));
        let tiles = match form {
            HeadForm::Apart => None,
            _ => Some(Statistics {
                parts: cx.float("logit slices", &[most, head_hopper::part_values(vocab)])?,
                target_logit: cx.float("head rows", &[most])?,
            }),
        };
        Ok(LogitPass {
            logp: cx.float("head rows", &[rows])?,
            lse: cx.float("head rows", &[rows])?,
            entropy: cx.float("head rows", &[rows])?,
            square: if squares { Some(cx.float("head rows", &[rows])?) } else { None },
            best: Tensor::new(&cx.pool, "head rows", DType::I32, &[rows])?,
            part: cx.float("logit slices", &[most, kernels::HEAD_PARTS, slices(vocab)])?,
            logits: form.buffer(cx, most, vocab)?,
            tiles,
            chunk,
        })
    }

    /// The logits of `n` rows, from the first of the current chunk on, if they are stored.
    pub fn logits(&self, n: usize) -> Result<Option<Tensor>> {
        self.logits.as_ref().map(|l| l.rows(0, n)).transpose()
    }

    /// Computes the figures of rows `from..to`.
    pub fn forward(
        &self,
        cx: &Cx,
        terms: &[LogitTerm],
        target: &Tensor,
        (from, to): (usize, usize),
        (scale, map): (f32, LogitMap),
    ) -> Result<()> {
        let (n, vocab) = (to - from, terms[0].weight.row_count());
        let (slices, target) = (slices(vocab), target.rows(from, to)?);
        let logits = self.logits(n)?;
        if let Some(Statistics { parts, target_logit }) = &self.tiles {
            let rows = terms[0].rows.rows(from, to)?;
            let target = Some((&target, target_logit));
            let out = Outputs { parts, target, logits: logits.as_ref() };
            head_hopper::statistics(cx, &out, (&rows, terms[0].weight), scale)?;
            let args = kernels::HeadJoinArgs {
                part: self.part.out(),
                parts,
                rows: n as i32,
                tiles: head_hopper::parts(vocab) as i32,
                slices: slices as i32,
                scale,
            };
            kernels::head_join(&*cx.device, Launch::flat(n * slices), args)?;
        } else if let Some(logits) = &logits {
            logits_of(cx, logits, terms, (from, to))?;
            map.apply(cx, logits)?;
            let args = kernels::HeadSlicesArgs {
                part: self.part.out(),
                logits,
                rows: n as i32,
                vocab: vocab as i32,
                slices: slices as i32,
                scale,
                square: i32::from(self.square.is_some()),
            };
            kernels::head_slices(&*cx.device, Launch::warps(n * slices), slice_form(cx), args)?;
        }
        let square = self.square.as_ref().map(|s| s.rows(from, to)).transpose()?;
        let (logp, lse) = (self.logp.rows(from, to)?, self.lse.rows(from, to)?);
        let (entropy, best) = (self.entropy.rows(from, to)?, self.best.rows(from, to)?);
        let args = kernels::HeadStatsArgs {
            logp: logp.out(),
            lse: lse.out(),
            entropy: Some(entropy.out()),
            square: square.as_ref().map(|s| s.out()),
            best: Some(best.out()),
            part: &self.part,
            logits: if self.tiles.is_none() { logits.as_ref() } else { None },
            target_logit: self.tiles.as_ref().map(|tiles| &tiles.target_logit),
            target: &target,
            rows: n as i32,
            vocab: vocab as i32,
            slices: slices as i32,
            scale,
        };
        kernels::head_stats(&*cx.device, Launch::warps(n), args)
    }
}

/// The gradient of the products of rows `from..to`, real [to - from, vocab]: from their logits, or
/// without logits by another product. `g` has the values of these rows.
pub fn gradient(
    cx: &Cx,
    dlogits: &Tensor,
    logits: Option<&Tensor>,
    terms: &[LogitTerm],
    (from, to): (usize, usize),
    g: &RowGradient,
    (scale, map): (f32, LogitMap),
) -> Result<()> {
    let Some(logits) = logits else {
        let rows = terms[0].rows.rows(from, to)?;
        return head_hopper::gradient(cx, dlogits, (&rows, terms[0].weight), g, scale);
    };
    let (rows, vocab) = (logits.row_count(), logits.cols());
    let args = kernels::HeadGradArgs {
        dlogits: dlogits.out(),
        logits,
        target: &g.target,
        lse: &g.lse,
        entropy: g.entropy.as_ref(),
        a: &g.logp,
        b: g.by_entropy.as_ref(),
        rows: rows as i32,
        vocab: vocab as i32,
        slices: slices(vocab) as i32,
        scale,
        slope: map.slope(scale),
        softcap: map.cap(),
    };
    kernels::head_grad(&*cx.device, Launch::warps(rows * slices(vocab)), args)
}
