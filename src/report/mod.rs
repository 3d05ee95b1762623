//! `report.html`: one page about a run or a pipeline of runs. Layer 8.
//!
//! Invariant: the page is one file that loads nothing from the network. Its contents were read from
//! the output folder (`metrics.jsonl`, `completions.jsonl`, `config.toml`) or passed in; an absent
//! file leaves out its section.

mod charts;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::fsio;

pub const FILE: &str = "report.html";
/// The [`ReportInput`] of a page, from which `temper report` writes it again.
const INPUT: &str = "report.json";
const PIPELINE: &str = "pipeline.json";
const METRICS: &str = "metrics.jsonl";
/// Most metrics lines on a page; longer logs are thinned, and the page says so.
const MOST_LINES: usize = 3000;
const MOST_SAMPLES: usize = 300;

/// The contents of a page that the output folder does not provide.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReportInput {
    /// Empty: the name of the folder.
    pub title: String,
    /// Facts about the run, shown first: a name and a value.
    pub facts: Vec<(String, String)>,
    pub notes: Vec<String>,
    pub table: Option<Table>,
    pub masks: Vec<MaskRow>,
}

/// A table of metrics before and after training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Table {
    pub caption: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// A row of training data, token by token; `mask` is true for the tokens in the loss.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskRow {
    pub tokens: Vec<String>,
    pub mask: Vec<bool>,
}

/// One run of a pipeline: its output folder and its input.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportStage {
    pub name: String,
    pub dir: PathBuf,
    pub input: ReportInput,
}

/// The arguments of [`write_pipeline`]; folders inside the pipeline's folder have relative paths.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pipeline {
    title: String,
    table: Option<Table>,
    stages: Vec<ReportStage>,
}

/// Writes `dir/report.html` for the run in `dir`, and `input` into `dir/report.json`. Returns the
/// path of the page.
pub fn write(dir: impl AsRef<Path>, input: &ReportInput) -> Result<PathBuf> {
    let dir = dir.as_ref();
    let name = name_of(dir);
    let title = if input.title.is_empty() { name.clone() } else { input.title.clone() };
    let text = serde_json::to_vec_pretty(input).map_err(|e| Error::Run(format!("{INPUT}: {e}")))?;
    fsio::atomic_write(dir.join(INPUT), &text)?;
    let run = ReportStage { name, dir: dir.to_path_buf(), input: input.clone() };
    page(dir, &title, None, &[run], false)
}

/// The input with which [`fn@write`] wrote the page of `dir`; the default if there is none.
pub fn read_input(dir: impl AsRef<Path>) -> Result<ReportInput> {
    let path = dir.as_ref().join(INPUT);
    if !path.is_file() {
        return Ok(ReportInput::default());
    }
    serde_json::from_slice(&fsio::read(&path)?)
        .map_err(|e| Error::data(&path, Some(e.line()), e.to_string()))
}

/// Writes `dir/report.html` with all `stages` in order below the pipeline's own table, and the
/// arguments into `dir/pipeline.json`. A stage without masks shows the masks of its own page.
pub fn write_pipeline(
    dir: impl AsRef<Path>,
    title: &str,
    table: Option<&Table>,
    stages: &[ReportStage],
) -> Result<PathBuf> {
    let dir = dir.as_ref();
    let inside = |stage: &ReportStage| ReportStage {
        dir: stage.dir.strip_prefix(dir).map_or_else(|_| stage.dir.clone(), Path::to_path_buf),
        ..stage.clone()
    };
    let pipeline = Pipeline {
        title: title.into(),
        table: table.cloned(),
        stages: stages.iter().map(inside).collect(),
    };
    let text =
        serde_json::to_vec_pretty(&pipeline).map_err(|e| Error::Run(format!("{PIPELINE}: {e}")))?;
    fsio::atomic_write(dir.join(PIPELINE), &text)?;
    page(dir, title, table, stages, false)
}

