//! The log as a table: its columns and their formats. Layer 0.
//!
//! Invariant: a row is at most as wide as the terminal. metrics.jsonl has the metrics without a
//! column.

use super::{MetricValue, Progress, number};

/// A column of the log. It shows the first of its metrics that the run logs.
struct Column {
    title: &'static str,
    metrics: &'static [&'static str],
    width: usize,
    /// If a row is too wide, the columns with the largest rank are dropped first.
    rank: u32,
    write: fn(f64) -> String,
}

/// All columns in order, except step, elapsed and left.
const COLUMNS: &[Column] = &[
    column("epoch", &["epoch"], 5, 6, |v| format!("{v:.2}")),
    column("loss", &["loss", "loss/policy_avg"], 8, 1, number::decimal),
    column("value loss", &["loss/value_avg"], 10, 9, number::decimal),
    column("reward", &["reward", "objective/scores"], 8, 0, number::decimal),
    column("std", &["reward_std"], 8, 10, number::decimal),
    column("margin", &["rewards/margins", "objective/scores_margin"], 8, 3, number::decimal),
    column(
        "accuracy",
        &["rewards/accuracies", "mean_token_accuracy", "accuracy"],
        8,
        3,
        number::percent,
    ),
    column("mean reward", &["mean_reward"], 11, 11, number::decimal),
    column("kl", &["kl", "objective/kl"], 8, 4, number::decimal),
    column(
        "entropy",
        &["entropy", "objective/entropy", "policy/entropy_avg"],
        8,
        12,
        number::decimal,
    ),
    column("length", &["completions/mean_length"], 7, 5, |v| format!("{v:.1}")),
    column("cut off", &["completions/clipped_ratio"], 7, 9, number::percent),
    column("lr", &["learning_rate"], 7, 7, number::small),
    column("grad norm", &["grad_norm"], 9, 8, number::decimal),
    column("tokens/s", &["tokens_per_second"], 8, 4, number::count),
    column("mfu", &["mfu"], 6, 10, number::percent),
    column("memory", &["peak_memory"], 10, 13, number::bytes),
];

const fn column(
    title: &'static str,
    metrics: &'static [&'static str],
    width: usize,
    rank: u32,
    write: fn(f64) -> String,
) -> Column {
    Column { title, metrics, width, rank, write }
}

/// Width of the columns elapsed and left.
const CLOCK: usize = 9;
const GAP: usize = 2;

/// The table of one run.
pub struct LogTable {
    /// Width of the column step: `800/1200`.
    step: usize,
    /// Each column with its metric in this run.
    columns: Vec<(&'static Column, &'static str)>,
}

impl LogTable {
    /// The columns for a run with these training metrics, as far as they fit in `width`.
    pub fn new(total: u64, metrics: &[(&str, MetricValue)], width: usize) -> LogTable {
        let step = (2 * total.to_string().len() + 1).max("step".len());
        let has = |name: &&str| metrics.iter().any(|(key, _)| key == name);
        let found = |c: &'static Column| Some((c, c.metrics.iter().copied().find(has)?));
        let mut columns: Vec<_> = COLUMNS.iter().filter_map(found).collect();
        let taken = |columns: &[(&Column, &str)]| -> usize {
            let own = step + 2 * (GAP + CLOCK);
            own + columns.iter().map(|c| GAP + c.0.width).sum::<usize>()
        };
        while taken(&columns) > width
            && let Some(last) = (0..columns.len()).max_by_key(|i| columns[*i].0.rank)
        {
            columns.remove(last);
        }
        LogTable { step, columns }
    }

    /// The header line.
    pub fn header(&self) -> String {
        let titles = self.columns.iter().map(|c| c.0.title.to_string());
        self.line("step", titles, ["elapsed", "left"])
    }

    /// The row of the training metrics at `step`.
    pub fn row(
        &self,
        step: u64,
        total: u64,
        metrics: &[(&str, MetricValue)],
        at: Option<&Progress>,
    ) -> String {
        let elapsed = at.map_or("-".into(), |at| number::clock(at.elapsed));
        let left = at.and_then(|at| at.left).map_or("-".into(), number::clock);
        let cells = self.columns.iter().map(|(c, name)| cell(c, name, metrics));
        self.line(&format!("{step}/{total}"), cells, [&elapsed, &left])
    }

