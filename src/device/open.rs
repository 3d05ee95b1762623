//! Opens the device that the user chooses. Layer 1.
//!
//! Invariant: `cuda` never falls back to another device; the printed device is the one that was
//! opened.

use std::sync::Arc;

use super::Device;
use super::cpu::Cpu;
use super::cuda::Cuda;
use crate::config::DeviceChoice;
use crate::error::{Error, Result};

/// Opens a device. `Auto`: the GPU if one can be used, else the CPU. Error for `Cuda`: why no GPU
/// can be used.
pub fn open(choice: DeviceChoice) -> Result<Arc<dyn Device>> {
    match choice {
        DeviceChoice::Cpu => Ok(Arc::new(Cpu::new())),
        DeviceChoice::Cuda => Ok(Arc::new(Cuda::new()?)),
        DeviceChoice::Auto => match Cuda::new() {
            Ok(device) => Ok(Arc::new(device)),
            Err(_) => Ok(Arc::new(Cpu::new())),
        },
    }
}

/// Starts the CPU's threads (`threads`, or one per core), which otherwise start at their first use.
/// Error: the system refuses them (`ulimit -u`, a container's limit).
pub fn start_threads(threads: Option<usize>) -> Result<()> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0));
    match builder.build_global() {
        Err(e) if std::error::Error::source(&e).is_some() => Err(Error::Device(format!(
            "the CPU's threads cannot be started ({e}); raise the limit of processes (ulimit -u), or set \
             RAYON_NUM_THREADS to a smaller number"
        ))),
        _ => Ok(()), // the threads run already, or were started
    }
}
