//! The naive definition of the quantised formats on the host, operation for operation in f32, and
//! the op form of quantising for the registry. Layer 4.
//!
//! Invariant: written from bitsandbytes' formulas without the kernels' shortcuts; tests compare the
//! two bit for bit.

use super::{BLOCK4, BLOCK8, NF4, QuantWeight, Scales, Scheme, Segment, dynamic_map};
use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::error::Result;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::tensor::Tensor;

/// A segment's storage on the host.
struct Host {
    codes: Vec<u8>,
    scales: HostScales,
}

enum HostScales {
    Float(Vec<f32>),
    Nested { codes: Vec<u8>, absmax: Vec<f32>, offset: f32 },
}

fn nearest(map: &[f32], v: f32) -> u8 {
    map.windows(2).filter(|w| (w[0] + w[1]) / 2.0 < v).count() as u8
}

/// Codes and largest magnitudes in blocks. A last block that is not whole is divided by its
/// magnitude; whole blocks are multiplied by the inverse.
pub(crate) fn blockwise_oracle(x: &[f32], map: &[f32], block: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut absmax) = (Vec::new(), Vec::new());
    for part in x.chunks(block) {
        let whole = part.len() == block;
        let largest =
            part.iter().fold(0f32, |m, v| m.max(v.abs())).max(if whole { 0.0 } else { 1e-38 });
        let scale = 1.0 / largest.max(1e-38);
        let scaled = |v: f32| (if whole { v * scale } else { v / largest }).clamp(-1.0, 1.0);
        codes.extend(part.iter().map(|v| nearest(map, scaled(*v))));
        absmax.push(largest);
    }
    (codes, absmax)
}

/// The mean in the order of PyTorch's sum: 4 x 8 columns (4 for fewer than 8 values), each as a
/// cascade of four levels.
fn mean(x: &[f32]) -> f32 {
    let wide = if x.len() >= 8 { 8 } else { 1 };
    let rows = x.len() / (4 * wide);
    let power = 4.max(rows.max(1).next_power_of_two().trailing_zeros() / 4);
    let mut columns = vec![[0f32; 4]; 4 * wide];
    for (c, level) in columns.iter_mut().enumerate() {
        for r in 0..rows {
            level[0] += x[r * 4 * wide + c];
            let done = r + 1;
            if done & ((1 << power) - 1) == 0 {
                for j in 1..4 {
                    level[j] += std::mem::take(&mut level[j - 1]);
                    if (done >> (j as u32 * power)) & ((1 << power) - 1) != 0 {
                        break;
                    }
                }
            }
        }
        level[0] = level[0] + level[1] + level[2] + level[3];
    }
    let vectors = x.len() / wide * wide;
    for (i, v) in x[rows * 4 * wide..vectors].iter().enumerate() {
        columns[i % wide][0] += v;
    }
    let mut total = x[vectors..].iter().fold(0f32, |s, v| s + v);
    for v in 0..wide {
        total += columns[v][0]
            + columns[v + wide][0]
            + columns[v + 2 * wide][0]
            + columns[v + 3 * wide][0];
    }
    total / x.len() as f32
}

fn quantise(x: &[f32], rows: usize, scheme: Scheme) -> Host {
    match scheme {
        Scheme::Int8 => {
            let (mut codes, mut absmax) = (Vec::new(), Vec::new());
            for row in x.chunks(x.len() / rows) {
                let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
                let scale = if largest > 0.0 { 1.0 / largest * 127.0 } else { 0.0 };
                codes.extend(row.iter().map(|v| (v * scale).round_ties_even() as i8 as u8));
                absmax.push(largest);
            }
            Host { codes, scales: HostScales::Float(absmax) }
        }
        Scheme::Nf4 { double } => {
            let (mut values, absmax) = blockwise_oracle(x, &NF4, BLOCK4);
            values.resize(values.len().next_multiple_of(2), nearest(&NF4, 0.0));
            let codes = values.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
            if !double {
                return Host { codes, scales: HostScales::Float(absmax) };
            }
            let offset = mean(&absmax);
            let shifted: Vec<f32> = absmax.iter().map(|a| a - offset).collect();
            let (codes8, absmax) = blockwise_oracle(&shifted, &dynamic_map(true), BLOCK8);
            Host { codes, scales: HostScales::Nested { codes: codes8, absmax, offset } }
        }
    }
}

