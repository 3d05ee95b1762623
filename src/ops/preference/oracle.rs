//! Functions of the losses in naive f64. Layer 4.
//!
//! Invariant: written from the formulas, independently of the kernels' numerics.

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

pub fn smoothed(x: f64, e: f64) -> f64 {
    -(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x)
}

pub fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}
