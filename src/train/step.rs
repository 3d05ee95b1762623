//! One optimizer step: its rows, forward, backward, clipping, update. Layer 8.
//!
//! Invariant: rows, random numbers and learning rate are functions of the step number.

use std::collections::BTreeMap;

use crate::autograd::Cx;
use crate::config::{SamplingStrategy, TrainingConfig};
use crate::data::order::epoch_order;
use crate::error::{Error, Result};
use crate::methods::{Method, Metric};
use crate::model::decoder::Decoder;
use crate::optim::schedule::Schedule;
use crate::optim::{AdamWConfig, Optimizer};

/// The results of one optimizer step.
#[derive(Clone, Debug)]
pub struct Step {
    /// Counts from 1.
    pub number: u64,
    pub epoch: f64,
    pub loss: f32,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f32,
    /// The learning rate of this step.
    pub learning_rate: f64,
    pub tokens: usize,
    pub metrics: Vec<Metric>,
}

/// Model, optimizer and method of one run, and its progress.
pub struct Trainer {
    pub cx: Cx,
    pub model: Decoder,
    pub optimizer: Optimizer,
    pub config: TrainingConfig,
    pub plan: StepPlan,
    pub schedule: Schedule,
    /// Number of finished optimizer steps.
    pub done: u64,
    /// Whether the last step gave a loss or gradient that is not finite.
    pub not_finite: bool,
    /// A step failed after its update had begun: neither the state before it nor the one after it
    /// is there, so no checkpoint can be written.
    pub half_applied: bool,
}

/// The rows of each step: Hugging Face's order of epochs, batches and accumulation, as a function
/// of the step number.
#[derive(Clone, Debug)]
pub struct StepPlan {
    rows: usize,
    batch: usize,
    accumulation: usize,
    sampling: SamplingStrategy,
    seed: u64,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
}

impl StepPlan {
    pub fn new(config: &TrainingConfig, rows: usize) -> Result<StepPlan> {
        if rows == 0 {
            return Err(Error::Run("there are no rows to train on".into()));
        }
        let (batch, accumulation) =
            (config.per_device_train_batch_size, config.gradient_accumulation_steps);
        let steps_per_epoch = rows.div_ceil(batch).div_ceil(accumulation) as u64;
        let sampling = config.train_sampling_strategy;
        let total_steps = config.total_steps(steps_per_epoch);
        Ok(StepPlan {
            rows,
            batch,
            accumulation,
            sampling,
            seed: config.seed,
            steps_per_epoch,
            total_steps,
        })
    }

    /// A plan for online methods: its rows are micro-batches that the method itself fills,
    /// `micro_batches` per epoch.
    pub fn online(config: &TrainingConfig, micro_batches: usize) -> Result<StepPlan> {
        let own = TrainingConfig {
            per_device_train_batch_size: 1,
            train_sampling_strategy: SamplingStrategy::Sequential,
            ..config.clone()
        };
        StepPlan::new(&own, micro_batches)
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The micro-batches of step `number` (from 0). The last one of an epoch may be smaller, as in
    /// Hugging Face's Trainer.
    pub fn micro_batches(&self, number: u64) -> Vec<Vec<usize>> {
        let epoch = number / self.steps_per_epoch;
        let order = epoch_order(self.sampling, self.rows, self.seed, epoch as u32);
        let per_step = self.batch * self.accumulation;
        let start = (number % self.steps_per_epoch) as usize * per_step;
        let rows = &order[start..(start + per_step).min(self.rows)];
        rows.chunks(self.batch).map(<[usize]>::to_vec).collect()
    }

    /// Epochs after `steps` steps, counted in batches as in Hugging Face's Trainer.
    pub fn epoch(&self, steps: u64) -> f64 {
        let batches = self.rows.div_ceil(self.batch);
        let (whole, rest) = (steps / self.steps_per_epoch, (steps % self.steps_per_epoch) as usize);
        whole as f64 + (rest * self.accumulation).min(batches) as f64 / batches as f64
    }
}

impl Trainer {
    /// A trainer over `rows` rows.
    pub fn new(cx: Cx, model: Decoder, config: TrainingConfig, rows: usize) -> Result<Trainer> {
        let plan = StepPlan::new(&config, rows)?;
        Trainer::with_plan(cx, model, config, plan)
    }

    pub fn with_plan(
        mut cx: Cx,
        model: Decoder,
        config: TrainingConfig,
        plan: StepPlan,
    ) -> Result<Trainer> {
        let optimizer = Optimizer::new(&mut cx, model.trained(), AdamWConfig::of(&config))?;
        let schedule = Schedule::of(&config, config.learning_rate, plan.total_steps)?;
        Ok(Trainer {
            cx,
            model,
            optimizer,
            config,
            plan,
            schedule,
            done: 0,
            not_finite: false,
            half_applied: false,
        })
    }

