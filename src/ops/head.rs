//! The fused head: log-probs of chosen tokens without ever holding all logits. Layer 4.
//!
//! Invariant: memory is one chunk of logits or less, whatever the vocabulary and the number of rows;
//! a row's log-prob does not depend on the chunk. Two modes: weights known beforehand ([`head_loss`]:
//! a chunk's gradients follow its statistics at once) and weights known later ([`head_logps`]: the
//! chunk's logits are computed again). Math: `kernels/head.cu`, `kernels/head_hopper.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Grads, Need, Node, Op, Round, Upstream};
use crate::device::{DType, Launch, Layout};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::add::axpy;
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::expect_cols;
use crate::ops::head_hopper::{self, Outputs};
use crate::ops::head_pass::{HeadForm, HeadPurpose, LogitPass, chunk_rows, chunks, gradient};
use crate::ops::head_terms::{
    self, HeadPair, RowGradient, TermSlots, gradients_of, logits_of, oracle_row, slots_in_forward,
    terms,
};
use crate::ops::logit_map::LogitMap;
use crate::ops::matmul::product;
use crate::tensor::Tensor;

/// The language-model head: its weight [vocab, d] real, and the map from its products to logits.
#[derive(Clone, Debug)]
pub struct Head {
    pub weight: Tensor,
    pub map: LogitMap,
    /// The head's LoRA pair, if it has one.
    pub pair: Option<HeadPair>,
}

impl Head {
    /// A head whose logits are the products themselves.
    pub fn plain(weight: Tensor) -> Head {
        Head { weight, map: LogitMap::PLAIN, pair: None }
    }

    /// Logits of hidden rows, F32 [rows, vocab]. Not on the tape.
    pub fn logits(&self, cx: &Cx, hidden: &Tensor) -> Result<Tensor> {
        let logits = cx.float("logits", &[hidden.row_count(), self.weight.row_count()])?;
        let narrow = self.pair.as_ref().map(|p| p.narrow_alone(cx, hidden)).transpose()?;
        let pair = self.with_narrow(narrow.as_ref());
        let terms = terms([hidden, &self.weight], &pair);
        logits_of(cx, &logits, &terms, (0, hidden.row_count()))?;
        self.map.apply(cx, &logits)?;
        Ok(logits)
    }

    /// The logits of rows that a token is sampled of. `plain`: at temperature 1, without a penalty, so
    /// that the product's tiles may give the statistics. Not on the tape.
    pub fn rows_to_sample(&self, cx: &Cx, hidden: &Tensor, plain: bool) -> Result<LogitRows> {
        let rows = hidden.row_count();
        if self.pair.is_none() && plain && rows >= TILES_TO_SAMPLE {
            let terms = terms([hidden, &self.weight], &[]);
            let purpose = HeadPurpose::Statistics;
            if HeadForm::of(cx, &terms, self.map, purpose) != HeadForm::Apart {
                let vocab = self.weight.row_count();
                let logits = cx.float("logits", &[rows, vocab])?;
                let shape = [rows, head_hopper::part_values(vocab)];
                let parts = cx.float("logit slices", &shape)?;
                let out = Outputs { parts: &parts, target: None, logits: Some(&logits) };
                head_hopper::statistics(cx, &out, (hidden, &self.weight), 1.0)?;
                return Ok(LogitRows { logits, parts: Some(parts) });
            }
        }
        Ok(LogitRows { logits: self.logits(cx, hidden)?, parts: None })
    }

    /// The inputs that an op has for the pair: its narrow product and B.
    pub(super) fn with_narrow<'a>(&'a self, narrow: Option<&'a Tensor>) -> Vec<&'a Tensor> {
        narrow.into_iter().zip(&self.pair).flat_map(|(t, pair)| [t, &pair.b]).collect()
    }
}

/// Rows of logits, F32 [n, vocab].
pub struct LogitRows {
    pub logits: Tensor,
    /// The statistics of their parts at temperature 1, F32 [n, parts x TILE_STATS], where the product
    /// with the head gives them (`kernels/head_hopper.cu`).
    pub parts: Option<Tensor>,
}

impl LogitRows {
    /// The most memory of a row.
    pub fn bytes_of_row(vocab: usize) -> usize {
        (vocab + head_hopper::part_values(vocab)) * DType::F32.size()
    }

    pub fn rows(&self, from: usize, to: usize) -> Result<LogitRows> {
        let parts = self.parts.as_ref().map(|t| t.rows(from, to)).transpose()?;
        Ok(LogitRows { logits: self.logits.rows(from, to)?, parts })
    }
}

