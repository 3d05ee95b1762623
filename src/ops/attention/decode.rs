//! Attention of a decoding step: the rotation of q and k, the append to the cache and the attention
//! of one row of each sequence, in one launch where a kernel can. Layer 4.
//!
//! Invariant: the bits are those of [`rope_append`] followed by [`attention_paged`]. Math and
//! numerics: `kernels/attention_decode.cu`.

use super::paged::attention_paged;
use super::rows::PagedRows;
use super::shape::AttnShape;
use super::{launch, oracle};
use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::error::{Error, Result};
use crate::ops::case::{Arg, Case, Kind, PerfShape, Rng};
use crate::ops::rope::{self, CaseOptions, NormOver, QkNorm, Rope, RopeTable};
use crate::ops::rope_append::RopeAppend;
use crate::tensor::Tensor;

/// Norms and rotates q and k of `qkv` [n, (heads + 2 kv_heads) head_dim], writes k and v of row `r`
/// to row `slots[r]` of `cache`, and returns the attention of each row over its sequence: [n, heads
/// head_dim]. No two rows belong to one sequence. A row of padding gives 0. The q columns of `qkv`
/// are undefined afterwards. Not on the tape. `next`: weights that the next products read, which
/// multiprocessors without a row fetch into the cache.
#[allow(clippy::too_many_arguments)]
pub fn attention_decode(
    cx: &mut Cx,
    qkv: &Tensor,
    cache: &Tensor,
    table: Option<&RopeTable>,
    norm: Option<QkNorm>,
    rows: PagedRows,
    shape: AttnShape,
    next: [Option<&Tensor>; 2],
) -> Result<Tensor> {
    let rope = Rope::new(shape.heads, shape.kv_heads, table, norm.as_ref());
    let inputs = rope::rope_inputs(
        &[qkv, cache, rows.positions, rows.slots, rows.page_table, rows.sequences],
        table,
        norm.as_ref(),
    );
    AttentionDecode { rope, shape }.run(cx, &inputs, next)
}

#[derive(Debug)]
pub struct AttentionDecode {
    pub rope: Rope,
    pub shape: AttnShape,
}

/// The number of inputs before those of the table and the norm.
const FIXED: usize = 6;

impl AttentionDecode {
    /// `x`: qkv, cache, position, slots, page table, sequence, then the inputs of the table and the
    /// norm.
    fn run(&self, cx: &mut Cx, x: &[&Tensor], next: [Option<&Tensor>; 2]) -> Result<Tensor> {
        let [qkv, cache, positions, slots, page_table, sequences] = match x.get(..FIXED) {
            Some(fixed) => [fixed[0], fixed[1], fixed[2], fixed[3], fixed[4], fixed[5]],
            None => return Err(Error::op("attention_decode", "too few inputs")),
        };
        let n = self.shape.numbers("attention_decode", qkv)?;
        let rows = PagedRows { slots, page_table, sequences, positions };
        rows.check("attention_decode", qkv, cache, &self.shape)?;
        let rest = &x[FIXED..];
        let args = self.rope.args(rest);
        // The kernel turns whole heads, and norms each by itself.
        let whole = |(_, over): (_, NormOver)| over == NormOver::Heads;
        let apart = !self.rope.is_plain(n.d) || self.rope.norm.is_some_and(whole);
        if !launch::decodes(cx, &n, qkv, cache)? {
            self.append(cx, x)?;
            return attention_paged(cx, qkv, cache, rows, self.shape);
        }
        let out = cx.real("attention", &[qkv.row_count(), self.shape.heads * n.d])?;
        if apart {
            self.append(cx, x)?;
            launch::decode(cx, &n, &out, [qkv, cache], rows, None, next)?;
        } else {
            if !self.rope.fits(n.d, &args) {
                let message = format!("{qkv:?}, table {:?}", args.cosine);
                return Err(Error::op("attention_decode", message));
            }
            self.rope.check_weights("attention_decode", &args, n.d)?;
            let norm = self.rope.norm.map(|(norm, _)| norm);
            launch::decode(cx, &n, &out, [qkv, cache], rows, Some((args, norm)), next)?;
        }
        Ok(out)
    }

    fn append(&self, cx: &Cx, x: &[&Tensor]) -> Result<()> {
        let inputs = [&x[..4], &x[FIXED..]].concat();
        RopeAppend(self.rope).run(cx, &inputs)
    }
}

