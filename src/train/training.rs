//! A training run for programs; the training commands call it. Layer 8.
//!
//! Invariant: nothing is checked or written before [`Training::run`], which reports all problems of
//! the options at once.

#![deny(missing_docs)]

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::job::{FinishedJob, Job, JobRows, execute};
use super::rows::RunFiles;
use super::summary::{Summary, next_commands};
use crate::autograd::Cx;
use crate::checkpoint::{RunFolder, is_moved_away, prepare_output};
use crate::config::{self, DataFile, DataFiles, TrainingConfig, TrlFiles, When};
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::{BuildMethod, MethodRun};
use crate::methods::{MethodEntry, registry};
use crate::model::hub::resolve_model;
use crate::observer::{Observer, Terminal};
use crate::report;
use crate::rewards::{RewardFunction, RewardRow};
use crate::signals::Stop;

/// A run from a model folder and rows to a trained model folder.
///
/// ```no_run
/// # fn main() -> temper::Result<()> {
/// temper::Training::new("sft")?
///     .option("learning_rate", 1e-5)
///     .model("models/base")
///     .data(["rows.jsonl"])
///     .output("out")
///     .run()?;
/// # Ok(())
/// # }
/// ```
pub struct Training {
    entry: &'static MethodEntry,
    run: Box<MethodRun>,
    config: Option<PathBuf>,
    overrides: Vec<String>,
    model: String,
    adapter: Option<PathBuf>,
    data: Vec<PathBuf>,
    eval_data: Vec<PathBuf>,
    output: PathBuf,
    resume: bool,
    overwrite: bool,
    rewards: Vec<RewardFunction>,
    observer: Arc<dyn Observer>,
    stop: Stop,
}

impl Training {
    /// A run of a method with its default options: `sft`, `dpo`, `grpo` or another of
    /// [`registry::REGISTRY`]. Error: the method does not exist.
    pub fn new(method: &str) -> Result<Training> {
        let entry = registry::find(method)?;
        Ok(Training::of(entry, (entry.run)()))
    }