/// The least number of rows whose statistics the product with the head gives to the sampler. For
/// fewer rows there are faster products, and reading the logits takes little time.
const TILES_TO_SAMPLE: usize = kernels::FEW_ROWS;

/// The head's results for each row, F32 `[n]` unless noted.
pub struct HeadOut {
    /// log p(target)
    pub logp: Tensor,
    /// entropy of the distribution, nats
    pub entropy: Tensor,
    /// I32 `[n]`: the most likely token
    pub best: Tensor,
    /// log of the sum of the squared probabilities, if requested (WPO)
    pub log_square: Option<Tensor>,
}

/// `loss = -sum_i weight[i] logp[i]` F32 `[1]`, and the rows' metrics. x [n, d] real, target I32
/// `[n]` below the vocabulary, weight F32 `[n]`; logits are scaled by `scale` (1 / temperature).
/// Only `loss` carries a gradient, and its upstream must be 1: gradients of x and w are computed in
/// the forward, chunk by chunk.
pub fn head_loss(
    cx: &mut Cx,
    x: &Tensor,
    head: &Head,
    target: &Tensor,
    weight: &Tensor,
    scale: f32,
) -> Result<(Tensor, HeadOut)> {
    let (w, map, chunk) = (&head.weight, head.map, chunk_rows(cx, &head.weight));
    let op = HeadLoss { scale, map, chunk };
    let narrow = head.pair.as_ref().map(|p| p.narrow(cx, x)).transpose()?;
    let mut inputs = vec![x, w, target, weight];
    inputs.extend(head.with_narrow(narrow.as_ref()));
    let [loss, logp, entropy, best] = cx.apply_many(op, &inputs)?;
    Ok((loss, HeadOut { logp, entropy, best, log_square: None }))
}

/// Log-prob, entropy and arg max of each row. Gradients flow to x and w from the upstreams of logp
/// and entropy. Arguments as for [`head_loss`].
pub fn head_logps(
    cx: &mut Cx,
    x: &Tensor,
    head: &Head,
    target: &Tensor,
    scale: f32,
) -> Result<HeadOut> {
    head_rows(cx, x, head, target, scale, false)
}

/// [`head_logps`] that, with `squares`, also returns `log_square` (which carries no gradient).
pub fn head_rows(
    cx: &mut Cx,
    x: &Tensor,
    head: &Head,
    target: &Tensor,
    scale: f32,
    square: bool,
) -> Result<HeadOut> {
    let (w, map, chunk) = (&head.weight, head.map, chunk_rows(cx, &head.weight));
    let narrow = head.pair.as_ref().map(|p| p.narrow(cx, x)).transpose()?;
    let mut inputs = vec![x, w, target];
    inputs.extend(head.with_narrow(narrow.as_ref()));
    let mut out = cx.apply(HeadLogps { scale, map, chunk, square }, &inputs)?;
    let log_square = if square { out.pop() } else { None };
    match <[Tensor; 3]>::try_from(out) {
        Ok([logp, entropy, best]) => Ok(HeadOut { logp, entropy, best, log_square }),
        Err(_) => Err(Error::op("head_logps", "gave another number of outputs")),
    }
}

/// The mean of each row's logits over the vocabulary, F32 `[n]`: the row times the mean row of the
/// head or, with a softcap, a mean over the logits themselves. Not on the tape.
pub fn mean_logits(cx: &Cx, x: &Tensor, head: &Head) -> Result<Tensor> {
    let (n, w) = (x.row_count(), &head.weight);
    let vocab = w.row_count();
    let mean = cx.float("mean logits", &[n])?;
    mean.zero()?;
    if head.map.softcap.is_some() {
        let size = chunk_rows(cx, w);
        for (from, to) in chunks(n, size) {
            let logits = head.logits(cx, &x.rows(from, to)?)?;
            let starts: Vec<i32> = (0..=to - from).map(|r| (r * vocab) as i32).collect();
            let (starts, sums) = (cx.ints("starts", &starts)?, cx.float("sums", &[to - from])?);
            let args = kernels::SegmentSumsFwdArgs {
                sums: sums.out(),
                values: &logits,
                weights: None,
                starts: &starts,
                segments: (to - from) as i32,
            };
            kernels::segment_sums_fwd(&*cx.device, Launch::warps(to - from), args)?;
            axpy(cx, &mean.rows(from, to)?, &sums, 1.0 / vocab as f32)?;
        }
        return Ok(mean);
    }
    let ones = Tensor::from_f32(&cx.pool, "ones", w.dtype(), &[1, vocab], &vec![1.0; vocab])?;
    let sums = cx.float("mean logits", &[n, 1])?;
    let narrow = head.pair.as_ref().map(|p| p.narrow_alone(cx, x)).transpose()?;
    let pair = head.with_narrow(narrow.as_ref());
    for (i, term) in terms([x, w], &pair).iter().enumerate() {
        let sum = cx.real("sum of the head", &[1, term.weight.cols()])?;
        product(cx, Layout::NN, &sum, &ones, term.weight, None, false)?;
        product(cx, Layout::NT, &sums, term.rows, &sum, None, i > 0)?;
    }
    axpy(cx, &mean, &sums.reshape(&[n])?, 1.0 / vocab as f32 / head.map.divisor)?;
    Ok(mean)
}

