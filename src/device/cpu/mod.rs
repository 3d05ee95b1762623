//! The CPU device: kernels run through the shim on all cores, matrix products through `gemm`.
//! Layer 1.
//!
//! Invariant: results do not depend on the number of threads. Blocks are independent, so each
//! worker runs a range of them; a matrix product is divided into parts whose bits do not depend on
//! the division.

mod gemm;

use std::alloc::{Layout as MemoryLayout, alloc, dealloc};
use std::ffi::c_void;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rayon::prelude::*;

use super::{
    Algorithm, Capabilities, CpuLaunch, Device, Download, Gemm, Graph, Kernel, KernelArgs,
    KernelDef, Launch, LibraryProduct, Mark, MemoryInfo, capturing, cgroup, download_size,
    insert_in_free_slot, lock, no_download, no_graph, no_mark, take_from_slot,
};
use crate::error::{Error, Result};

const ALIGN: usize = 256;
/// Bytes before and after each allocation in strict mode. No kernel may write them.
const RED_ZONE: usize = 512;
/// A NaN as a bf16, and as an f32 when repeated: the contents of new memory in strict mode.
pub const POISON: u16 = 0x7ff7;

pub struct Cpu {
    strict: bool,
    /// Whether AVX-512 code runs; true only if the machine supports it.
    wide: bool,
    seed: u64,
    wgmma: bool,
    launches: AtomicU64,
    /// Live allocations (address, bytes), kept in strict mode to check their red zones.
    live: Mutex<Vec<(u64, usize)>>,
    marks: Mutex<Vec<Option<Instant>>>,
    capturing: AtomicBool,
    recorded: Mutex<Vec<Step>>,
    graphs: Mutex<Vec<Option<Arc<Vec<Step>>>>>,
    downloads: Mutex<Vec<Option<Vec<u8>>>>,
}

/// One recorded operation.
enum Step {
    Launch { kernel: &'static KernelDef, at: Launch, args: Vec<Argument> },
    Gemm(Gemm),
    Copy { dst: u64, src: u64, bytes: usize },
    Fill { dst: u64, byte: u8, bytes: usize },
}

/// A recorded argument: a pointer, a scalar or a tensor map.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Argument([u64; 16]);

impl Cpu {
    pub fn new() -> Self {
        Cpu {
            strict: false,
            wide: gemm::has_avx512(),
            seed: 0,
            wgmma: false,
            launches: AtomicU64::new(0),
            live: Mutex::default(),
            marks: Mutex::default(),
            capturing: AtomicBool::new(false),
            recorded: Mutex::default(),
            graphs: Mutex::default(),
            downloads: Mutex::default(),
        }
    }

    /// Records the operation if a capture is in progress. Returns whether it did.
    fn record(&self, step: impl FnOnce() -> Step) -> bool {
        let on = self.capturing.load(Ordering::Acquire);
        if on {
            lock(&self.recorded).push(step());
        }
        on
    }

    fn not_while_capturing(&self, what: &str) -> Result<()> {
        if self.capturing.load(Ordering::Acquire) { Err(capturing(what)) } else { Ok(()) }
    }

    /// The strict mode: 32 real lanes per warp in an order permuted by `seed`, poisoned memory and
    /// red zones. Slow.
    pub fn strict(seed: u64) -> Self {
        Cpu { strict: true, seed, ..Cpu::new() }
    }

    /// Runs kernels and products without AVX-512 even if the machine supports it, for tests: the
    /// bits are the same.
    pub fn narrow() -> Self {
        Cpu { wide: false, ..Cpu::new() }
    }

    /// Makes ops choose the Hopper kernels, for tests: slow on a CPU.
    pub fn with_wgmma(self) -> Self {
        Cpu { wgmma: true, ..self }
    }

    fn pad(&self) -> usize {
        if self.strict { RED_ZONE } else { 0 }
    }

