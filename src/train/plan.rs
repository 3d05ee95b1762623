//! The memory plan: the peak memory of a run on its device, known before it starts. Layer 8.
//!
//! Invariant: nothing is modelled separately. The plan is a step of the run itself on [`DryRun`], a
//! device that computes nothing, and the peak that the pool reports; so it includes every change of
//! an op, of the tape or of the optimizer. The plan of an online method is a step of that method:
//! cache, reference, reward model, critic, a prefill, a decode step of all sequences, the longest
//! completions.

use std::path::Path;
use std::sync::Arc;

use super::samples::Samples;
use super::tuning::{prepare, scheme};
use super::{StepPlan, Trainer};
use crate::autograd::{Cx, Recompute};
use crate::config::{GradientCheckpointing, Optim, PeftConfig, TrainingConfig};
use crate::device::{Device, dry_run::DryRun, mebibytes};
use crate::error::{Error, Result};
use crate::methods::Method;
use crate::methods::offline::sft::Sft;
use crate::model::decoder::Decoder;
use crate::model::layout::ModelConfig;
use crate::observer::Silent;

/// The input of a plan: the options of the run and the lengths of its rows.
#[derive(Clone)]
pub struct PlanRequest<'a> {
    pub model: &'a ModelConfig,
    /// The model's folder, which the config of an adapter names.
    pub dir: &'a Path,
    pub adapter: Option<&'a Path>,
    pub peft: PeftConfig,
    pub training: TrainingConfig,
    /// Tokens of the longest sequence, and of a whole micro-batch.
    pub length: usize,
    pub tokens: usize,
    /// Whether the method compares its policy with a frozen model: see [`Decoder::reference`].
    pub reference: bool,
    /// Builds an online method: the plan is then a step of it with its longest prompts and
    /// completions. None: a step over rows.
    pub online: Option<&'a BuildOnline<'a>>,
    /// Most sequences generated at once, if the options leave the number to the plan.
    pub sequences: Option<usize>,
    /// Prompts that are completed at every evaluation.
    pub samples: Option<&'a Samples>,
}

/// Builds an online method from the options of a run.
pub type BuildOnline<'a> = dyn Fn(&TrainingConfig) -> Result<Box<dyn Method>> + 'a;

/// The planned peak.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub recompute: Recompute,
    /// Sequences generated at once, if the plan chooses them.
    pub sequences: Option<usize>,
    pub peak: usize,
    /// The parts of the peak, largest first: description and bytes.
    pub parts: Vec<(&'static str, usize)>,
    /// The blocks of the peak by the allocator's names.
    pub blocks: Vec<(String, usize)>,
}

impl Plan {
    /// The plan of `request` on a device that imitates that of `cx`, with its dtype and choice of
    /// kernels.
    pub fn new(cx: &Cx, request: &PlanRequest, recompute: Recompute) -> Result<Plan> {
        Plan::on(Arc::new(DryRun::like(&*cx.device)?), cx, request, recompute)
    }

