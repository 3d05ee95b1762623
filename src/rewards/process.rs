//! A program that answers in JSON lines: started once, and ended with all its children. Layer 6.
//!
//! Invariant: whatever the program does (it ends, is silent, writes garbage or an endless line)
//! becomes a [`ProgramFault`] that says what was read, in bounded memory. It is restarted at most
//! `restarts` times per run, and it never outlives this process.

use std::collections::VecDeque;
use std::io::{BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::lines::{Line, next_line};
use crate::error::{Error, Result};
use crate::observer::Observer;
use crate::observer::output::clean;
use crate::signals::Stop;

const STDERR_LINES: usize = 12;
/// Most bytes of an answer, and of a line of stderr that is kept.
const LONGEST: usize = 16 << 20;
const LONGEST_STDERR: usize = 4096;
/// Answers that are read ahead of the requests; beyond this the program blocks.
const READ_AHEAD: usize = 8;
/// How often a wait checks whether the run should stop.
const GLANCE: Duration = Duration::from_millis(50);
/// Replaces a timeout too large for the clock.
const FOREVER: Duration = Duration::from_secs(1 << 32);

/// Why an exchange ended before all answers were read.
pub enum ProgramFault {
    /// A restart may help.
    Restart(String),
    Stop(String),
    /// The run was asked to stop.
    Interrupted,
}

/// A program and how it is run.
#[derive(Debug)]
pub struct Program {
    argv: Vec<String>,
    timeout: Duration,
    /// Name of the option that sets `timeout`.
    timeout_option: &'static str,
    /// Number of restarts that are left.
    restarts: usize,
    running: Option<Running>,
    stop: Stop,
    env: Option<Vec<String>>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// Kills the program's process group when this process ends, however it ends.
    guard: Option<Child>,
    to: Sender<String>,
    from: Receiver<Line>,
    stderr: Arc<Mutex<VecDeque<String>>>,
}

impl Program {
    pub fn new(
        argv: Vec<String>,
        timeout: Duration,
        timeout_option: &'static str,
        restarts: usize,
    ) -> Program {
        let (running, stop, env) = (None, Stop::default(), None);
        Program { argv, timeout, timeout_option, restarts, running, stop, env }
    }

    /// The arguments that run `command` in a shell.
    pub fn shell(command: &str) -> Vec<String> {
        vec!["sh".into(), "-c".into(), command.into()]
    }

    /// Ends the wait for an answer when `stop` is requested.
    pub fn heed(&mut self, stop: &Stop) {
        self.stop = stop.clone();
    }

    /// Restricts the program's environment variables to these, PATH and HOME.
    pub fn limit_environment(&mut self, names: &[String]) {
        self.env = Some(names.to_vec());
    }

    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// The time at which an answer to a request sent now is late.
    pub fn deadline(&self) -> Instant {
        let now = Instant::now();
        now.checked_add(self.timeout).unwrap_or(now + FOREVER)
    }

    /// Starts the program unless it is running.
    pub fn start(&mut self) -> Result<(), ProgramFault> {
        if self.running.is_none() {
            self.running =
                Some(start(&self.argv, self.env.as_deref()).map_err(ProgramFault::Stop)?);
        }
        Ok(())
    }

    /// Sends a line. If the program has ended, reading the answer reports that with more detail.
    pub fn tell(&self, line: String) {
        if let Some(running) = &self.running {
            let _ = running.to.send(line);
        }
    }

    /// The next line of output, which must be the answer to `id`, before `until`. None: `wait` is
    /// false and there is no line yet.
    pub fn hear(
        &mut self,
        id: u64,
        until: Instant,
        wait: bool,
    ) -> Result<Option<String>, ProgramFault> {
        let Some(running) = &mut self.running else {
            return Err(ProgramFault::Stop("it is not running".into()));
        };
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let glance = if wait { left.min(GLANCE) } else { Duration::ZERO };
            match running.from.recv_timeout(glance) {
                Ok(Line::Whole(line)) => return Ok(Some(line)),
                Ok(Line::TooLong) => {
                    let most = LONGEST >> 20;
                    return Err(ProgramFault::Restart(format!(
                        "its answer for id {id} is longer than {most} MiB without an end of line"
                    )));
                }
                Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                    let (seconds, option) = (self.timeout.as_secs_f64(), self.timeout_option);
                    return Err(ProgramFault::Restart(format!(
                        "no answer for id {id} within {seconds} s ({option})"
                    )));
                }
                Err(RecvTimeoutError::Timeout) if !wait => return Ok(None),
                Err(RecvTimeoutError::Timeout) if self.stop.requested() => {
                    return Err(ProgramFault::Interrupted);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ProgramFault::Restart(format!(
                        "it ended {} before the answer for id {id}",
                        running.status()
                    )));
                }
            }
        }
    }

    /// Handles a fault at `place`: ends the program, so that it may be restarted. Error: the run
    /// should stop, or no restarts are left.
    pub fn recover(
        &mut self,
        fault: ProgramFault,
        place: &str,
        observer: &dyn Observer,
    ) -> Result<()> {
        let (what, again) = match fault {
            ProgramFault::Restart(what) => (what, self.restarts > 0),
            ProgramFault::Stop(what) => (what, false),
            ProgramFault::Interrupted => {
                self.end();
                return Err(Error::Interrupted(format!("stopped before the answer for {place}")));
            }
        };
        let said = self.end();
        let message = format!("{place}: {what}{said}");
        if !again {
            return Err(Error::Run(format!(
                "{message}\nThe program was `{}`. Fix it and resume the run from its last checkpoint.",
                self.shown()
            )));
        }
        self.restarts -= 1;
        observer.warn(&format!("{message}\nRestarting it ({} restarts left).", self.restarts));
        Ok(())
    }

    /// Ends the program. Returns its last lines on stderr.
    pub fn end(&mut self) -> String {
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

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(running) = &mut self.running {
            running.kill();
        }
    }
}

