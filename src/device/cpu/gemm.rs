//! The CPU's matrix product: runs `kernels/cpu/product.cpp` on all cores. Layer 1.
//!
//! Invariant: the bits of an element depend only on its row of A and its column of B: not on other
//! rows, on the division among workers, on the number of threads or on the vector width of the
//! machine.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::device::{DType, Gemm, Layout, Operand};

/// Mirrors `Product` in `kernels/cpu/product.cpp`, which documents the fields.
#[repr(C)]
struct Product {
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    lda: usize,
    ldb: usize,
    ldc: usize,
    m: usize,
    n: usize,
    k: usize,
    a_along_k: u32,
    b_along_k: u32,
    add: u32,
}

type Entry = unsafe extern "C" fn(*const Product);

unsafe extern "C" {
    fn temper_product(p: *const Product);
    /// The same function with AVX-512.
    #[cfg(target_arch = "x86_64")]
    fn temper_product_512(p: *const Product);
}

/// Whether this machine runs x86-64-v4 code.
pub fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        has!("avx512f")
            && has!("avx512bw")
            && has!("avx512cd")
            && has!("avx512dq")
            && has!("avx512vl")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A product with fewer multiply-adds takes microseconds and is not worth waking other threads.
const SMALL: usize = 1 << 18;
/// Most rows or columns of one worker's part: enough to make packing the other operand cheap, few
/// enough to balance the load.
const LONG: usize = 512;

/// Rows (or columns) of `long` in one worker's part.
fn part(long: usize, work: usize, workers: usize) -> usize {
    if work <= SMALL || workers == 1 {
        return long;
    }
    let share = long.div_ceil(workers);
    share.div_ceil(share.div_ceil(LONG)).next_multiple_of(96) // whole tiles for every vector width
}

/// # Safety
///
/// The operands are in live memory. `wide` requires [`has_avx512`].
pub unsafe fn gemm(g: &Gemm, wide: bool) {
    #[cfg(target_arch = "x86_64")]
    let entry: Entry = if wide { temper_product_512 } else { temper_product };
    #[cfg(not(target_arch = "x86_64"))]
    let (entry, _): (Entry, _) = (temper_product, wide);
    let (m, n, k) = (g.m, g.n, g.k);
    let (a_along_k, b_along_k) = (g.layout != Layout::TN, g.layout == Layout::NT);
    // bf16 operands are widened as a whole: bf16 on the CPU is for checks, not for speed.
    let (a_rows, a_cols) = if a_along_k { (m, k) } else { (k, m) };
    let (b_rows, b_cols) = if b_along_k { (n, k) } else { (k, n) };
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (Floats::new(g.a, a_rows, a_cols), Floats::new(g.b, b_rows, b_cols)) };
    // SAFETY: the caller's promise.
    let bias = g.bias.map(|bias| unsafe { Floats::new(bias, 1, n) });
    // SAFETY: n values, by the caller's promise.
    let bias = bias.as_ref().map(|b| unsafe { std::slice::from_raw_parts(b.pointer(), n) });
    // Each worker packs what it reads, so the longer side is divided: the other operand is smaller.
    let (by_rows, long) = (m >= n, m.max(n));
    let each = part(long, m * n * k, rayon::current_num_threads());
    let piece = |i: usize| {
        let cut = i * each..((i + 1) * each).min(long);
        let (rows, cols) = if by_rows { (cut, 0..n) } else { (0..m, cut) };
        let from = |o: &Floats, along_k: bool, first: usize| {
            o.pointer().wrapping_add(if along_k { first * o.stride } else { first })
        };
        let into = |c: *mut f32, ldc: usize, add: bool| Product {
            a: from(&a, a_along_k, rows.start),
            b: from(&b, b_along_k, cols.start),
            c,
            lda: a.stride,
            ldb: b.stride,
            ldc,
            m: rows.len(),
            n: cols.len(),
            k,
            a_along_k: a_along_k.into(),
            b_along_k: b_along_k.into(),
            add: add.into(),
        };
        let bias = bias.map(|b| &b[cols.clone()]);
        // SAFETY: the parts of C do not overlap; A and B are only read.
        unsafe { write(entry, &g.c, g.accumulate, bias, (rows.clone(), cols.clone()), into) };
    };
    match long.div_ceil(each.max(1)) {
        0 => {}
        1 => piece(0), // on this thread
        pieces => (0..pieces).into_par_iter().for_each(piece),
    }
}

/// Computes a part of C with its bias and rounds it if C is bf16.
///
/// # Safety
/// The operands are live, and nobody else touches these rows and columns of C.
unsafe fn write(
    entry: Entry,
    c: &Operand,
    accumulate: bool,
    bias: Option<&[f32]>,
    (rows, cols): (Range<usize>, Range<usize>),
    product: impl Fn(*mut f32, usize, bool) -> Product,
) {
    let first = rows.start * c.stride + cols.start;
    let n = cols.len();
    // SAFETY: the caller's promise; `wide` has all rows and columns of the part.
    unsafe {
        if c.dtype == DType::F32 {
            let out = (c.address as *mut f32).add(first);
            entry(&product(out, c.stride, accumulate));
            if let Some(bias) = bias {
                for r in 0..rows.len() {
                    let row = std::slice::from_raw_parts_mut(out.add(r * c.stride), n);
                    row.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
                }
            }
            return;
        }
        let mut wide = vec![0f32; rows.len() * n];
        entry(&product(wide.as_mut_ptr(), n, false));
        for (r, values) in wide.chunks_exact(n).enumerate() {
            let out = (c.address as *mut bf16).add(first + r * c.stride);
            let row = std::slice::from_raw_parts_mut(out, n);
            for (i, (o, v)) in row.iter_mut().zip(values).enumerate() {
                let v = v + bias.map_or(0.0, |b| b[i]);
                *o = bf16::from_f32(if accumulate { o.to_f32() + v } else { v });
            }
        }
    }
}

