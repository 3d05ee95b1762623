//! The state that all threads share, and the registration of a request in it. Layer 9.
//!
//! Invariant: a ticket counts its sequences from its creation until it is dropped. Dropping it
//! before the request has ended cancels the request.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;

use super::error::ApiError;
use super::events::Job;
use super::metrics::Metrics;
use super::names::Served;
use crate::config::ServeConfig;

pub(super) struct App {
    pub models: Vec<Served>,
    pub config: ServeConfig,
    pub metrics: Arc<Metrics>,
    jobs: mpsc::Sender<Job>,
    /// Whether new requests are refused.
    pub draining: AtomicBool,
    /// Requests that are being read, processed or answered.
    pub active: AtomicUsize,
    /// Sequences that run or wait.
    sequences: AtomicUsize,
    next: AtomicU64,
    /// Start time in seconds since 1970.
    pub started: u64,
}

impl App {
    pub fn new(models: Vec<Served>, config: ServeConfig, jobs: mpsc::Sender<Job>) -> App {
        App {
            models,
            config,
            metrics: Arc::default(),
            jobs,
            draining: AtomicBool::new(false),
            active: AtomicUsize::new(0),
            sequences: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            started: now(),
        }
    }

    /// Registers a request of `sequences` sequences. Error: the queue has no room.
    pub fn ticket(self: &Arc<App>, sequences: usize, began: Instant) -> Result<Ticket, ApiError> {
        let most = self.config.max_sequences + self.config.max_queue;
        if sequences > most {
            let message = format!(
                "the request asks for {sequences} completions, but the queue holds {most}; send \
                 fewer prompts or a lower n, or start the server with a higher max_queue"
            );
            return Err(ApiError::field("prompt", message));
        }
        let room = |taken: usize| Some(taken + sequences).filter(|taken| *taken <= most);
        let order = Ordering::SeqCst;
        if self.sequences.fetch_update(order, order, room).is_err() {
            let message = "the queue is full; try again later, or start the server with a higher \
                           max_queue";
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).code("queue_full"));
        }
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        Ok(Ticket { app: self.clone(), id, sequences, began, ended: false })
    }

    /// Sends a job to the worker. Error: the worker has ended.
    pub fn send(&self, job: Job) -> Result<(), ApiError> {
        self.jobs.send(job).map_err(|_| ApiError::internal("the server is stopping"))
    }
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

pub(super) struct Ticket {
    pub app: Arc<App>,
    pub id: u64,
    sequences: usize,
    pub began: Instant,
    /// Whether nothing is left to cancel.
    pub ended: bool,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.app.sequences.fetch_sub(self.sequences, Ordering::SeqCst);
        self.app.metrics.request_time.observe(self.began.elapsed());
        if !self.ended {
            self.app.metrics.cancelled.fetch_add(1, Ordering::Relaxed);
            // If this fails, the worker has ended and there is nothing to cancel.
            let _ = self.app.send(Job::Cancel(self.id));
        }
    }
}

/// Counts a request as active until it is dropped.
pub(super) struct ActiveRequest(Arc<App>);

impl ActiveRequest {
    pub fn new(app: &Arc<App>) -> ActiveRequest {
        app.active.fetch_add(1, Ordering::SeqCst);
        ActiveRequest(app.clone())
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}