fn start(argv: &[String], env: Option<&[String]>) -> Result<Running, String> {
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
        // A process group of its own: it is killed together with its children, and Ctrl-C reaches
        // only the run, which then ends it.
        .process_group(0)
        .spawn()
        .map_err(|e| {
            format!("`{program}` does not start ({e}); check that it is installed and on PATH")
        })?;
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

/// A shell that waits for the end of its stdin, which this process holds open, and then kills the
/// group. This works even after SIGKILL, when nothing else can. The shell has its own group, so
/// that Ctrl-C does not reach it. A program that left its group (setsid) is not killed.
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
    /// How the program ended. Waits for a moment, so that its stderr is read to the end.
    fn status(&mut self) -> String {
        for _ in 0..20 {
            if let Ok(Some(status)) = self.child.try_wait() {
                thread::sleep(Duration::from_millis(20)); // lets the reader of stderr catch up
                return format!("({status})");
            }
            thread::sleep(Duration::from_millis(10));
        }
        "(its stdout is closed)".into()
    }

    fn kill(&mut self) {
        // std kills only one process; the `kill` of the shell reaches the group without unsafe
        // code.
        let group = format!("kill -KILL -{}", self.child.id());
        let _ = Command::new("sh").args(["-c", &group]).stderr(Stdio::null()).status();
        let _ = self.child.kill();
        // The guard must end before the id of the group can be reused.
        if let Some(guard) = &mut self.guard {
            let _ = guard.kill();
            let _ = guard.wait();
        }
        let _ = self.child.wait();
    }
}

/// A line in the form of error messages.
pub fn shortened(line: &str) -> String {
    const MOST: usize = 200;
    let line = &clean(line);
    match line.char_indices().nth(MOST) {
        Some((at, _)) => format!("`{}...` ({} bytes)", &line[..at], line.len()),
        None => format!("`{line}`"),
    }
}
