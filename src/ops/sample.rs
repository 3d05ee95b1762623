//! Sampling of tokens on the device, with the log-probs and the entropy of each. Layer 4.
//!
//! Invariant: a sampled token is a function of (seed, sequence number, position, logits, the
//! sequence's own tokens): no state, no dependence on neighbours. Log-probs have the bits of the
//! head's. Math: `kernels/sample.cu`.

use crate::autograd::{Cost, Cx, F64, Fwd, Need, Op, Round};
use crate::device::{DType, Launch};
use crate::error::{Error, Result};
use crate::kernels::{self, SAMPLE_INFO, SAMPLE_OUTPUTS, SAMPLE_PARTS, SAMPLE_PASSES, SAMPLE_WAYS};
use crate::ops::case::{Arg, Case, PerfShape, Rng};
use crate::ops::head::LogitRows;
use crate::ops::head_pass::{slice_form, slices};
use crate::rng::{SAMPLE_TAG, philox, uniform};
use crate::tensor::{PendingDownload, Tensor};

/// Sampling options under their usual names. They apply in transformers' order: repetition_penalty,
/// temperature, top_k, top_p, min_p.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: always the most likely token.
    pub temperature: f64,
    /// Keep the k most likely; 0: all.
    pub top_k: usize,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1: all.
    pub top_p: f64,
    /// Drop tokens whose probability is below this share of the most likely one's; 0: none.
    pub min_p: f64,
    /// For tokens already in the sequence (prompt included), positive logits are divided by this
    /// and negative ones multiplied; 1: off.
    pub repetition_penalty: f64,
    pub seed: u64,
}

impl Sampling {
    pub fn greedy() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }

    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// The factor of the logits: with this `scale`, [`head_logps`](crate::ops::head::head_logps)
    /// returns `logp_scaled`.
    pub fn scale(&self) -> f32 {
        if self.is_greedy() { 1.0 } else { (1.0 / self.temperature) as f32 }
    }

    pub fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// Whether the logits themselves, at temperature 1, are all that a draw depends on.
    pub fn is_plain(&self) -> bool {
        self.scale() == 1.0 && !self.penalises()
    }

    /// Whether the sampling distribution differs from the model's at this temperature.
    pub fn truncates(&self) -> bool {
        self.is_greedy()
            || self.top_k > 0
            || self.top_p < 1.0
            || self.min_p > 0.0
            || self.penalises()
    }

    /// The sampling distribution: a probability for each token. `seen` are the tokens already in
    /// the sequence.
    pub fn distribution(&self, logits: &[f64], seen: &[u32]) -> Vec<f64> {
        let mut z = logits.to_vec();
        let mut distinct = seen.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        for t in distinct {
            let l = &mut z[t as usize];
            *l = if *l < 0.0 { *l * self.repetition_penalty } else { *l / self.repetition_penalty };
        }
        let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let n = z.len();
        if self.is_greedy() {
            let first = z.iter().position(|l| *l == top).unwrap_or(0);
            return (0..n).map(|i| f64::from(u8::from(i == first))).collect();
        }
        let mut p: Vec<f64> = z.iter().map(|l| ((l - top) / self.temperature).exp()).collect();
        // A value is kept while the values strictly above it are not enough: ties are kept or
        // dropped together.
        let mut keep_while = |enough: &dyn Fn(&[f64], f64) -> bool| {
            let all = p.clone();
            p.iter_mut().filter(|v| enough(&all, **v)).for_each(|v| *v = 0.0);
        };
        if self.top_k > 0 && self.top_k < n {
            keep_while(&|all, v| all.iter().filter(|a| **a > v).count() >= self.top_k);
        }
        if self.top_p < 1.0 {
            keep_while(&|all, v| {
                let above: f64 = all.iter().filter(|a| **a > v).sum();
                above >= self.top_p * all.iter().sum::<f64>()
            });
        }
        keep_while(&|_, v| v < self.min_p);
        let sum: f64 = p.iter().sum();
        p.iter().map(|v| v / sum).collect()
    }
}

/// The sampled tokens of a step, in one block, so that one download suffices.
pub struct Draws {
    block: Tensor,
    rows: usize,
}

