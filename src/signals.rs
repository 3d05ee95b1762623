//! Ctrl-C, SIGTERM and SIGHUP end a run with a clean checkpoint; a second one ends it at once. Layer 0.
//!
//! Invariant: the first signal only sets a flag, which the training loop looks at between
//! micro-batches.

#![deny(missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::error::{Error, Result};

/// Whether someone asked the run to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    flag: Arc<AtomicBool>,
}

impl Stop {
    /// Watches SIGINT, SIGTERM and SIGHUP (a lost terminal) from here on. The second signal exits with 130 without waiting
    /// for anything.
    pub fn on_signals() -> Result<Stop> {
        let stop = Stop::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // In this order: the first signal finds the flag unset, passes the shutdown by, and
            // sets it.
            let registered = flag::register_conditional_shutdown(signal, 130, stop.flag.clone())
                .and_then(|_| flag::register(signal, stop.flag.clone()));
            registered
                .map_err(|e| Error::Run(format!("signal {signal} cannot be watched: {e}")))?;
        }
        Ok(stop)
    }

    /// From here on a write beyond a file-size limit (`ulimit -f`) is an error of that write. The
    /// signal's default ends the process without a word.
    pub fn ignore_file_size_signal() -> Result<()> {
        // Caught rather than ignored: programs that this one starts keep the default.
        let nothing = Arc::new(AtomicBool::new(false));
        flag::register(SIGXFSZ, nothing)
            .map(drop)
            .map_err(|e| Error::Run(format!("signal {SIGXFSZ} cannot be watched: {e}")))
    }

    /// Whether the run is to end.
    pub fn requested(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// As a signal would.
    pub fn request(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }
}
