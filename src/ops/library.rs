//! Matrix products by the device's library; in an exact context only those that have the bits of
//! the engine's own kernel. Layer 4.
//!
//! Invariant: with `matmul=exact` (and for the small products of decoding steps with `auto`), a
//! forward product has the bits of the engine's own kernel, whichever kernel computes it. That
//! kernel is one chain over k for each element, whatever the number of rows; so a row's bits do not
//! depend on its batch, although the library's choice does.
//!
//! How this is enforced. Before the first product of a shape (with its types, strides and
//! alignment), each algorithm that the library proposes without split-K and each of the own kernels
//! computes a product of that shape a few times, and is timed (`fastest`). From the fastest on,
//! every bit of a result is compared with the own kernel's; the first that agrees is used from then
//! on. If a faster one has other bits and an own kernel runs, the run says so once. A number of
//! rows that steps are padded to is timed itself. Other numbers of rows padded to the same number
//! share the verdict that an own kernel is fastest; above [`TIMED`] rows they share the verdict for
//! the library too, and then take the first algorithm that agrees in the library's order.
//!
//! Why one product is enough. The order in which an algorithm adds is fixed by the algorithm and
//! the shape, not by the values; so it is enough to use values that reveal any other order. The
//! operands are therefore the check's own: in each row of A the second half repeats the first, in B
//! it is the negative of the first. All terms cancel, only the rounding errors remain, and they
//! depend on the order in every element. (The user's values may hide a difference: a new adapter's
//! B is zero, and where a sum is large, rounding to bfloat16 removes it.) The check is needed: on
//! an H100, 4 of cuBLASLt 13.1's 269 candidates had other bits, though by its own account none
//! splits k (benches/results/2026-11-27-h100-exact-products.md).
//!
//! What is not proven: that the library runs the same code on every call of one algorithm and
//! shape. Its documentation says so (bit-wise reproducible on one device and version), and RL
//! reports `sampling/ratio_off_one_max`, which is 0 as long as it does.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use crate::autograd::{Beside, Cx, ProductCheck, ProductChoice, ProductPatterns, ProductShape};
use crate::config::MatmulChoice;
use crate::device::{Algorithm, DType, Gemm, Launch, Layout, LibraryProduct, Operand, Pool};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::fastest;
use crate::ops::operands::Operands;
use crate::ops::own::OwnKernel;
use crate::ops::rmsnorm::NormInput;
use crate::ops::{few_hopper, matmul_few};
use crate::rng::{philox, tag, uniform};
use crate::tensor::Tensor;

/// Bytes of the own kernel's result that are held at once.
const CHUNK: usize = 32 << 20;
/// Bytes of work space kept for the next check.
const KEPT: usize = 64 << 20;
/// Distinct rows in the operands of a check; further rows are copies. No tile size is a multiple of
/// it, so no two tiles are alike.
const ROWS: usize = 17;
/// Magnitude of biases: that of the rounding errors beside them.
const SMALL: f32 = 1e-6;

/// Up to this many rows each number of rows is timed separately, unless an own kernel is fastest
/// for its padded size: decoding has few such numbers, a packed batch may have any.
const TIMED: usize = 256;
/// Bytes written before each timed run: more than an L2 cache holds.
const FLUSHED: usize = 64 << 20;

/// What happened to a product.
pub(super) enum Ran {
    /// The library computes it.
    Library,
    /// It is still to be computed, by this kernel.
    Not(OwnKernel),
}

/// The use of a pattern of values.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Pattern {
    /// The second half of a row repeats the first.
    Left,
    /// The second half of a row is the negative of the first.
    Right,
    Small,
    /// As `Left`, with other values.
    Other,
}

fn gemm(p: &Operands) -> Gemm {
    let operand =
        |t: &Tensor| Operand { address: t.address(), dtype: t.dtype(), stride: t.stride() };
    let (m, n, k) = p.sizes();
    Gemm {
        layout: p.layout,
        m,
        n,
        k,
        a: operand(p.a),
        b: operand(p.b),
        c: operand(p.c),
        bias: p.bias.map(operand),
        accumulate: p.accumulate,
    }
}