    /// Runs one optimizer step. If the loss or gradient is not finite, nothing is changed and the
    /// error names the first bad tensor and the rows.
    pub fn step(&mut self, method: &mut dyn Method) -> Result<Step> {
        let number = self.done;
        let micro_batches = self.plan.micro_batches(number);
        let refs: Vec<&[usize]> = micro_batches.iter().map(Vec::as_slice).collect();
        self.cx.set_rng(self.config.seed, number as u32, 0)?;
        let set = self.model.trained().set;
        self.cx.param_grads[set].reset();
        method.begin(number)?;
        let report = method.step(&mut self.cx, &self.model, &refs)?;
        let learning_rate = self.schedule.rate(number);
        let grad_norm = self.optimizer.measure(
            &mut self.cx,
            self.model.trained(),
            learning_rate,
            number + 1,
        )?;
        if !report.loss.is_finite() || !grad_norm.is_finite() {
            self.not_finite = true;
            return Err(self.explain_not_finite(method, report.loss, grad_norm, &micro_batches));
        }
        self.half_applied = true;
        self.optimizer.apply(&self.cx, self.model.trained())?;
        self.model.refresh(&self.cx)?;
        self.done += 1;
        method.stepped(&mut self.cx, &self.model, self.done)?;
        self.half_applied = false;
        Ok(Step {
            number: self.done,
            epoch: self.plan.epoch(self.done),
            loss: report.loss,
            grad_norm,
            learning_rate,
            tokens: report.tokens,
            metrics: report.metrics,
        })
    }

    fn explain_not_finite(
        &mut self,
        method: &mut dyn Method,
        loss: f32,
        norm: f32,
        micro_batches: &[Vec<usize>],
    ) -> Error {
        let mut text = format!(
            "step {}: loss {loss}, gradient norm {norm}; nothing was updated.",
            self.done + 1
        );
        let params = self.model.trained();
        // In the order of the forward: embedding, layers, final norm, head.
        let mut order: Vec<usize> = (0..params.specs.len()).collect();
        order.sort_by_key(|i| {
            let spec = &params.specs[*i];
            (
                spec.role >= crate::model::specs::Role::FinalNorm && spec.layer.is_none(),
                spec.layer,
                spec.role,
            )
        });
        let mut named = false;
        for what in ["weight", "gradient of"] {
            for i in &order {
                let view = match what {
                    "weight" => params.weight_view(*i).map(Some),
                    _ => params.state_view(&self.optimizer.grad, *i),
                };
                if let Ok(Some(Ok(values))) = view.map(|v| v.map(|t| t.to_f32()))
                    && let Some(at) = values.iter().position(|v| !v.is_finite())
                {
                    let name = &params.specs[*i].name;
                    text += &format!(
                        "\nThe first bad tensor is the {what} {name} (value {at} is {}).",
                        values[at]
                    );
                    named = true;
                    break;
                }
            }
            if named {
                break;
            }
        }
        let rows: Vec<usize> = micro_batches.concat();
        let mut bad = Vec::new();
        for row in &rows {
            if !method.row_loss(&mut self.cx, &self.model, *row).is_ok_and(f32::is_finite) {
                bad.push(method.row_source(*row));
            }
        }
        if bad.is_empty() {
            let all: Vec<String> = rows.iter().map(|r| method.row_source(*r)).collect();
            text += &format!("\nThe step's rows, each finite alone: {}.", all.join(", "));
        } else {
            text += &format!("\nRows whose loss is not finite: {}.", bad.join(", "));
        }
        text += "\nNext: look at those rows, or lower learning_rate or max_grad_norm.";
        Error::Run(text)
    }
}

/// Means of metrics since the last log, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Means {
    sums: BTreeMap<String, (f64, u64)>,
}

impl Means {
    pub fn add(&mut self, name: &str, value: f64) {
        let entry = self.sums.entry(name.to_string()).or_default();
        *entry = (entry.0 + value, entry.1 + 1);
    }

    /// Returns the means in order of their names and resets them.
    pub fn take(&mut self) -> Vec<(String, f64)> {
        std::mem::take(&mut self.sums)
            .into_iter()
            .map(|(name, (sum, n))| (name, sum / n as f64))
            .collect()
    }

    /// Sums and counts for a checkpoint; the sums keep their bits.
    pub fn state(&self) -> Vec<(String, u64, u64)> {
        self.sums.iter().map(|(name, (sum, n))| (name.clone(), sum.to_bits(), *n)).collect()
    }

    pub fn from_state(state: Vec<(String, u64, u64)>) -> Means {
        Means {
            sums: state
                .into_iter()
                .map(|(name, bits, n)| (name, (f64::from_bits(bits), n)))
                .collect(),
        }
    }
}
