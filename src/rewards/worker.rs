//! A reward that another program computes: JSON lines over stdin and stdout; one process for the
//! run. Layer 6.
//!
//! Invariant: answers are matched to rows by their id and come in the order of the rows. Anything
//! else (the program ends, is silent, writes garbage or another id) is reported with the row and
//! the text that was read; then the program is restarted and receives the rows without an answer,
//! at most `restarts` times per run. After that the run stops.
//!
//! A row is `{"id": 7, "index": 0, "batch": 4, "prompt": .., "completion": .., "completion_ids":
//! [..], "columns": {..}}`. Its answer is `{"id": 7, "reward": 0.5}`, or `null` to skip the row;
//! `{"id": 7, "error": "why"}` ends the run. Ids count from 0 over the whole run. `index` is the
//! row's position in its `batch`, for programs that score a batch at once.
//!
//! Rows may be sent while other completions of their batch are still being generated
//! ([`Worker::offer`]): then the program works during the generation. The lines and their order are
//! the same.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::batch::RewardBatch;
use super::process::{Program, ProgramFault, shortened};
use crate::error::Result;
use crate::observer::Observer;
use crate::observer::output::clean;
use crate::signals::Stop;

/// Runs a user's Python function with the same protocol.
const PYTHON: &str = include_str!("worker.py");

#[derive(Debug)]
pub struct Worker {
    program: Program,
    next_id: u64,
    /// The lines of an unfinished batch that were already sent.
    early: Vec<String>,
}

impl Worker {
    /// A worker that runs a shell command.
    pub fn command(command: &str, timeout: Duration, restarts: usize) -> Worker {
        Worker::new(Program::shell(command), timeout, restarts)
    }

    /// A worker that calls `def function(prompts, completions, **columns)` of a file, as TRL does.
    pub fn python(
        python: &str,
        file: &str,
        function: &str,
        timeout: Duration,
        restarts: usize,
    ) -> Worker {
        let argv = [python, "-u", "-c", PYTHON, file, function].map(str::to_string).to_vec();
        Worker::new(argv, timeout, restarts)
    }

    fn new(argv: Vec<String>, timeout: Duration, restarts: usize) -> Worker {
        let program = Program::new(argv, timeout, "key `timeout`", restarts);
        Worker { program, next_id: 0, early: Vec::new() }
    }

    /// Ends the wait for an answer when `stop` is requested.
    pub(super) fn heed(&mut self, stop: &Stop) {
        self.program.heed(stop);
    }

    /// Restricts the program's environment variables to these, PATH and HOME.
    pub(super) fn limit_environment(&mut self, names: &[String]) {
        self.program.limit_environment(names);
    }

    /// Sends row `row` of an unfinished batch. Rows come in order. Faults of the program are
    /// reported when the batch is scored.
    pub(super) fn offer(&mut self, batch: &RewardBatch, row: usize) {
        if row == 0 {
            self.forget();
        }
        if row != self.early.len() || self.program.start().is_err() {
            return;
        }
        let line = request(batch, row, self.next_id, (row, batch.len()));
        self.next_id += 1;
        self.program.tell(line.clone());
        self.early.push(line);
    }

    /// Drops a batch that was offered but never scored, and ends the program: its answers would be
    /// taken for those of the next batch.
    fn forget(&mut self) {
        if !self.early.is_empty() {
            self.program.end();
            self.early.clear();
        }
    }

    pub fn score(
        &mut self,
        name: &str,
        batch: &RewardBatch,
        observer: &dyn Observer,
    ) -> Result<Vec<Option<f64>>> {
        let mut rewards = Vec::with_capacity(batch.len());
        while rewards.len() < batch.len() {
            let Err(fault) = self.exchange(batch, &mut rewards) else { continue };
            let place = format!("reward `{name}`, row {} of {}", rewards.len(), batch.len());
            self.program.recover(fault, &place, observer)?;
        }
        Ok(rewards)
    }

    /// Sends the rows without an answer that were not sent yet, and reads the answers.
    fn exchange(
        &mut self,
        batch: &RewardBatch,
        rewards: &mut Vec<Option<f64>>,
    ) -> Result<(), ProgramFault> {
        let first = rewards.len();
        let mut id_of_first = self.next_id - self.early.len() as u64;
        let line = |row: usize, id_of_first: u64| {
            let id = id_of_first + (row - first) as u64;
            request(batch, row, id, (row - first, batch.len() - first))
        };
        let sent = self.early.iter().enumerate();
        if sent.clone().any(|(row, sent)| row >= batch.len() || *sent != line(row, id_of_first)) {
            self.forget();
            id_of_first = self.next_id;
        }
        self.program.start()?;
        let sent = std::mem::take(&mut self.early).len();
        self.next_id = id_of_first + (batch.len() - first) as u64;
        (first + sent..batch.len()).for_each(|row| self.program.tell(line(row, id_of_first)));
        for row in first..batch.len() {
            rewards.push(self.answer(id_of_first + (row - first) as u64)?);
        }
        Ok(())
    }

    /// Reads the reward of row `id`.
    fn answer(&mut self, id: u64) -> Result<Option<f64>, ProgramFault> {
        let until = self.program.deadline();
        let line = self.program.hear(id, until, true)?.unwrap_or_default();
        let got = shortened(&line);
        let wanted = format!("expected {{\"id\": {id}, \"reward\": NUMBER or null}}, got {got}");
        let Ok(Value::Object(answer)) = serde_json::from_str::<Value>(&line) else {
            return Err(ProgramFault::Restart(wanted));
        };
        match answer.get("id").and_then(Value::as_u64) {
            Some(other) if other == id => {}
            Some(_) => {
                return Err(ProgramFault::Restart(format!(
                    "answers must come in the order of the rows: {wanted}"
                )));
            }
            None => return Err(ProgramFault::Restart(wanted)),
        }
        if let Some(error) = answer.get("error") {
            let text = error.as_str().map_or_else(|| error.to_string(), str::to_string);
            return Err(ProgramFault::Stop(format!("it says: {}", clean(&text))));
        }
        match answer.get("reward") {
            Some(Value::Null) => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(f64::from(u8::from(*b)))),
            Some(Value::Number(n)) => Ok(n.as_f64()),
            _ => Err(ProgramFault::Restart(wanted)),
        }
    }
}

fn request(batch: &RewardBatch, row: usize, id: u64, (index, of): (usize, usize)) -> String {
    let columns: Map<String, Value> =
        batch.columns.keys().map(|name| (name.clone(), batch.cell(name, row).clone())).collect();
    let line = json!({
        "id": id, "index": index, "batch": of, "prompt": batch.prompts[row], "completion": batch.completions[row],
        "completion_ids": batch.completion_ids[row], "columns": columns,
    });
    format!("{line}\n")
}