/// A token with its log-probs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    pub token: u32,
    /// Under the model's distribution at temperature 1.
    pub logp: f32,
    /// Under the model's distribution at the sampling temperature: what a trainer's ratio uses.
    pub logp_scaled: f32,
    /// Under the sampling distribution.
    pub logp_truncated: f32,
    /// Of the model's distribution at the sampling temperature, nats.
    pub entropy: f32,
}

impl Draws {
    /// Downloads the step's results at once. Waits for the device.
    pub fn download(&self) -> Result<Vec<Draw>> {
        self.begin_download()?.wait()
    }

    /// Queues the download behind the sampling, without waiting.
    pub fn begin_download(&self) -> Result<PendingDraws> {
        Ok(PendingDraws { block: self.block.begin_download()?, rows: self.rows })
    }

    /// The tokens alone, on the device: I32 `[n]`.
    pub fn tokens(&self) -> Result<Tensor> {
        self.block.view(0, DType::I32, &[self.rows])
    }
}

/// Sampled tokens in flight to the host.
pub struct PendingDraws {
    block: PendingDownload,
    rows: usize,
}

impl PendingDraws {
    pub fn wait(self) -> Result<Vec<Draw>> {
        let (words, n) = (self.block.wait::<u32>()?, self.rows);
        let float = |column: usize, i: usize| f32::from_bits(words[column * n + i]);
        let draw = |i: usize| Draw {
            token: words[i],
            logp: float(1, i),
            logp_scaled: float(2, i),
            logp_truncated: float(3, i),
            entropy: float(4, i),
        };
        Ok((0..n).map(draw).collect())
    }
}

/// Samples a token from each row of `logits` F32 [n, vocab]. `who` I32 [n, 3]: sequence number (-1:
/// padding), position in its completion, row of `seen`. `seed` I32 `[2]`. `seen` I32 [rows, vocab /
/// 32 rounded up]: a bit for each token of a sequence, to which the sampled one is added; required
/// if the sampling penalises repetition.
pub fn sample(
    cx: &mut Cx,
    sampling: &Sampling,
    logits: &Tensor,
    who: &Tensor,
    seed: &Tensor,
    seen: Option<&Tensor>,
) -> Result<Draws> {
    let rows = LogitRows { logits: logits.clone(), parts: None };
    sample_rows(cx, sampling, &rows, who, seed, seen)
}

/// [`sample`] of logits whose statistics may be known; the same draws.
pub fn sample_rows(
    cx: &mut Cx,
    sampling: &Sampling,
    rows: &LogitRows,
    who: &Tensor,
    seed: &Tensor,
    seen: Option<&Tensor>,
) -> Result<Draws> {
    let op = Sample { sampling: sampling.clone() };
    let mut x = vec![&rows.logits, who, seed];
    x.extend(seen.filter(|_| sampling.penalises()));
    let block = op.run(cx, &x, rows.parts.as_ref())?;
    Ok(Draws { block, rows: rows.logits.row_count() })
}

/// Words per row of `seen`.
pub fn seen_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

#[derive(Debug)]
pub struct Sample {
    pub sampling: Sampling,
}