fn dequantise(h: &Host, rows: usize, cols: usize, scheme: Scheme) -> Vec<f32> {
    let scales = match &h.scales {
        HostScales::Float(absmax) => absmax.clone(),
        HostScales::Nested { codes, absmax, offset } => {
            let map = dynamic_map(true);
            codes
                .iter()
                .enumerate()
                .map(|(i, c)| map[usize::from(*c)] * absmax[i / BLOCK8] + offset)
                .collect()
        }
    };
    let value = |i: usize| match scheme {
        Scheme::Int8 => f32::from(h.codes[i] as i8) * scales[i / cols] * 7.874_016e-3,
        Scheme::Nf4 { .. } => {
            let byte = h.codes[i / 2];
            NF4[usize::from(if i & 1 == 0 { byte >> 4 } else { byte & 15 })] * scales[i / BLOCK4]
        }
    };
    (0..rows * cols).map(value).collect()
}

/// `w` [n, k] quantised in segments and dequantised, with each value rounded to storage.
pub(super) fn dequantised(round: Round, w: &F64, segment_rows: &[usize], scheme: Scheme) -> F64 {
    let mut values = Vec::new();
    let mut from = 0;
    for &rows in segment_rows {
        let x: Vec<f32> = w.data[from..from + rows * w.cols()].iter().map(|v| *v as f32).collect();
        from += x.len();
        values.extend(dequantise(&quantise(&x, rows, scheme), rows, w.cols(), scheme));
    }
    F64::new(&w.shape, values.into_iter().map(|v| round.at(f64::from(v))).collect())
}

/// The values of a weight on a device.
pub(crate) fn values_of(w: &QuantWeight, round: Round) -> Result<F64> {
    let mut values = Vec::new();
    for s in &w.segments {
        let scales = match &s.scales {
            Scales::Float(absmax) => HostScales::Float(absmax.to_vec()?),
            Scales::Nested { codes, absmax, offset } => HostScales::Nested {
                codes: codes.to_vec()?,
                absmax: absmax.to_vec()?,
                offset: offset.to_f32()?[0],
            },
        };
        values.extend(dequantise(
            &Host { codes: s.codes.to_vec()?, scales },
            s.rows,
            w.shape[1],
            w.scheme,
        ));
    }
    Ok(F64::new(&w.shape, values.into_iter().map(|v| round.at(f64::from(v))).collect()))
}

/// The op form, for the registry: x to codes, scales and values, in one segment.
#[derive(Debug)]
struct Quantise(Scheme);

impl Op for Quantise {
    fn name(&self) -> &'static str {
        "quantise"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let w = QuantWeight::from_tensor(cx, x[0], &[x[0].row_count()], self.0)?;
        let y = cx.real("dequantised weight", x[0].shape())?;
        w.dequantise_into(cx, &y)?;
        let mut outputs = Vec::new();
        for Segment { codes, scales, .. } in w.segments {
            outputs.push(codes);
            match scales {
                Scales::Float(absmax) => outputs.push(absmax),
                Scales::Nested { codes, absmax, offset } => outputs.extend([codes, absmax, offset]),
            }
        }
        outputs.push(y);
        Ok(Fwd { outputs, saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let (rows, cols) = (x[0].row_count(), x[0].cols());
        let values: Vec<f32> = x[0].data.iter().map(|v| *v as f32).collect();
        let h = quantise(&values, rows, self.0);
        let bytes = |b: &[u8]| F64::new(&[b.len()], b.iter().map(|v| f64::from(*v)).collect());
        let floats = |f: &[f32]| F64::new(&[f.len()], f.iter().map(|v| f64::from(*v)).collect());
        let mut outputs = vec![bytes(&h.codes)];
        match &h.scales {
            HostScales::Float(absmax) => outputs.push(floats(absmax)),
            HostScales::Nested { codes, absmax, offset } => {
                outputs.extend([bytes(codes), floats(absmax), floats(&[*offset])])
            }
        }
        let y = dequantise(&h, rows, cols, self.0);
        outputs.push(F64::from_fn(&x[0].shape, |i| round.at(f64::from(y[i]))));
        outputs
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(x, x[0].numel() / 2 + x[0].bytes())
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    for double in [false, true] {
        for shape in [[1, 1], [3, 5], [4, 64], [7, 77], [66, 250]] {
            let x = Arg::real(rng.array(&shape, 0.05)).no_grad();
            let label = format!("nf4 {shape:?}{}", if double { " double" } else { "" });
            let mut case = Case::new(label, Quantise(Scheme::Nf4 { double }), vec![x]);
            case.exact = true;
            cases.push(case);
        }
    }
    for shape in [[1, 1], [3, 7], [5, 300]] {
        let x = Arg::real(rng.array(&shape, 0.05)).no_grad();
        let mut case = Case::new(format!("int8 {shape:?}"), Quantise(Scheme::Int8), vec![x]);
        case.exact = true;
        cases.push(case);
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let x = Arg::real(rng.array(&[s.intermediate, s.hidden], 0.02)).no_grad();
    let op = Quantise(Scheme::Nf4 { double: true });
    vec![Case::new("nf4 with double quantisation, and back", op, vec![x])]
}