    /// [`Plan::new`] on any device, which need not be present; dtype and kernels are those of
    /// `like`.
    pub fn on(
        device: Arc<dyn Device>,
        like: &Cx,
        request: &PlanRequest,
        recompute: Recompute,
    ) -> Result<Plan> {
        let mut cx = Cx::new(device, like.dtype)?;
        (cx.matmul, cx.attention, cx.recompute) = (like.matmul, like.attention, recompute);
        // Messages about the run come from the run itself.
        cx.observer = Arc::new(Silent);
        let base = Decoder::builder(request.model.clone())
            .storage(scheme(&request.peft))
            .positions(request.length)
            .build(&cx)?;
        let model = prepare(&cx, base, &request.peft, request.adapter, request.dir, 0)?;
        let mut trainer = match request.online {
            Some(build) => online_step(cx, model, request, build)?,
            None => row_step(cx, model, request)?,
        };
        if let Some(samples) = request.samples {
            samples.complete(&mut trainer.cx, &mut trainer.model)?;
        }
        let (peak, blocks) = (trainer.cx.pool.in_use().1, trainer.cx.pool.high_water());
        let mut parts: Vec<(&'static str, usize)> = Vec::new();
        for (name, bytes) in &blocks {
            let part = part(name);
            match parts.iter_mut().find(|p| p.0 == part) {
                Some(p) => p.1 += bytes,
                None => parts.push((part, *bytes)),
            }
        }
        parts.sort_by_key(|p| std::cmp::Reverse(p.1));
        Ok(Plan { recompute, sequences: request.sequences, peak, parts, blocks })
    }

    /// The table that is printed before a run.
    pub fn table(&self, request: &PlanRequest, available: usize) -> String {
        let what = match request.online {
            None => format!("micro-batches of at most {} tokens", request.tokens),
            Some(_) => "all prompts and completions at their maximum length".into(),
        };
        let generated = match self.sequences {
            None => String::new(),
            Some(n) => format!(", sequences generated at once: {n}"),
        };
        let mut text = format!(
            "memory plan, {what}{generated}, gradient_checkpointing={}:\n",
            self.recompute.word()
        );
        for (part, bytes) in &self.parts {
            text += &format!("{:>14}  {part}\n", mebibytes(*bytes));
        }
        text + &format!(
            "{:>14}  at the peak; {} available",
            mebibytes(self.peak),
            mebibytes(available)
        )
    }
}

/// A step over rows of the greatest length, and one shorter row for the remaining tokens.
fn row_step(cx: Cx, model: Decoder, request: &PlanRequest) -> Result<Trainer> {
    let reference = if request.reference { Some(model.reference(&cx)?) } else { None };
    let length = request.length.max(2);
    let mut lengths = vec![length; request.tokens / length];
    lengths.extend(
        Some(request.tokens % length)
            .filter(|rest| *rest > 1 || request.tokens < length)
            .map(|n| n.max(2)),
    );
    let mut training = request.training.clone();
    training.per_device_train_batch_size = lengths.len();
    let rows = lengths.len() * training.gradient_accumulation_steps;
    let vocab = request.model.vocab_size.max(1);
    let row = |n: usize| ((0..n).map(|i| (i % vocab) as u32).collect(), vec![true; n]);
    let rows_of_step = lengths.iter().cycle().take(rows).map(|n| row(*n)).collect();
    let mut sft = Sft::from_sequences(rows_of_step)?;
    let mut trainer = Trainer::new(cx, model, training, rows)?;
    trainer.step(&mut sft)?;
    drop(reference);
    Ok(trainer)
}

/// The first step of an online method with everything that it holds: generation, rewards,
/// reference, update.
fn online_step(
    cx: Cx,
    model: Decoder,
    request: &PlanRequest,
    build: &BuildOnline,
) -> Result<Trainer> {
    let training = request.training.clone();
    let mut method = build(&training)?;
    if let Some(n) = request.sequences {
        method.set_sequences(n);
    }
    let steps = match method.micro_batches() {
        Some(n) => StepPlan::online(&training, n)?,
        None => StepPlan::new(&training, method.rows())?,
    };
    let mut trainer = Trainer::with_plan(cx, model, training, steps)?;
    method.attach(&mut trainer.cx, &trainer.model)?;
    trainer.step(&mut *method)?;
    Ok(trainer)
}

/// The line of the table to which a block belongs.
fn part(block: &str) -> &'static str {
    match block {
        "weights" => "weights",
        "adapter weights" => "adapter",
        "reference weights" => "reference",
        "reward model weights" => "reward model",
        "value model weights" => "value model",
        "kv cache" => "cache of keys and values",
        "parameter gradients" => "gradients",
        "adam moments" | "master weights" | "optimizer scalars" => "optimizer state",
        "logits chunk" | "dlogits chunk" | "logit slices" | "head rows" => "head chunk",
        "activation gradients" => "activation gradients",
        "dequantised weight" | "weight to quantise" => "a dequantised weight",
        "partial sums" | "column factors" | "filter gradients" | "attention delta"
        | "newton-schulz" => "scratch",
        "rope table" => "rope table",
        name if name.starts_with("nf4")
            || name.starts_with("int8")
            || name.starts_with("8-bit") =>
        {
            "quantised weights"
        }
        _ => "activations",
    }
}

/// Bytes available to a run on `cx`: free memory of the device plus unused memory of its pool.
pub fn available(cx: &Cx) -> Result<usize> {
    Ok(cx.device.memory()?.free.saturating_add(cx.pool.cached()))
}

/// Sequences generated at once: the first number to try, and the most, since more hardly speed up
/// decoding.
const SEQUENCES: (usize, usize) = (64, 1024);

/// Plans the run. `gradient_checkpointing=auto` recomputes if the run would not fit otherwise, with
/// a tenth of the memory kept in reserve for fragmentation. If the plan chooses the number of
/// sequences generated at once, the cache takes the remaining memory. Error: the run does not fit
/// in `available` bytes; the message lists options that would help.
pub fn fit(cx: &Cx, request: &PlanRequest, available: usize) -> Result<Plan> {
    let wanted = request.sequences.map(|n| n.clamp(1, SEQUENCES.1));
    let with = |n: usize| PlanRequest { sequences: Some(n), ..request.clone() };
    let first = match wanted {
        None => request.clone(),
        Some(n) => with(n.min(SEQUENCES.0)),
    };
    let mut plan = with_recompute(cx, &first, available)?;
    let Some(wanted) = wanted else {
        return match plan.peak <= available {
            true => Ok(plan),
            false => Err(Error::OutOfMemory(refusal(cx, request, &plan, available)?)),
        };
    };
    let recompute = plan.recompute;
    let again = |n: usize| Plan::new(cx, &with(n), recompute);
    let mut n = wanted.min(SEQUENCES.0);
    if plan.peak > available {
        while plan.peak > available && n > 1 {
            n /= 2;
            plan = again(n)?;
        }
        return match plan.peak <= available {
            true => Ok(plan),
            false => Err(Error::OutOfMemory(refusal(cx, &with(n), &plan, available)?)),
        };
    }
    let fits = |plan: &Plan| plan.peak <= available / 10 * 9;
    let (mut best, mut high) = (None, wanted + 1);
    if wanted > n {
        let all = again(wanted)?;
        if fits(&all) {
            return Ok(all);
        }
        high = wanted;
    }
    // Stops within about a sixteenth of the largest number that fits.
    while high > n + 1 + n / 16 {
        let middle = (n + high) / 2;
        let more = again(middle)?;
        match fits(&more) {
            true => (n, best) = (middle, Some(more)),
            false => high = middle,
        }
    }
    Ok(best.unwrap_or(plan))
}

