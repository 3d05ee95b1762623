//! Matrix products by the device's library; in an exact context only those that have the bits of
//! the engine's own kernel. Layer 4.
//!
//! Invariant: with `matmul=exact`, a forward product has the bits of the engine's own kernel,
//! whoever computes it. That kernel is one chain over k for each element, whatever the number of
//! rows; so a row's bits do not depend on its batch, although the library's choice does.
//!
//! How it is kept. Before the first product of a shape (and types, strides, alignment), each
//! algorithm that the library proposes without split-K, the fastest first, computes one product of
//! that shape, and every bit of it is compared with the own kernel's. The first that agrees is used
//! from then on; where none does, the own kernel is, and the run says so once.
//!
//! Why one product is enough. In which order an algorithm adds up is fixed by the algorithm and the
//! shape, not by the values; so it is enough to look at values that any other order would betray.
//! The operands are therefore the check's own: the second half of each row of A repeats the first,
//! that of B is its negative. All terms cancel, what is left is the rounding errors alone, and they
//! depend on the order in every element. (The user's values may hide it: a new adapter's B is zero,
//! and where a sum is large, rounding to bfloat16 removes what differs.) It is needed: on an H100, 4
//! of cuBLASLt 13.1's 269 candidates had other bits, though none splits k by its own account
//! (benches/results/2026-11-27-h100-exact-products.md).
//!
//! What is not proven: that the library runs the same code on every call of one algorithm and
//! shape. It is documented to (bit-wise reproducible on one device and version), and RL reports
//! `sampling/ratio_off_one_max`, which is 0 as long as it does.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use half::bf16;

use crate::autograd::{Cx, ProductCheck, ProductPatterns};
use crate::config::MatmulChoice;
use crate::device::{Algorithm, DType, Gemm, Launch, Layout, LibraryProduct, Operand, Pool};
use crate::error::{Error, Result};
use crate::kernels;
use crate::rng::{philox, tag, uniform};
use crate::tensor::Tensor;

/// Bytes of the own kernel's result that are held at once.
const CHUNK: usize = 32 << 20;
/// Bytes of work space that are kept for the next check.
const KEPT: usize = 64 << 20;
/// Rows that differ in the operands of a check; more are copies of these. No size of a tile is a
/// multiple of it, so no two tiles are alike.
const ROWS: usize = 17;
/// Of biases: as large as the rounding errors beside them.
const SMALL: f32 = 1e-6;

/// `c = op(a) op(b) (+ bias)`, or `c += ...`, of fitting sizes.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub layout: Layout,
    pub c: &'a Tensor,
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    pub accumulate: bool,
}

/// The engine's own kernel.
pub(super) type OwnProduct = fn(&Cx, &Operands) -> Result<()>;

/// What a pattern of values is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Pattern {
    /// The second half of a row repeats the first.
    Left,
    /// The second half of a row is the negative of the first.
    Right,
    Small,
}

