//! A program that answers the turns of completions: JSON lines over stdin and stdout; one process
//! for the run. Layer 6.
//!
//! An *episode* is the conversation of one completion. It begins with `{"id": 0, "op": "reset",
//! "episode": 3, "seed": 7, "prompt": .., "columns": {..}}`, answered by `{"id": 0}`. Each turn of
//! the model is `{"id": 5, "op": "step", "episode": 3, "turn": 1, "completion": "..",
//! "completion_ids": [..], "last": false, "truncated": false}`, answered by `{"id": 5,
//! "observation": .., "reward": 0.5, "done": false}`. The answer `{"id": 5, "error": "why"}` ends
//! the run.
//!
//! Invariant: answers are matched to requests by their id and may come in any order; an episode has
//! one open request at a time. Any other output is reported with the row and the text that was
//! read, and the program is restarted: it receives all requests of the open episodes again and must
//! repeat its answers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::process::{Program, ProgramFault, shortened};
use crate::error::Result;
use crate::observer::Observer;
use crate::observer::output::clean;
use crate::signals::Stop;

/// A program that answers turns.
#[derive(Debug)]
pub struct Environment {
    program: Program,
    next_id: u64,
    episodes: BTreeMap<usize, Episode>,
    /// The episode of each request without an answer.
    owed: BTreeMap<u64, usize>,
    /// The time at which the silence of a program that owes an answer becomes an error.
    late: Instant,
}

#[derive(Debug)]
struct Episode {
    /// Its row, for errors.
    place: String,
    /// All its requests, and the answers to the first of them.
    requests: Vec<Map<String, Value>>,
    answers: Vec<EnvironmentAnswer>,
    /// Number of requests that the current process has answered.
    answered: usize,
}

/// The answer of an environment to a turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EnvironmentAnswer {
    /// A text or messages; None: no observation.
    pub observation: Option<Value>,
    pub reward: Option<f64>,
    pub done: bool,
}

/// A turn of the model, as it is sent to the environment.
#[derive(Clone, Debug)]
pub struct EnvironmentTurn<'a> {
    /// Counts from 1.
    pub turn: usize,
    pub text: &'a str,
    pub ids: &'a [u32],
    /// No turn follows, whatever the environment answers.
    pub last: bool,
    /// The turn was cut off by the length limit.
    pub truncated: bool,
}

impl Environment {
    /// An environment that the shell runs as `command`. After `timeout` without an answer it is
    /// restarted.
    pub fn new(command: &str, timeout: Duration, restarts: usize) -> Environment {
        Environment {
            program: Program::new(
                Program::shell(command),
                timeout,
                "environment_timeout",
                restarts,
            ),
            next_id: 0,
            episodes: BTreeMap::new(),
            owed: BTreeMap::new(),
            late: Instant::now(),
        }
    }

    /// Ends the program when `stop` is requested, and restricts its environment variables to `env`
    /// (None: all of this process).
    pub fn govern(&mut self, stop: &Stop, env: Option<&[String]>) {
        self.program.heed(stop);
        env.into_iter().for_each(|names| self.program.limit_environment(names));
    }

    /// Drops all episodes. Ends a program that still owes answers, which would come too late.
    pub fn clear(&mut self) {
        if !self.owed.is_empty() {
            self.program.end();
        }
        self.owed.clear();
        self.episodes.clear();
    }

    /// Begins an episode; `place` is its row, for errors.
    pub fn reset(
        &mut self,
        episode: usize,
        place: String,
        seed: u32,
        prompt: &Value,
        columns: &Map<String, Value>,
    ) {
        let request = json!({
            "op": "reset", "episode": episode, "seed": seed, "prompt": prompt, "columns": columns,
        });
        let requests = vec![object(request)];
        let new = Episode { place, requests, answers: Vec::new(), answered: 0 };
        self.episodes.insert(episode, new);
        self.ask(episode);
    }

