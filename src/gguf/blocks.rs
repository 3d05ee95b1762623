//! The tensor types of a GGUF file: the layout of their blocks, and conversion from and to f32.
//! Layer 6.
//!
//! Invariant: widening gives exactly the f32 values of the `gguf` package: one rounding per
//! operation, in the same order, without fused multiply-add.

use half::{bf16, f16};
use rayon::prelude::*;

/// A tensor type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

/// Type, its number in a file, name, values per block, bytes per block.
const TYPES: [(GgufType, u32, &str, usize, usize); 11] = [
    (GgufType::F32, 0, "F32", 1, 4),
    (GgufType::F16, 1, "F16", 1, 2),
    (GgufType::BF16, 30, "BF16", 1, 2),
    (GgufType::Q8_0, 8, "Q8_0", 32, 34),
    (GgufType::Q4_0, 2, "Q4_0", 32, 18),
    (GgufType::Q4_1, 3, "Q4_1", 32, 20),
    (GgufType::Q5_0, 6, "Q5_0", 32, 22),
    (GgufType::Q5_1, 7, "Q5_1", 32, 24),
    (GgufType::Q4K, 12, "Q4_K", 256, 144),
    (GgufType::Q5K, 13, "Q5_K", 256, 176),
    (GgufType::Q6K, 14, "Q6_K", 256, 210),
];

/// Types that exist but cannot be read, for messages.
const OTHERS: [(u32, &str); 12] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (23, "IQ4_XS"),
    (39, "MXFP4"),
];

impl GgufType {
    /// The type with this number. The error is a description of the type for a message.
    pub fn of(number: u32) -> Result<Self, String> {
        if let Some(found) = TYPES.iter().find(|t| t.1 == number) {
            return Ok(found.0);
        }
        let name = OTHERS.iter().find(|t| t.0 == number).map_or("unknown", |t| t.1);
        Err(format!("{number} ({name})"))
    }

    /// The names of all types that can be read.
    pub fn names() -> String {
        TYPES.map(|t| t.2).join(", ")
    }

    fn row(self) -> (u32, &'static str, usize, usize) {
        let found = TYPES.iter().find(|t| t.0 == self).unwrap_or(&TYPES[0]);
        (found.1, found.2, found.3, found.4)
    }

    pub fn number(self) -> u32 {
        self.row().0
    }

    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Values per block; the length of a row is a multiple of it.
    pub fn block(self) -> usize {
        self.row().2
    }

    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Bytes of `values` values. None: they are not whole blocks, or too many.
    pub fn bytes(self, values: usize) -> Option<usize> {
        if !values.is_multiple_of(self.block()) {
            return None;
        }
        (values / self.block()).checked_mul(self.block_bytes())
    }

    /// Widens whole blocks `bytes` into `out`, which has the length of all their values.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        let (block, size) = (self.block(), self.block_bytes());
        let one: fn(&[u8], &mut [f32]) = match self {
            GgufType::F32 => |b, o| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            GgufType::F16 => |b, o| o[0] = half(b, 0),
            GgufType::BF16 => |b, o| o[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            GgufType::Q8_0 => q8_0,
            GgufType::Q4_0 => q4_0,
            GgufType::Q4_1 => q4_1,
            GgufType::Q5_0 => q5_0,
            GgufType::Q5_1 => q5_1,
            GgufType::Q4K => q4_k,
            GgufType::Q5K => q5_k,
            GgufType::Q6K => q6_k,
        };
        const PART: usize = 64; // blocks
        out.par_chunks_mut(block * PART).zip(bytes.par_chunks(size * PART)).for_each(|(o, b)| {
            o.chunks_exact_mut(block).zip(b.chunks_exact(size)).for_each(|(o, b)| one(b, o));
        });
    }