fn ask(cx: &Cx, p: &Operands, algorithm: Algorithm) -> Result<LibraryProduct> {
    // SAFETY: tensors are live memory by construction, and their sizes fit.
    unsafe { cx.device.gemm(&gemm(p), algorithm) }
}

/// The key of products that share one choice of kernel.
fn shape(p: &Operands, beside: Beside) -> ProductShape {
    let (m, n, k) = p.sizes();
    let rows = fastest::padded_rows(m);
    let (input, output) = (p.a.dtype(), p.c.dtype());
    ProductShape { rows, padded: rows == m && m <= TIMED, n, k, input, output, beside }
}

/// Runs the product in the library, if the context allows it and the library can.
pub(super) fn run(cx: &Cx, p: &Operands) -> Result<Ran> {
    let exact = is_exact(cx, p);
    let preferred = || Ran::Not(OwnKernel::preferred(cx, p));
    // Where C is added to, an algorithm may begin its chain with C instead of adding it last.
    // Operands whose terms cancel do not distinguish the two (for k 16 nothing is left to round),
    // and on an H100 cuBLASLt's bits differed: so the engine computes these itself.
    if cx.matmul == MatmulChoice::Own || exact && p.accumulate {
        return Ok(preferred());
    }
    if !exact {
        return Ok(match ask(cx, p, Algorithm::Fastest)? {
            LibraryProduct::Queued => Ran::Library,
            _ => preferred(),
        });
    }
    if let Some(kernel) = chosen_own(cx, p) {
        return Ok(Ran::Not(kernel));
    }
    let mut answer = ask(cx, p, Algorithm::Trusted)?;
    // Without a library the own kernels compete alone.
    let alone = !cx.device.capabilities().library_gemm && cx.device.computes();
    if answer == LibraryProduct::Untried || alone {
        let found = match choose(cx, p, Beside::Nothing) {
            Err(Error::OutOfMemory(_)) => {
                refused(cx, p, "no memory is left to compare others with it");
                None
            }
            found => found?,
        };
        if alone && chosen_own(cx, p).is_none() {
            // None could be compared: this shape is not tried again.
            let own = Some(OwnKernel::preferred(cx, p).number());
            remember(cx, shape(p, Beside::Nothing), ProductChoice { own, time: 0.0 });
        }
        cx.device.trust_gemm(&gemm(p), found);
        if let Some(kernel) = chosen_own(cx, p) {
            return Ok(Ran::Not(kernel));
        }
        answer = ask(cx, p, Algorithm::Trusted)?;
    }
    Ok(if answer == LibraryProduct::Queued { Ran::Library } else { preferred() })
}

/// Whether the product must have the bits of the engine's own kernel: where the context is exact,
/// and with `auto` where own kernels made for decoding steps compete: they are about as fast as the
/// library's or faster. (Only for the sizes to which steps are padded: each is timed once.)
fn is_exact(cx: &Cx, p: &Operands) -> bool {
    let rows = p.sizes().0;
    let chosen = match cx.matmul {
        MatmulChoice::Exact => true,
        MatmulChoice::Auto => {
            let padded = !p.accumulate && fastest::padded_rows(rows) == rows;
            padded && (matmul_few::fits(p) || few_hopper::competes(cx, p))
        }
        _ => false,
    };
    chosen && p.layout == Layout::NT && cx.device.capabilities().gemm_depends_on_rows
}

fn probe<'a>(c: &'a Tensor, a: &'a Tensor, b: &'a Tensor) -> Operands<'a> {
    Operands { layout: Layout::NT, c, a, b, bias: None, accumulate: false }
}