    /// Sends a turn of the model; [`Environment::hear`] returns the answer.
    pub fn step(&mut self, episode: usize, turn: &EnvironmentTurn) {
        let request = json!({
            "op": "step", "episode": episode, "turn": turn.turn, "completion": turn.text,
            "completion_ids": turn.ids, "last": turn.last, "truncated": turn.truncated,
        });
        let Some(of) = self.episodes.get_mut(&episode) else { return };
        of.requests.push(object(request));
        // Otherwise an earlier request has no answer yet, and this one is sent after it.
        if of.answered + 1 == of.requests.len() {
            self.ask(episode);
        }
    }

    /// Drops an episode that has ended.
    pub fn close(&mut self, episode: usize) {
        self.episodes.remove(&episode);
    }

    /// Whether answers are outstanding.
    pub fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// The next answer to a turn, and its episode. None: no answer is outstanding, or `wait` is
    /// false and there is none yet. Errors name the row.
    pub fn hear(
        &mut self,
        wait: bool,
        observer: &dyn Observer,
    ) -> Result<Option<(usize, EnvironmentAnswer)>> {
        while self.owes() {
            match self.exchange(wait) {
                Ok(Some(heard)) => return Ok(Some(heard)),
                Ok(None) if wait => {}
                Ok(None) => return Ok(None),
                Err((id, fault)) => {
                    let place = self.place(id);
                    self.program.recover(fault, &place, observer)?;
                    self.begin_again();
                }
            }
        }
        Ok(None)
    }

    /// Reads answers until one is new. None: `wait` is false and there is none.
    fn exchange(
        &mut self,
        wait: bool,
    ) -> Result<Option<(usize, EnvironmentAnswer)>, (u64, ProgramFault)> {
        while let Some((first, _)) = self.owed.first_key_value() {
            let first = *first;
            if !self.program.is_running() {
                self.program.start().map_err(|fault| (first, fault))?;
                self.begin_again();
                continue;
            }
            let line = self.program.hear(first, self.late, wait).map_err(|fault| (first, fault))?;
            let Some(line) = line else { return Ok(None) };
            if let Some(heard) = self.take(first, &line)? {
                return Ok(Some(heard));
            }
        }
        Ok(None)
    }

    /// Processes a line. Some: it answers a turn for the first time.
    fn take(
        &mut self,
        first: u64,
        line: &str,
    ) -> Result<Option<(usize, EnvironmentAnswer)>, (u64, ProgramFault)> {
        let got = shortened(line);
        let answer: Option<Map<String, Value>> = serde_json::from_str(line).ok();
        let id = answer.as_ref().and_then(|a| a.get("id")).and_then(Value::as_u64);
        let known = id.and_then(|id| Some((id, *self.owed.get(&id)?)));
        let (Some(answer), Some((id, number))) = (answer, known) else {
            let wanted = format!("expected a JSON object with the \"id\" of a request, got {got}");
            return Err((first, ProgramFault::Restart(wanted)));
        };
        if let Some(error) = answer.get("error") {
            let text = error.as_str().map_or_else(|| error.to_string(), str::to_string);
            return Err((id, ProgramFault::Stop(format!("it says: {}", clean(&text)))));
        }
        let Some(episode) = self.episodes.get_mut(&number) else {
            return Err((
                first,
                ProgramFault::Restart(format!("its episode has ended, got {got}")),
            ));
        };
        let turn = episode.answered;
        let read = EnvironmentAnswer::read(&answer, turn == 0)
            .and_then(|read| read.fits(&episode.requests[turn]).map(|()| read))
            .map_err(|wanted| (id, ProgramFault::Restart(format!("{wanted}, got {got}"))))?;
        if episode.answers.get(turn).is_some_and(|before| *before != read) {
            let message = format!(
                "after a restart it answered turn {turn} differently: {got}. An environment's \
                 answers must depend only on the episode (its seed and row)"
            );
            return Err((id, ProgramFault::Stop(message)));
        }
        self.owed.remove(&id);
        episode.answered += 1;
        let is_new = episode.answers.len() == turn;
        if is_new {
            episode.answers.push(read.clone());
        }
        let follows = episode.answered < episode.requests.len();
        self.heard();
        if follows {
            self.ask(number);
        }
        Ok((is_new && turn > 0).then_some((number, read)))
    }

