//! Asynchronous copies to the host: pinned memory, with an event for each piece. Layer 1.
//!
//! Invariant: a piece is reused only after its copy has ended, so the data that is read is
//! complete. The context must be bound for every call, including drop.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUstream};

#[derive(Default)]
pub(super) struct Downloads {
    pub begun: Vec<Option<Pinned>>,
    pub spare: Vec<Pinned>,
}

/// A piece of pinned memory and the event that marks the end of its copy.
pub(super) struct Pinned {
    base: *mut u8,
    capacity: usize,
    bytes: usize,
    event: sys::CUevent,
}
// SAFETY: only this piece uses the memory and the event.
unsafe impl Send for Pinned {}

impl Downloads {
    /// A spare piece of at least `bytes` bytes, or a new one.
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

    /// Queues a copy to this piece.
    ///
    /// # Safety
    ///
    /// `src..src+bytes` is live device memory, and `bytes` is at most the requested size.
    pub unsafe fn fill_from(
        &mut self,
        src: u64,
        bytes: usize,
        stream: CUstream,
    ) -> Result<(), DriverError> {
        self.bytes = bytes;
        if bytes > 0 {
            // SAFETY: the caller's promise; the piece is ours and is kept until its event has
            // occurred.
            unsafe {
                let to = std::slice::from_raw_parts_mut(self.base, bytes);
                result::memcpy_dtoh_async(to, src, stream)?;
            }
        }
        // SAFETY: our event.
        unsafe { result::event::record(self.event, stream) }
    }

    /// Waits for the copy and returns its bytes.
    pub fn wait(&self) -> Result<&[u8], DriverError> {
        // SAFETY: our event. The copy ends before it, so the bytes are initialised and do not
        // change.
        unsafe {
            result::event::synchronize(self.event)?;
            Ok(std::slice::from_raw_parts(self.base, self.bytes))
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: destroyed once; a copy in flight ends before the memory is freed.
        unsafe {
            let _ = result::event::synchronize(self.event);
            let _ = result::event::destroy(self.event);
            if !self.base.is_null() {
                let _ = result::free_host(self.base.cast());
            }
        }
    }
}