impl Operands<'_> {
    /// (m, n, k)
    pub fn sizes(&self) -> (usize, usize, usize) {
        let (m, k) = (self.a.row_count(), self.a.cols());
        let n = if self.layout == Layout::NT { self.b.row_count() } else { self.b.cols() };
        if self.layout == Layout::TN { (k, n, m) } else { (m, n, k) }
    }

    fn gemm(&self) -> Gemm {
        let operand =
            |t: &Tensor| Operand { address: t.address(), dtype: t.dtype(), stride: t.stride() };
        let (m, n, k) = self.sizes();
        Gemm {
            layout: self.layout,
            m,
            n,
            k,
            a: operand(self.a),
            b: operand(self.b),
            c: operand(self.c),
            bias: self.bias.map(operand),
            accumulate: self.accumulate,
        }
    }

    fn ask(&self, cx: &Cx, algorithm: Algorithm) -> Result<LibraryProduct> {
        // SAFETY: the tensors lie in live memory by construction, and their sizes fit.
        unsafe { cx.device.gemm(&self.gemm(), algorithm) }
    }

    /// Lets the library compute the product, if the context's choice allows it and it can.
    pub fn by_library(&self, cx: &Cx, own: OwnProduct) -> Result<bool> {
        let exact = cx.matmul == MatmulChoice::Exact
            && self.layout == Layout::NT
            && cx.device.capabilities().gemm_depends_on_rows;
        // Where C is added to, an algorithm may begin its chain with C instead of adding it last. Operands
        // whose terms cancel do not tell the two apart (for k 16 nothing is left to round), and on an H100
        // cuBLASLt's bits differed: so these are the engine's own.
        if cx.matmul == MatmulChoice::Own || exact && self.accumulate {
            return Ok(false);
        }
        if !exact {
            return Ok(self.ask(cx, Algorithm::Fastest)? == LibraryProduct::Queued);
        }
        let mut answer = self.ask(cx, Algorithm::Trusted)?;
        if answer == LibraryProduct::Untried {
            let no_bits = "the library has no algorithm with the bits of the engine's own one";
            let (found, why) = match self.matching(cx, own) {
                Err(Error::OutOfMemory(_)) => (None, "no memory is left to check the library's"),
                found => (found?, no_bits),
            };
            cx.device.trust_gemm(&self.gemm(), found);
            match found {
                Some(_) => drop(cx.product_check.library.fetch_add(1, Ordering::Relaxed)),
                None => self.refused(cx, why),
            }
            answer = self.ask(cx, Algorithm::Trusted)?;
        }
        Ok(answer == LibraryProduct::Queued)
    }

    /// Counts it, and says the first.
    fn refused(&self, cx: &Cx, why: &str) {
        if cx.product_check.own.fetch_add(1, Ordering::Relaxed) > 0 {
            return;
        }
        let ((m, n, k), dtype) = (self.sizes(), self.a.dtype().name());
        cx.observer.note(&format!(
            "matmul=exact: the engine's own product runs for m {m}, n {n}, k {k} in {dtype}, and wherever else it must: \
             {why}"
        ));
    }

    /// The first candidate of the library that has the own kernel's bits.
    fn matching(&self, cx: &Cx, own: OwnProduct) -> Result<Option<usize>> {
        let check = Check::begin(cx)?;
        let a = check.rows_like(self.a, self.a.row_count(), Pattern::Left)?;
        let b = check.rows_like(self.b, self.b.row_count(), Pattern::Right)?;
        let bias = self.bias.map(|t| check.rows_like(t, 1, Pattern::Small)).transpose()?;
        let m = self.c.row_count();
        let row = self.c.stride() * self.c.dtype().size();
        // Whole patterns, so that each chunk begins with the first row of one.
        let at_once = ((CHUNK / row.max(1)) / ROWS).max(1) * ROWS;
        for candidate in 0.. {
            // Nobody needs what C holds now: a product that is added does not come here.
            let c = self.c.clone();
            let whole = Operands { c: &c, a: &a, b: &b, bias: bias.as_ref(), ..*self };
            if whole.ask(cx, Algorithm::Candidate(candidate))? != LibraryProduct::Queued {
                break;
            }
            let mut same = true;
            for from in (0..m).step_by(at_once) {
                let to = (from + at_once).min(m);
                let expected = check.block_like(self.c, to - from)?.1;
                own(cx, &Operands { c: &expected, a: &a.rows(from, to)?, ..whole })?;
                same = same && equal(&check.pool, cx, &expected, &c, from)?;
            }
            if same {
                check.end();
                return Ok(Some(candidate));
            }
        }
        check.end();
        Ok(None)
    }
}

/// Whether `expected` has the bits of the rows of `c` that begin at `from`.
fn equal(pool: &Arc<Pool>, cx: &Cx, expected: &Tensor, c: &Tensor, from: usize) -> Result<bool> {
    let (rows, size) = (expected.row_count(), c.dtype().size());
    let (bytes, stride) = (c.cols() * size, c.stride() * size);
    let all = (rows - 1) * stride + bytes;
    let segments = bytes.div_ceil(kernels::COMPARE_SEGMENT);
    let differ = Tensor::new(pool, "product check", DType::U32, &[rows * segments])?;
    let args = kernels::RowsDifferArgs {
        differ: differ.out(),
        a: &expected.view(0, DType::U8, &[all])?,
        b: &c.view(from * stride, DType::U8, &[all])?,
        rows: rows as i32,
        bytes: bytes as i64,
        lda: (expected.stride() * size) as i64,
        ldb: stride as i64,
    };
    kernels::rows_differ(&*cx.device, Launch::flat(rows * segments), args)?;
    Ok(differ.to_vec::<u32>()?.iter().all(|d| *d == 0))
}

