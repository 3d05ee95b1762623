//! The log of a run: `metrics.jsonl`, `completions.jsonl`, `trainer_state.json`, and the same
//! messages to the observer. Layer 8.
//!
//! Invariant: no number replaces another. NaN is written as `null` with `"nan": true`.

mod tensorboard;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::fsio::{self, AppendFile};
use crate::observer::{MetricValue, Observer, Progress};

use tensorboard::EventFile;

const METRICS: &str = "metrics.jsonl";
const COMPLETIONS: &str = "completions.jsonl";

/// The log of one run. Dropping it reports the end to the observer.
pub struct RunLog {
    path: PathBuf,
    file: AppendFile,
    /// completions.jsonl; opened by the first completion.
    completions: Option<AppendFile>,
    /// The event file for TensorBoard, if the run asks for it.
    events: Option<EventFile>,
    history: Vec<Map<String, Value>>,
    observer: Arc<dyn Observer>,
    total: u64,
    pace: Pace,
    /// Whether the last append failed; reported once, until an append succeeds.
    failing: bool,
}

impl RunLog {
    /// Starts `output_dir/metrics.jsonl`. With `resume_from_step`, lines up to that step stay and
    /// later (or truncated) lines are removed, so that the final file is that of an uninterrupted
    /// run, except for timing fields. `tokens`: tokens trained on before. `total_steps`: passed to
    /// the observer.
    pub fn create(
        output_dir: impl AsRef<Path>,
        resume_from_step: Option<u64>,
        tokens: u64,
        total_steps: u64,
        observer: Arc<dyn Observer>,
    ) -> Result<Self> {
        let path = output_dir.as_ref().join(METRICS);
        let history = keep_lines(&path, resume_from_step)?;
        let file = AppendFile::open(&path)?;
        let first = resume_from_step.unwrap_or(0);
        let samples = output_dir.as_ref().join(COMPLETIONS);
        if samples.exists() {
            keep_lines(&samples, resume_from_step)?;
        }
        observer.begin(first, total_steps);
        Ok(Self {
            path,
            file,
            completions: None,
            events: None,
            history,
            observer,
            total: total_steps,
            pace: Pace::start(first, tokens),
            failing: false,
        })
    }

    /// Writes an event file for TensorBoard from now on; with `resume_from_step` it continues an
    /// older one.
    pub fn with_tensorboard(mut self, resume_from_step: Option<u64>) -> Self {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        match EventFile::create(dir, resume_from_step) {
            Ok(file) => self.events = Some(file),
            Err(e) => self.observer.warn(&format!("no event file is written: {e}")),
        }
        self
    }

    /// Logs `metrics` of a step as one line. If a key occurs twice, the last value counts.
    pub fn log(&mut self, step: u64, metrics: &[(&str, MetricValue)]) -> Result<()> {
        let line = to_json(step, metrics);
        let text = format!("{}\n", Value::Object(line.clone()));
        let appended = self.file.append(&text);
        self.heard(appended);
        self.history.push(line);
        if let Some(Err(e)) = self.events.as_mut().map(|file| file.add(step, metrics)) {
            self.observer.warn(&format!("no further events are written: {e}"));
            self.events = None;
        }
        self.observer.metrics(step, self.total, metrics);
        Ok(())
    }

