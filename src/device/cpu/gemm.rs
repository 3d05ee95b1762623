//! The CPU's matrix product: `matrixmultiply` over chunks of rows, on all cores. Layer 1.
//!
//! Invariant: a row's bits depend on that row and on B alone: not on the rows beside it, the cut or
//! the number of threads.

use half::bf16;
use rayon::prelude::*;

use super::few_rows;
use crate::device::{DType, Gemm, Layout, Operand};

/// Rows a worker takes at once: a row's bits do not depend on the cut, its speed does, since every
/// chunk packs all of B. So one chunk a worker, unless a chunk would be long enough for packing to
/// be cheap and for an even load to matter.
fn row_chunk(m: usize, workers: usize) -> usize {
    let share = m.div_ceil(workers.max(1));
    share.div_ceil(share.div_ceil(LONG_CHUNK).max(1)).next_multiple_of(16).max(16)
}

const LONG_CHUNK: usize = 512;

/// # Safety
/// The operands lie in live memory.
pub unsafe fn gemm(g: &Gemm) {
    let (m, n, k) = (g.m, g.n, g.k);
    // bf16 operands are widened whole: bf16 on the CPU is for checks, not for speed.
    let (a_rows, a_cols) = if g.layout == Layout::TN { (k, m) } else { (m, k) };
    let (b_rows, b_cols) = if g.layout == Layout::NT { (n, k) } else { (k, n) };
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (Floats::new(g.a, a_rows, a_cols), Floats::new(g.b, b_rows, b_cols)) };
    let plain =
        g.layout == Layout::NT && g.c.dtype == DType::F32 && !g.accumulate && g.bias.is_none();
    if plain && m <= few_rows::FEW && few_rows::available() {
        // SAFETY: the caller's promise.
        return unsafe { decode(g, &a, &b) };
    }
    let (rsb, csb) = if g.layout == Layout::NT { (1, b.stride) } else { (b.stride, 1) };
    // SAFETY: the caller's promise.
    let turned =
        (csb != 1 && n * k <= TURN_LIMIT).then(|| unsafe { transposed(b.pointer(), csb, n, k) });
    // From here on as an address: the workers share it.
    let (pb, rsb, csb) = match &turned {
        Some(t) => (t.as_ptr() as u64, n, 1),
        None => (b.pointer() as u64, rsb, csb),
    };
    let Operand { address: c_address, dtype: c_dtype, stride: ldc } = g.c;
    // SAFETY: the caller's promise.
    let bias = g.bias.map(|bias| unsafe { Floats::new(bias, 1, n) });
    // SAFETY: n values, by the caller's promise.
    let bias = bias.as_ref().map(|b| unsafe { std::slice::from_raw_parts(b.pointer(), n) });
    let rows_each = row_chunk(m, rayon::current_num_threads());
    let chunks = m.div_ceil(rows_each);
    (0..chunks).into_par_iter().for_each(|chunk| {
        let (r0, r1) = (chunk * rows_each, ((chunk + 1) * rows_each).min(m));
        let rows = r1 - r0;
        // SAFETY: rows r0..r1 of A and C, all of B; the chunks of C do not overlap.
        unsafe {
            let (whole, rsa, csa) = if g.layout == Layout::TN {
                (a.pointer().add(r0), 1, a.stride)
            } else {
                (a.pointer().add(r0 * a.stride), a.stride, 1)
            };
            let turned = (rsa != 1 && rows > 1).then(|| transposed(whole, rsa, rows, k));
            let (pa, rsa, csa) = match &turned {
                Some(t) => (t.as_ptr(), 1, rows),
                None => (whole, rsa, csa),
            };
            let sgemm = |beta: f32, c: *mut f32, stride: usize| {
                matrixmultiply::sgemm(
                    rows,
                    k,
                    n,
                    1.0,
                    pa,
                    rsa as isize,
                    csa as isize,
                    pb as *const f32,
                    rsb as isize,
                    csb as isize,
                    beta,
                    c,
                    stride as isize,
                    1,
                )
            };
            if c_dtype == DType::F32 {
                let c = (c_address as *mut f32).add(r0 * ldc);
                sgemm(if g.accumulate { 1.0 } else { 0.0 }, c, ldc);
                for r in 0..if bias.is_some() { rows } else { 0 } {
                    let out = std::slice::from_raw_parts_mut(c.add(r * ldc), n);
                    out.iter_mut().zip(bias.unwrap_or(&[])).for_each(|(o, b)| *o += b);
                }
                return;
            }
            let mut wide = vec![0f32; rows * n];
            sgemm(0.0, wide.as_mut_ptr(), n);
            for r in 0..rows {
                let out =
                    std::slice::from_raw_parts_mut((c_address as *mut bf16).add((r0 + r) * ldc), n);
                for (i, (o, v)) in out.iter_mut().zip(&wide[r * n..(r + 1) * n]).enumerate() {
                    let v = v + bias.map_or(0.0, |b| b[i]);
                    *o = bf16::from_f32(if g.accumulate { o.to_f32() + v } else { v });
                }
            }
        }
    });
}

