//! Shows a run to a person: a table on standard output, and everything else on standard error, with
//! a progress bar if that is a terminal. Layer 0.
//!
//! Invariant: a closed or full stream does not end a run: metrics.jsonl has what cannot be printed.
//! Text from data files and models is printed without escape sequences.

use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{self, clean};
use super::table::LogTable;
use super::{MetricValue, Observer, Progress, Work, number};

/// Width of rows if standard output is not a terminal.
const WIDTH: usize = 100;

/// Prints a run: a row of a table for each logged step, and a bar.
#[derive(Default)]
pub struct Terminal {
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    bar: Option<ProgressBar>,
    /// A second bar, for work besides the steps.
    work: Option<ProgressBar>,
    /// Made with the first row.
    table: Option<LogTable>,
    at: Option<Progress>,
}

impl Shown {
    /// Writes while the bars are hidden.
    fn print(&self, write: impl FnOnce()) {
        match self.work.as_ref().or(self.bar.as_ref()) {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

impl Terminal {
    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_line(&self, text: &str) {
        self.shown().print(|| output::note_line(clean(text)));
    }
}

/// The width of a row: that of the terminal.
fn width() -> usize {
    if !output::shows_to_a_person() {
        return WIDTH;
    }
    usize::from(console::Term::stdout().size_checked().map_or(80, |(_, columns)| columns))
}

impl Observer for Terminal {
    fn info(&self, text: &str) {
        self.note_line(text);
    }

    fn note(&self, text: &str) {
        self.note_line(&format!("note: {text}"));
    }

    fn warn(&self, text: &str) {
        self.note_line(&format!("warning: {text}"));
    }

    fn begin(&self, step: u64, total: u64) {
        let bar = output::has_room_for_a_bar().then(|| bar(step, total));
        *self.shown() = Shown { bar, ..Shown::default() };
    }

    fn progress(&self, at: &Progress) {
        let mut shown = self.shown();
        shown.at = Some(*at);
        if let Some(bar) = &shown.bar {
            let left = at.left.map_or("-".into(), number::clock);
            bar.set_position(at.step);
            bar.set_message(format!(
                "{left} left, {} tokens/s",
                number::count(at.tokens_per_second)
            ));
        }
    }

    fn work(&self, at: &Work) {
        let mut shown = self.shown();
        if at.done >= at.total {
            shown.work.take().inspect(ProgressBar::finish_and_clear);
        } else if output::has_room_for_a_bar() {
            let bar = shown.work.get_or_insert_with(|| bar(0, at.total as u64));
            bar.set_position(at.done as u64);
            bar.set_message(at.what.to_string());
        }
    }

    fn metrics(&self, step: u64, total: u64, metrics: &[(&str, MetricValue)]) {
        let mut shown = self.shown();
        let mut lines = Vec::new();
        let is_training = metrics.iter().any(|(key, _)| *key == "learning_rate");
        if shown.table.is_none() {
            let table = LogTable::new(total, metrics, width());
            lines.push(table.header());
            shown.table = Some(table);
        }
        if let Some(table) = &shown.table {
            lines.push(match is_training {
                true => table.row(step, total, metrics, shown.at.as_ref()),
                false => table.evaluation(metrics, width()),
            });
        }
        shown.print(|| {
            // If the reader has closed the stream, rows are lost here; metrics.jsonl has them.
            let _ = output::print_line(lines.join("\n"));
        });
    }

    fn end(&self) {
        let mut shown = self.shown();
        for bar in [shown.work.take(), shown.bar.take()].into_iter().flatten() {
            bar.finish_and_clear(); // the last row has the numbers of the bar
        }
    }

    fn summary(&self, text: &str) {
        self.shown().print(|| {
            let _ = output::print_line(clean(text));
        });
    }
}

fn bar(first: u64, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        .with_position(first);
    // wide_msg is cut at the edge of the terminal: a bar that wraps cannot be erased.
    let template = "{percent:>3}% [{bar:20}] {pos}/{len}  {elapsed}  {wide_msg}";
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar, // the template is constant and parses
    }
}