/// The kernel for `x w^T` of few rows that an activation follows: of the two that have one, the one
/// that is faster for the plain product.
pub(super) fn of_few_rows(cx: &Cx, x: &Tensor, w: &Tensor) -> Result<OwnKernel> {
    let asked = probe(x, x, w); // only the dtype of C matters
    if !few_hopper::fits(cx, &asked) || !is_exact(cx, &asked) {
        return Ok(OwnKernel::FewRows);
    }
    let chosen = || remembered(cx, &shape(&asked, Beside::Gate)).and_then(|choice| choice.own);
    if chosen().is_none() {
        let c = cx.real("product check", &[x.row_count(), w.row_count()])?;
        match choose(cx, &probe(&c, x, w), Beside::Gate) {
            Err(Error::OutOfMemory(_)) => {}
            done => drop(done?),
        }
    }
    Ok(chosen().map_or(OwnKernel::FewRows, OwnKernel::of_number))
}

/// A product behind a norm.
#[derive(Clone, Copy)]
pub(super) struct NormProduct<'a> {
    pub input: NormInput<'a>,
    pub w: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    pub y: &'a Tensor,
}

/// One way to compute such a product. Returns the sum of x and the residual, if there is one.
pub(super) type Way<'a> = dyn Fn(&NormProduct) -> Result<Option<Tensor>> + 'a;

/// Whether the second way to compute a product behind a norm, one kernel for both, has the bits of
/// the first, two kernels, and is faster. Timed once for each shape.
pub(super) fn norm_in_front(
    cx: &Cx,
    p: &NormProduct,
    gated: bool,
    ways: [&Way; 2],
) -> Result<bool> {
    let x = p.input.x;
    let asked = probe(x, x, p.w); // only the dtype of C matters
    if !is_exact(cx, &asked) {
        return Ok(false);
    }
    let key = shape(&asked, if gated { Beside::NormAndGate } else { Beside::Norm });
    if remembered(cx, &key).is_none() {
        let choice = match faster_way(cx, p, ways) {
            Err(Error::OutOfMemory(_)) => return Ok(false),
            choice => choice?,
        };
        choice.into_iter().for_each(|choice| remember(cx, key, choice));
    }
    Ok(remembered(cx, &key).is_some_and(|choice| choice.own.is_some()))
}

/// None: the device has no clock.
fn faster_way(cx: &Cx, p: &NormProduct, ways: [&Way; 2]) -> Result<Option<ProductChoice>> {
    let check = Check::begin(cx);
    let w = check.rows_like(p.w, p.w.row_count(), Pattern::Right)?;
    let like = |t: &Tensor, pattern| check.rows_like(t, t.row_count(), pattern);
    let NormInput { x, weight, norm, .. } = p.input;
    // The choice holds with a residual and without one.
    let (x, residual) = (like(x, Pattern::Left)?, like(x, Pattern::Other)?);
    let weight = check.rows_like(weight, 1, Pattern::Other)?;
    let bias = p.bias.map(|t| check.rows_like(t, 1, Pattern::Small)).transpose()?;
    let expected = check.block_like(p.y, p.y.row_count())?.1;
    let (bytes, y) = check.block_like(p.y, p.y.row_count())?;
    let input = NormInput { x: &x, residual: Some(&residual), weight: &weight, norm };
    let test = NormProduct { input, w: &w, bias: bias.as_ref(), y: &y };
    let expected_sum = ways[0](&NormProduct { y: &expected, ..test })?;
    let flush = Tensor::new(&check.pool, "product check", DType::U8, &[FLUSHED]).ok();
    let clear = || flush.as_ref().map_or(Ok(()), Tensor::zero);
    let timed = |way: &Way| fastest::timed(cx, &clear, &|| way(&test).map(drop));
    let times = [timed(ways[0])?, timed(ways[1])?];
    let early = cx.device.capabilities().wgmma;
    let first = fastest::by_time(&times, early, |i| i == 1).first().copied();
    let mut choice = None;
    if let Some(first) = first {
        let mut front = first == 1;
        if front {
            bytes.zero()?;
            let sum = ways[1](&test)?;
            let both = expected_sum.iter().zip(&sum).chain([(&expected, &y)]);
            let same: Result<Vec<bool>> =
                both.map(|(want, got)| equal(&check.pool, cx, want, got, 0)).collect();
            front = same?.into_iter().all(|same| same);
        }
        let own = front.then(|| OwnKernel::FewHopper.number());
        let time = fastest::median(&times[usize::from(front)]).unwrap_or_default();
        choice = Some(ProductChoice { own, time });
    }
    check.end();
    Ok(choice)
}

