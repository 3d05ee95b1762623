//! A whole run: from an output folder that may hold a checkpoint to the final model. Layer 8.
//!
//! Invariant: killed at any moment, the folder holds a checkpoint that verifies (once there was
//! one), and a run resumed from it writes the same weights and the same metrics, timing fields
//! apart, as one that was never interrupted.

use serde_json::json;

use super::inputs::{self, RunInputs};
use super::state::{FolderParts, RunState};
use super::summary::Summary;
use super::{Step, Trainer};
use crate::checkpoint::{self, CheckpointWriter, RunFolder};
use crate::config::When;
use crate::error::{Error, Result};
use crate::fsio;
use crate::log::RunLog;
use crate::methods::Method;
use crate::model::layout::ModelConfig;
use crate::observer::{MetricValue, Observer};
use crate::report::{self, MaskRow, ReportInput};
use crate::signals::Stop;

/// Everything of a run that is not the trainer.
pub struct Run<'a> {
    pub folder: &'a RunFolder,
    pub parts: FolderParts,
    pub stop: Stop,
    /// What the run reads, for checkpoints.
    pub inputs: RunInputs,
    /// The resolved run file, written as config.toml.
    pub config_toml: String,
    /// Peak flop/s of the device, if known, and a token's flops: for `mfu`.
    pub peak_flops: Option<f64>,
    pub flops_per_token: f64,
    /// Some training rows, for report.html.
    pub masks: Vec<MaskRow>,
    /// What the page says of the run before its curves: a name, and a value.
    pub facts: Vec<(String, String)>,
}