/// The plan of a request with its `gradient_checkpointing`, whether it fits or not.
fn with_recompute(cx: &Cx, request: &PlanRequest, available: usize) -> Result<Plan> {
    Ok(match request.training.gradient_checkpointing {
        GradientCheckpointing::On => Plan::new(cx, request, Recompute::Layers)?,
        GradientCheckpointing::Light => Plan::new(cx, request, Recompute::Light)?,
        GradientCheckpointing::Off => Plan::new(cx, request, Recompute::Off)?,
        GradientCheckpointing::Auto => {
            for recompute in [Recompute::Off, Recompute::Light] {
                let plan = Plan::new(cx, request, recompute)?;
                if plan.peak <= available / 10 * 9 {
                    return Ok(plan);
                }
            }
            Plan::new(cx, request, Recompute::Layers)?
        }
    })
}

/// A change of options that saves memory: its text, and its effect on the request. False: it is not
/// possible.
type Change = (String, fn(&mut PlanRequest) -> bool);

fn refusal(cx: &Cx, request: &PlanRequest, plan: &Plan, available: usize) -> Result<String> {
    let keys = &request.training;
    let (half, double) =
        (keys.per_device_train_batch_size / 2, keys.gradient_accumulation_steps * 2);
    let changes: [Change; 6] = [
        (format!("per_device_train_batch_size={half} gradient_accumulation_steps={double}"), |a| {
            let t = &mut a.training;
            (t.per_device_train_batch_size, t.gradient_accumulation_steps) =
                (t.per_device_train_batch_size / 2, t.gradient_accumulation_steps * 2);
            a.tokens = a.tokens.div_ceil(2);
            t.per_device_train_batch_size > 0
        }),
        ("gradient_checkpointing=true".into(), |a| {
            let before = std::mem::replace(
                &mut a.training.gradient_checkpointing,
                GradientCheckpointing::On,
            );
            matches!(before, GradientCheckpointing::Off | GradientCheckpointing::Light)
        }),
        (format!("max_length={}", request.length / 2), |a| {
            (a.length, a.tokens) = (a.length / 2, a.tokens.div_ceil(2));
            a.length >= 2 && a.online.is_none()
        }),
        ("optim=adamw_8bit".into(), |a| {
            std::mem::replace(&mut a.training.optim, Optim::Adamw8bit) != Optim::Adamw8bit
        }),
        ("use_peft=true lora_target_modules=all-linear".into(), |a| {
            let full = !a.peft.use_peft && a.adapter.is_none();
            if full {
                a.peft.use_peft = true;
                a.peft.lora_target_modules = Some(vec!["all-linear".into()]);
                (a.peft.freeze, a.peft.lr_multipliers) = (None, None);
            }
            full
        }),
        ("load_in_4bit=true".into(), |a| {
            let dense = a.peft.use_peft && scheme(&a.peft).is_none();
            a.peft.load_in_4bit |= dense;
            dense
        }),
    ];
    let mut text =
        format!("the run does not fit.\n{}\nWhat would help:", plan.table(request, available));
    let mut all = request.clone();
    let mut together = Vec::new();
    for (keys, change) in &changes {
        let mut one = request.clone();
        if !change(&mut one) {
            continue;
        }
        let on = one.training.gradient_checkpointing == GradientCheckpointing::On;
        let recompute = if on { Recompute::Layers } else { plan.recompute };
        // The groups may not divide a generation with other micro-batches.
        let Ok(changed) = Plan::new(cx, &one, recompute) else { continue };
        let peak = changed.peak;
        if peak < plan.peak {
            let enough = if peak <= available { "" } else { " (not enough)" };
            text += &format!("\n{:>14}  with {keys}{enough}", mebibytes(peak));
            change(&mut all);
            together.push(keys.as_str());
        }
    }
    let peak = Plan::new(cx, &all, Recompute::Layers)?.peak;
    text += &format!("\n{:>14}  with all of them: {}", mebibytes(peak), together.join(" "));
    if peak > available {
        text += " (not enough: use a smaller model or a larger device)";
    }
    Ok(text)
}
