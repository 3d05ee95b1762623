//! The CUDA device: the driver API, loaded at run time, and cuBLASLt where its library is found.
//! Layer 1.
//!
//! Invariant: all work runs on one stream of our own, in the order of the calls, so no event guards
//! a buffer. The code uses cudarc's `result` and `sys` layers: the per-slice events and parked
//! errors of its safe layer never come into play. A missing driver, library or device is an `Err`
//! that says the next step, never a panic: no symbol is touched before the presence of its library
//! and the version of the driver are known.

mod blas;
mod code;
mod downloads;
mod find_blas;
mod launch;
mod probe;

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blas::Blas;
use code::Code;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use downloads::Downloads;
use launch::Stream;
use probe::{
    HAS_GPU_IMAGES, HAS_HOPPER_IMAGES, dotted, driver_version, failed, old_gpu, probe, text,
};

use super::{
    Algorithm, Capabilities, Device, Download, EncodedMap, Gemm, Graph, Kernel, KernelArgs, Launch,
    LibraryProduct, Mark, MemoryInfo, TensorMap, capturing, download_size, insert_in_free_slot,
    lock, no_download, no_graph, no_mark, take_from_slot,
};
use crate::device::pool::mebibytes;
use crate::error::{Error, Result};

/// The ring of pinned memory for uploads: `SEGMENTS` segments, each guarded by an event.
const SEGMENT: usize = 8 << 20;
const SEGMENTS: usize = 4;

pub struct Cuda {
    /// Unique among all devices that this process has opened, including closed ones.
    number: u64,
    name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: Stream,
    /// (major, minor)
    capability: (i32, i32),
    /// The most bytes of dynamic shared memory that a kernel can opt in to.
    max_shared: u32,
    /// Bytes of the L2 cache.
    cache: usize,
    multiprocessors: usize,
    memory_bytes: usize,
    code: Mutex<Code>,
    /// The kernel launched last. It has its own lock, because an error that names it may occur
    /// while code is being loaded.
    last: Mutex<&'static str>,
    ring: Mutex<Ring>,
    marks: Mutex<Vec<Option<Event>>>,
    capturing: AtomicBool,
    graphs: Mutex<Vec<Option<Recorded>>>,
    downloads: Mutex<Downloads>,
    blas: Option<Blas>,
}

/// An instantiated graph, used only under the lock: two threads must not launch it at once.
struct Recorded(sys::CUgraphExec);
// SAFETY: any thread may use the handle under the context.
unsafe impl Send for Recorded {}

// SAFETY: the driver API is thread safe. Each call binds the context to its thread, and whatever is
// not thread safe (the ring, the caches, cuBLASLt's descriptors) is behind a mutex.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

/// The number of the next device to be opened; see [`Cuda::bind`].
static OPENED: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The number of the device whose context is bound to this thread; 0: none.
    static BOUND: Cell<u64> = const { Cell::new(0) };
}

#[derive(Clone, Copy)]
struct Event(sys::CUevent);
// SAFETY: any thread may use the handle under the context.
unsafe impl Send for Event {}

/// Pinned host memory. A segment is reused only after the copies from it have ended.
struct Ring {
    base: *mut u8,
    segment: usize,
    at: usize,
    events: [Event; SEGMENTS],
    pending: [bool; SEGMENTS],
}
// SAFETY: only the ring uses the memory.
unsafe impl Send for Ring {}

