//! Opening a device by the name that a user gives. Layer 1.
//!
//! Invariant: `cuda` never falls back to another device; whoever prints the device prints what was
//! opened.

use std::sync::Arc;

use super::Device;
use super::cpu::Cpu;
use super::cuda::Cuda;
use crate::error::{Error, Result};

/// Opens `cpu`, `cuda` or `auto`: the GPU where one can be used, else the CPU. Errors: another
/// name; for `cuda`, why there is no GPU.
pub fn open(choice: &str) -> Result<Arc<dyn Device>> {
    match choice {
        "cpu" => Ok(Arc::new(Cpu::new())),
        "cuda" => Ok(Arc::new(Cuda::new()?)),
        "auto" => match Cuda::new() {
            Ok(device) => Ok(Arc::new(device)),
            Err(_) => Ok(Arc::new(Cpu::new())),
        },
        other => Err(Error::Config(format!("device is auto, cuda or cpu, not \"{other}\""))),
    }
}
