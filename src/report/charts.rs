//! Assigns the metrics of a page to charts. Layer 8.
//!
//! Invariant: every metric is in one chart, or in the table of metrics that never change. The lines
//! of a chart have one scale: a metric of several runs, or a metric and its evaluation.

use serde_json::{Value, json};

/// A metric of a run: its name, and `[step, value or null]` for each logged step.
struct Series<'a> {
    name: &'a str,
    points: &'a [Value],
    run: usize,
    /// Index among the series of the run.
    at: usize,
}

/// The layout of runs that share their charts: `{charts: [[name, [[run, index of its series,
/// evaluation?], ..]], ..], still: [[name, value of each run], ..]}`. Times are omitted; the page
/// shows them as a bar.
pub fn layout(runs: &[&Value]) -> Value {
    let all: Vec<Series> = runs.iter().enumerate().flat_map(|(i, run)| series(i, run)).collect();
    let mut names: Vec<&str> = Vec::new();
    for s in all.iter().filter(|s| !s.name.starts_with("time/")) {
        if !names.contains(&s.name) {
            names.push(s.name);
        }
    }
    names.sort_by_key(|name| rank(name)); // stable: equal ranks stay in logged order
    let moves =
        |name: &str| of(&all, name).any(|s| s.points.iter().any(|p| p[1] != s.points[0][1]));
    let still = names.iter().filter(|name| !moves(name)).map(|name| {
        let value = |run: usize| {
            of(&all, name).find(|s| s.run == run).map_or(json!(""), |s| s.points[0][1].clone())
        };
        Value::Array(std::iter::once(json!(name)).chain((0..runs.len()).map(value)).collect())
    });
    let still: Vec<Value> = still.collect();
    let mut charts: Vec<(&str, Vec<Value>)> = Vec::new();
    for name in names.iter().copied().filter(|name| moves(name)) {
        // The evaluation of a metric that training logs, too.
        let plain =
            name.strip_prefix("eval_").filter(|plain| names.contains(plain) && moves(plain));
        let lines = of(&all, name).map(|s| json!([s.run, s.at, plain.is_some()]));
        let chart = plain.unwrap_or(name);
        match charts.iter_mut().find(|c| c.0 == chart) {
            Some(known) => known.1.extend(lines),
            None => charts.push((chart, lines.collect())),
        }
    }
    charts.sort_by_key(|chart| rank(chart.0));
    json!({ "charts": charts, "still": still })
}

/// The series of a metric, in the order of the runs.
fn of<'a>(all: &'a [Series<'a>], name: &'a str) -> impl Iterator<Item = &'a Series<'a>> {
    all.iter().filter(move |s| s.name == name)
}

fn series(run: usize, of: &Value) -> impl Iterator<Item = Series<'_>> {
    let all = of["series"].as_array().into_iter().flatten().enumerate();
    all.filter_map(move |(at, s)| {
        let points = s[1].as_array().filter(|points| !points.is_empty())?;
        Some(Series { name: s[0].as_str()?, points, run, at })
    })
}

/// The position of a metric on the page: the most important metrics come first.
fn rank(name: &str) -> usize {
    const FIRST: [&str; 12] = [
        "loss",
        "eval_loss",
        "reward",
        "reward_std",
        "rewards",
        "eval",
        "kl",
        "entropy",
        "clip_ratio",
        "completions",
        "policy",
        "val",
    ];
    const LAST: [&str; 7] = [
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "epoch",
        "tokens_per_second",
        "mfu",
        "peak_memory",
    ];
    let head = name.split('/').next().unwrap_or_default();
    let place = |list: &[&str]| list.iter().position(|word| *word == head);
    place(&FIRST).or(place(&LAST).map(|at| 200 + at)).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(series: &[(&str, &[Option<f64>])]) -> Value {
        let points = |values: &[Option<f64>]| -> Vec<Value> {
            values.iter().enumerate().map(|(i, v)| json!([i + 1, v])).collect()
        };
        let series: Vec<Value> = series.iter().map(|(n, v)| json!([n, points(v)])).collect();
        json!({ "series": series })
    }

    #[test]
    fn an_evaluation_stands_over_its_training_and_constants_are_folded() {
        let (a, b) = (Some(1.0), Some(2.0));
        let one = run(&[
            ("learning_rate", &[a, b]),
            ("clip_ratio/low_mean", &[Some(0.0), Some(0.0)]),
            ("time/train", &[a, b]),
            ("loss", &[a, b]),
            ("eval_loss", &[b, a]),
            ("eval_only", &[a, b]),
            ("gap", &[a, None]),
        ]);
        let layout = layout(&[&one]);
        let charts = json!([
            ["loss", [[0, 3, false], [0, 4, true]]],
            ["eval_only", [[0, 5, false]]],
            ["gap", [[0, 6, false]]],
            ["learning_rate", [[0, 0, false]]],
        ]);
        assert_eq!(layout["charts"], charts);
        assert_eq!(layout["still"], json!([["clip_ratio/low_mean", 0.0]]));
    }

    #[test]
    fn runs_share_a_chart_and_a_metric_that_moves_in_one_is_shown_of_all() {
        let (a, b) = (Some(1.0), Some(2.0));
        let one = run(&[("loss", &[a, b]), ("kl", &[a, a]), ("frac", &[a, a])]);
        let two = run(&[("kl", &[a, b]), ("loss", &[b, a])]);
        let layout = layout(&[&one, &two]);
        let charts = json!([
            ["loss", [[0, 0, false], [1, 1, false]]],
            ["kl", [[0, 1, false], [1, 0, false]]],
        ]);
        assert_eq!(layout["charts"], charts);
        assert_eq!(layout["still"], json!([["frac", 1.0, ""]]));
    }
}
