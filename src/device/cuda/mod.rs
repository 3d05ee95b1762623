//! The CUDA device: the driver API, loaded at run time, and cuBLASLt where its library is found.
//! Layer 1.
//!
//! Invariant: everything runs on one stream of our own, in the order of the calls; so no event
//! guards any buffer. We work on cudarc's `result` and `sys` layers: its safe layer's per-slice
//! events and error parking never come into play. A missing driver, library or device is an `Err`
//! that says the next step, never a panic: no symbol is touched before the presence of its library
//! and the driver's version are known.

mod blas;

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use blas::Blas;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute,
};

use super::{
    Capabilities, Device, EncodedMap, Gemm, Graph, Kernel, KernelArgs, KernelDef, Launch, Mark,
    MemoryInfo, TensorMap, capturing, insert_in_free_slot, lock, no_graph,
};
use crate::device::pool::mebibytes;
use crate::error::{Error, Result};

/// Whether nvcc was there when this was built.
const HAS_GPU_IMAGES: bool = !env!("TEMPER_NVCC").is_empty();
/// For a GPU of compute capability 9.0 the kernels of Hopper have code in an image of sm_90a only.
const HAS_HOPPER_IMAGES: bool = names_hopper(env!("TEMPER_ARCHS"));

const fn names_hopper(archs: &str) -> bool {
    let (text, word) = (archs.as_bytes(), b"sm_90a");
    let mut from = 0;
    while from + word.len() <= text.len() {
        let mut same = 0;
        while same < word.len() && text[from + same] == word[same] {
            same += 1;
        }
        if same == word.len() {
            return true;
        }
        from += 1;
    }
    false
}

/// What the bindings were generated for, and the first driver that has it.
const CUDA_VERSION: i32 = 13000;
const DRIVER: &str = "580";
/// Dynamic shared memory that every kernel may use without asking.
const PLAIN_SHARED: u32 = 48 << 10;
/// The pinned ring that uploads go through: `SEGMENTS` parts, each guarded by an event.
const SEGMENT: usize = 8 << 20;
const SEGMENTS: usize = 4;

pub struct Cuda {
    name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// (major, minor)
    capability: (i32, i32),
    /// The most dynamic shared memory a kernel of this device can opt in to.
    max_shared: u32,
    multiprocessors: usize,
    code: Mutex<Code>,
    ring: Mutex<Ring>,
    marks: Mutex<Vec<Option<Event>>>,
    capturing: AtomicBool,
    graphs: Mutex<Vec<Option<Recorded>>>,
    blas: Option<Blas>,
}

/// An instantiated graph. Used under the lock only: a graph must not be launched from two threads
/// at once.
struct Recorded(sys::CUgraphExec);
// SAFETY: a handle that any thread may use under the context.
unsafe impl Send for Recorded {}

// SAFETY: the driver API is thread safe; each call binds the context to its thread, and what is not
// thread safe (the ring, the caches, cuBLASLt's descriptors) lies behind a mutex.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

/// Modules and functions that were loaded so far, and the last kernel that was launched.
#[derive(Default)]
struct Code {
    modules: HashMap<&'static str, Module>,
    functions: HashMap<&'static str, Function>,
    last: &'static str,
}

struct Module(sys::CUmodule);
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

#[derive(Clone, Copy)]
struct Event(sys::CUevent);
// SAFETY: as for `Module`.
unsafe impl Send for Event {}

/// Pinned host memory. A segment is written again only after the copies out of it have ended.
struct Ring {
    base: *mut u8,
    segment: usize,
    at: usize,
    events: [Event; SEGMENTS],
    pending: [bool; SEGMENTS],
}
// SAFETY: the memory belongs to the ring alone.
unsafe impl Send for Ring {}

/// "CUDA_ERROR_X (description)".
fn text(e: DriverError) -> String {
    match e.error_string() {
        Ok(description) => format!("{:?} ({})", e.0, description.to_string_lossy()),
        Err(_) => format!("{:?}", e.0),
    }
}

fn failed(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |e| Error::Device(format!("{what}: {}", text(e)))
}

// --- what a user reads when there is no GPU to be had ---

fn no_images() -> Error {
    Error::Device(
        "this temper was built without nvcc, so it has no GPU code. Install the CUDA 13 toolkit, or only its compiler: \
         `pip install --target target/cuda-wheels nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* \
         nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*`, and build again (README, \"The GPU build\"). Or run with \
         --device cpu."
            .into(),
    )
}

