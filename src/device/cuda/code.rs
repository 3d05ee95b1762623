//! The kernels' machine code on the device: modules are loaded at a kernel's first launch. Layer 1.
//!
//! Invariant: a function is found by the address of its kernel's definition, so a launch hashes no
//! name; a kernel gets the shared memory that it asks for or an error that says how much there is.

use std::collections::HashMap;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUfunction_attribute as FunctionAttribute};

use super::Cuda;
use super::probe::text;
use crate::device::{Kernel, KernelDef, lock};
use crate::error::{Error, Result};

/// Dynamic shared memory that every kernel may use without asking.
const PLAIN_SHARED: u32 = 48 << 10;
/// Modules and functions that were loaded so far.
#[derive(Default)]
pub(super) struct Code {
    pub(super) modules: HashMap<&'static str, Module>,
    /// By the address of the kernel's definition, of which there is one: no name is hashed for a
    /// launch.
    functions: HashMap<usize, Function>,
}

pub(super) struct Module(pub(super) sys::CUmodule);
// SAFETY: a handle that any thread may use under the context.
unsafe impl Send for Module {}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory it may use as it is set up now.
    shared: u32,
}
// SAFETY: as for `Module`.
unsafe impl Send for Function {}

fn shared_too_large(kernel: &str, asked: u32, fixed: u32, most: u32, device: &str) -> Error {
    Error::Device(format!(
        "{kernel} needs {asked} bytes of dynamic shared memory and {fixed} of static; {device} gives a block at most {most}"
    ))
}

impl Cuda {
    pub(super) fn launch_error(&self, kernel: &str, what: &str, e: DriverError) -> Error {
        use sys::CUresult::*;
        match e.0 {
            CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUDA_ERROR_INVALID_PTX => Error::Device(format!(
                "{kernel}: this build has no GPU code for sm_{}{}; build again with TEMPER_CUDA_ARCHS=sm_{0}{1} ({})",
                self.capability.0,
                self.capability.1,
                text(e)
            )),
            // These come from work before, not from this launch.
            CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_LAUNCH_TIMEOUT => self.late(&format!("found while launching {kernel}"), e),
            _ => Error::Device(format!("{kernel}: {what}: {}", text(e))),
        }
    }

    /// The function of a kernel with room for `shared` bytes; loads its module first if need be.
    pub(super) fn function(&self, kernel: Kernel, shared: u32) -> Result<sys::CUfunction> {
        let mut code = lock(&self.code);
        let key = std::ptr::from_ref(kernel) as usize;
        let function = match code.functions.get(&key) {
            Some(f) if f.shared >= shared => return Ok(f.handle),
            Some(f) => *f,
            None => Function { handle: self.load(&mut code, kernel)?, shared: PLAIN_SHARED },
        };
        let (handle, mut allowed) = (function.handle, function.shared);
        if shared > allowed {
            // SAFETY: a function of a loaded module.
            let fixed = unsafe {
                result::function::get_function_attribute(
                    handle,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                )
            }
            .map_err(|e| self.launch_error(kernel.name, "reading its attributes", e))?
                as u32;
            if shared + fixed > self.max_shared {
                return Err(shared_too_large(
                    kernel.name,
                    shared,
                    fixed,
                    self.max_shared,
                    &self.name,
                ));
            }
            // SAFETY: as above.
            unsafe {
                result::function::set_function_attribute(
                    handle,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared as i32,
                )
            }
            .map_err(|e| self.launch_error(kernel.name, "asking for shared memory", e))?;
            allowed = shared;
        }
        code.functions.insert(key, Function { handle, shared: allowed });
        Ok(handle)
    }

    fn load(&self, code: &mut Code, kernel: &KernelDef) -> Result<sys::CUfunction> {
        let image = kernel.image;
        let module = match code.modules.get(image.name) {
            Some(module) => module.0,
            None => {
                if image.bytes.is_empty() {
                    return Err(Error::Device(format!(
                        "{}: is built for the CPU only",
                        kernel.name
                    )));
                }
                // `include_bytes!` promises no alignment, the loader reads words.
                let mut words = vec![0u64; image.bytes.len().div_ceil(8)];
                bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..image.bytes.len()]
                    .copy_from_slice(image.bytes);
                // SAFETY: a whole fatbin; the driver copies what it keeps.
                let module =
                    unsafe { result::module::load_data(words.as_ptr().cast()) }.map_err(|e| {
                        self.launch_error(
                            kernel.name,
                            &format!("loading GPU code {}", image.name),
                            e,
                        )
                    })?;
                code.modules.insert(image.name, Module(module));
                module
            }
        };
        let symbol =
            std::ffi::CString::new(kernel.name).map_err(|e| Error::Device(e.to_string()))?;
        // SAFETY: the module is loaded and stays so until `Drop`.
        unsafe { result::module::get_function(module, symbol) }.map_err(|e| {
            self.launch_error(kernel.name, &format!("looking it up in GPU code {}", image.name), e)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_shared_memory_is_said_with_the_limit() {
        let shared =
            shared_too_large("attention_64_bf16", 250_000, 16, 232_448, "NVIDIA H200").to_string();
        assert!(shared.contains("attention_64_bf16") && shared.contains("232448"), "{shared}");
    }
}