/// The own kernel that was fastest for products like this, if one was.
fn chosen_own(cx: &Cx, p: &Operands) -> Option<OwnKernel> {
    let choice = remembered(cx, &shape(p, Beside::Nothing))?;
    let kernel = OwnKernel::of_number(choice.own?);
    Some(if kernel.can(cx, p) { kernel } else { OwnKernel::preferred(cx, p) })
}

fn remember(cx: &Cx, shape: ProductShape, choice: ProductChoice) {
    let mut choices = cx.product_check.choices.lock().unwrap_or_else(PoisonError::into_inner);
    choices.insert(shape, choice);
}

fn remembered(cx: &Cx, shape: &ProductShape) -> Option<ProductChoice> {
    let choices = cx.product_check.choices.lock().unwrap_or_else(PoisonError::into_inner);
    choices.get(shape).copied()
}

/// Counts the refusal, and reports the first.
fn refused(cx: &Cx, p: &Operands, why: &str) {
    if cx.product_check.own.fetch_add(1, Ordering::Relaxed) > 0 {
        return;
    }
    let ((m, n, k), dtype) = (p.sizes(), p.a.dtype().name());
    cx.observer.note(&format!(
        "matmul={}: the engine's own product is used for m {m}, n {n}, k {k} in {dtype}, and \
         wherever else it is needed: {why}",
        format!("{:?}", cx.matmul).to_lowercase()
    ));
}

/// The library's candidate for products like this; None if an own kernel is used. With a gate only
/// the own kernels of few rows compete.
fn choose(cx: &Cx, p: &Operands, beside: Beside) -> Result<Option<usize>> {
    let check = Check::begin(cx);
    let a = check.rows_like(p.a, p.a.row_count(), Pattern::Left)?;
    let b = check.rows_like(p.b, p.b.row_count(), Pattern::Right)?;
    let bias = p.bias.map(|t| check.rows_like(t, 1, Pattern::Small)).transpose()?;
    // The contents of C are not needed: a product that accumulates does not come here.
    let test = Operands { a: &a, b: &b, bias: bias.as_ref(), ..*p };
    let candidate = |i| Ok(ask(cx, &test, Algorithm::Candidate(i))? == LibraryProduct::Queued);
    let key = shape(p, beside);
    let known = |rows: usize| rows > TIMED && remembered(cx, &key).is_some();
    let (mut found, mut other_bits) = (None, false);
    if known(p.sizes().0) {
        for i in 0.. {
            if !candidate(i)? {
                break;
            }
            if same_bits(cx, &check, &test)? {
                found = Some(i);
                break;
            }
            other_bits = true;
        }
    } else {
        let own = match beside {
            Beside::Nothing => OwnKernel::contenders(cx, p),
            _ => vec![OwnKernel::FewRows, OwnKernel::FewHopper],
        };
        let times = times(cx, &check, &test, &own, beside == Beside::Nothing)?;
        let library = times.len() - own.len();
        let mut choice = None;
        let early = cx.device.capabilities().wgmma;
        for i in fastest::by_time(&times, early, |i| i >= library) {
            let kernel = i.checked_sub(library).map(|i| own[i]);
            match kernel {
                Some(kernel) => kernel.run(cx, &test)?,
                None if candidate(i)? => {}
                None => continue,
            }
            if same_bits(cx, &check, &test)? {
                found = if kernel.is_none() { Some(i) } else { None };
                let time = fastest::median(&times[i]).unwrap_or_default();
                choice = Some(ProductChoice { own: kernel.map(OwnKernel::number), time });
                break;
            }
            other_bits = true;
        }
        choice.into_iter().for_each(|choice| remember(cx, key, choice));
    }
    check.end();
    match found {
        Some(_) => drop(cx.product_check.library.fetch_add(1, Ordering::Relaxed)),
        None if other_bits => refused(cx, p, "faster algorithms have other bits"),
        None => {}
    }
    Ok(found)
}