    /// A run with these options. Error: the method is not in the registry.
    pub fn with<M: BuildMethod + 'static>(run: MethodRun<M>) -> Result<Training> {
        Ok(Training::of(registry::find(run.method.name())?, Box::new(run)))
    }

    fn of(entry: &'static MethodEntry, run: Box<MethodRun>) -> Training {
        Training {
            entry,
            run,
            config: None,
            overrides: Vec::new(),
            model: String::new(),
            adapter: None,
            data: Vec::new(),
            eval_data: Vec::new(),
            output: PathBuf::new(),
            resume: false,
            overwrite: false,
            rewards: Vec::new(),
            observer: Arc::new(Terminal::default()),
            stop: Stop::default(),
        }
    }

    /// Sets an option, written as on the command line.
    pub fn option(self, name: &str, value: impl Display) -> Training {
        self.options([format!("{name}={value}")])
    }

    /// Sets options, each written `name=value`; later ones win.
    pub fn options(mut self, options: impl IntoIterator<Item = String>) -> Training {
        self.overrides.extend(options);
        self
    }

    /// Reads options from a run file (TOML, YAML or JSON); [`Training::option`] overrides them.
    pub fn config(mut self, file: impl Into<PathBuf>) -> Training {
        self.config = Some(file.into());
        self
    }

    /// The model to train: a folder, or the name of a hub model in the local cache.
    pub fn model(mut self, model: impl Into<String>) -> Training {
        self.model = model.into();
        self
    }

    /// An adapter folder to train further.
    pub fn adapter(mut self, dir: impl Into<PathBuf>) -> Training {
        self.adapter = Some(dir.into());
        self
    }

    /// Files of training rows, folders of them, or patterns; docs/data.md describes the formats.
    pub fn data<P: Into<PathBuf>>(mut self, files: impl IntoIterator<Item = P>) -> Training {
        self.data.extend(files.into_iter().map(Into::into));
        self
    }

    /// Files of evaluation rows. Without them the option `eval_rows` splits some off the training
    /// data.
    pub fn eval_data<P: Into<PathBuf>>(mut self, files: impl IntoIterator<Item = P>) -> Training {
        self.eval_data.extend(files.into_iter().map(Into::into));
        self
    }

    /// A reward for online methods: the score of a completion, or `None` if it does not apply.
    /// Metrics use the name `name`. It is added to the rewards of the options.
    pub fn reward(
        mut self,
        name: &str,
        function: impl Fn(&RewardRow) -> Option<f64> + Send + Sync + 'static,
    ) -> Training {
        self.rewards.push(RewardFunction::new(name, function));
        self
    }

    /// The output folder. It must not hold another run, unless [`Training::overwrite`] or
    /// [`Training::resume`] is set.
    pub fn output(mut self, dir: impl Into<PathBuf>) -> Training {
        self.output = dir.into();
        self
    }

    /// Whether to replace the run in the output folder.
    pub fn overwrite(mut self, yes: bool) -> Training {
        self.overwrite = yes;
        self
    }

    /// Whether to continue from the newest valid checkpoint in the output folder.
    pub fn resume(mut self, yes: bool) -> Training {
        self.resume = yes;
        self
    }

    /// Receives the messages of the run. Default: [`Terminal`].
    pub fn observer(mut self, observer: impl Observer + 'static) -> Training {
        self.observer = Arc::new(observer);
        self
    }

    /// Ends the run with a checkpoint when requested.
    pub fn stop(mut self, stop: Stop) -> Training {
        self.stop = stop;
        self
    }

    /// Trains to the end and writes the model. The options choose device and dtype. Errors: all
    /// problems of the options in one message; unreadable files; an output folder with another run;
    /// see [`execute`] for the others.
    pub fn run(mut self) -> Result<FinishedJob> {
        if self.output.as_os_str().is_empty() {
            return Err(Error::Config("a training run needs an output folder; give one".into()));
        }
        let dir = self.prepare()?;
        if self.overwrite {
            self.keeps_its_inputs(&dir)?;
        }
        let cx = Cx::open(&self.run.training, self.observer.clone())?;
        let folder = prepare_output(&self.output, self.overwrite, self.resume)?;
        let finished = self.execute(cx, &dir, &folder)?;
        self.observer.summary(&self.summary(&finished.summary));
        Ok(finished)
    }

    /// Error: the run reads files that `--overwrite` would move away.
    fn keeps_its_inputs(&self, dir: &Path) -> Result<()> {
        const FILES: [&str; 4] =
            ["ref_model", "teacher_model_name_or_path", "reward_model", "chat_template_path"];
        let keys = self.run.sections().into_iter().flat_map(|section| section.keys());
        let named: Vec<config::Key> = keys.filter(|key| FILES.contains(&key.name)).collect();
        let mut inputs: Vec<(&str, PathBuf)> = vec![("--model", dir.to_path_buf())];
        inputs.extend(self.adapter.iter().map(|path| ("--adapter", path.clone())));
        inputs.extend(self.run.training.data.0.iter().map(|file| ("--data", file.path.clone())));
        inputs.extend(self.eval_data.iter().map(|path| ("--eval-data", path.clone())));
        inputs.extend(
            named.iter().filter_map(|key| Some((key.name, PathBuf::from(key.value.as_str()?)))),
        );
        for (name, path) in inputs {
            if is_moved_away(&self.output, &path) {
                return Err(Error::Config(format!(
                    "{name} {} is part of the run in --output, which --overwrite replaces; give another --output",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    /// Writes the options to a file for TRL's command of the same method, and trains nothing.
    /// Error: see [`config::to_trl`].
    pub fn write_trl(mut self, file: &Path) -> Result<()> {
        self.prepare()?;
        let files = TrlFiles {
            model: &self.model,
            data: &self.data,
            eval_data: &self.eval_data,
            output: &self.output,
        };
        let defaults = (self.entry.run)();
        let name = self.entry.name;
        let text = config::to_trl(name, &self.run.sections(), &defaults.sections(), &files)?;
        fsio::atomic_write(file, text.as_bytes())?;
        let file = file.display();
        self.observer.note(&format!("wrote {file}; run it with `trl {name} --config {file}`"));
        Ok(())
    }

    /// The costs and results of the run, its folder, and commands to try next.
    fn summary(&self, summary: &Summary) -> String {
        let out = &self.output;
        let own: Vec<PathBuf> =
            self.run.training.data.0.iter().map(|file| file.path.clone()).collect();
        let data = if self.eval_data.is_empty() { &own } else { &self.eval_data };
        let is_adapter = out.join("adapter_config.json").is_file();
        let next = next_commands(&self.run, &self.model, out, is_adapter, data);
        let what = if is_adapter { "adapter" } else { "model" };
        format!(
            "\ndone\n{summary}\n  {what:<14} {}\n  {:<14} {}\n\nnext\n  {}",
            out.display(),
            "page",
            out.join(report::FILE).display(),
            next.join("\n  ")
        )
    }

    /// [`Training::run`] on an existing context, with its device, dtype and observer, and in an
    /// output folder that is already locked.
    pub fn run_in(mut self, cx: Cx, folder: &RunFolder) -> Result<FinishedJob> {
        self.observer = cx.observer.clone();
        let dir = self.prepare()?;
        self.execute(cx, &dir, folder)
    }

    /// Reads run file and options, and finds the model's folder.
    fn prepare(&mut self) -> Result<PathBuf> {
        if self.model.is_empty() {
            return Err(Error::Config("a training run needs a model; give its folder".into()));
        }
        let notes = self.run.read(self.config.as_deref(), &self.overrides, self.rewards.len())?;
        take_data(&mut self.run, &self.data)?;
        let scores =
            self.run.sections().iter().any(|s| s.keys().iter().any(|k| k.name == "reward_funcs"));
        if !self.rewards.is_empty() && !scores {
            return Err(Error::Config(format!(
                "{} does not use rewards; leave them out",
                self.entry.name
            )));
        }
        notes.iter().for_each(|note| self.observer.note(note));
        let training: &TrainingConfig = &self.run.training;
        let when = training.eval_strategy;
        if when != When::No && self.eval_data.is_empty() && training.eval_rows.is_zero() {
            let when = if when == When::Steps { "steps" } else { "epoch" };
            return Err(Error::Config(format!(
                "eval_strategy = \"{when}\" has no rows to evaluate on; give --eval-data FILE, or split rows off with eval_rows=0.05, or set eval_strategy=no"
            )));
        }
        resolve_model(&self.model)
    }

    fn execute(&self, cx: Cx, dir: &Path, folder: &RunFolder) -> Result<FinishedJob> {
        if folder.resume().is_some() {
            same_run(folder.path(), &self.run, &*self.observer)?;
        }
        let files =
            RunFiles { train: self.run.training.data.clone(), eval: self.eval_data.clone() };
        let job = Job {
            run: &self.run,
            model: dir,
            adapter: self.adapter.as_deref(),
            fresh: self.entry.from_scratch && !has_weights(dir),
            rows: JobRows::Files(&files),
            rewards: &self.rewards,
            folder,
            command: &self.command(),
            stop: self.stop.clone(),
        };
        execute(cx, &job)
    }

    /// The equivalent command, for config.toml.
    fn command(&self) -> String {
        let adapter = self.adapter.as_ref().map(|a| format!(" --adapter {}", a.display()));
        let data: Vec<String> = self.run.training.data.0.iter().map(DataFile::to_string).collect();
        let rewards =
            self.rewards.iter().map(|r| format!("\nwith the program's reward {}", r.name()));
        format!(
            "temper {} --model {}{} --data {}{}",
            self.entry.name,
            self.model,
            adapter.unwrap_or_default(),
            data.join(" "),
            rewards.collect::<String>()
        )
    }
}

/// Files given as arguments replace those of the options. Error: there are none at all.
pub fn take_data(run: &mut MethodRun, given: &[PathBuf]) -> Result<()> {
    if !given.is_empty() {
        let parse = |path: &PathBuf| match path.to_str() {
            Some(text) => DataFiles::parse(text),
            None => vec![DataFile { path: path.clone(), weight: None }],
        };
        run.training.data = DataFiles(given.iter().flat_map(parse).collect());
    }
    if run.training.data.0.is_empty() {
        return Err(Error::Config(
            "there are no rows to train on; give --data FILE, or data = [\"FILE\"] in the run file"
                .into(),
        ));
    }
    match run.training.data.problem() {
        Some(problem) => Err(Error::Config(problem)),
        None => Ok(()),
    }
}

fn has_weights(dir: &Path) -> bool {
    dir.join("model.safetensors").exists() || dir.join("model.safetensors.index.json").exists()
}

/// Error: a resumed run has other options than the run that it continues.
fn same_run(dir: &Path, run: &MethodRun, observer: &dyn Observer) -> Result<()> {
    let path = dir.join("config.toml");
    let text = String::from_utf8_lossy(&fsio::read(&path)?).into_owned();
    let changes = config::changes(&text, &run.sections())?;
    if changes.is_empty() {
        return Ok(());
    }
    let changes = changes.join("\n  ");
    if run.training.resume_with_changes {
        observer.warn(&format!("changed options, resume_with_changes=true:\n  {changes}"));
        return Ok(());
    }
    Err(Error::Config(format!(
        "--resume continues the run in {}, but these options differ from its config.toml:\n  \
         {changes}\nGive the same options, start another run in another --output, or set \
         resume_with_changes=true.",
        dir.display()
    )))
}
