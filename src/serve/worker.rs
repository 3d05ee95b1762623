//! The thread that computes: continuous batching of all requests, with one engine per name.
//! Layer 9.
//!
//! Invariant: requests join at the next step and leave when they end or are cancelled. A failure
//! ends only the affected requests, and the worker continues.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc};

use tokio::sync::mpsc::UnboundedSender;

use super::events::{Event, Job, RunJob};
use super::metrics::Metrics;
use super::score::{ScoreTask, score};
use super::ticket::App;
use crate::autograd::Cx;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::kv::PAGE;
use crate::rollout::sample::Sampling;
use crate::rollout::{Completion, Engine, EngineOptions, Request, RequestOptions, Stepped};

/// Upper bound of sequence numbers.
const NUMBERS: u32 = 1 << 31;

pub(super) struct Worker {
    cx: Cx,
    metrics: Arc<Metrics>,
    queue: mpsc::Receiver<Job>,
    lines: Vec<Line>,
    scoring: VecDeque<ScoreTask>,
    open: HashMap<u64, OpenRequest>,
    step_tokens: usize,
    /// The seed of requests that chose none; their sequences are numbered consecutively.
    seed: u64,
    next_number: u32,
}

/// The model and the running requests of one name.
struct Line {
    decoder: Decoder,
    engine: Engine,
    /// The prompt of each request of the engine, by the engine's number.
    prompts: HashMap<usize, RunningPrompt>,
}

#[derive(Clone, Copy)]
struct RunningPrompt {
    id: u64,
    prompt: usize,
    left: usize,
}

struct OpenRequest {
    model: usize,
    prompts: Vec<Vec<u32>>,
    n: usize,
    options: RequestOptions,
    /// Number of the first sequence.
    number: u32,
    events: UnboundedSender<Event>,
    each_token: bool,
    /// Whether no token was sent yet.
    first_token: bool,
    /// Number of unfinished prompts.
    left: usize,
}

impl Worker {
    pub fn new(
        cx: Cx,
        decoders: Vec<Decoder>,
        app: &App,
        queue: mpsc::Receiver<Job>,
    ) -> Result<Worker> {
        let config = &app.config;
        let mut lines = Vec::new();
        for (mut decoder, served) in decoders.into_iter().zip(&app.models) {
            let stop = served.stop.clone();
            let mut options =
                EngineOptions::new(served.longest, Sampling::greedy(), stop, config.max_sequences);
            options.max_step_tokens = config.step_tokens.max(config.max_sequences);
            let virtuals = decoder.vocab().virtuals;
            let tokens = config.cache_tokens.max(served.longest + virtuals);
            options.pages = Some(tokens.div_ceil(PAGE));
            let engine = Engine::new(&cx, &mut decoder, options, served.longest)?;
            lines.push(Line { decoder, engine, prompts: HashMap::new() });
        }
        Ok(Worker {
            cx,
            metrics: app.metrics.clone(),
            queue,
            lines,
            scoring: VecDeque::new(),
            open: HashMap::new(),
            step_tokens: config.step_tokens,
            seed: RandomState::new().hash_one(app.started),
            next_number: 0,
        })
    }

    /// Works until all senders of jobs are gone.
    pub fn run(&mut self) {
        loop {
            let idle = self.scoring.is_empty() && self.lines.iter().all(|l| !l.engine.has_work());
            if idle {
                self.publish();
                let Ok(job) = self.queue.recv() else { return };
                self.take(job);
            }
            loop {
                match self.queue.try_recv() {
                    Ok(job) => self.take(job),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => return,
                }
            }
            self.score();
            (0..self.lines.len()).for_each(|line| self.step(line));
            self.publish();
        }
    }

    fn take(&mut self, job: Job) {
        match job {
            Job::Run(job) => self.begin(*job),
            Job::Cancel(id) => self.close(id),
        }
    }

    fn begin(&mut self, job: RunJob) {
        let RunJob { id, model, prompts, n, mut options, seeded, score, each_token, events } = job;
        let mut number = 0;
        if !seeded {
            let wanted = (prompts.len() * n) as u32;
            if self.next_number > NUMBERS - 1 - wanted {
                (self.next_number, self.seed) = (0, self.seed.wrapping_add(1));
            }
            number = self.next_number;
            self.next_number += wanted;
            if !options.sampling.is_greedy() {
                options.sampling.seed = self.seed;
            }
        }
        let left = prompts.len();
        let request = OpenRequest {
            model,
            prompts,
            n,
            options,
            number,
            events,
            each_token,
            first_token: true,
            left,
        };
        match score {
            Some(top) => {
                let task = |(prompt, ids): (usize, &Vec<u32>)| ScoreTask {
                    id,
                    prompt,
                    model,
                    ids: ids.clone(),
                    top,
                };
                self.scoring.extend(request.prompts.iter().enumerate().map(task));
                self.open.insert(id, request);
            }
            None => {
                self.open.insert(id, request);
                (0..left).for_each(|prompt| self.generate(id, prompt));
            }
        }
    }