struct Floats {
    wide: Vec<f32>,
    address: u64,
    stride: usize,
}

impl Floats {
    /// # Safety
    /// `rows` rows of `cols` elements, `stride` apart, are live at the address.
    unsafe fn new(operand: Operand, rows: usize, cols: usize) -> Self {
        let Operand { address, dtype, stride } = operand;
        if dtype != DType::BF16 {
            return Floats { wide: Vec::new(), address, stride };
        }
        let mut wide = vec![0f32; rows * cols];
        for (r, row) in wide.chunks_exact_mut(cols.max(1)).enumerate() {
            // SAFETY: the caller's promise.
            let src = unsafe {
                std::slice::from_raw_parts((address as *const bf16).add(r * stride), cols)
            };
            for (o, v) in row.iter_mut().zip(src) {
                *o = v.to_f32();
            }
        }
        Floats { wide, address: 0, stride: cols }
    }

    fn pointer(&self) -> *const f32 {
        if self.address == 0 { self.wide.as_ptr() } else { self.address as *const f32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values whose sums round, so that a different order of addition is visible.
    fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| crate::rng::uniform(crate::rng::philox([seed, 0], [i, 0, 0, 0])[0]) - 0.5)
            .collect()
    }

    fn bits(v: &[f32]) -> Vec<u32> {
        v.iter().map(|x| x.to_bits()).collect()
    }

    /// The chain of an element, as defined in the head of `product.cpp`.
    fn chain(start: Option<f32>, k: usize, term: impl Fn(usize) -> (f32, f32)) -> f32 {
        let mut total = start;
        for from in (0..k).step_by(256) {
            let piece = (from..(from + 256).min(k)).fold(0f32, |sum, t| {
                let (a, b) = term(t);
                a.mul_add(b, sum)
            });
            total = Some(total.map_or(piece, |t| t + piece));
        }
        total.unwrap_or(0.0)
    }

    #[test]
    fn an_element_is_one_chain_whatever_stands_beside_it() {
        let shapes = [
            (1, 7, 5),
            (3, 33, 17),
            (13, 50, 700),
            (20, 31, 257),
            (33, 19, 512),
            (64, 96, 128),
            (65, 16, 9),
            (250, 130, 300),
            (777, 65, 40),
            (130, 1100, 270),
            (2, 2050, 64),
            (4, 3, 0),
        ];
        for (case, (m, n, k)) in shapes.into_iter().enumerate() {
            for (layout, accumulate) in [Layout::NT, Layout::NN, Layout::TN]
                .into_iter()
                .zip([false, false, true])
                .chain([(Layout::NT, true), (Layout::NN, true), (Layout::TN, false)])
            {
                let (a, b) = (values(m * k, case as u32), values(k * n, 100 + case as u32));
                let (lda, ldb) = (
                    if layout == Layout::TN { m } else { k },
                    if layout == Layout::NT { k } else { n },
                );
                let old = values(m * n, 200 + case as u32);
                let product = |wide: bool, first: usize, m: usize, c: &mut [f32]| {
                    let operand = |p: *const f32, stride: usize| Operand {
                        address: p as u64,
                        dtype: DType::F32,
                        stride,
                    };
                    let at = if layout == Layout::TN { first } else { first * k };
                    let a = operand(a.as_ptr().wrapping_add(at), lda); // with k = 0 nothing is read
                    let (b, c) = (operand(b.as_ptr(), ldb), operand(c.as_mut_ptr(), n));
                    let g = Gemm { layout, m, n, k, a, b, c, bias: None, accumulate };
                    // SAFETY: the operands are the vectors above, and the machine has `wide`.
                    unsafe { gemm(&g, wide) };
                };
                let mut want = old.clone();
                for (r, row) in want.chunks_exact_mut(n).enumerate() {
                    for (c, v) in row.iter_mut().enumerate() {
                        let of_a = |t| if layout == Layout::TN { t * m + r } else { r * k + t };
                        let of_b = |t| if layout == Layout::NT { c * k + t } else { t * n + c };
                        *v = chain(accumulate.then_some(*v), k, |t| (a[of_a(t)], b[of_b(t)]));
                    }
                }
                for wide in [false, has_avx512()] {
                    let at = format!("{layout:?} {m} {n} {k} {accumulate}, wide: {wide}");
                    let mut whole = old.clone();
                    product(wide, 0, m, &mut whole);
                    assert_eq!(bits(&whole), bits(&want), "{at}");
                    for row in [0, m / 2, m - 1] {
                        let of_row = row * n..(row + 1) * n;
                        let mut alone = old[of_row.clone()].to_vec();
                        product(wide, row, 1, &mut alone);
                        assert_eq!(bits(&alone), bits(&want[of_row]), "{at}, row {row} alone");
                    }
                }
            }
        }
    }
}
