//! Copies to the host that nobody waits for yet: pinned memory, each piece with an event. Layer 1.
//!
//! Invariant: a piece is filled again only after its copy was waited for, so what is read is whole.
//! Every call wants the context bound, dropping included.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUstream};

#[derive(Default)]
pub(super) struct Downloads {
    pub begun: Vec<Option<Pinned>>,
    pub spare: Vec<Pinned>,
}

/// A piece of pinned memory and the event that ends its copy.
pub(super) struct Pinned {
    base: *mut u8,
    capacity: usize,
    bytes: usize,
    event: sys::CUevent,
}
// SAFETY: the memory and the event belong to the piece alone.
unsafe impl Send for Pinned {}

impl Downloads {
    /// A spare piece of `bytes` or more, or a new one.
    pub fn spare(&mut self, bytes: usize) -> Result<Pinned, DriverError> {
        match self.spare.iter().position(|p| p.capacity >= bytes) {
            Some(i) => Ok(self.spare.swap_remove(i)),
            None => Pinned::new(bytes.next_power_of_two().max(4096)),
        }
    }
}

impl Pinned {
    fn new(capacity: usize) -> Result<Pinned, DriverError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        let mut pinned = Pinned { base: std::ptr::null_mut(), capacity, bytes: 0, event };
        // SAFETY: new memory (flags 0: pinned, and cached on the host), freed in `Drop`.
        pinned.base = unsafe { result::malloc_host(capacity, 0)? }.cast();
        Ok(pinned)
    }

    /// Queues the copy.
    ///
    /// # Safety
    /// `src..src+bytes` is live device memory, and `bytes` is at most what was asked for.
    pub unsafe fn fill_from(
        &mut self,
        src: u64,
        bytes: usize,
        stream: CUstream,
    ) -> Result<(), DriverError> {
        self.bytes = bytes;
        if bytes > 0 {
            // SAFETY: the caller's promise; the piece is ours and lives until its event was waited
            // for.
            unsafe {
                let to = std::slice::from_raw_parts_mut(self.base, bytes);
                result::memcpy_dtoh_async(to, src, stream)?;
            }
        }
        // SAFETY: our event.
        unsafe { result::event::record(self.event, stream) }
    }

    /// What was copied, as soon as it is there.
    pub fn wait(&self) -> Result<&[u8], DriverError> {
        // SAFETY: our event; after it the copy has ended, so the bytes are initialised and still.
        unsafe {
            result::event::synchronize(self.event)?;
            Ok(std::slice::from_raw_parts(self.base, self.bytes))
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: destroyed once; a copy in flight ends before the memory goes.
        unsafe {
            let _ = result::event::synchronize(self.event);
            let _ = result::event::destroy(self.event);
            if !self.base.is_null() {
                let _ = result::free_host(self.base.cast());
            }
        }
    }
}