impl Cuda {
    /// Opens the first GPU in CUDA_VISIBLE_DEVICES.
    pub fn new() -> Result<Cuda> {
        let (device, version) = probe(HAS_GPU_IMAGES)?;
        // SAFETY: the device comes from the driver.
        let attribute = |a| {
            unsafe { result::device::get_attribute(device, a) }.map_err(failed("reading the GPU"))
        };
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let mut name =
            result::device::get_name(device).map_err(failed("reading the GPU's name"))?;
        if capability.0 < 8 {
            return Err(old_gpu(&name, capability));
        }
        let max_shared =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        let cache = attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;
        let multiprocessors =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        // SAFETY: as above.
        let memory_bytes = unsafe { result::device::total_mem(device) }
            .map_err(failed("reading the GPU's memory"))?;
        let opening = "opening the GPU (is another process using it exclusively?)";
        // SAFETY: the device comes from the driver. The primary context, because cuBLASLt uses it.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed(opening))?;
        let proc = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
        let driver = driver_version(&proc).map(|v| format!("driver {v} / ")).unwrap_or_default();
        name = format!(
            "{name} (sm_{}{}, {driver}CUDA {})",
            capability.0,
            capability.1,
            dotted(version)
        );
        // From here on `Drop` cleans up if a call fails; it skips null handles.
        let mut cuda = Cuda {
            number: OPENED.fetch_add(1, Ordering::Relaxed),
            name,
            device,
            context,
            stream: Stream::none(),
            capability,
            max_shared,
            cache,
            multiprocessors,
            memory_bytes,
            code: Mutex::default(),
            last: Mutex::default(),
            ring: Mutex::new(Ring {
                base: std::ptr::null_mut(),
                segment: 0,
                at: 0,
                events: [Event(std::ptr::null_mut()); SEGMENTS],
                pending: [false; SEGMENTS],
            }),
            marks: Mutex::default(),
            capturing: AtomicBool::new(false),
            graphs: Mutex::default(),
            downloads: Mutex::default(),
            blas: None,
        };
        cuda.bind()?;
        cuda.stream = Stream::create(capability).map_err(failed(opening))?;
        {
            let mut ring = lock(&cuda.ring);
            // Flags 0: pinned, and cached on the host (write-combined memory would gain nothing
            // here). SAFETY: new memory, freed in `Drop`.
            ring.base = unsafe { result::malloc_host(SEGMENT * SEGMENTS, 0) }
                .map_err(failed("allocating 32 MiB of pinned host memory (see ulimit -l)"))?
                .cast();
            for event in &mut ring.events {
                event.0 = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                    .map_err(failed(opening))?;
            }
        }
        cuda.blas = Blas::new()?;
        if let Some(blas) = &cuda.blas {
            cuda.name =
                format!("{}, cuBLASLt {})", cuda.name.trim_end_matches(')'), blas.version());
        }
        Ok(cuda)
    }

    /// Binds the context to this thread, since rayon's threads and tests call from any thread.
    /// Nothing else in this process binds contexts, so a thread stays bound until it uses another
    /// device.
    fn bind(&self) -> Result<()> {
        if BOUND.get() == self.number {
            return Ok(());
        }
        // SAFETY: the context is retained until `Drop`.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(failed("binding the GPU to this thread"))?;
        BOUND.set(self.number);
        Ok(())
    }

    /// Binds the context. Error: a capture is in progress, and `what` cannot be part of a graph.
    fn bind_for(&self, what: &str) -> Result<()> {
        if self.capturing.load(Ordering::Acquire) {
            return Err(capturing(what));
        }
        self.bind()
    }

    /// The error of asynchronous work: an earlier call caused it, most likely the last kernel.
    fn late(&self, what: &str, e: DriverError) -> Error {
        let last = *lock(&self.last);
        let last = if last.is_empty() {
            "no kernel was launched yet".into()
        } else {
            format!("the last kernel launched was {last}")
        };
        Error::Device(format!(
            "{what}: {}; {last}. The GPU's state is lost: start again. CUDA_LAUNCH_BLOCKING=1 makes the error appear at the \
             kernel that caused it.",
            text(e)
        ))
    }

    /// Queues work on `bytes` bytes, or does nothing for 0 bytes.
    fn queue(
        &self,
        what: &str,
        bytes: usize,
        work: impl FnOnce() -> std::result::Result<(), DriverError>,
    ) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        work().map_err(|e| self.late(what, e))
    }

    fn launch_error(&self, kernel: &str, what: &str, e: DriverError) -> Error {
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
            // These errors come from earlier work, not from this launch.
            CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_LAUNCH_TIMEOUT => self.late(&format!("found while launching {kernel}"), e),
            _ => Error::Device(format!("{kernel}: {what}: {}", text(e))),
        }
    }
}

