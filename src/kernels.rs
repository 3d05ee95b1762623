//! The typed launchers that build.rs generates from the signatures in `kernels/*.cu`: one function
//! and one struct of named arguments for each kernel, and the constants that `kernels/` exports.
//! Layer 2.
//!
//! Invariant: a wrong number or kind of arguments does not compile; a wrong dtype is an error that
//! names the argument.

// The docs of the launchers are the heads of the kernels, in which brackets are indices.
#![allow(rustdoc::broken_intra_doc_links)]

use std::marker::PhantomData;

use crate::device::{CpuLaunch, DType, Device, Image, KernelDef, Launch, TensorMap};
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
        "{name}: no kernel for {} and size {d}; supported sizes: {}",
        real.name(),
        sizes.join(", ")
    )))
}

/// The address of a tensor, whose dtype must be the kernel's; 0 if the tensor is absent.
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

/// A tensor map: a matrix in memory and the box of it that the bulk copies (TMA) of a kernel move.
#[derive(Clone, Copy, Debug)]
pub struct Boxes<'a> {
    map: TensorMap,
    dtype: DType,
    tensor: PhantomData<&'a Tensor>,
}

impl<'a> Boxes<'a> {
    /// Boxes of `rows` rows, 128 bytes wide, with 128-byte swizzle in shared memory.
    pub fn swizzled(t: &'a Tensor, rows: usize) -> Boxes<'a> {
        let size = t.dtype().size();
        let map = TensorMap {
            address: t.address(),
            row_bytes: (t.stride() * size) as u64,
            rows: t.row_count() as u32,
            cols: t.cols() as u32,
            box_rows: rows as u32,
            box_cols: (128 / size) as u32,
            element_bytes: size as u32,
            swizzled: 1,
        };
        Boxes { map, dtype: t.dtype(), tensor: PhantomData }
    }

    /// Whether bulk copies can read `t`: its address and its rows are aligned to 16 bytes.
    pub fn fit(t: &Tensor) -> bool {
        t.address().is_multiple_of(16) && (t.stride() * t.dtype().size()).is_multiple_of(16)
    }

    fn dtype(&self) -> DType {
        self.dtype
    }
}