    /// Narrows whole blocks of values. None: the type cannot be written. F16 and BF16 round to
    /// nearest even; Q8_0 and Q4_0 choose their scale as the `gguf` package does.
    pub fn narrow(self, values: &[f32]) -> Option<Vec<u8>> {
        let blocks = values.chunks_exact(self.block());
        Some(match self {
            GgufType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            GgufType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            GgufType::BF16 => {
                values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
            }
            GgufType::Q8_0 => blocks.flat_map(to_q8_0).collect(),
            GgufType::Q4_0 => blocks.flat_map(to_q4_0).collect(),
            _ => return None,
        })
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn q8_0(b: &[u8], out: &mut [f32]) {
    let d = half(b, 0);
    out.iter_mut().zip(&b[2..]).for_each(|(o, q)| *o = f32::from(*q as i8) * d);
}

/// The 4 low bits of value `i` of a block of 32: the low halves hold the first 16 values.
fn nibble(qs: &[u8], i: usize) -> u8 {
    if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 }
}

/// Bit `i` of four bytes, as the fifth bit of a value.
fn fifth(bits: &[u8], i: usize) -> u8 {
    (bits[i / 8] >> (i % 8) & 1) << 4
}

fn q4_0(b: &[u8], out: &mut [f32]) {
    let d = half(b, 0);
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * f32::from(nibble(&b[2..], i) as i8 - 8);
    }
}

fn q4_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * f32::from(nibble(&b[4..], i)) + m;
    }
}

fn q5_0(b: &[u8], out: &mut [f32]) {
    let d = half(b, 0);
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * f32::from((nibble(&b[6..], i) | fifth(&b[2..6], i)) as i8 - 16);
    }
}

fn q5_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * f32::from(nibble(&b[8..], i) | fifth(&b[4..8], i)) + m;
    }
}

/// Scale and minimum of one of the 8 parts of a K block, 6 bits each, packed in 12 bytes: the low
/// four bits of the last four parts share a byte, and their high bits are the top bits of the first
/// eight bytes.
fn scale_min(s: &[u8], part: usize) -> (f32, f32) {
    let (scale, min) = if part < 4 {
        (s[part] & 63, s[part + 4] & 63)
    } else {
        (s[part + 4] & 15 | s[part - 4] >> 2 & 48, s[part + 4] >> 4 | s[part] >> 2 & 48)
    };
    (f32::from(scale), f32::from(min))
}

/// `high`: the fifth bits of 32 columns, one bit per part; None for Q4_K.
fn k_block(b: &[u8], high: Option<&[u8]>, qs: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(&b[4..16], part);
        let (scale, min) = (d * scale, dmin * min);
        for (i, o) in out.iter_mut().enumerate() {
            let low = qs[part / 2 * 32 + i] >> (4 * (part % 2)) & 15;
            let bit = high.map_or(0, |h| h[i] >> part & 1);
            *o = scale * f32::from(low | bit << 4) - min;
        }
    }
}

fn q4_k(b: &[u8], out: &mut [f32]) {
    k_block(b, None, &b[16..], out);
}

fn q5_k(b: &[u8], out: &mut [f32]) {
    k_block(b, Some(&b[16..48]), &b[48..], out);
}

fn q6_k(b: &[u8], out: &mut [f32]) {
    let (ql, qh, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(b, 208));
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (group, quarter) = (part / 4, part % 4); // group of 128 values
        for (i, o) in out.iter_mut().enumerate() {
            let low = ql[group * 64 + quarter % 2 * 32 + i] >> (4 * (quarter / 2)) & 15;
            let high = qh[group * 32 + i] >> (2 * quarter) & 3;
            let scale = d * f32::from(scales[part * 2 + i / 16] as i8);
            *o = scale * f32::from((low | high << 4) as i8 - 32);
        }
    }
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn to_q8_0(x: &[f32]) -> Vec<u8> {
    let d = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
    let id = inverse(d);
    let mut out = f16::from_f32(d).to_le_bytes().to_vec();
    out.extend(x.iter().map(|v| (v * id).round() as i8 as u8));
    out
}

fn to_q4_0(x: &[f32]) -> Vec<u8> {
    let widest = x.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = widest / -8.0;
    let id = inverse(d);
    let q = |v: f32| ((v * id + 8.5) as u8).min(15);
    let mut out = f16::from_f32(d).to_le_bytes().to_vec();
    out.extend((0..16).map(|i| q(x[i]) | q(x[i + 16]) << 4));
    out
}
