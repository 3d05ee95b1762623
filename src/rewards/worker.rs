//! A reward that another program computes: JSON lines over stdin and stdout, started once. Layer 6.
//!
//! Invariant: an answer belongs to a row by its id, and answers come in the order of the rows;
//! whatever else happens (end, silence, garbage, another id) is said with the row and what was
//! read, the program is started again and gets the rows it still owes, at most `restarts` times a
//! run. Then the run stops.
//!
//! A row: `{"id": 7, "index": 0, "batch": 4, "prompt": .., "completion": .., "completion_ids":
//! [..], "columns": {..}}`. Its answer: `{"id": 7, "reward": 0.5}`, `null` to skip; `{"id": 7,
//! "error": "why"}` ends the run. Ids count from 0 over the whole run, `index` is a row's
//! position in its `batch`, for programs that score a batch at once.

use std::collections::VecDeque;
use std::io::{BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::batch::RewardBatch;
use super::lines::{Line, next_line};
use crate::error::{Error, Result};
use crate::observer::Observer;
use crate::observer::output::clean;
use crate::signals::Stop;

/// Runs a user's Python function behind the same lines.
const PYTHON: &str = include_str!("worker.py");
const STDERR_LINES: usize = 12;
/// Bytes of an answer, at most, and of a line of stderr that is kept.
const LONGEST: usize = 16 << 20;
const LONGEST_STDERR: usize = 4096;
/// Answers that are read ahead of what is asked for; then the program waits.
const READ_AHEAD: usize = 8;
/// How often a wait looks whether the run is to stop.
const GLANCE: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub struct Worker {
    argv: Vec<String>,
    timeout: Duration,
    /// How many more times it may be started again.
    restarts: usize,
    next_id: u64,
    running: Option<Running>,
    stop: Stop,
    env: Option<Vec<String>>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// Ends the program's group when this process ends, however it ends.
    guard: Option<Child>,
    to: Sender<String>,
    from: Receiver<Line>,
    stderr: Arc<Mutex<VecDeque<String>>>,
}

/// Why an exchange ended before all rows had their answers.
enum Fault {
    /// Worth another start.
    Restart(String),
    Stop(String),
    /// The run is to stop.
    Interrupted,
}

impl Worker {
    /// A shell command.
    pub fn command(command: &str, timeout: Duration, restarts: usize) -> Worker {
        Worker::new(vec!["sh".into(), "-c".into(), command.into()], timeout, restarts)
    }

    /// `def function(prompts, completions, **columns)` of a file, as TRL calls it.
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
        Worker {
            argv,
            timeout,
            restarts,
            next_id: 0,
            running: None,
            stop: Stop::default(),
            env: None,
        }
    }

    /// Ends the wait for an answer when `stop` is requested.
    pub(super) fn heed(&mut self, stop: &Stop) {
        self.stop = stop.clone();
    }

    /// Gives the program these variables of the environment alone, and PATH and HOME.
    pub(super) fn limit_environment(&mut self, names: &[String]) {
        self.env = Some(names.to_vec());
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
            let row = rewards.len();
            let (what, again) = match fault {
                Fault::Restart(what) => (what, self.restarts > 0),
                Fault::Stop(what) => (what, false),
                Fault::Interrupted => {
                    self.end();
                    return Err(Error::Interrupted(format!(
                        "stopped while reward `{name}` had not answered for row {row} of {}",
                        batch.len()
                    )));
                }
            };
            let said = self.end();
            let message = format!("reward `{name}`, row {row} of {}: {what}{said}", batch.len());
            if !again {
                return Err(Error::Run(format!(
                    "{message}\nThe program was `{}`. Fix it and resume the run from its last checkpoint.",
                    self.shown()
                )));
            }
            self.restarts -= 1;
            observer.warn(&format!("{message}\nRestarting it ({} restarts left).", self.restarts));
        }
        Ok(rewards)
    }

    /// Sends the rows that have no answer yet and reads their answers.
    fn exchange(
        &mut self,
        batch: &RewardBatch,
        rewards: &mut Vec<Option<f64>>,
    ) -> std::result::Result<(), Fault> {
        if self.running.is_none() {
            self.running = Some(start(&self.argv, self.env.as_deref()).map_err(Fault::Stop)?);
        }
        let Some(running) = &mut self.running else {
            return Err(Fault::Stop("it is not running".into()));
        };
        let first = rewards.len();
        let id_of_first = self.next_id;
        self.next_id += (batch.len() - first) as u64;
        for row in first..batch.len() {
            let id = id_of_first + (row - first) as u64;
            let line = request(batch, row, id, (row - first, batch.len() - first));
            // A writer that has ended shows as an end of the answers, which says more.
            let _ = running.to.send(line);
        }
        for row in first..batch.len() {
            rewards.push(running.answer(
                id_of_first + (row - first) as u64,
                self.timeout,
                &self.stop,
            )?);
        }
        Ok(())
    }

    /// Ends the program; what it last said on stderr.
    fn end(&mut self) -> String {
        let Some(mut running) = self.running.take() else { return String::new() };
        running.kill();
        let lines = match running.stderr.lock() {
            Ok(lines) => lines.iter().map(|l| clean(l)).collect::<Vec<_>>().join("\n  "),
            Err(_) => String::new(),
        };
        if lines.is_empty() { lines } else { format!("\nThe last lines on its stderr:\n  {lines}") }
    }

    fn shown(&self) -> String {
        match self.argv.as_slice() {
            [_, _, _, _, file, function] => format!("{}:{}", file, function),
            argv => argv.last().cloned().unwrap_or_default(),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(running) = &mut self.running {
            running.kill();
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

fn start(argv: &[String], env: Option<&[String]>) -> std::result::Result<Running, String> {
    let Some((program, arguments)) = argv.split_first() else {
        return Err("no program is given".into());
    };
    let mut command = Command::new(program);
    if let Some(names) = env {
        let kept = names.iter().map(String::as_str).chain(["PATH", "HOME"]);
        command.env_clear().envs(kept.filter_map(|n| Some((n, std::env::var_os(n)?))));
    }
    let mut child = command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // a group of its own: it ends with its children, and Ctrl-C reaches the run first, which
        // then ends it
        .process_group(0)
        .spawn()
        .map_err(|e| format!("`{program}` does not start ({e}); is it installed and on PATH?"))?;
    let (Some(mut stdin), Some(stdout), Some(errors)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err("its pipes are missing".into());
    };
    let (to, lines) = channel::<String>();
    let (tell, from) = sync_channel(READ_AHEAD);
    // Threads, because a program may write before it has read everything: neither side may wait for
    // the other.
    thread::spawn(move || {
        for line in lines {
            if stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        let mut stdout = BufReader::new(stdout);
        while let Some(line) = next_line(&mut stdout, LONGEST, false) {
            let last = line == Line::TooLong;
            if tell.send(line).is_err() || last {
                return;
            }
        }
    });
    let stderr = Arc::new(Mutex::new(VecDeque::new()));
    let kept = stderr.clone();
    thread::spawn(move || {
        let mut errors = BufReader::new(errors);
        while let Some(Line::Whole(line)) = next_line(&mut errors, LONGEST_STDERR, true) {
            let Ok(mut lines) = kept.lock() else { return };
            if lines.len() == STDERR_LINES {
                lines.pop_front();
            }
            lines.push_back(line);
        }
    });
    let guard = guard(child.id());
    Ok(Running { child, guard, to, from, stderr })
}

/// A shell that waits for the end of its stdin, which this process holds open, and then ends the
/// group: also after SIGKILL, when nothing else can. It has a group of its own, so that Ctrl-C
/// passes it by. A program that leaves its group (setsid) is not reached.
fn guard(group: u32) -> Option<Child> {
    Command::new("sh")
        .args(["-c", "read -r _; kill -KILL -\"$1\"", "sh", &group.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .ok()
}

impl Running {
    /// The reward of row `id`.
    fn answer(
        &mut self,
        id: u64,
        timeout: Duration,
        stop: &Stop,
    ) -> std::result::Result<Option<f64>, Fault> {
        let until = Instant::now() + timeout;
        let line = loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.from.recv_timeout(left.min(GLANCE)) {
                Ok(Line::Whole(line)) => break line,
                Ok(Line::TooLong) => {
                    let most = LONGEST >> 20;
                    return Err(Fault::Restart(format!(
                        "its answer for id {id} is longer than {most} MiB without an end of line"
                    )));
                }
                Err(RecvTimeoutError::Timeout) if stop.requested() => {
                    return Err(Fault::Interrupted);
                }
                Err(RecvTimeoutError::Timeout) if left > GLANCE => {}
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = timeout.as_secs_f64();
                    return Err(Fault::Restart(format!(
                        "no answer for id {id} within {seconds} s (key `timeout`)"
                    )));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Fault::Restart(format!(
                        "it ended {} before the answer for id {id}",
                        self.status()
                    )));
                }
            }
        };
        let got = shortened(&line);
        let wanted = format!("expected {{\"id\": {id}, \"reward\": NUMBER or null}}, got {got}");
        let Ok(Value::Object(answer)) = serde_json::from_str::<Value>(&line) else {
            return Err(Fault::Restart(wanted));
        };
        match answer.get("id").and_then(Value::as_u64) {
            Some(other) if other == id => {}
            Some(_) => {
                return Err(Fault::Restart(format!(
                    "answers come in the order of the rows: {wanted}"
                )));
            }
            None => return Err(Fault::Restart(wanted)),
        }
        if let Some(error) = answer.get("error") {
            let text = error.as_str().map_or_else(|| error.to_string(), str::to_string);
            return Err(Fault::Stop(format!("it says: {}", clean(&text))));
        }
        match answer.get("reward") {
            Some(Value::Null) => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(f64::from(u8::from(*b)))),
            Some(Value::Number(n)) => Ok(n.as_f64()),
            _ => Err(Fault::Restart(wanted)),
        }
    }

    /// How the program ended; its stderr is read to the end, or for a moment if a child of it lives
    /// on.
    fn status(&mut self) -> String {
        for _ in 0..20 {
            if let Ok(Some(status)) = self.child.try_wait() {
                thread::sleep(Duration::from_millis(20)); // lets the thread that reads stderr catch up
                return format!("({status})");
            }
            thread::sleep(Duration::from_millis(10));
        }
        "(its stdout is closed)".into()
    }

    fn kill(&mut self) {
        // std kills one process only; the shell's `kill` reaches the group without a line of unsafe
        // code
        let group = format!("kill -KILL -{}", self.child.id());
        let _ = Command::new("sh").args(["-c", &group]).stderr(Stdio::null()).status();
        let _ = self.child.kill();
        // Before the group's number can be another's.
        if let Some(guard) = &mut self.guard {
            let _ = guard.kill();
            let _ = guard.wait();
        }
        let _ = self.child.wait();
    }
}

fn shortened(line: &str) -> String {
    const MOST: usize = 200;
    let line = &clean(line);
    match line.char_indices().nth(MOST) {
        Some((at, _)) => format!("`{}...` ({} bytes)", &line[..at], line.len()),
        None => format!("`{line}`"),
    }
}