impl Run<'_> {
    /// Trains to the end, or to a signal (then [`Error::Interrupted`], after a checkpoint). Writes
    /// the final model.
    pub fn train(&self, trainer: &mut Trainer, method: &mut dyn Method) -> Result<Summary> {
        let dir = self.folder.path();
        let mut state = RunState::default();
        let resumed = match self.folder.resume() {
            Some(found) => {
                state = trainer.read_state(&found.path)?;
                method.restore(&mut trainer.cx, &found.path)?;
                Some(trainer.done)
            }
            None => None,
        };
        fsio::atomic_write(dir.join("config.toml"), self.config_toml.as_bytes())?;
        let total = trainer.plan.total_steps;
        let observer = trainer.cx.observer.clone();
        let (first, before) = (trainer.done, state.num_tokens);
        let mut log = RunLog::create(dir, resumed, before, total, observer.clone())?;
        if trainer.config.report_to.iter().any(|to| to == "tensorboard" || to == "all") {
            log = log.with_tensorboard(resumed);
        }
        for note in self.folder.notes() {
            observer.info(note);
        }
        if let Some(step) = resumed {
            observer.info(&format!("resumed at step {step} of {total}"));
        }
        let summary = |trainer: &Trainer, state: &RunState, log: &RunLog| {
            let peak = trainer.cx.pool.in_use().1 as u64;
            Summary::new(log, trainer.done - first, state.num_tokens, before, peak)
        };
        if trainer.done >= total {
            observer.info("this run is finished; nothing is left to do");
        }
        while trainer.done < total {
            if self.stop.requested() {
                self.save(trainer, method, &state, &log)?;
                self.page(&*observer, &summary(trainer, &state, &log));
                let message = format!(
                    "stopped after step {} of {total}; go on with the same command and --resume",
                    trainer.done
                );
                return Err(Error::Interrupted(message));
            }
            let step = match trainer.step(method) {
                Ok(step) => step,
                Err(e) => {
                    // Nothing of the step was applied: what was done before it can be gone on with.
                    if trainer.done > 0 && trainer.config.save_strategy != When::No {
                        self.save(trainer, method, &state, &log)?;
                        observer.warn(&format!(
                            "checkpoint-{} holds the steps before the error",
                            trainer.done
                        ));
                    }
                    self.page(&*observer, &summary(trainer, &state, &log));
                    return Err(e);
                }
            };
            log.completions(step.number, method.take_completions())?;
            self.take(trainer, method, &step, &mut state, &mut log)?;
        }
        trainer.write_model(dir, &self.parts)?;
        if trainer.config.save_strategy != When::No && resumed != Some(total) {
            self.save(trainer, method, &state, &log)?;
        }
        self.folder.discard_overwritten()?;
        log.sync()?;
        let summary = summary(trainer, &state, &log);
        self.page(&*observer, &summary);
        Ok(summary)
    }

    /// Logs, evaluates and saves where a step asks for it.
    fn take(
        &self,
        trainer: &mut Trainer,
        method: &mut dyn Method,
        step: &Step,
        state: &mut RunState,
        log: &mut RunLog,
    ) -> Result<()> {
        let total = trainer.plan.total_steps;
        state.num_tokens += step.tokens as u64;
        state.means.add("loss", f64::from(step.loss));
        for (name, value) in &step.metrics {
            state.means.add(name, *value);
        }
        log.step(step.number, state.num_tokens);
        let every =
            |amount: crate::config::Amount| step.number.is_multiple_of(amount.of(total).max(1));
        let epoch_ends = step.number.is_multiple_of(trainer.plan.steps_per_epoch);
        let last = step.number == total;
        if every(trainer.config.logging_steps) || last {
            let means = state.means.take();
            let mut metrics: Vec<(&str, MetricValue)> = Vec::new();
            metrics
                .extend(means.iter().filter(|m| m.0 == "loss").map(|m| (m.0.as_str(), m.1.into())));
            metrics.push(("grad_norm", f64::from(step.grad_norm).into()));
            metrics.push(("learning_rate", step.learning_rate.into()));
            metrics
                .extend(means.iter().filter(|m| m.0 != "loss").map(|m| (m.0.as_str(), m.1.into())));
            metrics.push(("num_tokens", state.num_tokens.into()));
            metrics.push(("epoch", step.epoch.into()));
            metrics.push(("tokens_per_second", log.tokens_per_second().into()));
            if let Some(peak) = self.peak_flops {
                metrics
                    .push(("mfu", (log.tokens_per_second() * self.flops_per_token / peak).into()));
            }
            metrics.push(("peak_memory", (trainer.cx.pool.in_use().1 as u64).into()));
            log.log(step.number, &metrics)?;
            for completion in method.shown_completions() {
                trainer.cx.observer.info(&completion);
            }
        }
        let evaluate = match trainer.config.eval_strategy {
            When::No => false,
            When::Steps => {
                every(trainer.config.eval_steps.unwrap_or(trainer.config.logging_steps)) || last
            }
            When::Epoch => epoch_ends || last,
        };
        if evaluate && method.eval_rows() > 0 {
            let batch = trainer.config.per_device_eval_batch_size;
            let results = method.evaluate(&mut trainer.cx, &trainer.model, batch)?;
            let named: Vec<(String, f64)> =
                results.into_iter().map(|(n, v)| (format!("eval_{n}"), v)).collect();
            let mut metrics: Vec<(&str, MetricValue)> =
                named.iter().map(|(n, v)| (n.as_str(), (*v).into())).collect();
            metrics.push(("epoch", step.epoch.into()));
            log.log(step.number, &metrics)?;
        }
        let save = match trainer.config.save_strategy {
            When::No => false,
            When::Steps => every(trainer.config.save_steps),
            When::Epoch => epoch_ends,
        };
        if save && !last { self.save(trainer, method, state, log) } else { Ok(()) }
    }

    /// Writes report.html of the whole run, resumed or not. A page that cannot be written ends no
    /// run.
    fn page(&self, observer: &dyn Observer, summary: &Summary) {
        let dir = self.folder.path();
        let facts = [self.facts.clone(), summary.lines()].concat();
        let input = report::read_input(dir).map(|kept| ReportInput {
            masks: self.masks.clone(),
            facts,
            ..kept
        });
        if let Err(e) = input.and_then(|input| report::write(dir, &input)) {
            observer.warn(&format!("{} was not written: {e}", report::FILE));
        }
    }

    /// Writes checkpoint-N. Where the disk is full the run goes on with the older one, and says so.
    fn save(
        &self,
        trainer: &Trainer,
        method: &dyn Method,
        state: &RunState,
        log: &RunLog,
    ) -> Result<()> {
        let (dir, step) = (self.folder.path(), trainer.done);
        if checkpoint::is_saved(dir, step) {
            return Ok(());
        }
        log.sync()?;
        let write = || -> Result<()> {
            let mut writer = CheckpointWriter::new(dir, step, trainer.state_bytes(&self.parts))?;
            trainer.write_state(&mut writer, &self.parts, state)?;
            writer.add_file(inputs::FILE, &self.inputs.to_bytes()?)?;
            for (name, bytes) in method.state()? {
                writer.add_file(&name, &bytes)?;
            }
            let more = [("train_batch_size", json!(trainer.config.per_device_train_batch_size))];
            writer.add_file(
                "trainer_state.json",
                &log.trainer_state(step, trainer.plan.epoch(step), &more),
            )?;
            writer.finish()?;
            checkpoint::prune(dir, trainer.config.save_total_limit, step)?;
            Ok(())
        };
        match write() {
            Err(e) if e.is_no_space() => {
                trainer.cx.observer.warn(&format!("checkpoint-{step} was not written: {e}; older checkpoints stay, the run goes on"));
                Ok(())
            }
            other => other,
        }
    }
}

/// Dense bf16 peak of GPUs we know, in flop/s.
pub fn peak_flops(device: &str) -> Option<f64> {
    let known = [
        ("H100", 989e12),
        ("H200", 989e12),
        ("A100", 312e12),
        ("L40S", 362e12),
        ("RTX 4090", 165e12),
    ];
    known.iter().find(|(name, _)| device.contains(name)).map(|(_, flops)| *flops)
}

/// 6 N_matmul + 6 L heads head_dim T (causal), N_matmul with the head and without the look-up
/// (PaLM's convention).
pub fn flops_per_token(config: &ModelConfig, params: usize, length: usize) -> f64 {
    let lookup =
        if config.tie_word_embeddings { 0 } else { config.vocab_size * config.hidden_size };
    let attention = config.num_layers * config.num_heads * config.head_dim * length;
    6.0 * ((params - lookup) as f64 + attention as f64)
}