    /// The row of the metrics of an evaluation. Metrics without a column follow by name, as far as
    /// they fit in `width`.
    pub fn evaluation(&self, metrics: &[(&str, MetricValue)], width: usize) -> String {
        let plain: Vec<(&str, MetricValue)> = metrics
            .iter()
            .map(|(key, v)| (key.strip_prefix("eval_").unwrap_or(key), v.clone()))
            .collect();
        let cells: Vec<String> =
            self.columns.iter().map(|(c, name)| cell(c, name, &plain)).collect();
        let shows = self
            .columns
            .iter()
            .any(|(_, name)| *name != "epoch" && plain.iter().any(|(key, _)| key == name));
        if shows {
            return self.line("eval", cells.into_iter(), ["", ""]).trim_end().to_string();
        }
        let mut line = format!("{:>1$}", "eval", self.step);
        for (key, value) in &plain {
            let text = match value {
                MetricValue::Int(v) => number::count(*v as f64),
                MetricValue::Float(v) => number::decimal(*v),
                MetricValue::Text(v) => v.clone(),
            };
            let item = format!("  {key} {text}");
            if *key != "epoch" && line.len() + item.len() <= width {
                line += &item;
            }
        }
        line
    }

    fn line(&self, step: &str, cells: impl Iterator<Item = String>, clocks: [&str; 2]) -> String {
        let mut line = format!("{step:>0$}", self.step);
        for ((column, _), cell) in self.columns.iter().zip(cells) {
            line += &format!("{:GAP$}{cell:>1$}", "", column.width);
        }
        for clock in clocks {
            line += &format!("{:GAP$}{clock:>CLOCK$}", "");
        }
        line
    }
}

/// The text of a cell; empty if the metric was not logged.
fn cell(column: &Column, name: &str, metrics: &[(&str, MetricValue)]) -> String {
    match metrics.iter().find(|(key, _)| *key == name) {
        Some((_, MetricValue::Float(v))) => (column.write)(*v),
        Some((_, MetricValue::Int(v))) => (column.write)(*v as f64),
        Some((_, MetricValue::Text(v))) => v.chars().take(column.width).collect(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn grpo() -> Vec<(&'static str, MetricValue)> {
        let names = [
            "loss",
            "grad_norm",
            "learning_rate",
            "completions/clipped_ratio",
            "completions/mean_length",
            "entropy",
            "kl",
            "reward",
            "reward_std",
            "rewards/numeric_match/mean",
            "epoch",
            "tokens_per_second",
            "peak_memory",
        ];
        names.iter().map(|n| (*n, MetricValue::Float(0.123456))).collect()
    }

    #[test]
    fn rows_are_aligned_and_no_wider_than_the_terminal() {
        let at = Progress {
            step: 7,
            total: 1200,
            steps_per_second: 1.0,
            tokens_per_second: 1.0,
            elapsed: Duration::from_secs(9),
            left: Some(Duration::from_secs(40_000)),
        };
        for width in [60, 80, 100, 160] {
            let table = LogTable::new(1200, &grpo(), width);
            let header = table.header();
            let row = table.row(7, 1200, &grpo(), Some(&at));
            assert_eq!(header.len(), row.len());
            assert!(row.len() <= width, "{row}");
            for word in ["reward", "loss", "elapsed", "left"] {
                assert!(header.contains(word), "{width}: {header}");
            }
            // Columns are right-aligned: a value ends where its title ends.
            let end = |text: &str, word: &str| text.find(word).unwrap() + word.len();
            assert_eq!(end(&header, "loss"), end(&row, "0.1235"));
            assert!(row.ends_with("11:06:40"), "{row}");
        }
        let narrow = LogTable::new(1200, &grpo(), 80).header();
        assert!(!narrow.contains("memory") && !narrow.contains("entropy"), "{narrow}");
        assert!(LogTable::new(1200, &grpo(), 160).header().contains("memory"));
    }

    #[test]
    fn an_evaluation_stands_in_the_columns_of_training() {
        let table = LogTable::new(10, &grpo(), 80);
        let eval = [("eval_loss", 7.5.into()), ("epoch", 1.0.into())];
        let line = table.evaluation(&eval, 80);
        assert!(line.trim_start().starts_with("eval"), "{line}");
        assert_eq!(line.find("7.5000").unwrap() + 6, table.header().find("loss").unwrap() + 4);
        let strange = [("eval_bleu", 0.25.into()), ("eval_rouge", 0.5.into())];
        assert_eq!(table.evaluation(&strange, 80), " eval  bleu 0.2500  rouge 0.5000");
    }
}
