//! A device that computes nothing, for memory plans and launch counts. Layer 1.
//!
//! Invariant: it answers like the device that it stands for, so the same code requests the same
//! memory from the pool and launches the same kernels. But its addresses have no memory, and
//! everything read back is zero.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{
    Algorithm, Capabilities, Device, Download, Gemm, Graph, Kernel, KernelArgs, Launch, Layout,
    LibraryProduct, Mark, MemoryInfo, lock,
};
use crate::error::Result;

pub struct DryRun {
    name: String,
    capabilities: Capabilities,
    memory: MemoryInfo,
    next: AtomicU64,
    /// By the address of the kernel's name.
    launches: Mutex<HashMap<usize, (&'static str, usize)>>,
    capturing: AtomicBool,
}

impl DryRun {
    /// Imitates `device`.
    pub fn like(device: &dyn Device) -> Result<DryRun> {
        Ok(DryRun::new(&device.name(), device.capabilities(), device.memory()?))
    }

    /// Imitates a device that is not present.
    pub fn new(name: &str, capabilities: Capabilities, memory: MemoryInfo) -> DryRun {
        // Any aligned address except 0, which stands for no memory.
        let next = AtomicU64::new(1 << 40);
        DryRun {
            name: name.into(),
            capabilities,
            memory,
            next,
            launches: Mutex::default(),
            capturing: AtomicBool::new(false),
        }
    }

    /// The launches since the last call, by name: kernels, `library product NT`, `copy`, `fill`,
    /// `graph`. Recorded work is not counted, and a replayed graph counts as one launch.
    pub fn take_launches(&self) -> BTreeMap<String, usize> {
        let mut all = BTreeMap::new();
        for (name, n) in std::mem::take(&mut *lock(&self.launches)).into_values() {
            *all.entry(name.to_string()).or_default() += n;
        }
        all
    }

    fn count(&self, name: &'static str) {
        if self.capturing.load(Ordering::Acquire) {
            return;
        }
        lock(&self.launches).entry(name.as_ptr() as usize).or_insert((name, 0)).1 += 1;
    }
}

impl Device for DryRun {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn computes(&self) -> bool {
        false
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        Ok(self.next.fetch_add(bytes.next_multiple_of(256).max(256) as u64, Ordering::Relaxed))
    }

    unsafe fn free(&self, _address: u64, _bytes: usize) {}

    unsafe fn upload(&self, _dst: u64, _src: &[u8]) -> Result<()> {
        Ok(())
    }

    unsafe fn download(&self, dst: &mut [u8], _src: u64) -> Result<()> {
        dst.fill(0);
        Ok(())
    }

    unsafe fn begin_download(&self, _src: u64, _bytes: usize) -> Result<Download> {
        Ok(0)
    }

    fn end_download(&self, _download: Download, dst: &mut [u8]) -> Result<()> {
        dst.fill(0);
        Ok(())
    }

    unsafe fn copy(&self, _dst: u64, _src: u64, _bytes: usize) -> Result<()> {
        self.count("copy");
        Ok(())
    }

    unsafe fn fill(&self, _dst: u64, _byte: u8, _bytes: usize) -> Result<()> {
        self.count("fill");
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, _at: Launch, _args: KernelArgs) -> Result<()> {
        self.count(kernel.name);
        Ok(())
    }

    /// Treats every candidate of the library as trusted, because nothing is computed here.
    unsafe fn gemm(&self, g: &Gemm, _algorithm: Algorithm) -> Result<LibraryProduct> {
        if !self.capabilities.library_gemm {
            return Ok(LibraryProduct::Unavailable);
        }
        self.count(match g.layout {
            Layout::NT => "library product NT",
            Layout::NN => "library product NN",
            Layout::TN => "library product TN",
        });
        Ok(LibraryProduct::Queued)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> Result<MemoryInfo> {
        Ok(self.memory)
    }

    fn mark(&self) -> Result<Mark> {
        Ok(Mark(0))
    }

    fn elapsed_ms(&self, _from: Mark, _to: Mark) -> Result<f32> {
        Ok(0.0)
    }

    fn begin_capture(&self) -> Result<()> {
        self.capturing.store(true, Ordering::Release);
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph> {
        self.capturing.store(false, Ordering::Release);
        Ok(0)
    }

    unsafe fn replay(&self, _graph: Graph) -> Result<()> {
        self.count("graph");
        Ok(())
    }

    fn forget(&self, _graph: Graph) {}
}
