//! The memory plan: what a run will hold on its device, known before it starts. Layer 8.
//!
//! Invariant: nothing is modelled twice. The plan is a step of the run itself on [`DryRun`], a
//! device that computes nothing, and what the pool then says of its peak; so a change of an op, of
//! the tape or of the optimizer is in the plan already.

use std::path::Path;
use std::sync::Arc;

use super::Trainer;
use super::tuning::{prepare, scheme};
use crate::autograd::{Cx, Recompute};
use crate::config::{GradientCheckpointing, Optim, PeftConfig, TrainingConfig};
use crate::device::{Device, dry_run::DryRun, mebibytes};
use crate::error::{Error, Result};
use crate::methods::offline::sft::Sft;
use crate::model::decoder::Decoder;
use crate::model::layout::ModelConfig;

/// What is asked of a plan: the run's own keys, and how long its rows are.
#[derive(Clone)]
pub struct PlanRequest<'a> {
    pub model: &'a ModelConfig,
    /// The model's folder, which an adapter's config names.
    pub dir: &'a Path,
    pub adapter: Option<&'a Path>,
    pub peft: PeftConfig,
    pub training: TrainingConfig,
    /// Tokens of the longest sequence, and of all of a micro-batch.
    pub length: usize,
    pub tokens: usize,
    /// The method holds its policy against a model that stays: see [`Decoder::reference`].
    pub reference: bool,
}

/// What will be in use at the peak.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub recompute: Recompute,
    pub peak: usize,
    /// What the peak is made of, largest first: what it is, bytes.
    pub parts: Vec<(&'static str, usize)>,
    /// As the allocator names it.
    pub blocks: Vec<(String, usize)>,
}

impl Plan {
    /// The plan of `request` on a device that stands for `cx`'s, with its dtype and its choices of
    /// kernels.
    pub fn new(cx: &Cx, request: &PlanRequest, recompute: Recompute) -> Result<Plan> {
        Plan::on(Arc::new(DryRun::like(&*cx.device)?), cx, request, recompute)
    }

    /// As [`Plan::new`], on a device that need not be there; dtype and choices are those of `like`.
    pub fn on(
        device: Arc<dyn Device>,
        like: &Cx,
        request: &PlanRequest,
        recompute: Recompute,
    ) -> Result<Plan> {
        let mut cx = Cx::new(device, like.dtype)?;
        (cx.matmul, cx.attention, cx.recompute) = (like.matmul, like.attention, recompute);
        let base = Decoder::builder(request.model.clone())
            .storage(scheme(&request.peft))
            .positions(request.length)
            .build(&cx)?;
        // Initial values take host time and no memory: the plan's are the plainest.
        let peft = PeftConfig { init_lora_weights: "true".into(), ..request.peft.clone() };
        let model = prepare(&cx, base, &peft, request.adapter, request.dir, 0)?;
        let reference = if request.reference { Some(model.reference(&cx)?) } else { None };
        // Sequences as long as they get, and a shorter one for the rest of the tokens.
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
        let mut sft =
            Sft::from_sequences(lengths.iter().cycle().take(rows).map(|n| row(*n)).collect());
        let mut trainer = Trainer::new(cx, model, training, rows)?;
        trainer.step(&mut sft)?;
        drop(reference);
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
        Ok(Plan { recompute, peak, parts, blocks })
    }

    /// The table that is printed before a run.
    pub fn table(&self, request: &PlanRequest, available: usize) -> String {
        let mut text = format!(
            "memory plan, micro-batches of at most {} tokens, gradient_checkpointing={}:\n",
            request.tokens,
            self.recompute == Recompute::Layers
        );
        for (part, bytes) in &self.parts {
            text += &format!("{:>14}  {part}\n", mebibytes(*bytes));
        }
        text + &format!(
            "{:>14}  at the peak; {} are available",
            mebibytes(self.peak),
            mebibytes(available)
        )
    }
}

/// Which line of the table a block belongs to.
fn part(block: &str) -> &'static str {
    match block {
        "weights" => "weights",
        "adapter weights" => "adapter",
        "reference weights" => "reference",
        "parameter gradients" => "gradients",
        "adam moments" | "master weights" | "optimizer scalars" => "optimizer state",
        "logits chunk" | "dlogits chunk" | "head rows" => "head chunk",
        "activation gradients" => "activation gradients",
        "dequantised weight" | "weight to quantise" => "a dequantised weight",
        "partial sums" | "column factors" | "attention delta" => "scratch",
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

/// Bytes that a run on `cx` may take: what the device has free, and what its pool holds unused.
pub fn available(cx: &Cx) -> Result<usize> {
    Ok(cx.device.memory()?.free.saturating_add(cx.pool.cached()))
}

/// Plans the run: `gradient_checkpointing=auto` turns on where it does not fit without, a tenth
/// kept for what the pool cannot use. Errors: a run that does not fit in `available` bytes, with
/// what would make it.
pub fn fit(cx: &Cx, request: &PlanRequest, available: usize) -> Result<Plan> {
    let plan = match request.training.gradient_checkpointing {
        GradientCheckpointing::On => Plan::new(cx, request, Recompute::Layers)?,
        GradientCheckpointing::Off => Plan::new(cx, request, Recompute::Off)?,
        GradientCheckpointing::Auto => {
            let plan = Plan::new(cx, request, Recompute::Off)?;
            if plan.peak > available / 10 * 9 {
                Plan::new(cx, request, Recompute::Layers)?
            } else {
                plan
            }
        }
    };
    if plan.peak <= available {
        return Ok(plan);
    }
    Err(Error::OutOfMemory(refusal(cx, request, &plan, available)?))
}

/// A change of keys that takes less memory: what to write, and what it makes of the run.
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
            std::mem::replace(&mut a.training.gradient_checkpointing, GradientCheckpointing::On)
                == GradientCheckpointing::Off
        }),
        (format!("max_length={}", request.length / 2), |a| {
            (a.length, a.tokens) = (a.length / 2, a.tokens.div_ceil(2));
            a.length >= 2
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
        format!("the run does not fit.\n{}\nWhat would change it:", plan.table(request, available));
    let mut all = request.clone();
    let mut together = Vec::new();
    for (keys, change) in &changes {
        let mut one = request.clone();
        if !change(&mut one) {
            continue;
        }
        let on = one.training.gradient_checkpointing == GradientCheckpointing::On;
        let recompute = if on { Recompute::Layers } else { plan.recompute };
        let peak = Plan::new(cx, &one, recompute)?.peak;
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
        text += " (not enough: take a smaller model or a larger device)";
    }
    Ok(text)
}
