//! The costs and results of a finished run, and what to do next. Layer 8.
//!
//! Invariant: every value was measured in the run or logged last.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::config::{DataOptions, OnBadRow, Section};
use crate::log::RunLog;
use crate::methods::MethodRun;
use crate::model::layout::Task;
use crate::observer::number;

/// The costs and results of a finished run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Tokens of the whole run.
    pub num_tokens: u64,
    /// The last logged loss; NaN if the run had nothing left to do.
    pub loss: f64,
    /// Steps, tokens and time since the start or the resume.
    pub steps: u64,
    pub tokens: u64,
    pub elapsed: Duration,
    /// Peak memory on the device in bytes.
    pub peak_memory: u64,
    /// Results: a name and a value.
    pub results: Vec<(String, String)>,
}

/// Training metrics in the summary, and their names; a run has some of them.
const RESULTS: &[(&str, &str)] = &[
    ("reward", "reward"),
    ("objective/scores", "reward"),
    ("loss", "loss"),
    ("mean_token_accuracy", "token accuracy"),
    ("rewards/accuracies", "accuracy"),
    ("accuracy", "accuracy"),
    ("rewards/margins", "reward margin"),
    ("kl", "KL"),
    ("objective/kl", "KL"),
    ("completions/mean_length", "length"),
];

impl Summary {
    /// `tokens` is for the whole run, `before` for the part before a resume.
    pub fn new(log: &RunLog, steps: u64, tokens: u64, before: u64, peak_memory: u64) -> Summary {
        let number = |line: &Map<String, Value>, key: &str| line.get(key).and_then(Value::as_f64);
        let of = |key: &str| -> Vec<f64> {
            log.history().iter().filter_map(|line| number(line, key)).collect()
        };
        let mut results: Vec<(String, String)> = Vec::new();
        for (key, name) in RESULTS {
            if results.iter().any(|(shown, _)| shown == name) {
                continue; // PPO logs its reward under TRL's two names
            }
            if let [first, .., last] = of(key)[..] {
                let (first, last) = (write(key, first), write(key, last));
                results.push((name.to_string(), format!("{last} (first logged: {first})")));
            } else if let [only] = of(key)[..] {
                results.push((name.to_string(), write(key, only)));
            }
        }
        let is_eval = |line: &&Map<String, Value>| line.keys().any(|k| k.starts_with("eval_"));
        if let Some(line) = log.history().iter().rev().find(is_eval) {
            let shown = RESULTS.iter().filter_map(|(key, name)| {
                number(line, &format!("eval_{key}")).map(|v| format!("{name} {}", write(key, v)))
            });
            let shown: Vec<String> = shown.collect();
            if !shown.is_empty() {
                results.push(("evaluation".into(), shown.join(", ")));
            }
        }
        Summary {
            num_tokens: tokens,
            loss: of("loss").last().copied().unwrap_or(f64::NAN),
            steps,
            tokens: tokens.saturating_sub(before),
            elapsed: log.elapsed(),
            peak_memory,
            results,
        }
    }

    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// The lines of the summary: a name and a value.
    pub fn lines(&self) -> Vec<(String, String)> {
        let rate = number::count(self.tokens_per_second());
        let tokens = number::count(self.tokens as f64);
        let mut lines = vec![
            ("time".into(), format!("{} for {} steps", number::clock(self.elapsed), self.steps)),
            ("tokens".into(), format!("{tokens}, {rate} tokens/s")),
            ("peak memory".into(), number::bytes(self.peak_memory as f64)),
        ];
        if self.steps == 0 {
            lines.clear();
        }
        lines.extend(self.results.iter().cloned());
        lines
    }
}

fn write(key: &str, v: f64) -> String {
    match key {
        "mean_token_accuracy" | "rewards/accuracies" | "accuracy" => number::percent(v),
        "completions/mean_length" => format!("{v:.1} tokens"),
        _ => number::decimal(v),
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let lines = self.lines();
        for (i, (what, value)) in lines.iter().enumerate() {
            let end = if i + 1 == lines.len() { "" } else { "\n" };
            write!(f, "  {what:<14} {value}{end}")?;
        }
        Ok(())
    }
}

/// Commands to try with the folder of a finished run.
pub fn next_commands(
    run: &MethodRun,
    model: &str,
    output: &Path,
    is_adapter: bool,
    data: &[impl AsRef<Path>],
) -> Vec<String> {
    let out = quoted(output);
    let on = match is_adapter {
        true => format!("--model {} --adapter {out}", quoted(Path::new(model))),
        false => format!("--model {out}"),
    };
    let data: Vec<String> = data.iter().map(|p| quoted(p.as_ref())).collect();
    let data = data.join(" ") + &read_as(&run.training.reading);
    let mut commands = Vec::new();
    match run.method.task() {
        Task::CausalLm => {
            let chats = output.join("chat_template.jinja").is_file();
            commands.push(match chats {
                true => format!("temper chat {on}"),
                false => format!("temper generate {on} --prompt \"Once\" max_new_tokens=64"),
            });
            match rewards(&run.method) {
                Some(names) if !names.is_empty() => {
                    let names = quoted(Path::new(&names.join(",")));
                    commands.push(format!("temper eval {on} --data {data} reward_funcs={names}"));
                }
                Some(_) => {}
                None if ["sft", "pretrain"].contains(&run.method.name()) => {
                    commands.push(format!("temper eval {on} --data {data}"));
                }
                None => {}
            }
            if is_adapter {
                let merged = quoted(&output.with_file_name(format!(
                    "{}-merged",
                    output.file_name().unwrap_or_default().to_string_lossy()
                )));
                commands.push(format!("temper merge {on} --output {merged}"));
            }
        }
        _ if run.method.name() == "reward" => {
            commands.push(format!("temper eval {on} --data {data}"));
        }
        _ => {}
    }
    commands.push(format!("temper report {out}"));
    commands
}

/// The options for reading rows that are not the defaults, as arguments.
fn read_as(options: &DataOptions) -> String {
    let DataOptions { columns, on_bad_row, max_row_bytes } = options;
    let mut text = String::new();
    if !columns.0.is_empty() {
        let pairs: Vec<String> = columns.0.iter().map(|(f, c)| format!("{f}:{c}")).collect();
        text += &format!(" {}", quoted(Path::new(&format!("columns={}", pairs.join(",")))));
    }
    if *on_bad_row == OnBadRow::Drop {
        text += " on_bad_row=drop";
    }
    if *max_row_bytes != DataOptions::default().max_row_bytes {
        text += &format!(" max_row_bytes={max_row_bytes}");
    }
    text
}

/// The names of the rewards in a method's options. None: the method has none.
fn rewards(method: &(impl Section + ?Sized)) -> Option<Vec<String>> {
    let key = method.keys().into_iter().find(|k| k.name == "reward_funcs")?;
    let names = key.value.as_array()?.iter().filter_map(|v| v.as_str().map(String::from));
    Some(names.collect())
}

/// A path quoted for a shell.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./-:@+,=%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