/// The memory of a check: outside of the context's pool, whose peak is the run's.
struct Check<'a> {
    pool: Arc<Pool>,
    kept: MutexGuard<'a, Option<Arc<Pool>>>,
    patterns: &'a ProductPatterns,
}

impl<'a> Check<'a> {
    fn begin(cx: &'a Cx) -> Result<Check<'a>> {
        let ProductCheck { pool, patterns, .. } = &cx.product_check;
        let mut kept = pool.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = kept.take().unwrap_or_else(|| Pool::new(cx.device.clone()));
        Ok(Check { pool, kept, patterns })
    }

    /// `rows` rows in memory of their own, aligned as `t` and with its stride: all of their bytes,
    /// and the rows.
    fn block_like(&self, t: &Tensor, rows: usize) -> Result<(Tensor, Tensor)> {
        let (dtype, cols, stride) = (t.dtype(), t.cols(), t.stride().max(t.cols()));
        let (offset, bytes) = ((t.address() % 256) as usize, rows * stride * dtype.size());
        let block = Tensor::new(&self.pool, "product check", DType::U8, &[offset + bytes])?;
        let rows = block.view(offset, dtype, &[rows, stride])?.columns(0, cols)?;
        Ok((block.view(offset, DType::U8, &[bytes])?, rows))
    }

    /// As [`Check::block_like`], filled with a pattern.
    fn rows_like(&self, t: &Tensor, rows: usize, pattern: Pattern) -> Result<Tensor> {
        let (bytes, result) = self.block_like(t, rows)?;
        let (dtype, cols, stride) = (t.dtype(), t.cols(), t.stride().max(t.cols()));
        let part = |from: usize, n: usize| {
            let row = stride * dtype.size();
            bytes.view(from * row, DType::U8, &[n * row])
        };
        let mut done = rows.min(ROWS);
        let values = self.values(pattern, cols, stride);
        let values = &values[..done * stride];
        match dtype {
            DType::BF16 => {
                let half: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                part(0, done)?.upload(&half)?;
            }
            _ => part(0, done)?.upload(values)?,
        }
        while done < rows {
            let n = done.min(rows - done);
            part(done, n)?.copy_from(&part(0, n)?)?;
            done += n;
        }
        Ok(result)
    }

    /// `ROWS` rows of a pattern.
    fn values(&self, pattern: Pattern, cols: usize, stride: usize) -> Arc<[f32]> {
        let mut known = self.patterns.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || Arc::from(values(pattern, ROWS, cols, stride));
        known.entry((pattern as u32, cols, stride)).or_insert_with(make).clone()
    }

    /// Keeps the memory for the next check, unless there is much of it.
    fn end(mut self) {
        if self.pool.cached() + self.pool.in_use().0 <= KEPT {
            *self.kept = Some(self.pool.clone());
        }
    }
}

fn values(pattern: Pattern, rows: usize, cols: usize, stride: usize) -> Vec<f32> {
    let key = [pattern as u32, cols as u32];
    let draw = |i: usize| philox(key, [i as u32, 0, 0, tag::PRODUCT_CHECK]).map(uniform);
    let mut random = (0..).flat_map(draw).map(|u| 2.0 * u - 1.0);
    let mut all = vec![0f32; rows * stride];
    for row in all.chunks_exact_mut(stride.max(1)) {
        let half = cols / 2;
        for j in 0..cols {
            row[j] = match pattern {
                Pattern::Left if (half..2 * half).contains(&j) => row[j - half],
                Pattern::Right if (half..2 * half).contains(&j) => -row[j - half],
                Pattern::Small => SMALL * random.next().unwrap_or_default(),
                _ => random.next().unwrap_or_default(),
            };
        }
    }
    all
}
