//! The GPU code of the kernels: a module is loaded at the first launch of one of its kernels.
//! Layer 1.
//!
//! Invariant: a function is found by the address of its kernel's definition, so that a launch
//! hashes no name. A kernel gets the shared memory it requests, or an error that states the limit.

use std::collections::HashMap;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUfunction_attribute as FunctionAttribute};

use crate::device::{Kernel, KernelDef};
use crate::error::{Error, Result};

/// Dynamic shared memory that a kernel may use without opting in.
const PLAIN_SHARED: u32 = 48 << 10;
/// The modules and functions loaded so far.
#[derive(Default)]
pub(super) struct Code {
    pub(super) modules: HashMap<&'static str, Module>,
    /// By the address of the kernel's definition, which is unique.
    functions: HashMap<usize, Function>,
}

pub(super) struct Module(pub(super) sys::CUmodule);
// SAFETY: any thread may use the handle under the context.
unsafe impl Send for Module {}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Whether its code begins with the wait for its predecessor.
    waits: bool,
    /// Dynamic shared memory that it may use in its current setup.
    shared: u32,
}
// SAFETY: as for `Module`.
unsafe impl Send for Function {}

fn shared_too_large(kernel: &str, asked: u32, fixed: u32, most: u32, device: &str) -> Error {
    Error::Device(format!(
        "{kernel} needs {asked} bytes of dynamic shared memory and {fixed} of static; {device} \
         allows at most {most} for each block"
    ))
}

/// The share of a multiprocessor's memory, in percent, that is shared memory while a kernel runs; unset:
/// the driver's choice. A multiprocessor must be empty to change it, so kernels that want different
/// shares cannot overlap. For measurements.
const CARVEOUT: &str = "TEMPER_CARVEOUT";

/// The oldest target whose code begins with the wait (`wait_for_previous` in
/// `kernels/prim/kernel.cuh`).
const WAITS: i32 = 90;

/// Makes the error for a failed operation on a kernel.
pub(super) type LaunchError<'a> = &'a dyn Fn(&str, DriverError) -> Error;

impl Code {
    /// The function of a kernel with `shared` bytes of dynamic shared memory, and whether its code
    /// waits for its predecessor. Loads its module first if necessary. `error` describes an operation
    /// on the kernel that failed; `limits` are the most shared memory of a block and the name of the
    /// device.
    pub(super) fn function(
        &mut self,
        kernel: Kernel,
        shared: u32,
        limits: (u32, &str),
        error: LaunchError,
    ) -> Result<(sys::CUfunction, bool)> {
        let key = std::ptr::from_ref(kernel) as usize;
        let function = match self.functions.get(&key) {
            Some(f) if f.shared >= shared => return Ok((f.handle, f.waits)),
            Some(f) => *f,
            None => self.load(kernel, error)?,
        };
        let Function { handle, waits, shared: mut allowed } = function;
        if shared > allowed {
            // SAFETY: a function of a loaded module.
            let fixed = unsafe {
                result::function::get_function_attribute(
                    handle,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                )
            }
            .map_err(|e| error("reading its attributes", e))? as u32;
            if shared + fixed > limits.0 {
                return Err(shared_too_large(kernel.name, shared, fixed, limits.0, limits.1));
            }
            // SAFETY: as above.
            unsafe {
                result::function::set_function_attribute(
                    handle,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared as i32,
                )
            }
            .map_err(|e| error("asking for shared memory", e))?;
            allowed = shared;
        }
        self.functions.insert(key, Function { handle, waits, shared: allowed });
        Ok((handle, waits))
    }

    fn load(&mut self, kernel: &KernelDef, error: LaunchError) -> Result<Function> {
        let image = kernel.image;
        let module = match self.modules.get(image.name) {
            Some(module) => module.0,
            None => {
                if image.bytes.is_empty() {
                    return Err(Error::Device(format!(
                        "{}: is built for the CPU only",
                        kernel.name
                    )));
                }
                // `include_bytes!` promises no alignment, but the loader reads words.
                let mut words = vec![0u64; image.bytes.len().div_ceil(8)];
                bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..image.bytes.len()]
                    .copy_from_slice(image.bytes);
                // SAFETY: a complete fatbin; the driver copies what it keeps.
                let module = unsafe { result::module::load_data(words.as_ptr().cast()) }
                    .map_err(|e| error(&format!("loading GPU code {}", image.name), e))?;
                self.modules.insert(image.name, Module(module));
                module
            }
        };
        let symbol =
            std::ffi::CString::new(kernel.name).map_err(|e| Error::Device(e.to_string()))?;
        // SAFETY: the module is loaded until `Drop`.
        let handle = unsafe { result::module::get_function(module, symbol) }
            .map_err(|e| error(&format!("looking it up in GPU code {}", image.name), e))?;
        if let Some(percent) = carveout()? {
            // SAFETY: a function of a loaded module.
            unsafe {
                result::function::set_function_attribute(
                    handle,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                    percent,
                )
            }
            .map_err(|e| error("choosing its share of shared memory", e))?;
        }
        // Code that the driver compiled from PTX for an older target has no wait. SAFETY: a function
        // of a loaded module.
        let target = unsafe {
            result::function::get_function_attribute(
                handle,
                FunctionAttribute::CU_FUNC_ATTRIBUTE_PTX_VERSION,
            )
        }
        .map_err(|e| error("reading its attributes", e))?;
        Ok(Function { handle, waits: target >= WAITS, shared: PLAIN_SHARED })
    }
}

fn carveout() -> Result<Option<i32>> {
    std::env::var(CARVEOUT).ok().map(|text| percent(&text)).transpose()
}

fn percent(text: &str) -> Result<i32> {
    let percent = text.parse().ok().filter(|n| (0..=100).contains(n));
    percent
        .ok_or_else(|| Error::Config(format!("{CARVEOUT}={text} must be a number from 0 to 100")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_that_is_no_percentage_is_refused() {
        assert_eq!(percent("100").unwrap(), 100);
        for text in ["", "x", "101", "-1"] {
            assert!(percent(text).unwrap_err().to_string().contains(CARVEOUT), "{text}");
        }
    }

    #[test]
    fn too_much_shared_memory_is_said_with_the_limit() {
        let shared =
            shared_too_large("attention_64_bf16", 250_000, 16, 232_448, "NVIDIA H200").to_string();
        assert!(shared.contains("attention_64_bf16") && shared.contains("232448"), "{shared}");
    }
}