fn no_driver() -> Error {
    Error::Device(format!(
        "no NVIDIA driver on this machine (libcuda.so.1 was not found). Install driver {DRIVER} or newer; in a container, \
         start it with the GPU passed in (docker run --gpus all). Or run with --device cpu."
    ))
}

fn no_init(e: DriverError) -> Error {
    Error::Device(format!(
        "the NVIDIA driver did not start: {}. `nvidia-smi` should work as this user first; in a container, start it with \
         the GPU passed in (docker run --gpus all). Or run with --device cpu.",
        text(e)
    ))
}

fn no_device() -> Error {
    Error::Device(
        "the NVIDIA driver shows no GPU. Look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES, or run with --device cpu."
            .into(),
    )
}

fn old_driver(version: i32) -> Error {
    Error::Device(format!(
        "the NVIDIA driver supports CUDA {}, this build needs {} (driver {DRIVER} or newer). Update the driver, or run with \
         --device cpu.",
        dotted(version),
        dotted(CUDA_VERSION)
    ))
}

fn old_gpu(name: &str, (major, minor): (i32, i32)) -> Error {
    Error::Device(format!(
        "{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer. Run with --device cpu."
    ))
}

fn shared_too_large(kernel: &str, asked: u32, fixed: u32, most: u32, device: &str) -> Error {
    Error::Device(format!(
        "{kernel} needs {asked} bytes of dynamic shared memory and {fixed} of static; {device} gives a block at most {most}"
    ))
}

/// 13010 is 13.1.
fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The kernel module's version, "580.65.06", from its line in /proc/driver/nvidia/version.
fn driver_version(proc: &str) -> Option<&str> {
    let line = proc.lines().find(|l| l.starts_with("NVRM version:"))?;
    line.split_whitespace()
        .find(|w| w.contains('.') && w.chars().all(|c| c.is_ascii_digit() || c == '.'))
}

/// Finds the device, or says what is missing. Returns it and the CUDA version of the driver.
fn probe(has_images: bool) -> Result<(sys::CUdevice, i32)> {
    if !has_images {
        return Err(no_images());
    }
    // SAFETY: only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(no_driver());
    }
    let mut version = 0;
    // SAFETY: both calls exist in every driver; the first one is allowed before cuInit.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(no_init)?;
    if version != 0 && version < CUDA_VERSION {
        return Err(old_driver(version));
    }
    // A stub library, a driver whose kernel module is missing or another version: all of them end
    // here.
    match result::init() {
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(no_device()),
        other => other.map_err(no_init)?,
    }
    if result::device::get_count().map_err(no_init)? == 0 {
        return Err(no_device());
    }
    Ok((result::device::get(0).map_err(no_init)?, version))
}

