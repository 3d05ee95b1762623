//! PiSSA: LoRA initialised with the base's largest singular directions. Layer 5.
//!
//! W = U S V^T; A_0 = sqrt(S_r / s) V_r^T, B_0 = U_r sqrt(S_r / s). The adapted weight is W - s B_0
//! A_0 + s B A, starting from A = A_0, B = B_0 (Meng, Wang, Zhang, "PiSSA: Principal Singular
//! Values and Singular Vectors Adaptation of Large Language Models", 2024). `pissa_niter_N`:
//! computes the r largest with N rounds of subspace iteration from a random start (Halko,
//! Martinsson, Tropp, "Finding structure with randomness", 2011, algorithm 4.4).
//!
//! Invariant: the base keeps its bits. The pair that is subtracted from it stays beside the trained
//! one, frozen and with B negated, as further ranks of the same product: the residual is never
//! stored, the model without the adapter is the reference, and the saved adapter is the plain LoRA
//! of rank 2 r into which PEFT converts a PiSSA adapter.

use nalgebra::DMatrix;

use crate::error::{Error, Result};
use crate::model::params::normals;

/// Returns A_0 [r, cols] and -B_0 [rows, r] of w [rows, cols], row-major. `niter` None: exact.
pub fn principal(
    w: &[f32],
    (rows, cols): (usize, usize),
    rank: usize,
    scale: f32,
    niter: Option<usize>,
    seed: (u64, u32),
) -> Result<(Vec<f32>, Vec<f32>)> {
    if rank > rows.min(cols) {
        let message = format!(
            "init_lora_weights=pissa: rank {rank} is too high for a {rows} x {cols} weight; \
             lower lora_r"
        );
        return Err(Error::Config(message));
    }
    let w = DMatrix::from_row_iterator(rows, cols, w.iter().map(|v| f64::from(*v)));
    let (u, s, vt) = match niter {
        None => svd(w)?,
        Some(rounds) => {
            let start = normals(seed.0, seed.1, cols * rank);
            let start = DMatrix::from_iterator(cols, rank, start.into_iter().map(f64::from));
            let mut q = (&w * start).qr().q();
            for _ in 0..rounds {
                q = (&w * w.tr_mul(&q).qr().q()).qr().q();
            }
            let (u, s, vt) = svd(q.tr_mul(&w))?;
            (q * u, s, vt)
        }
    };
    let root: Vec<f64> = s.iter().take(rank).map(|s| (s / f64::from(scale)).sqrt()).collect();
    let a = (0..rank).flat_map(|i| (0..cols).map(move |j| (i, j)));
    let a = a.map(|(i, j)| (root[i] * vt[(i, j)]) as f32).collect();
    let b = (0..rows).flat_map(|i| (0..rank).map(move |j| (i, j)));
    let b = b.map(|(i, j)| (-u[(i, j)] * root[j]) as f32).collect();
    Ok((a, b))
}

type Svd = (DMatrix<f64>, Vec<f64>, DMatrix<f64>);

/// Returns U, the singular values in descending order, and V^T.
fn svd(w: DMatrix<f64>) -> Result<Svd> {
    let svd = w
        .try_svd(true, true, f64::EPSILON, 0)
        .and_then(|s| Some((s.u?, s.singular_values, s.v_t?)));
    let (u, s, vt) =
        svd.ok_or_else(|| Error::op("pissa", "the singular values of a weight did not converge"))?;
    Ok((u, s.iter().copied().collect(), vt))
}

/// Reads the number of iterations from `pissa` or `pissa_niter_N`; Some(None) for exact. None:
/// another initialisation.
pub fn rounds(init: &str) -> Option<Option<usize>> {
    match init {
        "pissa" => Some(None),
        _ => init.strip_prefix("pissa_niter_").and_then(|n| n.parse().ok()).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_weight_has_no_principal_part() {
        let (rows, cols, r) = (24, 40, 4);
        let mut w: Vec<f32> = normals(3, 0, rows * cols).iter().map(|v| 0.02 * v).collect();
        let (l, k) = (normals(3, 1, rows * r), normals(3, 2, r * cols));
        for i in 0..rows * cols {
            w[i] += (0..r).map(|j| l[i / cols * r + j] * k[j * cols + i % cols]).sum::<f32>();
        }
        let square = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let rest = |niter| {
            let (a, b) = principal(&w, (rows, cols), r, 2.0, niter, (7, 0)).unwrap();
            let left = |i: usize| {
                w[i] + 2.0
                    * (0..r).map(|j| b[i / cols * r + j] * a[j * cols + i % cols]).sum::<f32>()
            };
            square(&(0..rows * cols).map(left).collect::<Vec<_>>()) / square(&w)
        };
        let (exact, near) = (rest(None), rest(Some(4)));
        assert!(exact < 1e-3 && (near / exact - 1.0).abs() < 1e-3, "{exact:e} {near:e}");
        assert!(principal(&w, (rows, cols), 25, 1.0, None, (7, 0)).is_err());
        assert_eq!(
            (rounds("pissa"), rounds("pissa_niter_4"), rounds("true")),
            (Some(None), Some(Some(4)), None)
        );
    }
}
