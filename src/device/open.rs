//! Opening the device that a user chooses. Layer 1.
//!
//! Invariant: `cuda` never falls back to another device; a printed device is the one
//! that was opened.

use std::sync::Arc;

use super::Device;
use super::cpu::Cpu;
use super::cuda::Cuda;
use crate::config::DeviceChoice;
use crate::error::Result;

/// Opens a device; `Auto` is the GPU where one can be used, else the CPU. Errors, for `Cuda`: why
/// there is no GPU.
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
