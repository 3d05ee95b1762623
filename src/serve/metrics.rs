//! Counters in Prometheus' text format. Layer 9.
//!
//! Invariant: a counter never falls. A value that rises and falls is a gauge and returns to 0 when
//! nothing is served.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the buckets in seconds.
const SECONDS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

#[derive(Default)]
pub(super) struct Histogram {
    /// The last bucket is for times above all bounds.
    buckets: [AtomicU64; SECONDS.len() + 1],
    microseconds: AtomicU64,
}

impl Histogram {
    pub fn observe(&self, time: Duration) {
        let bucket = SECONDS.partition_point(|end| *end < time.as_secs_f64());
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.microseconds.fetch_add(time.as_micros() as u64, Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut sum = 0;
        for (i, bucket) in self.buckets.iter().enumerate() {
            sum += bucket.load(Relaxed);
            let end = SECONDS.get(i).map_or("+Inf".to_string(), f64::to_string);
            let _ = writeln!(out, "{name}_bucket{{le=\"{end}\"}} {sum}");
        }
        let seconds = self.microseconds.load(Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum {seconds}\n{name}_count {sum}");
    }
}

#[derive(Default)]
pub(super) struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    pub connections: AtomicUsize,
    pub running: AtomicUsize,
    pub waiting: AtomicUsize,
    pub cancelled: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub completion_tokens: AtomicU64,
    pub steps: AtomicU64,
    pub preempted: AtomicU64,
    pub request_time: Histogram,
    pub first_token_time: Histogram,
}

impl Metrics {
    pub fn answered(&self, path: &'static str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *requests.entry((path, status)).or_default() += 1;
    }

    /// The page of metrics; `active` is the number of requests in progress.
    pub fn text(&self, active: usize) -> String {
        let mut out = String::new();
        let name = "temper_requests_total";
        let _ = writeln!(out, "# HELP {name} Requests answered.\n# TYPE {name} counter");
        let requests = self.requests.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for ((path, status), n) in requests.iter() {
            let _ = writeln!(out, "{name}{{path=\"{path}\",status=\"{status}\"}} {n}");
        }
        drop(requests);
        let count = |n: &AtomicU64| n.load(Relaxed);
        let level = |n: &AtomicUsize| n.load(Relaxed) as u64;
        for (name, kind, value, help) in [
            ("requests_active", "gauge", active as u64, "Requests being worked on."),
            ("connections", "gauge", level(&self.connections), "Open connections."),
            ("sequences_running", "gauge", level(&self.running), "Sequences being decoded."),
            (
                "sequences_waiting",
                "gauge",
                level(&self.waiting),
                "Sequences waiting for cache space.",
            ),
            (
                "requests_cancelled_total",
                "counter",
                count(&self.cancelled),
                "Requests whose client disconnected or whose time ran out.",
            ),
            ("prompt_tokens_total", "counter", count(&self.prompt_tokens), "Tokens of prompts."),
            (
                "completion_tokens_total",
                "counter",
                count(&self.completion_tokens),
                "Tokens sampled.",
            ),
            ("steps_total", "counter", count(&self.steps), "Forward passes of the engine."),
            (
                "sequences_preempted_total",
                "counter",
                count(&self.preempted),
                "Times that a sequence gave up its cache and started again.",
            ),
        ] {
            let _ = writeln!(
                out,
                "# HELP temper_{name} {help}\n# TYPE temper_{name} {kind}\ntemper_{name} {value}"
            );
        }
        let help = "Seconds from a request's first byte to the end of its answer.";
        self.request_time.write(&mut out, "temper_request_seconds", help);
        let help = "Seconds from a request's acceptance to its first token.";
        self.first_token_time.write(&mut out, "temper_first_token_seconds", help);
        out
    }
}