    /// Called after a strict launch. Error: the kernel wrote outside a buffer.
    fn check_red_zones(&self, kernel: &str) -> Result<()> {
        for &(address, bytes) in lock(&self.live).iter() {
            for (start, side) in
                [(address - RED_ZONE as u64, "before"), (address + bytes as u64, "past the end of")]
            {
                // SAFETY: the zone belongs to a live allocation of `alloc`.
                let zone = unsafe { std::slice::from_raw_parts(start as *const u8, RED_ZONE) };
                if zone.chunks(2).any(|pair| pair != POISON.to_le_bytes()) {
                    // SAFETY: as above. The zone is repaired so that the next launch is not blamed
                    // for this write.
                    unsafe { self.fill_poison(start, RED_ZONE) };
                    return Err(Error::Device(format!(
                        "{kernel} wrote {side} a buffer of {bytes} bytes"
                    )));
                }
            }
        }
        Ok(())
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Kernel arguments for worker threads, which only read them; they outlive the launch.
struct Args(*const *mut c_void);
// SAFETY: the list is only read, and `launch` returns after the workers.
unsafe impl Sync for Args {}

impl Device for Cpu {
    fn name(&self) -> String {
        let mode = if self.strict { ", strict" } else { "" };
        format!("cpu ({} threads{mode})", rayon::current_num_threads())
    }

    fn capabilities(&self) -> Capabilities {
        // A device with wgmma also has mma.sync.
        Capabilities { tensor_cores: self.wgmma, wgmma: self.wgmma, ..Capabilities::CPU }
    }

    fn is_strict(&self) -> bool {
        self.strict
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        let all = bytes + 2 * self.pad();
        let layout = MemoryLayout::from_size_align(all.max(1), ALIGN).map_err(|_| {
            Error::OutOfMemory(format!("{bytes} bytes is not a size the CPU can allocate"))
        })?;
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            return Err(Error::OutOfMemory(format!("the CPU could not allocate {bytes} bytes")));
        }
        let address = base as u64 + self.pad() as u64;
        if self.strict {
            // SAFETY: all three ranges lie in the new allocation.
            unsafe {
                // The zones hold the poison, too: a kernel that reads there computes NaN.
                self.fill_poison(base as u64, RED_ZONE);
                self.fill_poison(address, bytes);
                self.fill_poison(address + bytes as u64, RED_ZONE);
            }
            lock(&self.live).push((address, bytes));
        }
        Ok(address)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        lock(&self.live).retain(|(a, _)| *a != address);
        let all = (bytes + 2 * self.pad()).max(1);
        if let Ok(layout) = MemoryLayout::from_size_align(all, ALIGN) {
            // SAFETY: the caller's promise, with the layout of `alloc`.
            unsafe { dealloc((address - self.pad() as u64) as *mut u8, layout) };
        }
    }

    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()> {
        self.not_while_capturing("upload")?;
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst as *mut u8, src.len()) };
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], src: u64) -> Result<()> {
        self.not_while_capturing("download")?;
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }

    unsafe fn begin_download(&self, src: u64, bytes: usize) -> Result<Download> {
        let mut copy = vec![0; bytes];
        // SAFETY: the caller's promise.
        unsafe { self.download(&mut copy, src)? };
        Ok(insert_in_free_slot(&mut lock(&self.downloads), copy))
    }

    fn end_download(&self, download: Download, dst: &mut [u8]) -> Result<()> {
        let copy = take_from_slot(&mut lock(&self.downloads), download);
        let copy = copy.ok_or_else(|| no_download(download))?;
        match dst.len() {
            0 => {}
            n if n == copy.len() => dst.copy_from_slice(&copy),
            n => return Err(download_size(copy.len(), n)),
        }
        Ok(())
    }

    unsafe fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        if self.record(|| Step::Copy { dst, src, bytes }) {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn fill(&self, dst: u64, byte: u8, bytes: usize) -> Result<()> {
        if self.record(|| Step::Fill { dst, byte, bytes }) {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { std::ptr::write_bytes(dst as *mut u8, byte, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, at: Launch, args: KernelArgs) -> Result<()> {
        kernel.check_block(at)?;
        let copied = || {
            let mut copies = vec![Argument([0; 16]); kernel.args.len()];
            for ((copy, arg), size) in copies.iter_mut().zip(args.iter()).zip(kernel.args) {
                // SAFETY: the caller's promise: the argument has the size in the signature, at most
                // 128 bytes.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        arg.cast::<u8>(),
                        (&raw mut *copy).cast(),
                        usize::from(*size),
                    )
                };
            }
            Step::Launch { kernel, at, args: copies }
        };
        if self.record(copied) {
            return Ok(());
        }
        let blocks = at.grid.iter().map(|g| u64::from(*g)).product::<u64>();
        let entry = match kernel.wide {
            _ if self.strict => kernel.strict,
            Some(wide) if self.wide => wide,
            _ => kernel.cpu,
        };
        let number = self.launches.fetch_add(1, Ordering::Relaxed);
        let args = Args(args.as_ptr());
        let args = &args;
        let run = |begin: u64, end: u64| -> Result<()> {
            let mut error = [0u8; 1024];
            let launch = CpuLaunch {
                args: args.0,
                grid: at.grid,
                block: [at.block, 1, 1],
                shared_bytes: at.shared,
                strict: u32::from(self.strict),
                seed: self.seed.wrapping_mul(0x9e37_79b9).wrapping_add(number),
                block_begin: begin,
                block_end: end,
                error: error.as_mut_ptr(),
                error_bytes: error.len(),
            };
            // SAFETY: the caller's promise about `args`; `launch` outlives the call.
            unsafe { entry(&launch) };
            match error.iter().position(|b| *b == 0) {
                Some(0) | None => Ok(()),
                Some(n) => Err(Error::Device(format!(
                    "{}: {}",
                    kernel.name,
                    String::from_utf8_lossy(&error[..n])
                ))),
            }
        };
        let workers = rayon::current_num_threads() as u64;
        // A few ranges per worker balance blocks of unequal cost; results do not depend on the
        // division.
        let ranges = (workers * 4).min(blocks);
        if ranges <= 1 || workers == 1 {
            run(0, blocks)?;
        } else {
            (0..ranges)
                .into_par_iter()
                .try_for_each(|r| run(blocks * r / ranges, blocks * (r + 1) / ranges))?;
        }
        if self.strict { self.check_red_zones(kernel.name) } else { Ok(()) }
    }

    /// There is only one algorithm, in which a row does not depend on the number of rows.
    unsafe fn gemm(&self, g: &Gemm, _algorithm: Algorithm) -> Result<LibraryProduct> {
        if !self.record(|| Step::Gemm(*g)) {
            // SAFETY: the caller's promise.
            unsafe { gemm::gemm(g, self.wide) };
        }
        Ok(LibraryProduct::Queued)
    }

    fn sync(&self) -> Result<()> {
        self.not_while_capturing("sync")
    }

    fn memory(&self) -> Result<MemoryInfo> {
        Ok(cgroup::host_memory(Path::new("/")))
    }

    fn mark(&self) -> Result<Mark> {
        self.not_while_capturing("mark")?;
        Ok(Mark(insert_in_free_slot(&mut lock(&self.marks), Instant::now())))
    }

    fn elapsed_ms(&self, from: Mark, to: Mark) -> Result<f32> {
        let mut marks = lock(&self.marks);
        let mut take = |mark: Mark| take_from_slot(&mut marks, mark.0).ok_or_else(no_mark);
        Ok(take(to)?.duration_since(take(from)?).as_secs_f32() * 1e3)
    }

    fn begin_capture(&self) -> Result<()> {
        if self.strict {
            // Strict mode frees memory at once instead of returning it to a pool, so a recorded
            // temporary would no longer exist.
            return Err(Error::Device(
                "the strict CPU mode does not capture graphs: use the fast one".into(),
            ));
        }
        self.not_while_capturing("begin_capture")?;
        lock(&self.recorded).clear();
        self.capturing.store(true, Ordering::Release);
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph> {
        if !self.capturing.swap(false, Ordering::AcqRel) {
            return Err(Error::Device("end_capture without begin_capture".into()));
        }
        let steps = std::mem::take(&mut *lock(&self.recorded));
        Ok(insert_in_free_slot(&mut lock(&self.graphs), Arc::new(steps)))
    }

    unsafe fn replay(&self, graph: Graph) -> Result<()> {
        self.not_while_capturing("replay")?;
        let steps =
            lock(&self.graphs).get(graph).cloned().flatten().ok_or_else(|| no_graph(graph))?;
        for step in steps.iter() {
            // SAFETY: as for the recorded call, by the caller's promise; the copied arguments
            // outlive the launch.
            unsafe {
                match step {
                    Step::Launch { kernel, at, args } => {
                        let mut pointers: Vec<*mut c_void> =
                            args.iter().map(|a| (&raw const *a).cast_mut().cast()).collect();
                        self.launch(kernel, *at, &mut pointers)?;
                    }
                    Step::Gemm(g) => {
                        self.gemm(g, Algorithm::Fastest)?;
                    }
                    Step::Copy { dst, src, bytes } => self.copy(*dst, *src, *bytes)?,
                    Step::Fill { dst, byte, bytes } => self.fill(*dst, *byte, *bytes)?,
                }
            }
        }
        Ok(())
    }

    fn forget(&self, graph: Graph) {
        if let Some(slot) = lock(&self.graphs).get_mut(graph) {
            *slot = None;
        }
    }
}

impl Cpu {
    /// # Safety
    /// The range is live.
    unsafe fn fill_poison(&self, address: u64, bytes: usize) {
        let pattern = POISON.to_le_bytes();
        for i in 0..bytes {
            // SAFETY: the caller's promise.
            unsafe { *((address + i as u64) as *mut u8) = pattern[i & 1] };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DType;
    use crate::device::Pool;
    use crate::tensor::Tensor;

    const N: usize = 64;

    fn input() -> Vec<f32> {
        (0..N).map(|i| i as f32 + 0.5).collect()
    }

    #[test]
    fn a_captured_list_replays_with_the_values_that_memory_has_then() {
        let pool = Pool::new(Arc::new(Cpu::new()));
        let device = &**pool.device();
        let x = Tensor::from_host(&pool, "x", DType::F32, &[N], &input()).unwrap();
        let y = Tensor::from_host(&pool, "y", DType::F32, &[N], &[7f32; N]).unwrap();
        let z = Tensor::from_host(&pool, "z", DType::F32, &[N], &[7f32; N]).unwrap();
        device.begin_capture().unwrap();
        y.zero().unwrap();
        for scale in [2.0f32, 3.0] {
            crate::kernels::axpy(
                device,
                Launch::flat(N),
                crate::kernels::AxpyArgs { y: y.out(), x: &x, scale, n: N as i64, accumulate: 1 },
            )
            .unwrap();
        }
        z.copy_from(&y).unwrap();
        assert!(
            x.upload(&input())
                .unwrap_err()
                .to_string()
                .contains("upload while a graph is captured")
        );
        assert!(z.to_vec::<f32>().unwrap_err().to_string().contains("download"));
        let graph = device.end_capture().unwrap();
        assert_eq!(z.to_vec::<f32>().unwrap(), [7f32; N], "recorded, not run");
        for factor in [1.0f32, 10.0] {
            x.upload(&input().iter().map(|v| factor * v).collect::<Vec<_>>()).unwrap();
            // SAFETY: x, y and z are live.
            unsafe { device.replay(graph) }.unwrap();
            assert_eq!(
                z.to_vec::<f32>().unwrap(),
                input().iter().map(|v| 5.0 * factor * v).collect::<Vec<_>>()
            );
        }
        device.forget(graph);
        // SAFETY: there is nothing to run.
        assert!(unsafe { device.replay(graph) }.unwrap_err().to_string().contains("does not have"));
        assert!(Cpu::strict(0).begin_capture().is_err());
    }
}