/// Microseconds of the library's candidates, if they compete, then of the own kernels.
fn times(
    cx: &Cx,
    check: &Check,
    test: &Operands,
    own: &[OwnKernel],
    library: bool,
) -> Result<Vec<Vec<f32>>> {
    // If there is no memory for it, all contenders find their operands in the cache alike.
    let flush = Tensor::new(&check.pool, "product check", DType::U8, &[FLUSHED]).ok();
    let clear = || flush.as_ref().map_or(Ok(()), Tensor::zero);
    let mut all = Vec::new();
    while library && ask(cx, test, Algorithm::Candidate(all.len()))? == LibraryProduct::Queued {
        let algorithm = Algorithm::Candidate(all.len());
        all.push(fastest::timed(cx, &clear, &|| ask(cx, test, algorithm).map(drop))?);
    }
    for kernel in own {
        all.push(fastest::timed(cx, &clear, &|| kernel.run(cx, test))?);
    }
    Ok(all)
}

/// Whether C has the bits of the own kernel's result: that of the tile kernel or, for so many rows
/// that it would take long, that of the preferred kernel.
fn same_bits(cx: &Cx, check: &Check, test: &Operands) -> Result<bool> {
    let m = test.c.row_count();
    let row = test.c.stride() * test.c.dtype().size();
    // Whole patterns, so that each chunk begins with the first row of one.
    let at_once = ((CHUNK / row.max(1)) / ROWS).max(1) * ROWS;
    let mut same = true;
    for from in (0..m).step_by(at_once) {
        let to = (from + at_once).min(m);
        let expected = check.block_like(test.c, to - from)?.1;
        let part = Operands { c: &expected, a: &test.a.rows(from, to)?, ..*test };
        let many = m > TIMED;
        if many { OwnKernel::preferred(cx, &part) } else { OwnKernel::Tile }.run(cx, &part)?;
        same = same && equal(&check.pool, cx, &expected, test.c, from)?;
    }
    Ok(same)
}

/// Whether `expected` has the same bits as the rows of `c` from `from` on.
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

/// The memory of a check, outside the context's pool, whose peak belongs to the run.
struct Check<'a> {
    pool: Arc<Pool>,
    kept: &'a Mutex<Option<Arc<Pool>>>,
    patterns: &'a ProductPatterns,
}

impl<'a> Check<'a> {
    fn begin(cx: &'a Cx) -> Check<'a> {
        let ProductCheck { pool: kept, patterns, .. } = &cx.product_check;
        let pool = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        Check { pool: pool.unwrap_or_else(|| Pool::new(cx.device.clone())), kept, patterns }
    }

    /// `rows` rows in new memory with the alignment and the stride of `t`: all their bytes, and the
    /// rows.
    fn block_like(&self, t: &Tensor, rows: usize) -> Result<(Tensor, Tensor)> {
        let (dtype, cols, stride) = (t.dtype(), t.cols(), t.stride().max(t.cols()));
        let (offset, bytes) = ((t.address() % 256) as usize, rows * stride * dtype.size());
        let block = Tensor::new(&self.pool, "product check", DType::U8, &[offset + bytes])?;
        let rows = block.view(offset, dtype, &[rows, stride])?.columns(0, cols)?;
        Ok((block.view(offset, DType::U8, &[bytes])?, rows))
    }

    /// [`Check::block_like`], filled with a pattern.
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

    /// Keeps the memory for the next check, unless it is large.
    fn end(self) {
        if self.pool.cached() + self.pool.in_use().0 <= KEPT {
            *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.pool);
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
                Pattern::Left | Pattern::Other if (half..2 * half).contains(&j) => row[j - half],
                Pattern::Right if (half..2 * half).contains(&j) => -row[j - half],
                Pattern::Small => SMALL * random.next().unwrap_or_default(),
                _ => random.next().unwrap_or_default(),
            };
        }
    }
    all
}