    /// Submits a prompt to its engine.
    fn generate(&mut self, id: u64, prompt: usize) {
        let Some(open) = self.open.get(&id) else { return };
        let line = &mut self.lines[open.model];
        let number = open.number + (prompt * open.n) as u32;
        let request = Request { prompt: open.prompts[prompt].clone(), n: open.n, number };
        match line.engine.submit_with(&request, open.options.clone()) {
            Ok(index) => {
                line.prompts.insert(index, RunningPrompt { id, prompt, left: open.n });
            }
            Err(e) => self.fail(id, &e),
        }
    }

    /// Scores the prompts that have waited longest: as many of one model as fit into a step.
    fn score(&mut self) {
        let Some(model) = self.scoring.front().map(|task| task.model) else { return };
        let (mut tasks, mut tokens) = (Vec::new(), 0);
        let most = self.step_tokens;
        let fits = |task: &ScoreTask, tokens: usize| {
            task.model == model && (tokens == 0 || tokens + task.ids.len() <= most)
        };
        while self.scoring.front().is_some_and(|task| fits(task, tokens)) {
            let Some(task) = self.scoring.pop_front() else { break };
            tokens += task.ids.len();
            tasks.push(task);
        }
        self.metrics.steps.fetch_add(1, Relaxed);
        match score(&mut self.cx, &self.lines[model].decoder, &tasks) {
            Ok(scores) => {
                for (task, scores) in tasks.into_iter().zip(scores) {
                    let Some(open) = self.open.get_mut(&task.id) else { continue };
                    let (prompt, logps, top) = (task.prompt, scores.logps, scores.top);
                    let _ = open.events.send(Event::Scored { prompt, logps, top });
                    if open.options.max_new_tokens > 0 {
                        self.generate(task.id, prompt);
                    } else {
                        self.prompt_done(task.id);
                    }
                }
            }
            Err(e) => tasks.iter().for_each(|task| self.fail(task.id, &e)),
        }
    }

    fn step(&mut self, line: usize) {
        let own = &mut self.lines[line];
        if !own.engine.has_work() {
            return;
        }
        let before = own.engine.counts;
        match own.engine.step(&mut self.cx, &own.decoder) {
            Ok(stepped) => {
                let after = own.engine.counts;
                self.metrics.steps.fetch_add((after.steps - before.steps) as u64, Relaxed);
                let preempted = (after.preempted - before.preempted) as u64;
                self.metrics.preempted.fetch_add(preempted, Relaxed);
                self.tell(line, stepped);
            }
            Err(e) => {
                own.engine.abort();
                let ids: Vec<u64> = own.prompts.drain().map(|(_, running)| running.id).collect();
                ids.into_iter().for_each(|id| self.fail(id, &e));
            }
        }
    }

    /// Sends the events of a step to the requests. A failed send is ignored: the client has
    /// disconnected, and a cancellation will follow.
    fn tell(&mut self, line: usize, stepped: Stepped) {
        self.metrics.completion_tokens.fetch_add(stepped.tokens.len() as u64, Relaxed);
        for sampled in stepped.tokens {
            let Some(running) = self.lines[line].prompts.get(&sampled.request) else { continue };
            let Some(open) = self.open.get_mut(&running.id) else { continue };
            // Waking the answering thread for each token would cost more than a small model's step.
            if !std::mem::take(&mut open.first_token) && !open.each_token {
                continue;
            }
            let choice = running.prompt * open.n + sampled.member;
            let (token, logp, top) = (sampled.token, sampled.logp, sampled.top);
            let _ = open.events.send(Event::Token { choice, token, logp, top });
        }
        for Completion { request, member, ids, finish, .. } in stepped.done {
            let Some(running) = self.lines[line].prompts.get_mut(&request) else { continue };
            running.left -= 1;
            let RunningPrompt { id, prompt, left } = *running;
            if left == 0 {
                self.lines[line].prompts.remove(&request);
            }
            let Some(open) = self.open.get(&id) else { continue };
            let choice = prompt * open.n + member;
            let _ = open.events.send(Event::Done { choice, ids, finish });
            if left == 0 {
                self.prompt_done(id);
            }
        }
    }

    fn prompt_done(&mut self, id: u64) {
        let Some(open) = self.open.get_mut(&id) else { return };
        open.left -= 1;
        if open.left == 0 {
            self.open.remove(&id);
        }
    }

    fn fail(&mut self, id: u64, error: &Error) {
        if let Some(open) = self.open.get(&id) {
            let _ = open.events.send(Event::Failed(error.to_string()));
        }
        self.close(id);
    }

    /// Drops a request in any state.
    fn close(&mut self, id: u64) {
        let Some(open) = self.open.remove(&id) else { return };
        self.scoring.retain(|task| task.id != id);
        let Line { engine, prompts, .. } = &mut self.lines[open.model];
        prompts.retain(|index, running| {
            let own = running.id == id;
            if own {
                engine.cancel(*index);
            }
            !own
        });
    }

    fn publish(&self) {
        let (mut running, mut waiting) = (0, self.scoring.len());
        for line in &self.lines {
            let (own_running, own_waiting) = line.engine.load();
            running += own_running;
            waiting += own_waiting;
        }
        self.metrics.running.store(running, Relaxed);
        self.metrics.waiting.store(waiting, Relaxed);
    }
}
