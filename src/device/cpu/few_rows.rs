//! The forward product of a few rows (decoding), without packing the weight. Layer 1.
//!
//! Invariant: the bits are those of `matrixmultiply` (but for the sign of a zero), which larger
//! products use: an element is one chain of multiply-adds along k from 0 in pieces of 256, the
//! pieces added from left to right (tested against it). So which of the two runs may depend on the
//! number of rows.

/// Rows up to which this is taken: the more rows, the less packing B costs beside the product
/// itself.
pub const FEW: usize = 64;

/// `matrixmultiply`'s KC.
#[cfg(target_arch = "x86_64")]
const PIECE: usize = 256;

/// `c = a b^T`: a [m, k] of row stride `lda`, b [n, k] of `ldb`, c [m, n] of `ldc`; columns
/// `from..to` of c.
#[derive(Clone, Copy)]
pub struct Product {
    pub m: usize,
    pub k: usize,
    pub b: u64,
    pub ldb: usize,
    pub c: u64,
    pub ldc: usize,
}

/// Whether this machine has the instructions; else nothing here runs.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx2")
        && std::arch::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// A as [k, m rounded up to 8], zeros behind: the rows are the lanes of a register.
///
/// # Safety
/// `m` rows of `k` values, `lda` apart, are live at `a`.
pub unsafe fn lanes(a: *const f32, lda: usize, m: usize, k: usize) -> Vec<f32> {
    let wide = m.next_multiple_of(8);
    let mut out = vec![0f32; k * wide];
    for r in 0..m {
        // SAFETY: the caller's promise.
        let row = unsafe { std::slice::from_raw_parts(a.add(r * lda), k) };
        row.iter().enumerate().for_each(|(i, v)| out[i * wide + r] = *v);
    }
    out
}

/// # Safety
/// The operands are live, the machine is [`available`], and nobody else writes these columns of c.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub unsafe fn columns(p: &Product, a: &[f32], from: usize, to: usize) {
    let mut row = 0;
    while row < p.m {
        let vectors = (p.m - row).div_ceil(8);
        // SAFETY: the caller's promise.
        unsafe {
            match vectors {
                1 => row_block::<1, 6>(p, a, row, from, to),
                2 => row_block::<2, 4>(p, a, row, from, to),
                3 => row_block::<3, 3>(p, a, row, from, to),
                _ => row_block::<4, 3>(p, a, row, from, to),
            }
        }
        row += 8 * vectors.min(4);
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn columns(_p: &Product, _a: &[f32], _from: usize, _to: usize) {
    unreachable!("only where available() is true")
}

/// 8 R rows from `row` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn row_block<const R: usize, const C: usize>(
    p: &Product,
    a: &[f32],
    row: usize,
    from: usize,
    to: usize,
) {
    let mut column = from;
    // SAFETY: the caller's promise.
    unsafe {
        while column + C <= to {
            tile::<R, C>(p, a, row, column);
            column += C;
        }
        while column < to {
            tile::<R, 1>(p, a, row, column);
            column += 1;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const R: usize, const C: usize>(p: &Product, a: &[f32], row: usize, column: usize) {
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps,
    };
    let wide = p.m.next_multiple_of(8);
    let mut total = [[_mm256_setzero_ps(); C]; R];
    for start in (0..p.k).step_by(PIECE) {
        let mut sum = [[_mm256_setzero_ps(); C]; R];
        for i in start..(start + PIECE).min(p.k) {
            // SAFETY: i < k, and rows and columns are those of the product.
            unsafe {
                let lanes = a.as_ptr().add(i * wide + row);
                let mut b = [_mm256_setzero_ps(); C];
                for (j, b) in b.iter_mut().enumerate() {
                    *b = _mm256_broadcast_ss(&*(p.b as *const f32).add((column + j) * p.ldb + i));
                }
                for (r, sums) in sum.iter_mut().enumerate() {
                    let x = _mm256_loadu_ps(lanes.add(8 * r));
                    sums.iter_mut().zip(b).for_each(|(s, b)| *s = _mm256_fmadd_ps(x, b, *s));
                }
            }
        }
        // The first piece is added to 0, as the library's is.
        for (totals, sums) in total.iter_mut().zip(&sum) {
            totals.iter_mut().zip(sums).for_each(|(t, s)| *t = _mm256_add_ps(*t, *s));
        }
    }
    for (r, totals) in total.iter().enumerate() {
        for (j, register) in totals.iter().enumerate() {
            // SAFETY: a register is eight floats.
            let values: [f32; 8] = unsafe { std::mem::transmute(*register) };
            for (i, value) in values.iter().enumerate().take((p.m - row).saturating_sub(8 * r)) {
                // SAFETY: an element of c that this call owns.
                unsafe { *(p.c as *mut f32).add((row + 8 * r + i) * p.ldc + column + j) = *value };
            }
        }
    }
}