/// Rewrites the page of a folder: of a run, of a pipeline, or of all runs in the folder.
pub fn again(dir: impl AsRef<Path>) -> Result<PathBuf> {
    let dir = dir.as_ref();
    let is_run = |dir: &Path| dir.join(METRICS).is_file();
    if is_run(dir) {
        return write(dir, &read_input(dir)?);
    }
    let path = dir.join(PIPELINE);
    if path.is_file() {
        let bytes = fsio::read(&path)?;
        let mut pipeline: Pipeline = serde_json::from_slice(&bytes)
            .map_err(|e| Error::data(&path, Some(e.line()), e.to_string()))?;
        pipeline.stages.iter_mut().for_each(|stage| stage.dir = dir.join(&stage.dir)); // absolute: stays
        return page(dir, &pipeline.title, pipeline.table.as_ref(), &pipeline.stages, false);
    }
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let mut runs: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|path| is_run(path)).collect();
    runs.sort();
    if runs.is_empty() {
        let message = format!(
            "holds no run: neither it nor a folder in it has {METRICS}; give a run's --output"
        );
        return Err(Error::data(dir, None, message));
    }
    let stage = |path: &PathBuf| {
        Ok(ReportStage { name: name_of(path), dir: path.clone(), input: read_input(path)? })
    };
    let runs = runs.iter().map(stage).collect::<Result<Vec<_>>>()?;
    page(dir, &name_of(dir), None, &runs, runs.len() > 1)
}

fn name_of(dir: &Path) -> String {
    dir.file_name().map_or_else(|| "run".into(), |n| n.to_string_lossy().into_owned())
}

/// With `overlay`, one chart per metric shows the curves of all runs.
fn page(
    dir: &Path,
    title: &str,
    table: Option<&Table>,
    stages: &[ReportStage],
    overlay: bool,
) -> Result<PathBuf> {
    let runs = stages.iter().map(run).collect::<Result<Vec<_>>>()?;
    let layouts: Vec<Value> = match overlay {
        true => vec![charts::layout(&runs.iter().collect::<Vec<_>>())],
        false => runs.iter().map(|run| charts::layout(&[run])).collect(),
    };
    let data = json!({
        "title": title, "table": table, "overlay": overlay, "layouts": layouts, "runs": runs,
    });
    // In a script element only `</` and `<!--` could end the data. With `<` escaped, text from a
    // model cannot break out into the page.
    let data = data.to_string().replace('<', "\\u003c");
    let escaped = title.replace('&', "&amp;").replace('<', "&lt;");
    let parts = [
        ("@TITLE@", escaped.as_str()),
        ("@CSS@", include_str!("page.css")),
        ("@JS@", include_str!("page.js")),
        ("@DATA@", data.as_str()),
    ];
    let mut rest = include_str!("page.html");
    let mut html = String::with_capacity(data.len() + 40_000);
    // The template is filled from left to right, so a placeholder inside an inserted text is never
    // replaced.
    while let Some((at, (place, text))) =
        parts.iter().filter_map(|p| Some((rest.find(p.0)?, *p))).min_by_key(|(at, _)| *at)
    {
        html.push_str(&rest[..at]);
        html.push_str(text);
        rest = &rest[at + place.len()..];
    }
    html.push_str(rest);
    let path = dir.join(FILE);
    fsio::atomic_write(&path, html.as_bytes())?;
    Ok(path)
}

fn run(stage: &ReportStage) -> Result<Value> {
    let kept = read_input(&stage.dir)?;
    let given = &stage.input;
    let masks = if given.masks.is_empty() { kept.masks } else { given.masks.clone() };
    let facts = if given.facts.is_empty() { kept.facts } else { given.facts.clone() };
    for (i, row) in masks.iter().enumerate() {
        let (tokens, mask) = (row.tokens.len(), row.mask.len());
        if tokens != mask {
            return Err(Error::Run(format!(
                "report: mask row {i} has {tokens} tokens and {mask} mask values"
            )));
        }
    }
    let mut notes = stage.input.notes.clone();
    let (series, thinned) = series(&lines(&stage.dir.join(METRICS))?);
    if thinned > 1 {
        notes.push(format!("The curves show one of {thinned} logged steps."));
    }
    let (samples, recorded) = samples(&stage.dir.join("completions.jsonl"))?;
    if samples.len() < recorded {
        notes.push(format!("{} of {recorded} recorded completions are shown.", samples.len()));
    }
    let config = stage.dir.join("config.toml");
    let config = config.is_file().then(|| fsio::read(&config)).transpose()?;
    Ok(json!({
        "name": stage.name, "facts": facts, "notes": notes, "table": stage.input.table, "series": series, "samples": samples,
        "masks": masks, "config": config.map(|c| String::from_utf8_lossy(&c).into_owned()),
    }))
}

