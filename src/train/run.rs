//! A whole run: from an output folder, perhaps with a checkpoint, to the final model. Layer 8.
//!
//! Invariant: if the run is killed at any moment, the folder holds a valid checkpoint (once there
//! was one), and a run resumed from it writes the same weights and the same metrics, except for
//! timing fields, as an uninterrupted one.

use std::path::Path;

use serde_json::json;

use super::best::BestModel;
use super::inputs::{self, RunInputs};
use super::samples::Samples;
use super::state::{FolderParts, RunState};
use super::summary::Summary;
use super::watch::Watch;
use super::{Step, Trainer};
use crate::checkpoint::{self, CheckpointWriter, Found, RunFolder};
use crate::config::When;
use crate::error::{Error, Result};
use crate::fsio;
use crate::log::RunLog;
use crate::methods::Method;
use crate::model::layout::ModelConfig;
use crate::observer::{MetricValue, Observer};
use crate::report::{self, MaskRow, ReportInput};
use crate::signals::Stop;

/// The parts of a run besides the trainer.
pub struct Run<'a> {
    pub folder: &'a RunFolder,
    pub parts: FolderParts,
    pub stop: Stop,
    /// Records of what the run reads, for checkpoints.
    pub inputs: RunInputs,
    /// The resolved options, written as config.toml.
    pub config_toml: String,
    /// Peak flop/s of the device, if known, and flops per token, for `mfu`.
    pub peak_flops: Option<f64>,
    pub flops_per_token: f64,
    /// Prompts that are completed at every evaluation.
    pub samples: Option<Samples>,
    /// Some training rows for report.html.
    pub masks: Vec<MaskRow>,
    /// Facts that the page shows before the curves: a name and a value.
    pub facts: Vec<(String, String)>,
}

/// Whether saving a checkpoint deletes older ones beyond save_total_limit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Prune {
    Yes,
    No,
}

