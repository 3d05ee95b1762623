//! The self-check of the head on Hopper: statistics and gradient at the ends of a product, with and
//! without logits in memory, against kernels that read stored logits. Layer 8.
//!
//! Invariant: the sizes are those of models, for which a block has many tiles; the cases of the ops
//! are small.

use std::sync::Arc;

use super::{CheckOutcome, check_hopper};
use crate::autograd::Cx;
use crate::config::MatmulChoice;
use crate::device::{DType, Device};
use crate::error::Result;
use crate::ops::case::Rng;
use crate::ops::fastest::median;
use crate::ops::head::Head;
use crate::ops::head_pass::{HeadForm, HeadPurpose, LogitPass, chunks, gradient};
use crate::ops::head_terms::{LogitTerm, RowGradient, TermSlots, gradients_of};
use crate::ops::logit_map::LogitMap;
use crate::ops::sample::{Draw, Sampling, sample_rows};
use crate::tensor::Tensor;

/// Rows, hidden size and vocabulary: 0.5B, 0.6B, 1.5B and 135M models, and ragged tiles.
const SIZES: [[usize; 3]; 5] = [
    [1_000, 896, 151_936],
    [500, 1024, 151_936],
    [500, 1536, 151_936],
    [1_500, 576, 49_152],
    [700, 840, 50_008],
];
/// Chunks of a pass whose gradients are written to the same memory.
const CHUNKS: usize = 3;
/// 1 / temperature.
const SCALE: f32 = 1.25;
/// Rows that tokens are drawn from.
const DRAWN: usize = 256;
/// Timed runs, after one that is not timed.
const RUNS: usize = 3;

/// On a device with the Hopper kernels, compares results bit for bit. The name of the case has the
/// times.
pub fn check_head(device: &Arc<dyn Device>, each: impl FnMut(&CheckOutcome)) -> Vec<CheckOutcome> {
    let with_entropy = [SIZES[0], SIZES[4]].map(|sizes| (sizes, true));
    let cases = SIZES.map(|sizes| (sizes, false)).into_iter().chain(with_entropy);
    check_hopper(
        device,
        "head rows",
        cases,
        |(sizes, entropy)| compare(device, sizes, entropy),
        each,
    )
}

/// The name of the case, and what differs. `entropy`: its upstream is not zero.
pub fn compare(
    device: &Arc<dyn Device>,
    sizes: [usize; 3],
    entropy: bool,
) -> Result<(String, Vec<String>)> {
    let mut rows = Rows::new(device, sizes, entropy)?;
    let [m, k, vocab] = sizes;
    let mut case = format!("rows {m} hidden {k} vocabulary {vocab}");
    if entropy {
        case += ", with the entropy's gradient";
    }
    let (apart, times) = rows.timed(HeadForm::Apart)?;
    let mut differ = Vec::new();
    let mut compare = |what: &str, got: &Figures| {
        let names = ["log-prob", "log of the sum", "entropy", "most likely token", "gradient"];
        let other = apart.iter().zip(got).zip(names).filter(|((a, b), _)| a != b);
        differ.extend(other.map(|(_, name)| format!("{name} ({what})")));
    };
    let shown = |[statistics, gradient]: [f32; 2]| {
        format!("statistics {statistics:.0} us, gradient {gradient:.0}")
    };
    case += &format!("; apart: {}", shown(times));
    for (form, what) in [(HeadForm::Stored, "logits stored"), (HeadForm::Absent, "no logits")] {
        let (figures, times) = rows.timed(form)?;
        compare(what, &figures);
        case += &format!("; {what}: {}", shown(times));
    }
    // The gradients of all chunks, at once as input of a product.
    if rows.in_chunks(HeadForm::Absent)? != rows.in_chunks(HeadForm::Apart)? {
        differ.push("gradient of the rows (in chunks)".into());
    }
    let [from_logits, from_tiles] = [rows.draws(false)?, rows.draws(true)?];
    differ.extend((from_logits != from_tiles).then(|| "sampled tokens".into()));
    Ok((case, differ))
}

/// The bytes of log-probs, logs of sums, entropies, most likely tokens and the gradient of logits.
type Figures = [Vec<u8>; 5];

/// Hidden rows with a head and upstreams.
struct Rows {
    cx: Cx,
    x: Tensor,
    w: Tensor,
    target: Tensor,
    /// Upstreams of the log-prob and of the entropy.
    logp: Tensor,
    by_entropy: Option<Tensor>,
}

impl Rows {
    fn new(device: &Arc<dyn Device>, [m, k, vocab]: [usize; 3], entropy: bool) -> Result<Rows> {
        let mut cx = Cx::new(device.clone(), DType::BF16)?;
        cx.matmul = MatmulChoice::Own;
        let mut rng = Rng(31);
        let values: Vec<f32> = (0..65_537).map(|_| rng.normal() as f32).collect();
        let tensor = |dtype, shape: &[usize], scale: f32| {
            let n: usize = shape.iter().product();
            let some: Vec<f32> = values.iter().map(|v| scale * v).cycle().take(n).collect();
            Tensor::from_f32(&cx.pool, "head rows", dtype, shape, &some)
        };
        let x = tensor(DType::BF16, &[m, k], 1.0)?;
        let w = tensor(DType::BF16, &[vocab, k], 3.0 * (k as f32).powf(-0.5))?;
        let targets: Vec<i32> = (0..m).map(|_| rng.below(vocab) as i32).collect();
        let target = cx.ints("targets", &targets)?;
        let by_entropy = if entropy { Some(tensor(DType::F32, &[m], 0.01)?) } else { None };
        let logp = tensor(DType::F32, &[m], 1.0)?;
        Ok(Rows { cx, x, w, target, logp, by_entropy })
    }