impl Sample {
    /// I32 [5, n]: tokens, then the bits of four rows of floats.
    fn run(&self, cx: &Cx, x: &[&Tensor], parts: Option<&Tensor>) -> Result<Tensor> {
        let (logits, who, seed, s) = (x[0], x[1], x[2], &self.sampling);
        let (n, vocab) = (logits.row_count(), logits.cols());
        let words = seen_words(vocab);
        if who.numel() != SAMPLE_INFO * n || seed.numel() != 2 || !logits.is_contiguous() {
            return Err(Error::op("sample", format!("{logits:?}, who {who:?}, seed {seed:?}")));
        }
        let seen = match (s.penalises(), x.get(3)) {
            (false, _) => None,
            (true, Some(seen)) if seen.cols() == words => Some(*seen),
            (true, seen) => {
                let message = format!(
                    "repetition_penalty needs a row of {words} words a sequence, not {seen:?}"
                );
                return Err(Error::op("sample", message));
            }
        };
        let block = Tensor::new(&cx.pool, "draws", DType::I32, &[SAMPLE_OUTPUTS, n])?;
        let column =
            |i: usize| block.view(4 * i * n, if i == 0 { DType::I32 } else { DType::F32 }, &[n]);
        let [token, logp, scaled, truncated, entropy] =
            [column(0)?, column(1)?, column(2)?, column(3)?, column(4)?];
        let slices = slices(vocab);
        let part = cx.float("logit slices", &[n, SAMPLE_PARTS, slices])?;
        if let Some(parts) = parts.filter(|_| s.is_plain()) {
            let args = kernels::SampleJoinArgs {
                part: part.out(),
                parts,
                who,
                rows: n as i32,
                tiles: (parts.cols() / kernels::TILE_STATS) as i32,
                slices: slices as i32,
            };
            kernels::sample_join(&*cx.device, Launch::flat(n * slices), args)?;
        } else {
            let args = kernels::SampleSlicesArgs {
                part: part.out(),
                seen,
                logits,
                who,
                rows: n as i32,
                vocab: vocab as i32,
                slices: slices as i32,
                words: words as i32,
                scale: s.scale(),
                penalty: s.repetition_penalty as f32,
            };
            kernels::sample_slices(&*cx.device, Launch::warps(n * slices), slice_form(cx), args)?;
        }
        let rows = Rows { logits, who, seen, part: &part };
        let (mut top_k, mut top_p) = (None, None);
        if !s.is_greedy() && s.top_k > 0 && s.top_k < vocab {
            top_k = Some(self.search(cx, &rows, Threshold::TopK, None)?);
        }
        if !s.is_greedy() && s.top_p < 1.0 {
            if top_k.is_some() {
                self.keep(cx, &rows, top_k.as_ref(), None, 0.0)?;
            }
            top_p = Some(self.search(cx, &rows, Threshold::TopP, top_k.as_ref())?);
        }
        let truncates = !s.is_greedy() && (top_k.is_some() || top_p.is_some() || s.min_p > 0.0);
        if truncates {
            self.keep(cx, &rows, top_k.as_ref(), top_p.as_ref(), s.min_p)?;
        }
        let args = kernels::SampleArgs {
            token: token.out(),
            logp: logp.out(),
            logp_scaled: scaled.out(),
            logp_truncated: truncated.out(),
            entropy: entropy.out(),
            seen: seen.map(Tensor::out),
            part: &part,
            logits,
            who,
            seed,
            top_k_rank: top_k.as_ref(),
            top_p_rank: top_p.as_ref(),
            rows: n as i32,
            vocab: vocab as i32,
            slices: slices as i32,
            words: words as i32,
            greedy: i32::from(s.is_greedy()),
            truncates: i32::from(truncates),
            scale: s.scale(),
            min_p: s.min_p as f32,
            penalty: s.repetition_penalty as f32,
        };
        kernels::sample(&*cx.device, Launch::warps(n), args)?;
        Ok(block)
    }

    /// Replaces the weights of each row's slices by those of the kept values.
    fn keep(
        &self,
        cx: &Cx,
        rows: &Rows,
        top_k: Option<&Tensor>,
        top_p: Option<&Tensor>,
        min_p: f64,
    ) -> Result<()> {
        let (n, vocab, s) = (rows.logits.row_count(), rows.logits.cols(), &self.sampling);
        let slices = slices(vocab);
        let args = kernels::SampleKeptArgs {
            part: rows.part.out(),
            seen: rows.seen,
            logits: rows.logits,
            who: rows.who,
            top_k_rank: top_k,
            top_p_rank: top_p,
            rows: n as i32,
            vocab: vocab as i32,
            slices: slices as i32,
            words: seen_words(vocab) as i32,
            scale: s.scale(),
            min_p: min_p as f32,
            penalty: s.repetition_penalty as f32,
        };
        kernels::sample_kept(&*cx.device, Launch::warps(n * slices), args)
    }