/// Index of the first input of the head's pair (t and B), if it has one.
const PAIR_OF_LOGPS: usize = 3;
const PAIR_OF_LOSS: usize = 4;

#[derive(Debug)]
pub struct HeadLoss {
    pub scale: f32,
    pub map: LogitMap,
    pub chunk: usize,
}

#[derive(Debug)]
pub struct HeadLogps {
    pub scale: f32,
    pub map: LogitMap,
    pub chunk: usize,
    /// Also compute log sum p^2.
    pub square: bool,
}

/// `rows`: the number of inputs with one value per row, after x and the weight.
fn check(name: &'static str, x: &[&Tensor], rows: usize) -> Result<()> {
    let hint = "check hidden_size in config.json";
    expect_cols(name, "the head's weight", x[1], x[0].cols(), hint)?;
    head_terms::check(name, &terms([x[0], x[1]], &x[2 + rows..]))?;
    if x[2..2 + rows].iter().any(|t| t.numel() != x[0].row_count()) {
        return Err(Error::op(name, format!("{:?} has not one target (and weight) a row", x[0])));
    }
    Ok(())
}

impl Op for HeadLoss {
    fn name(&self) -> &'static str {
        "head_loss"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], need: &Need) -> Result<Fwd> {
        check("head_loss", x, 2)?;
        let (h, w, target, weight) = (x[0], x[1], x[2], x[3]);
        let (rows, vocab) = (h.row_count(), w.row_count());
        let terms = terms([h, w], &x[PAIR_OF_LOSS..]);
        let purpose = if need.tape { HeadPurpose::Loss } else { HeadPurpose::Statistics };
        let form = HeadForm::of(cx, &terms, self.map, purpose);
        let pass = LogitPass::new(cx, (rows, vocab), self.chunk, purpose, form)?;
        let loss = cx.float("loss", &[1])?;
        let upstream = cx.float("head rows", &[rows])?;
        let wants = |i: usize| need.inputs.get(i) == Some(&true);
        let wanted = [0, PAIR_OF_LOSS].map(|i| [wants(i), wants(i + 1)]);
        let mut slots = slots_in_forward(cx, "head_loss", &terms, &wanted)?;
        let dlogits = match need.tape {
            true => Some(cx.real("dlogits chunk", &[pass.chunk.min(rows.max(1)), vocab])?),
            false => None,
        };
        if need.tape {
            let args =
                kernels::NllUpstreamArgs { upstream: upstream.out(), weight, rows: rows as i32 };
            kernels::nll_upstream(&*cx.device, Launch::flat(rows), args)?;
        }
        let by_row = RowGradient {
            target: target.clone(),
            lse: pass.lse.clone(),
            logp: upstream,
            entropy: None,
            by_entropy: None,
        };
        for range in chunks(rows, pass.chunk) {
            let of = (self.scale, self.map);
            pass.forward(cx, &terms, target, range, of)?;
            let Some(dlogits) = &dlogits else { continue };
            let (logits, dl) =
                (pass.logits(range.1 - range.0)?, dlogits.rows(0, range.1 - range.0)?);
            let g = by_row.rows(range.0, range.1)?;
            gradient(cx, &dl, logits.as_ref(), &terms, range, &g, of)?;
            gradients_of(cx, &dl, &terms, &mut slots, range)?;
        }
        let args = kernels::WeightedNllArgs {
            loss: loss.out(),
            logp: &pass.logp,
            weight,
            rows: rows as i32,
        };
        kernels::weighted_nll(&*cx.device, Launch::warps(1), args)?;
        Ok(Fwd {
            outputs: vec![loss, pass.logp, pass.entropy, pass.best],
            saved: slots.into_iter().filter_map(|slot| Some(slot.rows?.0)).collect(),
        })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        if dy[0].is_none() {
            return Err(Error::op("head_loss", "only the loss carries a gradient; use head_logps"));
        }
        let wanted = [0, PAIR_OF_LOSS].into_iter().filter(|i| *i < node.inputs.len());
        let wanted: Vec<usize> = wanted.filter(|i| g.wants(*i)).collect();
        wanted.into_iter().zip(&node.saved).try_for_each(|(i, dx)| g.give(cx, i, dx.clone()))
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let [logp, entropy, best, _] = rows_reference(x, &x[PAIR_OF_LOSS..], self.scale, self.map);
        let loss = -x[3].data.iter().zip(&logp.data).map(|(w, l)| w * l).sum::<f64>();
        vec![F64::new(&[1], vec![loss]), logp, entropy, best]
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        head_cost(x, PAIR_OF_LOSS)
    }
}

