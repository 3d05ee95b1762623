//! What goes between the threads that talk and the one that computes. Layer 9.
//!
//! Invariant: a request's events come in order: the scores of its prompts, tokens, an end for each
//! completion.

use tokio::sync::mpsc::UnboundedSender;

use crate::rollout::{Finish, RequestOptions};

/// What the worker is asked to do.
pub(super) enum Job {
    Run(Box<RunJob>),
    /// The client of this request has gone, or its time is up.
    Cancel(u64),
}

/// A request: completions of prompts.
pub(super) struct RunJob {
    pub id: u64,
    /// Which of the names.
    pub model: usize,
    pub prompts: Vec<Vec<u32>>,
    /// Completions of each.
    pub n: usize,
    /// `max_new_tokens` of 0: nothing is generated.
    pub options: RequestOptions,
    /// Whether the request chose its seed: then its sequences are numbered from 0, as those of
    /// `temper generate` are.
    pub seeded: bool,
    /// Score the prompts, and tell so many of the most probable tokens at each place.
    pub score: Option<usize>,
    /// Tell each token as it comes; else the first one, and all of a completion at its end.
    pub each_token: bool,
    pub events: UnboundedSender<Event>,
}

/// What became of it. A choice is the number of a prompt times n, plus that of its completion.
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
    /// Of the prompt's tokens from the second on: log-probs, and the most probable tokens.
    Scored {
        prompt: usize,
        logps: Vec<f32>,
        top: Vec<Vec<(u32, f32)>>,
    },
    Failed(String),
}
