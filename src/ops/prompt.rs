//! Token embedding with a learned prompt before each sequence: ids from the vocabulary's size on
//! are rows of a second table. Layer 4.
//!
//! Invariant: as for the plain embedding, the backward adds the places of an id in order. Kernel:
//! `kernels/prompt.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::Launch;
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::embedding::{TokenIndex, copied_rows, sorted_places, sum_places};
use crate::ops::scale::Multiply;
use crate::tensor::Tensor;

/// `y[i] = scale w[ids[i]]`, or `p[ids[i] - vocab]` for ids from vocab on: w [vocab, d], p [virtual
/// tokens, d] real; y [n, d] real. The caller has checked that ids are below vocab + virtual
/// tokens.
pub fn prompt_embedding(
    cx: &mut Cx,
    w: &Tensor,
    p: &Tensor,
    index: &TokenIndex,
    scale: f32,
) -> Result<Tensor> {
    let vocab = w.row_count();
    let op = PromptEmbedding { text: index.distinct_below(vocab), scale };
    cx.apply1(op, &[w, p, &index.ids, &index.unique, &index.starts, &index.order])
}

#[derive(Debug)]
pub struct PromptEmbedding {
    /// How many of the distinct ids are ordinary tokens; these come first.
    pub text: usize,
    /// Scale of the first table's rows.
    pub scale: f32,
}

impl Op for PromptEmbedding {
    fn name(&self) -> &'static str {
        "prompt_embedding"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let (w, p, ids) = (x[0], x[1], x[2]);
        if w.cols() != p.cols() {
            let message = format!("the prompt {p:?} is not as wide as the embedding {w:?}");
            return Err(Error::op("prompt_embedding", message));
        }
        let (n, d) = (ids.numel(), w.cols());
        let y = cx.real("embedding", &[n, d])?;
        let vocab = w.row_count() as i32;
        let args = kernels::PromptGatherArgs {
            y: y.out(),
            w,
            p,
            ids,
            n: n as i32,
            vocab,
            d: d as i32,
            scale: self.scale,
        };
        kernels::prompt_gather(&*cx.device, Launch::warps(n), args)?;
        let saved = x[3..6].iter().map(|t| (*t).clone()).collect();
        Ok(Fwd { outputs: vec![y], saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let Some(dy) = &dy[0] else { return Ok(()) };
        let (unique, starts, order) = (&node.saved[0], &node.saved[1], &node.saved[2]);
        if order.numel() != dy.row_count() {
            let message = "these token ids were made for generation: no gradient flows to them";
            return Err(Error::op("prompt_embedding", message));
        }
        let distinct = unique.numel();
        for (input, from, to) in [(0, 0, self.text), (1, self.text, distinct)] {
            if let Some((dw, accumulate)) = g.slot(input)? {
                if !accumulate {
                    dw.zero()?;
                }
                // Ids of the prompt's rows are shifted to start at 0.
                let shift = if input == 0 { 0 } else { node.inputs[0].shape[0] };
                let scaled;
                let dy = if input == 0 && self.scale != 1.0 {
                    scaled = Multiply { factor: self.scale }.of(cx, dy)?;
                    &scaled
                } else {
                    dy
                };
                sum_places(
                    cx,
                    &dw,
                    dy,
                    &unique.rows(from, to)?,
                    &starts.rows(from, to + 1)?,
                    order,
                    shift,
                )?;
            }
        }
        Ok(())
    }

    fn oracle(&self, round: Round, x: &[F64]) -> Vec<F64> {
        let mut y = F64::zeros(&[x[2].data.len(), x[0].cols()]);
        for i in 0..x[2].data.len() {
            let (id, vocab) = (x[2].index(i), x[0].row_count());
            let (row, by) = match id.checked_sub(vocab) {
                None => (x[0].row(id), f64::from(self.scale)),
                Some(id) => (x[1].row(id), 1.0),
            };
            for (y, v) in y.row_mut(i).iter_mut().zip(row) {
                *y = round.at(by * v);
            }
        }
        vec![y]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        copied_rows(x[0], x[2])
    }
}

fn case(rng: &mut Rng, [vocab, virtuals, d]: [usize; 3], lengths: &[usize], scale: f32) -> Case {
    let mut ids: Vec<i32> = Vec::new();
    for n in lengths {
        ids.extend((vocab..vocab + virtuals).map(|i| i as i32));
        ids.extend((0..*n).map(|_| rng.below(vocab) as i32));
    }
    let [unique, starts, order] = sorted_places(&ids);
    let text = unique.iter().filter(|i| (**i as usize) < vocab).count();
    let mut inputs = [vocab, virtuals].map(|n| Arg::param(rng.array(&[n, d], 1.0))).to_vec();
    inputs.extend([&ids, &unique, &starts, &order].map(|v| Arg::ints(v)));
    let label = format!("vocab {vocab} virtual {virtuals} d {d} n {} scale {scale}", ids.len());
    let exact = scale == 1.0; // an unscaled row is a plain copy
    Case { exact, ..Case::new(label, PromptEmbedding { text, scale }, inputs) }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    vec![
        case(rng, [3, 1, 5], &[1], 1.0),
        case(rng, [20, 4, 64], &[9, 1, 17], 1.0),
        case(rng, [7, 2, 300], &[5, 5], 1.0),
        case(rng, [20, 4, 64], &[9, 1, 17], 5.5),
    ]
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    vec![case(rng, [s.vocab, 20, s.hidden], &vec![s.length; s.sequences], 1.0)]
}