/// The JSON objects of a file with one per line. Empty if the file does not exist.
fn lines(path: &Path) -> Result<Vec<Map<String, Value>>> {
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let bytes = fsio::read(path)?;
    let mut out = Vec::new();
    let all: Vec<&[u8]> = bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()).collect();
    for (n, line) in all.iter().enumerate() {
        match serde_json::from_slice(line) {
            Ok(object) => out.push(object),
            Err(_) if n + 1 == all.len() => {} // the last line of a live or killed run
            Err(e) => {
                return Err(Error::data(path, Some(n + 1), format!("not a JSON object: {e}")));
            }
        }
    }
    Ok(out)
}

/// `[name, [[step, value or null], ..]]` for each numeric metric in the order of first appearance,
/// and the thinning factor.
fn series(lines: &[Map<String, Value>]) -> (Vec<Value>, usize) {
    let every = lines.len().div_ceil(MOST_LINES).max(1);
    let mut order: Vec<&str> = Vec::new();
    let mut points: BTreeMap<&str, Vec<(f64, Option<f64>)>> = BTreeMap::new();
    for (n, line) in lines.iter().enumerate() {
        let Some(step) = line.get("step").and_then(Value::as_f64) else { continue };
        // Evaluation lines have other keys: they are few and stay.
        let training = line.contains_key("learning_rate");
        if training && n % every != 0 && n + 1 != lines.len() {
            continue;
        }
        for (key, value) in line.iter().filter(|(k, _)| k.as_str() != "step") {
            if value.is_number() || value.is_null() {
                let of = points.entry(key).or_insert_with(|| {
                    order.push(key);
                    Vec::new()
                });
                of.push((step, value.as_f64()));
            }
        }
    }
    let known = |name: &&str| points[*name].iter().any(|p| p.1.is_some());
    (order.iter().copied().filter(known).map(|name| json!([name, points[name]])).collect(), every)
}

/// Completions spread evenly over the run, and their total number. The file of a long run is too
/// large for memory: this finds the lines first and parses only those that are shown.
fn samples(path: &Path) -> Result<(Vec<Value>, usize)> {
    if !path.is_file() {
        return Ok((Vec::new(), 0));
    }
    let failed = |e| Error::io(path, e);
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(failed)?);
    let (mut starts, mut at) = (Vec::new(), 0u64);
    loop {
        let n = file.skip_until(b'\n').map_err(failed)?;
        if n == 0 {
            break;
        }
        starts.push(at);
        at += n as u64;
    }
    let mut samples = Vec::new();
    for i in spread(starts.len()) {
        file.seek(SeekFrom::Start(starts[i])).map_err(failed)?;
        let mut line = Vec::new();
        file.read_until(b'\n', &mut line).map_err(failed)?;
        match serde_json::from_slice(&line) {
            Ok(object) => samples.push(sample(&object)),
            Err(_) if i + 1 == starts.len() => drop(starts.pop()), // cut short, as above
            Err(e) => {
                return Err(Error::data(path, Some(i + 1), format!("not a JSON object: {e}")));
            }
        }
    }
    Ok((samples, starts.len()))
}

/// Indices of rows spread evenly over the run, including the last.
fn spread(n: usize) -> impl Iterator<Item = usize> {
    let shown = n.min(MOST_SAMPLES);
    (0..shown).map(move |i| if n == shown { i } else { (i + 1) * n / shown - 1 })
}

/// Prompt, completion, step and all numbers of a line in their order, rewards first, with `rewards`
/// flattened.
fn sample(line: &Map<String, Value>) -> Value {
    let mut chips: Vec<(String, Value)> = Vec::new();
    let shown = |v: &Value| v.is_number() || v.is_null() || v.is_boolean();
    for (key, value) in line {
        match value {
            Value::Object(inner) => {
                let numbers = inner.iter().filter(|(_, v)| shown(v));
                chips.extend(numbers.map(|(name, v)| (format!("{key}/{name}"), v.clone())));
            }
            v if shown(v) => chips.push((key.clone(), v.clone())),
            Value::String(s)
                if !matches!(key.as_str(), "prompt" | "completion") && s.chars().count() <= 40 =>
            {
                chips.push((key.clone(), value.clone()));
            }
            _ => {}
        }
    }
    let get = |key: &str| line.get(key).cloned().unwrap_or(Value::Null);
    json!({ "step": get("step"), "prompt": get("prompt"), "completion": get("completion"), "reward": get("reward"),
        "chips": chips })
}
