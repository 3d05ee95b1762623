//! Arithmetic of the oracles: f64 arrays on the host, and rounding to stored dtypes. Layer 3.
//!
//! Invariant: the code is naive and obvious; an oracle shares no code with a kernel.

/// How an oracle rounds a value where the kernel stores one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Round {
    /// No rounding: the exact oracle.
    None,
    F32,
    Bf16,
}

impl Round {
    pub fn at(self, v: f64) -> f64 {
        match self {
            Round::None => v,
            Round::F32 => v as f32 as f64,
            Round::Bf16 => half::bf16::from_f32(v as f32).to_f64(),
        }
    }
}

/// A host array of an oracle. Indices are stored as f64, too.
#[derive(Clone, Debug, PartialEq)]
pub struct F64 {
    pub data: Vec<f64>,
    pub shape: Vec<usize>,
}

impl F64 {
    pub fn new(shape: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(
            shape.iter().product::<usize>(),
            data.len(),
            "a reference array of shape {shape:?}"
        );
        F64 { data, shape: shape.to_vec() }
    }

    pub fn zeros(shape: &[usize]) -> Self {
        F64 { data: vec![0.0; shape.iter().product()], shape: shape.to_vec() }
    }

    pub fn from_fn(shape: &[usize], f: impl FnMut(usize) -> f64) -> Self {
        F64 { data: (0..shape.iter().product()).map(f).collect(), shape: shape.to_vec() }
    }

    pub fn cols(&self) -> usize {
        *self.shape.last().unwrap_or(&1)
    }

    pub fn row_count(&self) -> usize {
        self.data.len() / self.cols().max(1)
    }

    pub fn row(&self, r: usize) -> &[f64] {
        &self.data[r * self.cols()..(r + 1) * self.cols()]
    }

    pub fn row_mut(&mut self, r: usize) -> &mut [f64] {
        let cols = self.cols();
        &mut self.data[r * cols..(r + 1) * cols]
    }

    pub fn index(&self, i: usize) -> usize {
        self.data[i] as usize
    }
}