impl Op for HeadLogps {
    fn name(&self) -> &'static str {
        "head_logps"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        check("head_logps", x, 1)?;
        let terms = terms([x[0], x[1]], &x[PAIR_OF_LOGPS..]);
        let purpose = if self.square { HeadPurpose::Squares } else { HeadPurpose::Statistics };
        let form = HeadForm::of(cx, &terms, self.map, purpose);
        let sizes = (x[0].row_count(), x[1].row_count());
        let pass = LogitPass::new(cx, sizes, self.chunk, purpose, form)?;
        for range in chunks(sizes.0, pass.chunk) {
            pass.forward(cx, &terms, x[2], range, (self.scale, self.map))?;
        }
        let mut saved =
            vec![x[0].clone(), x[1].clone(), x[2].clone(), pass.lse.clone(), pass.entropy.clone()];
        saved.extend(x[PAIR_OF_LOGPS..].iter().map(|t| (*t).clone()));
        let mut outputs = vec![pass.logp, pass.entropy, pass.best];
        outputs.extend(pass.square);
        Ok(Fwd { outputs, saved })
    }

    fn backward(&self, cx: &mut Cx, node: &Node, dy: &Upstream, g: &mut Grads) -> Result<()> {
        let [h, w, target, lse, entropy, pair @ ..] = &node.saved[..] else { return Ok(()) };
        let rows = h.row_count();
        let zeros;
        let dlogp = match &dy[0] {
            Some(d) => d,
            None => {
                zeros = cx.float("head rows", &[rows])?;
                zeros.zero()?;
                &zeros
            }
        };
        let pair: Vec<&Tensor> = pair.iter().collect();
        let terms = terms([h, w], &pair);
        let mut slots = Vec::new();
        for at in [0, PAIR_OF_LOGPS].into_iter().take(terms.len()) {
            slots.push(TermSlots { rows: g.slot(at)?, weight: g.slot(at + 1)? });
        }
        // With squares the statistics come from stored logits, which a library may have computed.
        let purpose = if self.square { HeadPurpose::Squares } else { HeadPurpose::Gradient };
        let form = HeadForm::of(cx, &terms, self.map, purpose);
        let (of, chunk) = ((self.scale, self.map), form.rows_at_once(self.chunk));
        let shape = [chunk.min(rows.max(1)), w.row_count()];
        let logits = form.buffer(cx, shape[0], shape[1])?;
        let dlogits = cx.real("dlogits chunk", &shape)?;
        let by_row = RowGradient {
            target: target.clone(),
            lse: lse.clone(),
            logp: dlogp.clone(),
            entropy: Some(entropy.clone()),
            by_entropy: dy[1].clone(),
        };
        for range in chunks(rows, chunk) {
            let n = range.1 - range.0;
            let logits = logits.as_ref().map(|l| l.rows(0, n)).transpose()?;
            if let Some(logits) = &logits {
                logits_of(cx, logits, &terms, range)?;
                self.map.apply(cx, logits)?;
            }
            let (dl, g) = (dlogits.rows(0, n)?, by_row.rows(range.0, range.1)?);
            gradient(cx, &dl, logits.as_ref(), &terms, range, &g, of)?;
            gradients_of(cx, &dl, &terms, &mut slots, range)?;
        }
        Ok(())
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let mut out = Vec::from(rows_reference(x, &x[PAIR_OF_LOGPS..], self.scale, self.map));
        out.truncate(if self.square { 4 } else { 3 });
        out
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        head_cost(x, PAIR_OF_LOGPS)
    }
}