impl Run<'_> {
    /// Trains to the end and writes the final model, or stops after a signal with a checkpoint and
    /// [`Error::Interrupted`].
    pub fn train(&self, trainer: &mut Trainer, method: &mut dyn Method) -> Result<Summary> {
        let dir = self.folder.path();
        let mut state = RunState::default();
        let resumed = match self.folder.resume() {
            Some(found) => {
                state = self.restore(trainer, method, found)?;
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
        let ends = |trainer: &Trainer, state: &RunState| state.best.ends(&trainer.config.best);
        if trainer.done >= total || ends(trainer, &state) {
            observer.info("this run is finished; nothing is left to do");
        }
        let mut watch = Watch::default();
        while trainer.done < total && !ends(trainer, &state) {
            if self.stop.requested() {
                self.save(trainer, method, &mut state, &mut log, Prune::Yes)?;
                self.page(&*observer, &summary(trainer, &state, &log));
                let message = format!(
                    "stopped after step {} of {total}; to continue, run the same command with \
                     --resume",
                    trainer.done
                );
                return Err(Error::Interrupted(message));
            }
            let step = match trainer.step(method) {
                Ok(step) => step,
                // The signal cut a wait short: the loop saves and stops.
                Err(Error::Interrupted(what)) if self.stop.requested() => {
                    observer.info(&what);
                    continue;
                }
                Err(e) => {
                    // A failed step has as a rule not been applied, so the state before it can be
                    // continued, unless that state gives values that are not finite.
                    let usable = !trainer.not_finite && !trainer.half_applied && trainer.done > 0;
                    if usable && trainer.config.save_strategy != When::No {
                        self.save(trainer, method, &mut state, &mut log, Prune::No)?;
                        if checkpoint::is_saved(dir, trainer.done) {
                            observer.warn(&format!(
                                "checkpoint-{} holds the steps before the error",
                                trainer.done
                            ));
                        }
                    }
                    self.page(&*observer, &summary(trainer, &state, &log));
                    return Err(if trainer.not_finite { self.way_out(trainer, e) } else { e });
                }
            };
            let completions = method.take_completions();
            watch.completions(step.number, &completions, &*observer);
            log.completions(step.number, completions)?;
            self.take(trainer, method, &step, &mut state, &mut log, &mut watch)?;
        }
        // The checkpoint comes first: if writing the model fails, --resume can write it.
        if trainer.config.save_strategy != When::No {
            if resumed == Some(trainer.done) {
                // The run was killed after its last checkpoint, perhaps before older ones were
                // deleted.
                let best = state.best.kept(&trainer.config.best);
                checkpoint::prune_but(dir, trainer.config.save_total_limit, trainer.done, best)?;
            } else {
                self.save(trainer, method, &mut state, &mut log, Prune::Yes)?;
            }
        }
        self.take_best(trainer, &state.best)?;
        trainer.write_model(dir, &self.parts).map_err(|e| self.way_out(trainer, e))?;
        self.folder.discard_overwritten()?;
        log.sync();
        let summary = summary(trainer, &state, &log);
        self.page(&*observer, &summary);
        Ok(summary)
    }

    /// Reads a checkpoint, or, if its contents do not fit the run, the newest older one that does.
    fn restore(
        &self,
        trainer: &mut Trainer,
        method: &mut dyn Method,
        found: &Found,
    ) -> Result<RunState> {
        let mut read = |path: &Path| -> Result<RunState> {
            let state = trainer.read_state(path)?;
            method.restore(&mut trainer.cx, path)?;
            Ok(state)
        };
        let first = match read(&found.path) {
            Err(e @ Error::Checkpoint { .. }) => e,
            other => return other,
        };
        let mut older = checkpoint::list(self.folder.path())?;
        older.retain(|(step, path)| *step < found.step && checkpoint::verify(path).is_ok());
        for (_, path) in older.iter().rev() {
            if let Ok(state) = read(path) {
                trainer.cx.observer.warn(&format!("skipped {first}"));
                return Ok(state);
            }
        }
        Err(first)
    }

    /// Reports an early end of the run, and loads the best checkpoint if the options ask for it.
    fn take_best(&self, trainer: &mut Trainer, best: &BestModel) -> Result<()> {
        let (options, done) = (trainer.config.best.clone(), trainer.done);
        let observer = trainer.cx.observer.clone();
        if best.ends(&options) && done < trainer.plan.total_steps {
            observer.info(&format!(
                "stopped early, after step {done}: {}; {} evaluations in a row did not improve on it",
                best.told(&options),
                best.misses()
            ));
        }
        if !options.load_best_model_at_end {
            return Ok(());
        }
        let Some(step) = best.saved() else {
            observer.warn("no best checkpoint was saved; the result is the last model");
            return Ok(());
        };
        if step != done {
            let path = checkpoint::checkpoint_path(self.folder.path(), step);
            checkpoint::verify(&path)?;
            trainer.read_state(&path)?;
            trainer.done = done;
        }
        observer.info(&format!(
            "the result is the model of checkpoint-{step}: {}",
            best.told(&options)
        ));
        Ok(())
    }

    /// Logs, evaluates and saves, if they are due after this step.
    fn take(
        &self,
        trainer: &mut Trainer,
        method: &mut dyn Method,
        step: &Step,
        state: &mut RunState,
        log: &mut RunLog,
        watch: &mut Watch,
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
            watch.loss(log.history(), &*trainer.cx.observer);
            watch.rewards(step.number)?;
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
            state.best.take(&trainer.config.best, step.number, &results)?;
            let named: Vec<(String, f64)> =
                results.into_iter().map(|(n, v)| (format!("eval_{n}"), v)).collect();
            let mut metrics: Vec<(&str, MetricValue)> =
                named.iter().map(|(n, v)| (n.as_str(), (*v).into())).collect();
            metrics.push(("epoch", step.epoch.into()));
            log.log(step.number, &metrics)?;
            if let Some(samples) = &self.samples {
                let observer = trainer.cx.observer.clone();
                let lines = samples.take(&mut trainer.cx, &mut trainer.model, &*observer)?;
                log.completions(step.number, lines)?;
            }
        }
        let save = match trainer.config.save_strategy {
            When::No => false,
            When::Steps => every(trainer.config.save_steps),
            When::Epoch => epoch_ends,
        };
        if save && !last { self.save(trainer, method, state, log, Prune::Yes) } else { Ok(()) }
    }

    /// Writes report.html for the whole run, including the part before a resume. A failure does not
    /// end the run.
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

    /// Adds the next step to the error of a non-finite step or model, or of a model that could not
    /// be written.
    fn way_out(&self, trainer: &Trainer, e: Error) -> Error {
        let dir = self.folder.path();
        let found = checkpoint::latest(dir).ok().and_then(|search| search.found);
        let next = match found {
            Some(found) if found.step == trainer.done && !trainer.not_finite => {
                let at = found.path.display();
                format!(
                    "{at} holds the whole run. Remove the cause, then run the same command with \
                     --resume."
                )
            }
            // --resume uses the same options and rows, so it would compute the same values.
            Some(found) => {
                let (at, flag) = match trainer.model.adapter {
                    Some(_) => (found.path.display(), "--adapter"),
                    None => (found.path.display(), "--model"),
                };
                format!(
                    "{at} is the newest state that was saved, but --resume would fail at the \
                     same step. Start a new run from it with {flag} {at}, another --output, and \
                     other options or rows."
                )
            }
            None => {
                "No checkpoint was saved: start again with other options or rows and --overwrite."
                    .into()
            }
        };
        match e {
            Error::Run(text) => Error::Run(format!("{text}\n{next}")),
            Error::Model { path, message } => {
                Error::Model { path, message: format!("{message}\n{next}") }
            }
            Error::Io { path, source } => {
                let text = format!("{source}\n{next}");
                Error::Io { path, source: std::io::Error::new(source.kind(), text) }
            }
            other => other,
        }
    }

    /// Writes checkpoint-N. If the disk is full, the run reports it and continues with the older
    /// one.
    fn save(
        &self,
        trainer: &Trainer,
        method: &dyn Method,
        state: &mut RunState,
        log: &mut RunLog,
        prune: Prune,
    ) -> Result<()> {
        let (dir, step) = (self.folder.path(), trainer.done);
        if checkpoint::is_saved(dir, step) {
            return Ok(());
        }
        log.sync();
        let (log, before) = (&*log, state.best.clone());
        state.best.saving(step);
        let state_now = &*state;
        // Errors here end the run; below, an `Error::Run` means that the state is not finite.
        let (read, files) = (self.inputs.to_bytes()?, method.state()?);
        let write = || -> Result<()> {
            let mut writer = CheckpointWriter::new(dir, step, trainer.state_bytes(&self.parts))?;
            trainer.write_state(&mut writer, &self.parts, state_now)?;
            writer.add_file(inputs::FILE, &read)?;
            for (name, bytes) in &files {
                writer.add_file(name, bytes)?;
            }
            let (metric, best_step) = state_now.best.shown();
            let best = state_now.best.saved().map(|n| checkpoint::checkpoint_path(dir, n));
            let more = [
                ("train_batch_size", json!(trainer.config.per_device_train_batch_size)),
                ("best_metric", metric),
                ("best_global_step", best_step),
                ("best_model_checkpoint", json!(best)),
            ];
            writer.add_file(
                "trainer_state.json",
                &log.trainer_state(step, trainer.plan.epoch(step), &more),
            )?;
            writer.finish()?;
            if prune == Prune::Yes {
                let best = state_now.best.kept(&trainer.config.best);
                checkpoint::prune_but(dir, trainer.config.save_total_limit, step, best)?;
            }
            Ok(())
        };
        let written = write();
        if written.is_err() {
            state.best = before;
        }
        match written {
            // The disk is full, or the state is not finite.
            Err(e) if e.is_no_space() || matches!(e, Error::Run(_)) => {
                let text =
                    format!("checkpoint-{step} was not written: {e}; older checkpoints are kept");
                trainer.cx.observer.warn(&text);
                Ok(())
            }
            other => other,
        }
    }
}

/// Dense bf16 peak of known GPUs in flop/s, by a part of their name; the first that fits counts.
pub fn peak_flops(device: &str) -> Option<f64> {
    let known = [
        ("H100 PCIe", 756e12),
        ("H100 NVL", 835e12),
        ("H100", 989e12),
        ("H200", 989e12),
        ("A100", 312e12),
        ("L40S", 362e12),
        ("RTX 4090", 165e12),
    ];
    known.iter().find(|(name, _)| device.contains(name)).map(|(_, flops)| *flops)
}

/// 6 N_matmul + 6 L heads head_dim T (causal), where N_matmul includes the head but not the look-up
/// (PaLM's convention).
pub fn flops_per_token(config: &ModelConfig, params: usize, length: usize) -> f64 {
    let lookup =
        if config.tie_word_embeddings { 0 } else { config.vocab_size * config.hidden_size };
    let attention = config.num_layers * config.num_heads * config.head_dim * length;
    6.0 * ((params - lookup) as f64 + attention as f64)
}
