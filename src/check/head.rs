//! The self-check of the head on Hopper: statistics and gradient at the ends of a product, without
//! logits in memory, against stored logits. Layer 8.
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
use crate::ops::head_pass::{HeadPurpose, LogitPass, gradient};
use crate::ops::head_terms::{LogitTerm, RowGradient};
use crate::ops::logit_map::LogitMap;
use crate::tensor::Tensor;

/// Rows, hidden size and vocabulary: 0.5B, 0.6B, 1.5B and 135M models.
const SIZES: [[usize; 3]; 4] =
    [[2_000, 896, 151_936], [1_500, 1024, 151_936], [1_000, 1536, 151_936], [2_500, 576, 49_152]];
/// 1 / temperature.
const SCALE: f32 = 1.25;
/// Timed runs, after one that is not timed.
const RUNS: usize = 3;

/// On a device with the Hopper kernels, compares results bit for bit. The name of the case has the
/// times.
pub fn check_head(device: &Arc<dyn Device>, each: impl FnMut(&CheckOutcome)) -> Vec<CheckOutcome> {
    let cases = SIZES.into_iter().flat_map(|sizes| [(sizes, false), (sizes, true)]);
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
    let rows = Rows::new(device, sizes, entropy)?;
    let (stored, stored_times) = rows.run(false)?;
    let (fused, times) = rows.run(true)?;
    let names = ["log-prob", "log of the sum", "entropy", "most likely token", "gradient"];
    let differ = stored.iter().zip(&fused).zip(names).filter(|((a, b), _)| a != b);
    let differ = differ.map(|(_, name)| name.into()).collect();
    let [m, k, vocab] = sizes;
    let mut case = format!("rows {m} hidden {k} vocabulary {vocab}");
    if entropy {
        case += ", with the entropy's gradient";
    }
    for (name, (time, before)) in
        ["statistics", "gradient"].into_iter().zip(times.into_iter().zip(stored_times))
    {
        case += &format!("; {name} {time:.0} us, with stored logits {before:.0}");
    }
    Ok((case, differ))
}

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

    /// The bytes of all results, and the median times of statistics and gradient in microseconds.
    fn run(&self, skips: bool) -> Result<([Vec<u8>; 5], [f32; 2])> {
        let Rows { cx, x, w, target, .. } = self;
        let (m, vocab) = (x.row_count(), w.row_count());
        let (terms, of) = ([LogitTerm { rows: x, weight: w }], (SCALE, LogitMap::PLAIN));
        let mut times = [Vec::new(), Vec::new()];
        let mut last: Option<[Tensor; 5]> = None;
        for _ in 0..=RUNS {
            drop(last.take());
            let pass = LogitPass::new(cx, (m, vocab), m, HeadPurpose::Statistics, skips)?;
            let dlogits = cx.real("dlogits chunk", &[m, vocab])?;
            let start = cx.device.mark()?;
            pass.forward(cx, &terms, target, (0, m), of)?;
            let marks = [cx.device.mark()?, cx.device.mark()?];
            let logits = pass.logits(m)?;
            let g = RowGradient {
                target: target.clone(),
                lse: pass.lse.clone(),
                logp: self.logp.clone(),
                entropy: Some(pass.entropy.clone()),
                by_entropy: self.by_entropy.clone(),
            };
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
}
