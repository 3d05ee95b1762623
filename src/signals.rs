//! Ctrl-C, SIGTERM and SIGHUP end a run with a clean checkpoint; a second signal ends it at once.
//! Layer 0.
//!
//! Invariant: the first signal only sets a flag, which the training loop checks between
//! micro-batches.

#![deny(missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::error::{Error, Result};

/// Whether the run was asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    flag: Arc<AtomicBool>,
}

impl Stop {
    /// Handles SIGINT, SIGTERM and SIGHUP (a lost terminal) from now on. The second signal exits at
    /// once with code 130.
    pub fn on_signals() -> Result<Stop> {
        let stop = Stop::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // The order matters: at the first signal the shutdown handler sees an unset flag and
            // does nothing, then the second handler sets the flag.
            let registered = flag::register_conditional_shutdown(signal, 130, stop.flag.clone())
                .and_then(|_| flag::register(signal, stop.flag.clone()));
            registered.map_err(|e| {
                Error::Run(format!("cannot install a handler for signal {signal}: {e}"))
            })?;
        }
        Ok(stop)
    }

    /// Turns a write beyond a file-size limit (`ulimit -f`) into an error of that write. By default
    /// the signal ends the process without a message.
    pub fn ignore_file_size_signal() -> Result<()> {
        // A handler rather than "ignore": child processes keep the default action.
        let nothing = Arc::new(AtomicBool::new(false));
        flag::register(SIGXFSZ, nothing)
            .map(drop)
            .map_err(|e| Error::Run(format!("cannot install a handler for signal {SIGXFSZ}: {e}")))
    }

    /// Whether the run should end.
    pub fn requested(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// Asks the run to end, as a signal does.
    pub fn request(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }
}