/// A forward product of few rows: the columns are cut among the workers.
///
/// # Safety
/// As [`gemm`], C is float, and the machine can.
unsafe fn decode(g: &Gemm, a: &Floats, b: &Floats) {
    let (m, n, k) = (g.m, g.n, g.k);
    // SAFETY: the caller's promise.
    let lanes = unsafe { few_rows::lanes(a.pointer(), a.stride, m, k) };
    let p = few_rows::Product {
        m,
        k,
        b: b.pointer() as u64,
        ldb: b.stride,
        c: g.c.address,
        ldc: g.c.stride,
    };
    // A worker's share in whole tiles; a product that takes microseconds is not worth waking
    // anybody.
    let workers = if m * n * k < 1 << 17 { 1 } else { rayon::current_num_threads() };
    let share = n.div_ceil(workers).next_multiple_of(12);
    (0..n.div_ceil(share)).into_par_iter().for_each(|i| {
        // SAFETY: the columns of the shares do not overlap.
        unsafe { few_rows::columns(&p, &lanes, i * share, ((i + 1) * share).min(n)) };
    });
}

/// A B of more values is packed as it lies: no second copy of a large weight.
const TURN_LIMIT: usize = 4 << 20;

/// `rows` rows of `cols` values, `stride` apart, column by column: [cols, rows]. `matrixmultiply`
/// packs an operand value by value where its panels are not contiguous (4 ns each, as long as the
/// product itself at the quickstart's sizes); this takes a quarter of that, and what it packs then
/// is a copy. The same values in the same order: the same bits.
///
/// # Safety
/// The rows lie in live memory.
unsafe fn transposed(src: *const f32, stride: usize, rows: usize, cols: usize) -> Vec<f32> {
    const TILE: usize = 8;
    let mut out: Vec<f32> = Vec::with_capacity(rows * cols);
    let dst = out.as_mut_ptr();
    // SAFETY: reads stay in the given rows; every value of `out` is written once before its length
    // is set.
    unsafe {
        for r in (0..rows - rows % TILE).step_by(TILE) {
            for c in (0..cols - cols % TILE).step_by(TILE) {
                let mut tile = [[0f32; TILE]; TILE];
                for (i, line) in tile.iter_mut().enumerate() {
                    std::ptr::copy_nonoverlapping(
                        src.add((r + i) * stride + c),
                        line.as_mut_ptr(),
                        TILE,
                    );
                }
                let column_of = |j: usize| -> [f32; TILE] { std::array::from_fn(|i| tile[i][j]) };
                (0..TILE).for_each(|j| {
                    let column = column_of(j);
                    std::ptr::copy_nonoverlapping(
                        column.as_ptr(),
                        dst.add((c + j) * rows + r),
                        TILE,
                    );
                });
            }
        }
        let (whole_rows, whole_cols) = (rows - rows % TILE, cols - cols % TILE);
        for r in 0..rows {
            for c in if r < whole_rows { whole_cols } else { 0 }..cols {
                *dst.add(c * rows + r) = *src.add(r * stride + c);
            }
        }
        out.set_len(rows * cols);
    }
    out
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

    /// Values whose sums round, so that another order of adding shows.
    fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| crate::rng::uniform(crate::rng::philox([seed, 0], [i, 0, 0, 0])[0]) - 0.5)
            .collect()
    }

    #[test]
    fn a_rows_bits_do_not_depend_on_the_rows_beside_it_nor_on_turned_operands() {
        let shapes = [
            (1, 7, 5),
            (3, 33, 17),
            (13, 50, 700),
            (20, 31, 257),
            (33, 19, 512),
            (64, 96, 128),
            (250, 130, 300),
            (777, 65, 40),
            (130, 1100, 270),
        ];
        for (case, (m, n, k)) in shapes.into_iter().enumerate() {
            for layout in [Layout::NT, Layout::NN, Layout::TN] {
                let (a, b) = (values(m * k, case as u32), values(k * n, 100 + case as u32));
                let (lda, ldb) = (
                    if layout == Layout::TN { m } else { k },
                    if layout == Layout::NT { k } else { n },
                );
                let product = |a: *const f32, m: usize, c: &mut [f32]| {
                    let operand = |p: *const f32, stride: usize| Operand {
                        address: p as u64,
                        dtype: DType::F32,
                        stride,
                    };
                    let (a, b, c) =
                        (operand(a, lda), operand(b.as_ptr(), ldb), operand(c.as_mut_ptr(), n));
                    // SAFETY: the operands are the vectors above.
                    unsafe {
                        gemm(&Gemm { layout, m, n, k, a, b, c, bias: None, accumulate: false })
                    };
                };
                let mut whole = vec![0f32; m * n];
                product(a.as_ptr(), m, &mut whole);
                let mut plain = vec![0f32; m * n];
                let (rsa, csa) = if layout == Layout::TN { (1, m) } else { (k, 1) };
                let (rsb, csb) = if layout == Layout::NT { (1, k) } else { (n, 1) };
                let [rsa, csa, rsb, csb, n1] = [rsa, csa, rsb, csb, n].map(|s| s as isize);
                let out = plain.as_mut_ptr();
                // SAFETY: as above.
                unsafe {
                    matrixmultiply::sgemm(
                        m,
                        k,
                        n,
                        1.0,
                        a.as_ptr(),
                        rsa,
                        csa,
                        b.as_ptr(),
                        rsb,
                        csb,
                        0.0,
                        out,
                        n1,
                        1,
                    )
                };
                let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(
                    bits(&whole),
                    bits(&plain),
                    "{layout:?} {m} {n} {k}: as the library gives it"
                );
                for row in [0, m / 2, m - 1] {
                    let mut alone = vec![0f32; n];
                    let at = if layout == Layout::TN { row } else { row * k };
                    product(a[at..].as_ptr(), 1, &mut alone);
                    assert_eq!(
                        bits(&alone),
                        bits(&whole[row * n..(row + 1) * n]),
                        "{layout:?} {m} {n} {k} row {row}"
                    );
                }
            }
        }
    }
}
