//! The stream, and launches that begin while the kernel before them ends. Layer 1.
//!
//! Invariant: a kernel is launched early only directly behind another kernel, and only if its code
//! first waits for the end of its predecessor; so no result depends on it. What is saved is the
//! gap between two kernels, about a microsecond. (Programmatic dependent launch: CUDA C++ Programming
//! Guide.)

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUlaunchAttributeID as AttributeId};

use crate::device::Launch;

/// Turns early launches off, to find out whether they cause a fault.
const VARIABLE: &str = "TEMPER_EARLY_LAUNCH";

pub(super) struct Stream {
    handle: sys::CUstream,
    /// Whether the GPU can launch early (Hopper and newer) and the user has not turned it off.
    can: bool,
    /// Whether it does.
    early: AtomicBool,
    /// Whether the last work queued is a kernel.
    behind_kernel: AtomicBool,
}

impl Stream {
    /// No stream yet.
    pub(super) fn none() -> Stream {
        Stream {
            handle: std::ptr::null_mut(),
            can: false,
            early: AtomicBool::new(false),
            behind_kernel: AtomicBool::new(false),
        }
    }

    /// A stream of the context that is bound: not the legacy one, which cannot be captured and
    /// waits for other streams.
    pub(super) fn create(capability: (i32, i32)) -> Result<Stream, DriverError> {
        let off = std::env::var(VARIABLE).is_ok_and(|v| v == "0");
        let handle = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        let can = capability >= (9, 0) && !off;
        Ok(Stream { handle, can, early: AtomicBool::new(can), ..Stream::none() })
    }

    /// See `Device::launch_early`.
    pub(super) fn launch_early(&self, on: bool) -> bool {
        self.early.swap(on && self.can, Ordering::Relaxed)
    }

    pub(super) fn exists(&self) -> bool {
        !self.handle.is_null()
    }

    /// The stream, for anything but a kernel of ours.
    pub(super) fn handle(&self) -> sys::CUstream {
        self.behind_kernel.store(false, Ordering::Relaxed);
        self.handle
    }

    /// The stream, for a library that may queue nothing; see [`Stream::ends_with_kernel`].
    pub(super) fn handle_for_library(&self) -> sys::CUstream {
        self.handle
    }

    /// The last work queued is a kernel, of ours or of a library.
    pub(super) fn ends_with_kernel(&self) {
        self.behind_kernel.store(true, Ordering::Relaxed);
    }

    /// Queues a kernel of ours: its function, and whether its code waits for its predecessor.
    ///
    /// # Safety
    /// `args` fit the function, and what they point to lives until the kernel has run.
    pub(super) unsafe fn launch(
        &self,
        (function, waits): (sys::CUfunction, bool),
        at: Launch,
        args: &mut [*mut c_void],
    ) -> Result<(), DriverError> {
        let mut early = sys::CUlaunchAttribute {
            id: AttributeId::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let behind_kernel = self.behind_kernel.swap(false, Ordering::Relaxed);
        let config = sys::CUlaunchConfig {
            gridDimX: at.grid[0],
            gridDimY: at.grid[1],
            gridDimZ: at.grid[2],
            blockDimX: at.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: at.shared,
            hStream: self.handle,
            attrs: &raw mut early,
            numAttrs: u32::from(self.early.load(Ordering::Relaxed) && waits && behind_kernel),
        };
        // SAFETY: the caller's promise; the driver copies `config` and `args` before it returns.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                args.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()?;
        self.ends_with_kernel();
        Ok(())
    }
}