    /// Sends the next request of an episode.
    fn ask(&mut self, number: usize) {
        let Some(episode) = self.episodes.get(&number) else { return };
        let Some(request) = episode.requests.get(episode.answered).cloned() else { return };
        if self.owed.is_empty() {
            self.heard();
        }
        let id = self.next_id;
        self.next_id += 1;
        self.owed.insert(id, number);
        let mut line = object(json!({ "id": id }));
        line.extend(request);
        // If the program does not start, the next wait for an answer says why.
        let _ = self.program.start();
        self.program.tell(format!("{}\n", Value::Object(line)));
    }

    /// Restarts the timeout.
    fn heard(&mut self) {
        self.late = self.program.deadline();
    }

    /// A new process knows nothing: sends it every open episode from the beginning.
    fn begin_again(&mut self) {
        self.owed.clear();
        self.heard();
        let open: Vec<usize> = self.episodes.keys().copied().collect();
        for number in open {
            if let Some(episode) = self.episodes.get_mut(&number) {
                episode.answered = 0;
            }
            self.ask(number);
        }
    }

    /// The row and turn of a request.
    fn place(&self, id: u64) -> String {
        let episode = self.owed.get(&id).and_then(|number| self.episodes.get(number));
        let Some(episode) = episode else { return "environment".into() };
        match episode.answered {
            0 => format!("environment, {}, reset", episode.place),
            turn => format!("environment, {}, turn {turn}", episode.place),
        }
    }
}

impl EnvironmentAnswer {
    /// The error says what was expected.
    fn read(answer: &Map<String, Value>, reset: bool) -> Result<EnvironmentAnswer, String> {
        let reward = match answer.get("reward") {
            None | Some(Value::Null) => None,
            Some(Value::Bool(b)) => Some(f64::from(u8::from(*b))),
            Some(Value::Number(n)) => n.as_f64(),
            Some(_) => return Err("expected \"reward\": NUMBER or null".into()),
        };
        let done = match answer.get("done") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(done)) => *done,
            Some(_) => return Err("expected \"done\": true or false".into()),
        };
        let observation = answer.get("observation").filter(|o| !o.is_null()).cloned();
        let said = |m: &Value| {
            let role = m.get("role").and_then(Value::as_str).unwrap_or_default();
            !role.is_empty()
                && role != "assistant"
                && m.get("content").is_some_and(Value::is_string)
        };
        let understood = match &observation {
            None | Some(Value::String(_)) => true,
            Some(Value::Array(messages)) => !messages.is_empty() && messages.iter().all(said),
            Some(_) => false,
        };
        if !understood {
            let wanted = "expected \"observation\": a text, or messages {\"role\": .., \
                          \"content\": TEXT} with a role other than assistant";
            return Err(wanted.into());
        }
        let answer = EnvironmentAnswer { observation, reward, done };
        if reset && answer != EnvironmentAnswer::default() {
            return Err(
                "expected an answer to reset with only an id (the prompt comes from the row)"
                    .into(),
            );
        }
        Ok(answer)
    }

    /// Error: the request needs more than this answer.
    fn fits(&self, request: &Map<String, Value>) -> Result<(), String> {
        let goes_on = request.get("last") == Some(&Value::Bool(false));
        match goes_on && !self.done && self.observation.is_none() {
            true => Err("expected an \"observation\" or \"done\": true".into()),
            false => Ok(()),
        }
    }
}

/// The map of a literal that is an object.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