    /// The threshold of each row, I32 `[n]`: its number in the order of all floats. With `floor`,
    /// the thresholds of an earlier search, the weights of the slices are those of the values not
    /// below it.
    fn search(
        &self,
        cx: &Cx,
        rows: &Rows,
        threshold: Threshold,
        floor: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (n, vocab, s) = (rows.logits.row_count(), rows.logits.cols(), &self.sampling);
        let slices = slices(vocab);
        let count = if threshold == Threshold::TopK { s.top_k as i32 } else { 0 };
        let sums = cx.float("sums above thresholds", &[n, SAMPLE_WAYS, slices])?;
        let floats = || cx.float("thresholds", &[n]);
        let (base, limit, top) = (floats()?, floats()?, floats()?);
        let ints = || Tensor::new(&cx.pool, "thresholds", DType::I32, &[n]);
        let (rank, width, digit) = (ints()?, ints()?, ints()?);
        let args = kernels::SampleBoundsArgs {
            rank: rank.out(),
            width: width.out(),
            digit: digit.out(),
            base: base.out(),
            limit: limit.out(),
            top: top.out(),
            part: rows.part,
            who: rows.who,
            floor_rank: floor,
            rows: n as i32,
            vocab: vocab as i32,
            slices: slices as i32,
            count,
            top_p: s.top_p as f32,
            scale: s.scale(),
        };
        kernels::sample_bounds(&*cx.device, Launch::warps(n), args)?;
        for _ in 0..SAMPLE_PASSES {
            let args = kernels::SampleAboveArgs {
                sums: sums.out(),
                seen: rows.seen,
                logits: rows.logits,
                who: rows.who,
                part: rows.part,
                rank: &rank,
                width: &width,
                digit: &digit,
                top: &top,
                rows: n as i32,
                vocab: vocab as i32,
                slices: slices as i32,
                words: seen_words(vocab) as i32,
                count,
                scale: s.scale(),
                penalty: s.repetition_penalty as f32,
            };
            kernels::sample_above(&*cx.device, Launch::warps(n * slices), args)?;
            let args = kernels::SampleNarrowArgs {
                rank: rank.out(),
                width: width.out(),
                digit: digit.out(),
                base: base.out(),
                limit: &limit,
                sums: &sums,
                who: rows.who,
                rows: n as i32,
                slices: slices as i32,
            };
            kernels::sample_narrow(&*cx.device, Launch::warps(n), args)?;
        }
        Ok(rank)
    }
}

/// The inputs of a search for a threshold.
struct Rows<'a> {
    logits: &'a Tensor,
    who: &'a Tensor,
    seen: Option<&'a Tensor>,
    part: &'a Tensor,
}

#[derive(Clone, Copy, PartialEq)]
enum Threshold {
    TopK,
    TopP,
}

impl Op for Sample {
    fn name(&self) -> &'static str {
        "sample"
    }

    fn forward(&self, cx: &mut Cx, x: &[&Tensor], _need: &Need) -> Result<Fwd> {
        let block = self.run(cx, x, None)?;
        let n = x[0].row_count();
        let mut outputs = vec![block.view(0, DType::I32, &[n])?];
        for i in 1..SAMPLE_OUTPUTS {
            outputs.push(block.view(4 * i * n, DType::F32, &[n])?);
        }
        outputs.extend(x.get(3).map(|seen| (*seen).clone()));
        Ok(Fwd { outputs, saved: vec![] })
    }

    fn oracle(&self, _round: Round, x: &[F64]) -> Vec<F64> {
        let (n, vocab) = (x[0].row_count(), x[0].cols());
        let mut out: Vec<F64> = (0..SAMPLE_OUTPUTS).map(|_| F64::zeros(&[n])).collect();
        let mut seen = x.get(3).cloned();
        let key = [x[2].data[0] as i32 as u32, x[2].data[1] as i32 as u32];
        let log_softmax = |l: &[f64], scale: f64| -> Vec<f64> {
            let top = l.iter().copied().fold(f64::NEG_INFINITY, f64::max) * scale;
            let lse = top + l.iter().map(|v| (v * scale - top).exp()).sum::<f64>().ln();
            l.iter().map(|v| v * scale - lse).collect()
        };
        for r in 0..n {
            let who = &x[1].data[SAMPLE_INFO * r..][..SAMPLE_INFO];
            if who[0] < 0.0 {
                continue;
            }
            let has = |bits: &F64, t: usize| {
                (bits.row(who[2] as usize)[t / 32] as i32 >> (t % 32)) & 1 == 1
            };
            let tokens: Vec<u32> = seen
                .iter()
                .flat_map(|s| (0..vocab).filter(|t| has(s, *t)))
                .map(|t| t as u32)
                .collect();
            let p = self.sampling.distribution(x[0].row(r), &tokens);
            let counter = [who[1] as u32, who[0] as u32, 0, SAMPLE_TAG];
            let u = f64::from(uniform(philox(key, counter)[0]));
            let mut below = 0.0;
            let passes = |v: &f64| {
                below += v;
                below > u
            };
            let last = p.iter().rposition(|v| *v > 0.0).unwrap_or(0);
            let token = p.iter().position(passes).unwrap_or(last);
            let scaled = log_softmax(x[0].row(r), f64::from(self.sampling.scale()));
            out[0].data[r] = token as f64;
            out[1].data[r] = log_softmax(x[0].row(r), 1.0)[token];
            out[2].data[r] = scaled[token];
            out[3].data[r] = p[token].ln();
            out[4].data[r] = -scaled.iter().map(|l| l.exp() * l).sum::<f64>();
            if let Some(seen) = &mut seen {
                let word = &mut seen.row_mut(who[2] as usize)[token / 32];
                *word = f64::from(*word as i32 | (1u32 << (token % 32)) as i32);
            }
        }
        out.extend(seen);
        out
    }

    fn cost(&self, x: &[&Tensor]) -> Cost {
        Cost::memory(&x[..1], 20 * x[0].row_count())
    }
}

