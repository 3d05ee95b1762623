//! The typed launchers that build.rs generates from the signatures in `kernels/*.cu`, one function
//! and one struct of named arguments a kernel, and the constants that `kernels/` exports. Layer 2.
//!
//! Invariant: a wrong number or kind of argument does not compile; a wrong dtype is an `Err` that
//! names the argument.

// The launchers' docs are the heads of the kernels: brackets there are indices.
#![allow(rustdoc::broken_intra_doc_links)]

use crate::device::{CpuLaunch, DType, Device, Image, KernelDef, Launch};
use crate::error::{Error, Result};
use crate::tensor::{Out, Tensor};

include!(concat!(env!("OUT_DIR"), "/launchers.rs"));

fn select(
    name: &str,
    real: DType,
    d: usize,
    table: &[(DType, usize, &'static KernelDef)],
) -> Result<&'static KernelDef> {
    if let Some(found) = table.iter().find(|(r, t, _)| *r == real && *t == d) {
        return Ok(found.2);
    }
    let sizes: Vec<String> =
        table.iter().filter(|t| t.0 == DType::F32).map(|t| t.1.to_string()).collect();
    Err(Error::Device(format!(
        "{name}: no kernel for {} and size {d}; there are sizes {}",
        real.name(),
        sizes.join(", ")
    )))
}

/// The address of a tensor of the kernel's dtype; 0 where there is none.
fn argument(kernel: &KernelDef, name: &str, tensor: Option<&Tensor>, dtype: DType) -> Result<u64> {
    let Some(tensor) = tensor else { return Ok(0) };
    if tensor.dtype() != dtype {
        return Err(Error::Device(format!(
            "{}: argument {name} ({}) is {}, the kernel takes {}",
            kernel.name,
            tensor.name(),
            tensor.dtype().name(),
            dtype.name()
        )));
    }
    Ok(tensor.address())
}