    /// All figures, and the median times of statistics and gradient in microseconds.
    fn timed(&self, form: HeadForm) -> Result<(Figures, [f32; 2])> {
        let Rows { cx, x, w, target, .. } = self;
        let (m, vocab) = (x.row_count(), w.row_count());
        let (terms, of) = ([LogitTerm { rows: x, weight: w }], (SCALE, LogitMap::PLAIN));
        let mut times = [Vec::new(), Vec::new()];
        let mut last: Option<[Tensor; 5]> = None;
        for _ in 0..=RUNS {
            drop(last.take());
            let pass = LogitPass::new(cx, (m, vocab), m, HeadPurpose::Statistics, form)?;
            let dlogits = cx.real("dlogits chunk", &[m, vocab])?;
            let start = cx.device.mark()?;
            pass.forward(cx, &terms, target, (0, m), of)?;
            let marks = [cx.device.mark()?, cx.device.mark()?];
            let (logits, g) = (pass.logits(m)?, self.by_row(&pass));
            gradient(cx, &dlogits, logits.as_ref(), &terms, (0, m), &g, of)?;
            let end = cx.device.mark()?;
            let [statistics_end, gradient_start] = marks;
            let intervals = [(start, statistics_end), (gradient_start, end)];
            for (times, (from, to)) in times.iter_mut().zip(intervals) {
                times.push(1000.0 * cx.device.elapsed_ms(from, to)?);
            }
            last = Some([pass.logp, pass.lse, pass.entropy, pass.best, dlogits]);
        }
        let mut bytes = [(); 5].map(|()| Vec::new());
        for (bytes, t) in bytes.iter_mut().zip(last.iter().flatten()) {
            *bytes = t.to_bytes()?;
        }
        Ok((bytes, times.each_ref().map(|times| median(&times[1..]).unwrap_or_default())))
    }

    fn by_row(&self, pass: &LogitPass) -> RowGradient {
        RowGradient {
            target: self.target.clone(),
            lse: pass.lse.clone(),
            logp: self.logp.clone(),
            entropy: Some(pass.entropy.clone()),
            by_entropy: self.by_entropy.clone(),
        }
    }

    /// The bytes of the rows' gradient, in chunks that use the same memory one after the other.
    fn in_chunks(&self, form: HeadForm) -> Result<Vec<u8>> {
        let Rows { cx, x, w, target, .. } = self;
        let (m, vocab) = (x.row_count(), w.row_count());
        let (terms, of) = ([LogitTerm { rows: x, weight: w }], (SCALE, LogitMap::PLAIN));
        let chunk = m.div_ceil(CHUNKS);
        let pass = LogitPass::new(cx, (m, vocab), chunk, HeadPurpose::Statistics, form)?;
        let (dx, dlogits) = (cx.real("gradient", x.shape())?, cx.real("dlogits", &[chunk, vocab])?);
        let mut slots = [TermSlots::of_rows(&dx)];
        for range in chunks(m, chunk) {
            pass.forward(cx, &terms, target, range, of)?;
            let n = range.1 - range.0;
            let (dl, g) = (dlogits.rows(0, n)?, self.by_row(&pass).rows(range.0, range.1)?);
            gradient(cx, &dl, pass.logits(n)?.as_ref(), &terms, range, &g, of)?;
            gradients_of(cx, &dl, &terms, &mut slots, range)?;
        }
        dx.to_bytes()
    }

    /// The bits of tokens drawn from some of the rows.
    fn draws(&mut self, from_tiles: bool) -> Result<Vec<[u32; 5]>> {
        let Rows { cx, x, w, .. } = self;
        let (n, head) = (x.row_count().min(DRAWN), Head::plain(w.clone()));
        let rows = head.rows_to_sample(cx, &x.rows(0, n)?, from_tiles)?;
        let who: Vec<i32> = (0..n as i32).flat_map(|r| [r, 3 * r, r]).collect();
        let (who, seed) = (cx.ints("who", &who)?, cx.ints("seed", &[3, 1])?);
        let how = Sampling { temperature: 1.0, ..Sampling::greedy() };
        let draws = sample_rows(cx, &how, &rows, &who, &seed, None)?.download()?;
        let bits = |d: &Draw| {
            let [logp, scaled, truncated, entropy] =
                [d.logp, d.logp_scaled, d.logp_truncated, d.entropy].map(f32::to_bits);
            [d.token, logp, scaled, truncated, entropy]
        };
        Ok(draws.iter().map(bits).collect())
    }
}
