//! The self-check of `matmul=exact`: compares the fastest kernels with the engine's oldest one.
//! Layer 8.
//!
//! Invariant: the operands are like a user's, and not those with which the library's algorithms
//! were verified.

use std::sync::Arc;

use super::CheckOutcome;
use crate::autograd::Cx;
use crate::config::MatmulChoice;
use crate::device::{DType, Device, Layout};
use crate::error::Result;
use crate::ops::case::Rng;
use crate::ops::matmul::{product, product_by};
use crate::ops::own::OwnKernel;
use crate::tensor::Tensor;

/// Rows of decode steps, of irregular steps and of training.
const ROWS: [usize; 6] = [1, 7, 64, 200, 256, 1024];

/// (n, k, bias, float result, accumulated): the products of a 0.5B model, a part of its head, and
/// the second product of an adapter.
const SHAPES: [(usize, usize, bool, bool, bool); 6] = [
    (1152, 896, true, false, false),
    (896, 896, false, false, false),
    (9728, 896, false, false, false),
    (896, 4864, false, false, false),
    (8192, 896, false, true, false),
    (896, 16, false, false, true),
];

/// On a device whose library depends on the number of rows, compares each product with that of the
/// engine's own kernel, bit for bit. The name of the case lists the fastest kernel for each number
/// of rows.
pub fn check_products(
    device: &Arc<dyn Device>,
    mut each: impl FnMut(&CheckOutcome),
) -> Vec<CheckOutcome> {
    let mut all = Vec::new();
    if !device.capabilities().gemm_depends_on_rows {
        return all;
    }
    for dtype in [DType::BF16, DType::F32] {
        for shape in SHAPES {
            let compared = compare(device, dtype, shape);
            let outcome = CheckOutcome::of_measured("exact products", dtype, compared);
            each(&outcome);
            all.push(outcome);
        }
    }
    all
}

/// The name of the case, and the numbers of rows whose products differ.
fn compare(
    device: &Arc<dyn Device>,
    dtype: DType,
    (n, k, bias, float, accumulate): (usize, usize, bool, bool, bool),
) -> Result<(String, Vec<String>)> {
    let mut cx = Cx::new(device.clone(), dtype)?;
    let mut rng = Rng(17);
    let values: Vec<f32> = (0..65_537).map(|_| rng.normal() as f32).collect();
    let tensor = |rows: usize, cols: usize, dtype: DType| {
        let some: Vec<f32> = values.iter().copied().cycle().take(rows * cols).collect();
        Tensor::from_f32(&cx.pool, "product", dtype, &[rows, cols], &some)
    };
    let most = ROWS[ROWS.len() - 1];
    let (a, b) = (tensor(most, k, dtype)?, tensor(n, k, dtype)?);
    let added = bias.then(|| tensor(1, n, dtype)).transpose()?;
    let output = if float { DType::F32 } else { dtype };
    let before = tensor(most, n, output)?;
    let mut different = Vec::new();
    cx.matmul = MatmulChoice::Exact;
    for m in ROWS {
        let mut results = Vec::new();
        for exact in [true, false] {
            let c = Tensor::new(&cx.pool, "product", output, &[m, n])?;
            c.copy_from(&before.rows(0, m)?)?;
            let (a, bias) = (a.rows(0, m)?, added.as_ref());
            match exact {
                true => product(&cx, Layout::NT, &c, &a, &b, bias, accumulate)?,
                false => {
                    let tile = OwnKernel::Tile;
                    product_by(&cx, tile, Layout::NT, &c, (&a, &b), bias, accumulate)?;
                }
            }
            results.push(c.to_bytes()?);
        }
        if results[0] != results[1] {
            different.push(format!("{m} rows"));
        }
    }
    let form = match (bias, float, accumulate) {
        (true, ..) => " with bias",
        (_, true, _) => " to float",
        (.., true) => ", added",
        _ => "",
    };
    let mut fastest: Vec<(usize, String)> = Vec::new();
    for (shape, choice) in cx.product_check.choices.lock().unwrap_or_else(|e| e.into_inner()).iter()
    {
        let name = choice.own.map_or("library".into(), |own| OwnKernel::of_number(own).name());
        fastest.push((shape.rows, format!("{} {name} {:.1} us", shape.rows, choice.time)));
    }
    fastest.sort();
    let fastest: Vec<String> = fastest.into_iter().map(|(_, text)| text).collect();
    let case = match fastest.is_empty() {
        true => format!("n {n} k {k}{form}: the engine's own"),
        false => format!("n {n} k {k}{form}; rows, fastest: {}", fastest.join(", ")),
    };
    Ok((case, different))
}