impl Cuda {
    /// The first GPU that CUDA_VISIBLE_DEVICES shows.
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
        let multiprocessors =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let opening = "opening the GPU (is another process using it exclusively?)";
        // SAFETY: the device comes from the driver. The primary context, because cuBLASLt works in
        // it.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed(opening))?;
        let proc = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
        let driver = driver_version(&proc).map(|v| format!("driver {v} / ")).unwrap_or_default();
        name = format!(
            "{name} (sm_{}{}, {driver}CUDA {})",
            capability.0,
            capability.1,
            dotted(version)
        );
        // From here on `Drop` cleans up, whatever fails: null handles are skipped.
        let mut cuda = Cuda {
            name,
            device,
            context,
            stream: std::ptr::null_mut(),
            capability,
            max_shared,
            multiprocessors,
            code: Mutex::default(),
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
            blas: None,
        };
        cuda.bind()?;
        // Not the legacy stream: that one cannot be captured and waits for others.
        cuda.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed(opening))?;
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

    /// Makes the context this thread's: rayon's threads and tests call from anywhere.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained until `Drop`.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(failed("binding the GPU to this thread"))
    }

    /// Binds, and refuses what cannot be part of a graph.
    fn bind_for(&self, what: &str) -> Result<()> {
        if self.capturing.load(Ordering::Acquire) {
            return Err(capturing(what));
        }
        self.bind()
    }

    /// An error of asynchronous work: it belongs to something before, most likely the last kernel.
    fn late(&self, what: &str, e: DriverError) -> Error {
        let last = lock(&self.code).last;
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

    /// Queues work on `bytes` bytes; nothing is done for none.
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
    fn function(&self, kernel: &KernelDef, shared: u32) -> Result<sys::CUfunction> {
        let mut code = lock(&self.code);
        let function = match code.functions.get(kernel.name) {
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
        code.functions.insert(kernel.name, Function { handle, shared: allowed });
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

impl Device for Cuda {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            library_gemm: self.blas.is_some(),
            multiprocessors: self.multiprocessors,
            wgmma: self.capability.0 == 9 && HAS_HOPPER_IMAGES,
            ..Capabilities::GPU
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
        // An error here belongs to work before, and the next call returns it again.
        if self.bind().is_ok() {
            // SAFETY: the caller's promise; cuMemFree waits for work that is in flight.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()> {
        // Through pinned memory: `src` may go as soon as this returns, while a copy straight from
        // pageable memory is only documented to be "possibly" synchronous. The copy out of the ring
        // is ordered by the stream like everything else.
        self.bind_for("upload")?;
        let late = |e| self.late("upload", e);
        let mut ring = lock(&self.ring);
        let mut done = 0;
        while done < src.len() {
            if ring.at == SEGMENT {
                let full = ring.segment;
                // SAFETY: our event, our stream.
                unsafe { result::event::record(ring.events[full].0, self.stream) }.map_err(late)?;
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
            // SAFETY: `at + n` stays in the segment, no copy out of these bytes is in flight, and
            // the caller promises the destination.
            unsafe {
                let staged = ring.base.add(ring.segment * SEGMENT + ring.at);
                std::ptr::copy_nonoverlapping(src.as_ptr().add(done), staged, n);
                result::memcpy_htod_async(
                    dst + done as u64,
                    std::slice::from_raw_parts(staged, n),
                    self.stream,
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
        // SAFETY: the caller's promise; `dst` is not read before the stream has been waited for.
        unsafe { result::memcpy_dtoh_async(dst, src, self.stream) }
            .map_err(|e| self.late("download", e))?;
        self.sync()
    }

    unsafe fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        self.queue("copy", bytes, || unsafe {
            result::memcpy_dtod_async(dst, src, bytes, self.stream)
        })
    }

    unsafe fn fill(&self, dst: u64, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        self.queue("fill", bytes, || unsafe {
            result::memset_d8_async(dst, byte, bytes, self.stream)
        })
    }

    unsafe fn launch(&self, kernel: Kernel, at: Launch, args: KernelArgs) -> Result<()> {
        kernel.check_block(at)?;
        self.bind()?;
        let function = self.function(kernel, at.shared)?;
        let ([x, y, z], block) = (at.grid, (at.block, 1, 1));
        // SAFETY: the caller's promise; the driver reads `args` before it returns.
        unsafe { result::launch_kernel(function, (x, y, z), block, at.shared, self.stream, args) }
            .map_err(|e| {
                let shape = format!(
                    "launch of grid {x} x {y} x {z}, block {}, {} bytes shared",
                    at.block, at.shared
                );
                self.launch_error(kernel.name, &shape, e)
            })?;
        lock(&self.code).last = kernel.name;
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
        // SAFETY: the driver reads the arrays, of two and one numbers for two dimensions, before it
        // returns, and writes 128 bytes at a multiple of 64.
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

    unsafe fn gemm(&self, g: &Gemm) -> Result<bool> {
        let Some(blas) = &self.blas else { return Ok(false) };
        self.bind()?;
        // SAFETY: the caller's promise.
        let ran = unsafe { blas.run(g, self.stream)? };
        if ran {
            lock(&self.code).last = "cuBLASLt's matrix product";
        }
        Ok(ran)
    }

    fn sync(&self) -> Result<()> {
        self.bind_for("sync")?;
        // SAFETY: our stream.
        unsafe { result::stream::synchronize(self.stream) }
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
        // Default flags: an event with timing.
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|e| self.late("mark", e))?;
        // SAFETY: a new event, our stream.
        if let Err(e) = unsafe { result::event::record(event, self.stream) } {
            // SAFETY: as above; not used again.
            let _ = unsafe { result::event::destroy(event) };
            return Err(self.late("mark", e));
        }
        Ok(insert_in_free_slot(&mut lock(&self.marks), Event(event)))
    }

    fn elapsed_ms(&self, from: Mark, to: Mark) -> Result<f32> {
        self.bind_for("elapsed_ms")?;
        let mut marks = lock(&self.marks);
        let mut take = |i: Mark| marks.get_mut(i).and_then(Option::take);
        let pair = (take(from), take(to));
        drop(marks);
        let ms = match pair {
            // SAFETY: recorded events of this stream.
            (Some(a), Some(b)) => unsafe {
                result::event::synchronize(b.0)
                    .and_then(|()| result::event::elapsed(a.0, b.0))
                    .map_err(|e| self.late("timing", e))
            },
            _ => Err(Error::Device("elapsed_ms: a mark that was already spent".into())),
        };
        for event in [pair.0, pair.1].into_iter().flatten() {
            // SAFETY: taken out of the list, so this was its last use.
            let _ = unsafe { result::event::destroy(event.0) };
        }
        ms
    }

    fn begin_capture(&self) -> Result<()> {
        self.bind_for("begin_capture")?;
        // Relaxed: modules that load at their first launch and pool slabs may still be allocated
        // meanwhile. Nothing else runs on this device, so there is no other thread's call to guard
        // against. SAFETY: our stream, which is not the legacy one.
        unsafe {
            result::stream::begin_capture(
                self.stream,
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
        // SAFETY: our stream, which captures.
        let graph = unsafe { result::stream::end_capture(self.stream) }
            .map_err(failed("capturing a graph"))?;
        if graph.is_null() {
            return Err(Error::Device(
                "capturing a graph: the capture was invalidated by an error before".into(),
            ));
        }
        // SAFETY: a new graph; the executable one does not need it.
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
        unsafe { result::graph::launch(recorded.0, self.stream) }
            .map_err(|e| self.late("replay of a graph", e))?;
        lock(&self.code).last = "a replayed graph";
        Ok(())
    }

    fn forget(&self, graph: Graph) {
        let taken = lock(&self.graphs).get_mut(graph).and_then(Option::take);
        if let (Some(recorded), Ok(())) = (taken, self.bind()) {
            // SAFETY: taken out of the list, so this is its last use; the driver lets a replay in
            // flight end first.
            let _ = unsafe { result::graph::exec_destroy(recorded.0) };
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Errors of the past are no longer of interest; a lost context fails all of these, which is
        // as good.
        if self.bind().is_err() {
            return;
        }
        // SAFETY: nothing uses the device any more, each handle is destroyed once, null handles are
        // skipped.
        unsafe {
            if !self.stream.is_null() {
                let _ = result::stream::synchronize(self.stream);
            }
            self.blas = None;
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
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DeviceChoice;

    fn message<T>(r: Result<T>) -> String {
        r.err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_build_without_gpu_code_says_how_to_get_it() {
        let text = message(probe(false));
        for part in ["nvidia-cuda-nvcc", "nvidia-cuda-cccl", "The GPU build", "--device cpu"] {
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
        assert!(!text.contains("  "), "{text}");
    }

    #[test]
    fn a_machine_without_a_gpu_gives_an_error_and_no_panic() {
        // SAFETY: only tries to open the library.
        if unsafe { sys::is_culib_present() } {
            return; // tests/it on a GPU machine covers the rest
        }
        assert!(message(probe(true)).contains("libcuda.so.1"), "{}", message(probe(true)));
        let text = message(Cuda::new());
        assert!(
            text.contains(if HAS_GPU_IMAGES { "libcuda.so.1" } else { "built without nvcc" }),
            "{text}"
        );
        assert!(
            message(crate::device::open(DeviceChoice::Cuda)).contains("--device cpu"),
            "cuda never falls back"
        );
        assert!(
            crate::device::open(DeviceChoice::Auto)
                .is_ok_and(|d| d.capabilities() == Capabilities::CPU)
        );
    }

    #[test]
    fn every_refusal_says_the_next_step() {
        let old = old_driver(12040).to_string();
        assert!(old.contains("CUDA 12.4") && old.contains("13.0") && old.contains("580"), "{old}");
        let device = no_device().to_string();
        assert!(
            device.contains("nvidia-smi") && device.contains("CUDA_VISIBLE_DEVICES"),
            "{device}"
        );
        let gpu = old_gpu("Tesla T4", (7, 5)).to_string();
        assert!(gpu.contains("Tesla T4") && gpu.contains("7.5"), "{gpu}");
        let shared =
            shared_too_large("attention_64_bf16", 250_000, 16, 232_448, "NVIDIA H200").to_string();
        assert!(shared.contains("attention_64_bf16") && shared.contains("232448"), "{shared}");
    }

    #[test]
    fn the_driver_version_is_read_from_its_proc_file() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\nGCC version:  gcc 12.3\n";
        assert_eq!(driver_version(open), Some("580.65.06"));
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024\n";
        assert_eq!(driver_version(closed), Some("550.90.07"));
        assert_eq!(driver_version(""), None);
    }
}
