//! Finds out whether a GPU can be used, and what is missing otherwise. Layer 1.
//!
//! Invariant: no symbol of the driver is touched before its library and its version are known, and
//! every error says the next step.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::error::{Error, Result};

/// Whether nvcc was available at build time.
pub(super) const HAS_GPU_IMAGES: bool = !env!("TEMPER_NVCC").is_empty();
/// Whether the build has code for sm_90a, the only image with the Hopper kernels for a GPU of
/// compute capability 9.0.
pub(super) const HAS_HOPPER_IMAGES: bool = names_hopper(env!("TEMPER_ARCHS"));

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

/// The CUDA version that the bindings were generated for, and the first driver that supports it.
const CUDA_VERSION: i32 = 13000;
const DRIVER: &str = "580";
/// "CUDA_ERROR_X (description)".
pub(super) fn text(e: DriverError) -> String {
    match e.error_string() {
        Ok(description) => format!("{:?} ({})", e.0, description.to_string_lossy()),
        Err(_) => format!("{:?}", e.0),
    }
}

pub(super) fn failed(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |e| Error::Device(format!("{what}: {}", text(e)))
}

// --- the errors for a machine without a usable GPU ---

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
        "the NVIDIA driver did not start: {}. Make `nvidia-smi` work as this user first; in a \
         container, start it with the GPU passed in (docker run --gpus all). Or run with \
         --device cpu.",
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
        "the NVIDIA driver supports CUDA {}, but this build needs {} (driver {DRIVER} or newer). \
         Update the driver, or run with --device cpu.",
        dotted(version),
        dotted(CUDA_VERSION)
    ))
}

pub(super) fn old_gpu(name: &str, (major, minor): (i32, i32)) -> Error {
    Error::Device(format!(
        "{name} has compute capability {major}.{minor}, but the kernels need 8.0 (Ampere) or \
         newer. Run with --device cpu."
    ))
}

/// Formats the version number 13010 as 13.1.
pub(super) fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The kernel module's version, "580.65.06", from its line in /proc/driver/nvidia/version.
pub(super) fn driver_version(proc: &str) -> Option<&str> {
    let line = proc.lines().find(|l| l.starts_with("NVRM version:"))?;
    line.split_whitespace()
        .find(|w| w.contains('.') && w.chars().all(|c| c.is_ascii_digit() || c == '.'))
}

/// The first device and the CUDA version of the driver. Error: what is missing.
pub(super) fn probe(has_images: bool) -> Result<(sys::CUdevice, i32)> {
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
    // A stub library, a missing kernel module and a kernel module of another version all fail here.
    match result::init() {
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(no_device()),
        other => other.map_err(no_init)?,
    }
    if result::device::get_count().map_err(no_init)? == 0 {
        return Err(no_device());
    }
    Ok((result::device::get(0).map_err(no_init)?, version))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DeviceChoice;
    use crate::device::Capabilities;
    use crate::device::cuda::Cuda;

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