pub fn cases(rng: &mut Rng) -> Vec<Case> {
    let plain = Sampling { temperature: 1.0, ..Sampling::greedy() };
    let mut cases = Vec::new();
    for (rows, vocab, sampling) in [
        (3, 5, Sampling::greedy()),
        (33, 130, plain.clone()),
        (9, 1031, Sampling { temperature: 0.7, ..plain.clone() }),
        (9, 513, Sampling { temperature: 1.5, top_k: 20, ..plain.clone() }),
        (9, 300, Sampling { top_p: 0.8, ..plain.clone() }),
        (9, 97, Sampling { min_p: 0.2, ..plain.clone() }),
        (9, 300, Sampling { repetition_penalty: 1.4, ..Sampling::greedy() }),
        (
            17,
            300,
            Sampling {
                temperature: 0.8,
                top_k: 40,
                top_p: 0.9,
                min_p: 0.05,
                repetition_penalty: 1.3,
                seed: 0,
            },
        ),
        // Several slices per row, the last one ragged.
        (5, 4999, plain.clone()),
        (4, 6147, Sampling { repetition_penalty: 1.4, ..Sampling::greedy() }),
        (5, 4999, Sampling { temperature: 0.6, min_p: 0.02, ..plain.clone() }),
        (
            5,
            6147,
            Sampling {
                temperature: 0.8,
                top_k: 300,
                top_p: 0.9,
                min_p: 0.0,
                repetition_penalty: 1.3,
                seed: 0,
            },
        ),
    ] {
        let logits = Arg::float(rng.array(&[rows, vocab], 2.0));
        let who: Vec<i32> = (0..rows as i32)
            .flat_map(|r| [if r == 2 { -1 } else { 100 + r }, r * 7, rows as i32 - 1 - r])
            .collect();
        let seed: Vec<i32> = vec![rng.bits() as i32, rng.bits() as i32];
        let mut inputs = vec![logits, Arg::ints(&who), Arg::ints(&seed)];
        if sampling.penalises() {
            let words = seen_words(vocab);
            let mut seen = Arg::ints(&[]);
            seen.value =
                F64::from_fn(&[rows, words], |_| f64::from(rng.bits() as i32 & rng.bits() as i32));
            inputs.push(seen);
        }
        let label = format!("rows {rows} vocab {vocab} {sampling:?}");
        cases.push(Case::new(label, Sample { sampling }, inputs));
    }
    cases
}

pub fn perf(rng: &mut Rng, s: &PerfShape) -> Vec<Case> {
    let rows: Vec<i32> = (0..s.sequences as i32).flat_map(|r| [r, 0, r]).collect();
    let logits = Arg::float(rng.array(&[s.sequences, s.vocab], 2.0));
    let plain = Sampling { temperature: 1.0, ..Sampling::greedy() };
    let nucleus = Sampling { top_p: 0.95, ..plain.clone() };
    let case = |label: &str, sampling| {
        let inputs = vec![logits.clone(), Arg::ints(&rows), Arg::ints(&[1, 2])];
        Case::new(label, Sample { sampling }, inputs)
    };
    vec![case("full distribution", plain), case("top_p 0.95", nucleus)]
}
