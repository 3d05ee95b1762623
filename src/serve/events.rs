//! Messages between the threads that handle connections and the one that computes. Layer 9.
//!
//! Invariant: the events of a request come in order: the scores of its prompts, then tokens and an
//! end for each completion.

use tokio::sync::mpsc::UnboundedSender;

use crate::rollout::{Finish, RequestOptions};

/// A message to the worker.
pub(super) enum Job {
    Run(Box<RunJob>),
    /// The client of this request has disconnected, or its time is up.
    Cancel(u64),
}

/// A request for completions of prompts.
pub(super) struct RunJob {
    pub id: u64,
    /// Index of the name.
    pub model: usize,
    pub prompts: Vec<Vec<u32>>,
    /// Completions per prompt.
    pub n: usize,
    /// With `max_new_tokens` 0 nothing is generated.
    pub options: RequestOptions,
    /// Whether the request chose its seed. Then its sequences are numbered from 0, as in `temper
    /// generate`.
    pub seeded: bool,
    /// Some: score the prompts and report this many of the most probable tokens at each position.
    pub score: Option<usize>,
    /// Whether to send each token at once. Otherwise only the first token of the request is sent,
    /// and each completion as a whole at its end.
    pub each_token: bool,
    pub events: UnboundedSender<Event>,
}

/// A message from the worker. A choice is the index of a prompt times n plus that of its
/// completion.
#[derive(Debug)]
pub(super) enum Event {
    Token {
        choice: usize,
        token: u32,
        logp: f32,
        top: Vec<(u32, f32)>,
    },
    Done {
        choice: usize,
        ids: Vec<u32>,
        finish: Finish,
    },
    /// The log-probs of a prompt's tokens from the second on, and the most probable tokens at each
    /// position.
    Scored {
        prompt: usize,
        logps: Vec<f32>,
        top: Vec<Vec<(u32, f32)>>,
    },
    Failed(String),
}