    /// Appends the completions of a step to completions.jsonl.
    pub fn completions(&mut self, step: u64, lines: Vec<Value>) -> Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let path = self.path.with_file_name(COMPLETIONS);
        let mut text = String::new();
        for mut line in lines {
            line["step"] = step.into();
            text += &format!("{line}\n");
        }
        let file = match &mut self.completions {
            Some(file) => file,
            None => self.completions.insert(AppendFile::open(&path)?),
        };
        let appended = file.append(&text);
        self.heard(appended);
        Ok(())
    }

    /// A failed write does not end the run: the lines wait for the next append.
    fn heard(&mut self, done: Result<()>) {
        if let Err(e) = &done
            && !self.failing
        {
            self.observer.warn(&format!(
                "{e}; the run continues, and the lines are written when that is possible"
            ));
        }
        self.failing = done.is_err();
    }

    /// Reports a finished step; `tokens`: tokens that the run has trained on so far.
    pub fn step(&mut self, step: u64, tokens: u64) {
        self.pace.at(step, tokens);
        self.observer.progress(&Progress {
            step,
            total: self.total,
            steps_per_second: self.pace.steps,
            tokens_per_second: self.pace.tokens,
            elapsed: self.elapsed(),
            left: self.pace.left(step, self.total),
        });
    }

    /// Tokens per second over the last steps, for `tokens_per_second`.
    pub fn tokens_per_second(&self) -> f64 {
        self.pace.tokens
    }

    /// Time since the log was created; for a resumed run, since the resume.
    pub fn elapsed(&self) -> Duration {
        self.pace.begin.elapsed()
    }

    /// Syncs everything logged so far to disk. Call it before a checkpoint is finished.
    pub fn sync(&mut self) {
        let metrics = self.file.sync();
        let completions = self.completions.as_mut().map_or(Ok(()), AppendFile::sync);
        self.heard(metrics.and(completions));
    }

    /// All lines, including those before a resume.
    pub fn history(&self) -> &[Map<String, Value>] {
        &self.history
    }

    /// `trainer_state.json` in Hugging Face's format, which plotting tools read. `more` adds or
    /// replaces keys (`train_batch_size` ...).
    pub fn trainer_state(&self, step: u64, epoch: f64, more: &[(&str, Value)]) -> Vec<u8> {
        let mut state = Map::new();
        for (key, value) in [
            ("best_global_step", Value::Null),
            ("best_metric", Value::Null),
            ("best_model_checkpoint", Value::Null),
            ("epoch", number(epoch)),
            ("global_step", step.into()),
            ("is_hyper_param_search", false.into()),
            ("is_local_process_zero", true.into()),
            ("is_world_process_zero", true.into()),
            (
                "log_history",
                Value::Array(self.history.iter().cloned().map(Value::Object).collect()),
            ),
            ("max_steps", self.total.into()),
        ] {
            state.insert(key.into(), value);
        }
        state.extend(more.iter().map(|(k, v)| (k.to_string(), v.clone())));
        let mut text = format!("{:#}", Value::Object(state));
        text.push('\n');
        text.into_bytes()
    }
}

impl Drop for RunLog {
    fn drop(&mut self) {
        self.observer.end();
    }
}

/// Steps and tokens per second over about the last ten seconds.
#[derive(Debug)]
struct Pace {
    begin: Instant,
    first: u64,
    since: Instant,
    /// Step and tokens at `since`.
    from: (u64, u64),
    steps: f64,
    tokens: f64,
}

impl Pace {
    /// `tokens` before a resume are not counted.
    fn start(step: u64, tokens: u64) -> Self {
        let begin = Instant::now();
        Pace { begin, first: step, since: begin, from: (step, tokens), steps: 0.0, tokens: 0.0 }
    }

    fn at(&mut self, step: u64, tokens: u64) {
        let seconds = self.since.elapsed().as_secs_f64().max(1e-9);
        self.steps = step.saturating_sub(self.from.0) as f64 / seconds;
        self.tokens = tokens.saturating_sub(self.from.1) as f64 / seconds;
        if seconds > 10.0 {
            (self.since, self.from) = (Instant::now(), (step, tokens));
        }
    }

    /// The time for the remaining steps at the mean pace so far, including evaluations and
    /// checkpoints.
    fn left(&self, step: u64, total: u64) -> Option<Duration> {
        let done = step.checked_sub(self.first).filter(|n| *n > 0)?;
        let rest = total.saturating_sub(step) as f64 / done as f64;
        Duration::try_from_secs_f64(self.begin.elapsed().as_secs_f64() * rest).ok()
    }
}

/// Rewrites a log with the lines that a resumed run keeps (a new run keeps none), and returns them.
fn keep_lines(path: &Path, resume_from_step: Option<u64>) -> Result<Vec<Map<String, Value>>> {
    let lines = resume_from_step.map_or(Ok(Vec::new()), |step| kept(path, step))?;
    let text: String =
        lines.iter().map(|line| format!("{}\n", Value::Object(line.clone()))).collect();
    fsio::atomic_write(path, text.as_bytes())?;
    Ok(lines)
}