impl Device for Cuda {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            library_gemm: self.blas.is_some(),
            multiprocessors: self.multiprocessors,
            wgmma: self.capability.0 == 9 && HAS_HOPPER_IMAGES,
            shared: self.max_shared as usize,
            cache: self.cache,
            ..Capabilities::gpu(self.memory_bytes)
        }
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        // SAFETY: new memory (256-byte aligned by the driver), freed by `free`.
        unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = self
                    .memory()
                    .map(|m| mebibytes(m.free))
                    .unwrap_or_else(|_| "an unknown amount".into());
                Error::OutOfMemory(format!(
                    "the GPU could not allocate {}; {free} is free",
                    mebibytes(bytes)
                ))
            }
            _ => self.late(&format!("allocating {}", mebibytes(bytes)), e),
        })
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        // An error here belongs to earlier work, and the next call returns it again.
        if self.bind().is_ok() {
            // SAFETY: the caller's promise; cuMemFree waits for work in flight.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()> {
        // The copy goes through pinned memory: the caller may free `src` as soon as this returns,
        // and a copy from pageable memory is only documented to be "possibly" synchronous. The
        // stream orders the copy from the ring like all other work.
        self.bind_for("upload")?;
        let late = |e| self.late("upload", e);
        let mut ring = lock(&self.ring);
        let mut done = 0;
        while done < src.len() {
            if ring.at == SEGMENT {
                let full = ring.segment;
                // SAFETY: our event, our stream.
                unsafe { result::event::record(ring.events[full].0, self.stream.handle()) }
                    .map_err(late)?;
                ring.pending[full] = true;
                let next = (full + 1) % SEGMENTS;
                if ring.pending[next] {
                    // SAFETY: our event.
                    unsafe { result::event::synchronize(ring.events[next].0) }.map_err(late)?;
                    ring.pending[next] = false;
                }
                (ring.segment, ring.at) = (next, 0);
            }
            let n = (src.len() - done).min(SEGMENT - ring.at);
            // SAFETY: `at + n` is within the segment, no copy from these bytes is in flight, and
            // the caller promises the destination.
            unsafe {
                let staged = ring.base.add(ring.segment * SEGMENT + ring.at);
                std::ptr::copy_nonoverlapping(src.as_ptr().add(done), staged, n);
                result::memcpy_htod_async(
                    dst + done as u64,
                    std::slice::from_raw_parts(staged, n),
                    self.stream.handle(),
                )
            }
            .map_err(late)?;
            ring.at = (ring.at + n).next_multiple_of(64).min(SEGMENT);
            done += n;
        }
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], src: u64) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        self.bind_for("download")?;
        // SAFETY: the caller's promise; `dst` is not read before the stream is synchronized.
        unsafe { result::memcpy_dtoh_async(dst, src, self.stream.handle()) }
            .map_err(|e| self.late("download", e))?;
        self.sync()
    }

    unsafe fn begin_download(&self, src: u64, bytes: usize) -> Result<Download> {
        self.bind_for("download")?;
        let late = |e| self.late("download", e);
        let mut pinned = lock(&self.downloads).spare(bytes).map_err(late)?;
        // SAFETY: the caller's promise; nothing else uses this pinned memory before `end_download`.
        unsafe { pinned.fill_from(src, bytes, self.stream.handle()) }.map_err(late)?;
        Ok(insert_in_free_slot(&mut lock(&self.downloads).begun, pinned))
    }

    fn end_download(&self, download: Download, dst: &mut [u8]) -> Result<()> {
        self.bind()?;
        let begun = take_from_slot(&mut lock(&self.downloads).begun, download);
        let pinned = begun.ok_or_else(|| no_download(download))?;
        let bytes = pinned.wait().map_err(|e| self.late("download", e))?;
        match dst.len() {
            0 => {}
            n if n == bytes.len() => dst.copy_from_slice(bytes),
            n => return Err(download_size(bytes.len(), n)),
        }
        lock(&self.downloads).spare.push(pinned);
        Ok(())
    }

    unsafe fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        self.queue("copy", bytes, || unsafe {
            result::memcpy_dtod_async(dst, src, bytes, self.stream.handle())
        })
    }

    unsafe fn fill(&self, dst: u64, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        self.queue("fill", bytes, || unsafe {
            result::memset_d8_async(dst, byte, bytes, self.stream.handle())
        })
    }

    unsafe fn launch(&self, kernel: Kernel, at: Launch, args: KernelArgs) -> Result<()> {
        kernel.check_block(at)?;
        self.bind()?;
        let (function, waits) = lock(&self.code).function(
            kernel,
            at.shared,
            (self.max_shared, &self.name),
            &|what, e| self.launch_error(kernel.name, what, e),
        )?;
        let [x, y, z] = at.grid;
        // SAFETY: the caller's promise.
        unsafe { self.stream.launch((function, waits), at, args) }.map_err(|e| {
            let shape = format!(
                "launch of grid {x} x {y} x {z}, block {}, {} bytes shared",
                at.block, at.shared
            );
            self.launch_error(kernel.name, &shape, e)
        })?;
        *lock(&self.last) = kernel.name;
        Ok(())
    }

    fn encode_map(&self, map: &TensorMap) -> Result<EncodedMap> {
        use sys::CUtensorMapDataType_enum::*;
        let mut encoded = EncodedMap([0; 16]);
        let (sizes, strides) = ([u64::from(map.cols), u64::from(map.rows)], [map.row_bytes]);
        let dtype = match map.element_bytes {
            2 => CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match map.swizzled {
            0 => sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_NONE,
            _ => sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        // SAFETY: before it returns, the driver reads the arrays (two numbers each, one stride) and
        // writes 128 bytes at an address aligned to 64.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut encoded).cast(),
                dtype,
                2,
                map.address as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                [map.box_cols, map.box_rows].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed(&format!("the tensor map of {map:?}")))?;
        Ok(encoded)
    }

    unsafe fn gemm(&self, g: &Gemm, algorithm: Algorithm) -> Result<LibraryProduct> {
        let Some(blas) = &self.blas else { return Ok(LibraryProduct::Unavailable) };
        self.bind()?;
        // SAFETY: the caller's promise.
        let answer = unsafe { blas.run(g, algorithm, self.stream.handle_for_library()) };
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) => {
                self.stream.handle(); // something may be queued
                return Err(e);
            }
        };
        if answer == LibraryProduct::Queued {
            self.stream.ends_with_kernel();
            *lock(&self.last) = "cuBLASLt's matrix product";
        }
        // Candidates cannot be tested during a capture, which runs nothing; they are tested another
        // time.
        let capturing = self.capturing.load(Ordering::Acquire);
        Ok(if answer == LibraryProduct::Untried && capturing {
            LibraryProduct::Unavailable
        } else {
            answer
        })
    }

    fn trust_gemm(&self, g: &Gemm, candidate: Option<usize>) {
        if let Some(blas) = &self.blas {
            blas.trust(g, candidate);
        }
    }

    fn library(&self) -> Option<String> {
        Some(match &self.blas {
            Some(blas) => format!("cuBLASLt {} ({})", blas.version(), blas.path()),
            None => {
                "none (cuBLASLt was not found; TEMPER_CUBLASLT names its file or folder)".into()
            }
        })
    }

    fn launch_early(&self, on: bool) -> bool {
        self.stream.launch_early(on)
    }

    fn sync(&self) -> Result<()> {
        self.bind_for("sync")?;
        // SAFETY: our stream.
        unsafe { result::stream::synchronize(self.stream.handle()) }
            .map_err(|e| self.late("the GPU reports", e))
    }

    fn memory(&self) -> Result<MemoryInfo> {
        self.bind()?;
        let (free, total) =
            result::mem_get_info().map_err(|e| self.late("reading the GPU's free memory", e))?;
        Ok(MemoryInfo { free, total })
    }

    fn mark(&self) -> Result<Mark> {
        self.bind_for("mark")?;
        // The default flags make an event with timing.
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|e| self.late("mark", e))?;
        // SAFETY: a new event, our stream.
        if let Err(e) = unsafe { result::event::record(event, self.stream.handle()) } {
            // SAFETY: as above; the event is not used again.
            let _ = unsafe { result::event::destroy(event) };
            return Err(self.late("mark", e));
        }
        Ok(Mark(insert_in_free_slot(&mut lock(&self.marks), Event(event))))
    }

    fn elapsed_ms(&self, from: Mark, to: Mark) -> Result<f32> {
        self.bind_for("elapsed_ms")?;
        let mut marks = lock(&self.marks);
        let mut take = |mark: Mark| take_from_slot(&mut marks, mark.0);
        let pair = (take(from), take(to));
        drop(marks);
        let ms = match pair {
            // SAFETY: recorded events of this stream.
            (Some(a), Some(b)) => unsafe {
                result::event::synchronize(b.0)
                    .and_then(|()| result::event::elapsed(a.0, b.0))
                    .map_err(|e| self.late("timing", e))
            },
            _ => Err(no_mark()),
        };
        for event in [pair.0, pair.1].into_iter().flatten() {
            // SAFETY: removed from the list, so this is its last use.
            let _ = unsafe { result::event::destroy(event.0) };
        }
        ms
    }

    fn begin_capture(&self) -> Result<()> {
        self.bind_for("begin_capture")?;
        // Relaxed mode: the first launch of a kernel may load its module, and the pool may allocate
        // slabs, during a capture. Nothing else runs on this device, so no call of another thread
        // needs to be guarded against. SAFETY: our stream, which is not the legacy one.
        unsafe {
            result::stream::begin_capture(
                self.stream.handle(),
                sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
            )
        }
        .map_err(|e| self.late("begin_capture", e))?;
        self.capturing.store(true, Ordering::Release);
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph> {
        if !self.capturing.swap(false, Ordering::AcqRel) {
            return Err(Error::Device("end_capture without begin_capture".into()));
        }
        self.bind()?;
        // SAFETY: our stream, which is being captured.
        let graph = unsafe { result::stream::end_capture(self.stream.handle()) }
            .map_err(failed("capturing a graph"))?;
        if graph.is_null() {
            return Err(Error::Device(
                "capturing a graph: the capture was invalidated by an error before".into(),
            ));
        }
        // SAFETY: a new graph; its executable form does not need it.
        let recorded = unsafe {
            let recorded = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            recorded.map_err(failed("instantiating a graph"))?
        };
        Ok(insert_in_free_slot(&mut lock(&self.graphs), Recorded(recorded)))
    }

    unsafe fn replay(&self, graph: Graph) -> Result<()> {
        self.bind_for("replay")?;
        let graphs = lock(&self.graphs);
        let Some(Some(recorded)) = graphs.get(graph) else { return Err(no_graph(graph)) };
        // SAFETY: the caller's promise; the graph is ours and live.
        unsafe { result::graph::launch(recorded.0, self.stream.handle()) }
            .map_err(|e| self.late("replay of a graph", e))?;
        *lock(&self.last) = "a replayed graph";
        Ok(())
    }

    fn forget(&self, graph: Graph) {
        let taken = take_from_slot(&mut lock(&self.graphs), graph);
        if let (Some(recorded), Ok(())) = (taken, self.bind()) {
            // SAFETY: removed from the list, so this is its last use; the driver first finishes a
            // replay in flight.
            let _ = unsafe { result::graph::exec_destroy(recorded.0) };
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Earlier errors no longer matter. If the context is lost, all of these calls fail, which
        // does no harm.
        if self.bind().is_err() {
            return;
        }
        // SAFETY: nothing uses the device any more, each handle is destroyed once, and null handles
        // are skipped.
        unsafe {
            if self.stream.exists() {
                let _ = result::stream::synchronize(self.stream.handle());
            }
            self.blas = None;
            // Pinned memory and events must be released while the context is bound.
            *self.downloads.get_mut().unwrap_or_else(|e| e.into_inner()) = Downloads::default();
            for recorded in
                self.graphs.get_mut().unwrap_or_else(|e| e.into_inner()).iter().flatten()
            {
                let _ = result::graph::exec_destroy(recorded.0);
            }
            let ring = self.ring.get_mut().unwrap_or_else(|e| e.into_inner());
            let marks = self.marks.get_mut().unwrap_or_else(|e| e.into_inner());
            for event in ring.events.iter().chain(marks.iter().flatten()).filter(|e| !e.0.is_null())
            {
                let _ = result::event::destroy(event.0);
            }
            if !ring.base.is_null() {
                let _ = result::free_host(ring.base.cast());
            }
            for module in self.code.get_mut().unwrap_or_else(|e| e.into_inner()).modules.values() {
                let _ = result::module::unload(module.0);
            }
            if self.stream.exists() {
                let _ = result::stream::destroy(self.stream.handle());
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