fn head_cost(x: &[&Tensor], pair: usize) -> Cost {
    let (m, n) = (x[0].row_count(), x[1].row_count());
    let k = x[0].cols() + x.get(pair).map_or(0, |t| t.cols());
    Cost { flops: 2.0 * (m * n * k) as f64, ..Cost::memory(x, 12 * m * n) }
}

fn rows_reference(x: &[F64], pair: &[F64], scale: f32, map: LogitMap) -> [F64; 4] {
    let rows = x[0].row_count();
    let mut out = [(); 4].map(|()| F64::zeros(&[rows]));
    for r in 0..rows {
        let z = oracle_row(&x[0], &x[1], pair, r).into_iter();
        let logits: Vec<f64> = z.map(|z| f64::from(scale) * map.oracle(z)).collect();
        let top = logits.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
        let lse = top + logits.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
        out[0].data[r] = logits[x[2].index(r)] - lse;
        out[1].data[r] = lse - logits.iter().map(|l| (l - lse).exp() * l).sum::<f64>();
        out[2].data[r] = logits.iter().position(|l| *l == top).unwrap_or(0) as f64;
        out[3].data[r] = logits.iter().map(|l| (2.0 * (l - lse)).exp()).sum::<f64>().ln();
    }
    out
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let mut cases = Vec::new();
    let plain = LogitMap::PLAIN;
    let capped = LogitMap { divisor: 1.0, softcap: Some(5.0) };
    for (rows, d, vocab, chunk, scale, map, rank) in [
        (1, 4, 3, 32, 1.0f32, plain, 0),
        (33, 16, 130, 16, 1.0, plain, 0),
        (9, 24, 1031, 4, 0.7, plain, 0),
        (5, 8, 4999, 3, 0.9, plain, 0),
        (33, 16, 130, 16, 1.0, LogitMap { divisor: 3.0, softcap: None }, 0),
        (9, 24, 1031, 4, 0.7, capped, 0),
        (5, 8, 4999, 3, 1.3, LogitMap { divisor: 0.8, softcap: Some(2.0) }, 0),
        (70, 40, 264, 64, 1.0, plain, 0),
        (200, 72, 1160, 64, 0.6, plain, 0),
        (33, 16, 130, 16, 1.0, plain, 3),
        (9, 24, 1031, 4, 0.7, capped, 8),
    ] {
        let x = rng.array(&[rows, d], 1.0);
        let w = rng.array(&[vocab, d], 1.0);
        let target: Vec<i32> = (0..rows).map(|_| rng.below(vocab) as i32).collect();
        let weight = F64::from_fn(&[rows], |_| rng.uniform());
        let mut label = format!("rows {rows} d {d} vocab {vocab} chunk {chunk} scale {scale}");
        if map != plain {
            label += &format!(" {map:?}");
        }
        let mut pair = Vec::new();
        if rank > 0 {
            label += &format!(" rank {rank}");
            pair.push(Arg::real(rng.array(&[rows, rank], 0.5)));
            pair.push(Arg::param(rng.array(&[vocab, rank], 0.5)));
        }
        let mut inputs = vec![Arg::real(x), Arg::param(w), Arg::ints(&target)];
        let mut with_weight = inputs.clone();
        with_weight.push(Arg::float(weight));
        with_weight.extend(pair.clone());
        inputs.extend(pair);
        // The arg max of near ties may differ. It decides nothing else here; tests of its own
        // compare it.
        for square in [false, true] {
            let label = format!("{label}{}", if square { " square" } else { "" });
            let case = Case::new(label, HeadLogps { scale, map, chunk, square }, inputs.clone());
            // Outputs without a gradient get a zero upstream.
            let upstream =
                [None, None, Some(0.0), Some(0.0)][..if square { 4 } else { 3 }].to_vec();
            cases.push(Case { skip: vec![2], upstream, ..case });
        }
        let case = Case::new(label, HeadLoss { scale, map, chunk }, with_weight);
        cases.push(Case {
            skip: vec![3],
            upstream: vec![Some(1.0), Some(0.0), Some(0.0), Some(0.0)],
            ..case
        });
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let target: Vec<i32> = (0..s.tokens()).map(|_| rng.below(s.vocab) as i32).collect();
    let inputs = vec![
        Arg::real(rng.array(&[s.tokens(), s.hidden], 1.0)),
        Arg::param(rng.array(&[s.vocab, s.hidden], 0.02)),
        Arg::ints(&target),
    ];
    let op = HeadLogps { scale: 1.0, map: LogitMap::PLAIN, chunk: 1024, square: false };
    vec![Case::new("log-probs in chunks of 1024", op, inputs)]
}