/// The lines of a log up to `step`, in order. Reading ends at the first line that is not JSON: the
/// last line of a killed run.
fn kept(path: &Path, step: u64) -> Result<Vec<Map<String, Value>>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(path, e)),
    };
    let lines = bytes
        .split(|b| *b == b'\n')
        .map_while(|line| serde_json::from_slice::<Map<String, Value>>(line).ok());
    Ok(lines
        .filter(|line| line.get("step").and_then(Value::as_u64).is_some_and(|s| s <= step))
        .collect())
}

fn to_json(step: u64, metrics: &[(&str, MetricValue)]) -> Map<String, Value> {
    let mut line = Map::new();
    line.insert("step".into(), step.into());
    let (mut nan, mut infinite) = (false, false);
    for (key, metric) in metrics {
        let value = match metric {
            MetricValue::Int(v) => Value::from(*v),
            MetricValue::Text(v) => Value::from(v.as_str()),
            MetricValue::Float(v) => number(*v),
        };
        if let MetricValue::Float(v) = metric {
            nan |= v.is_nan();
            infinite |= v.is_infinite();
        }
        line.insert(key.to_string(), value);
    }
    for (key, holds) in [("nan", nan), ("inf", infinite)] {
        if holds {
            line.insert(key.into(), true.into());
        }
    }
    line
}

/// JSON has no NaN and no infinities; they become null.
fn number(v: f64) -> Value {
    serde_json::Number::from_f64(v).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;

    use super::*;
    use crate::observer::Silent;

    #[test]
    fn nan_is_written_as_null_and_said() {
        let metrics =
            [("loss", MetricValue::Float(f64::NAN)), ("num_tokens", 7.into()), ("lr", 0.5.into())];
        let line = Value::Object(to_json(3, &metrics)).to_string();
        assert_eq!(line, r#"{"step":3,"loss":null,"num_tokens":7,"lr":0.5,"nan":true}"#);
    }

    #[test]
    fn the_rate_after_a_resume_is_that_since_the_resume() {
        let mut pace = Pace::start(100, 1_000_000);
        std::thread::sleep(Duration::from_millis(20));
        pace.at(101, 1_000_500);
        // 500 tokens in at least 20 ms; with the tokens from before it would be 50 million per
        // second.
        assert!(pace.tokens > 0.0 && pace.tokens <= 25_000.0, "{}", pace.tokens);
        assert!(pace.steps > 0.0 && pace.steps <= 50.0, "{}", pace.steps);
        let left = pace.left(101, 103).unwrap();
        assert!(left >= Duration::from_millis(40), "{left:?}");
        assert_eq!(pace.left(100, 103), None);
    }

    #[test]
    fn a_resumed_log_equals_an_uninterrupted_one() {
        let dir = tempfile::tempdir().unwrap();
        let run = |resume: Option<u64>, steps: std::ops::RangeInclusive<u64>| {
            let mut log = RunLog::create(dir.path(), resume, 0, 6, Arc::new(Silent)).unwrap();
            for step in steps {
                log.step(step, step * 10);
                log.log(
                    step,
                    &[("loss", (1.0 / step as f64).into()), ("num_tokens", (step * 10).into())],
                )
                .unwrap();
            }
            log.sync();
            let state: Value =
                serde_json::from_slice(&log.trainer_state(6, 1.0, &[("save_steps", 2.into())]))
                    .unwrap();
            assert_eq!(
                state["log_history"].as_array().unwrap().len() as u64,
                6.min(log.history().len() as u64)
            );
            drop(log);
            std::fs::read_to_string(dir.path().join(METRICS)).unwrap()
        };
        let whole = run(None, 1..=6);
        assert_eq!(whole.lines().count(), 6);
        let mut file = OpenOptions::new().append(true).open(dir.path().join(METRICS)).unwrap();
        file.write_all(b"{\"step\": 7, \"lo").unwrap();
        assert_eq!(run(Some(4), 5..=6), whole);
        assert_eq!(run(Some(0), 1..=6), whole);
        assert_eq!(run(None, 1..=2).lines().count(), 2);
    }
}