impl Op for AttentionDecode {
    fn name(&self) -> &'static str {
        "attention_decode"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let out = self.run(cx, x, [None; 2])?;
        Ok(Fwd { outputs: vec![out, x[1].clone()], saved: vec![] })
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let inputs = [&x[..4], &x[FIXED..]].concat();
        let appended = RopeAppend(self.rope).oracle(round, &inputs);
        let [qkv, cache] = [&appended[0], &appended[1]].map(Clone::clone);
        let paged = [qkv, cache.clone(), x[4].clone(), x[5].clone(), x[2].clone()];
        vec![oracle::paged(round, &self.shape, &paged), cache]
    }

    /// The cost with full page tables: only the device knows how long the sequences are.
    fn cost(&self, x: &[&Tensor]) -> Cost {
        let (rows, width) = (x[0].row_count(), self.shape.heads * self.shape.head_dim);
        let positions = x[4].numel() * super::PAGE;
        let row = x[1].cols() * x[1].dtype().size();
        let bytes = x[0].bytes() + rows * width * x[0].dtype().size() + positions * row;
        let flops = 4.0 * (width * x[4].cols() * super::PAGE * rows) as f64;
        Cost { bytes: bytes as f64, flops }
    }
}

/// Sequences of these lengths, the last token of each a row; a last row is padding.
fn case(rng: &mut Rng, label: &str, shape: AttnShape, of: CaseOptions, lengths: &[usize]) -> Case {
    let page = super::PAGE;
    let each = lengths.iter().max().map_or(1, |n| n.div_ceil(page));
    let heads = [shape.heads, shape.kv_heads, shape.head_dim];
    let longest = lengths.iter().max().map_or(1, |n| *n);
    let plain = rope::case(rng, lengths.len() + 1, heads, of, longest);
    // Pages in a shuffled order: the odd ones from the end, then the even ones.
    let count = lengths.len() * each;
    let mut order: Vec<f64> = (0..count).rev().filter(|i| i % 2 == 1).map(|i| i as f64).collect();
    order.extend((0..count).filter(|i| i % 2 == 0).map(|i| i as f64));
    let mut positions: Vec<i32> = lengths.iter().map(|n| *n as i32 - 1).collect();
    let slot = |(i, n): (usize, &usize)| {
        order[i * each + (n - 1) / page] as i32 * page as i32 + ((n - 1) % page) as i32
    };
    let mut slots: Vec<i32> = lengths.iter().enumerate().map(slot).collect();
    let mut sequences: Vec<i32> = (0..lengths.len() as i32).collect();
    positions.push(0);
    slots.push(-1);
    sequences.push(-1);
    let width = 2 * shape.kv_heads * shape.head_dim;
    let table = Arg { value: F64::new(&[lengths.len(), each], order.clone()), ..Arg::ints(&[]) };
    let mut inputs = vec![
        plain.inputs[0].clone(),
        Arg::real(rng.array(&[count * page, width], 1.0)),
        Arg::ints(&positions),
        Arg::ints(&slots),
        Arg { kind: Kind::Int, ..table },
        Arg::ints(&sequences),
    ];
    inputs.extend(plain.inputs[2..].iter().cloned());
    let inputs = inputs.into_iter().map(|input| Arg { param: false, ..input }.no_grad()).collect();
    let rope = Rope {
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        turned: of.turned.unwrap_or(shape.head_dim),
        scaled: of.scaled,
        norm: of.norm(),
    };
    let mut case = Case::new(label, AttentionDecode { rope, shape }, inputs);
    // Rotated q and k are rounded, then P and the result.
    case.roundings = 4.0;
    case
}

pub fn decode_cases(rng: &mut Rng) -> Vec<Case> {
    use oracle::shape;
    let plain = CaseOptions::PLAIN;
    let windowed = AttnShape { window: Some(70), softcap: Some(5.0), ..shape(4, 2, 64) };
    vec![
        case(rng, "group 7", shape(7, 1, 64), plain, &[1, 64, 65, 300]),
        case(rng, "group 2, normed", shape(4, 2, 128), CaseOptions::NORMED, &[5, 129, 260]),
        case(rng, "Gemma 3's norm", shape(2, 1, 64), CaseOptions::GEMMA3, &[70, 520]),
        case(rng, "OLMo 2's norm", shape(4, 2, 64), CaseOptions::OLMO2, &[70, 3]),
        case(rng, "window, softcap", windowed, plain, &[30, 150, 330]),
        case(
            rng,
            "not rotated",
            shape(2, 2, 64),
            CaseOptions { turned: Some(0), ..plain },
            &[66, 2],
        ),
        case(
            rng,
            "partly rotated, q scaled",
            shape(2, 1, 64),
            CaseOptions { turned: Some(32), scaled: true, ..plain },
            &[66, 2],
        ),
        case(rng, "head size 32", shape(4, 2, 32), plain, &[40, 80]),
        case(rng, "20 heads a kv head", shape(20, 1, 64), plain, &[40, 80]),
    ]
}

/// A decode step: the last token of each sequence.
pub fn decode_perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let shape = oracle::shape(s.heads, s.kv_heads, s.head_dim);
    vec![case(rng, "a decode step", shape, CaseOptions::PLAIN, &vec![s.length; s.sequences])]
}
