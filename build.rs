//! Builds the kernels twice from one source: for the CPU with the host C++ compiler (always) and
//! for the GPU with nvcc (if found). Generates the typed Rust launchers from the kernels'
//! signatures. Nothing is written outside OUT_DIR; results that another build of this package in
//! the same target folder has already made are copied from there.
//!
//! Environment: `NVCC` or `CUDA_HOME` says where nvcc is (`NVCC=none` builds without),
//! `TEMPER_CUDA_ARCHS` the GPU targets (default `sm_80,sm_90a,sm_120` plus compute_80 PTX),
//! `TEMPER_PTXAS_REPORT` a file for ptxas' resource lines.

#[path = "build/cpu.rs"]
mod cpu;
#[path = "build/files.rs"]
mod files;
#[path = "build/gpu.rs"]
mod gpu;
#[path = "build/kept.rs"]
mod kept;
#[path = "build/launchers.rs"]
mod launchers;
#[path = "build/signature.rs"]
mod signature;

use std::path::PathBuf;

fn main() {
    for path in ["kernels", "build.rs", "build"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for var in ["NVCC", "CUDA_HOME", "TEMPER_CUDA_ARCHS", "TEMPER_PTXAS_REPORT"] {
        println!("cargo:rerun-if-env-changed={var}");
    }
    let out = PathBuf::from(std::env::var("OUT_DIR").unwrap());
    let sources = match files::Sources::read() {
        Ok(sources) => sources,
        Err(errors) => {
            eprintln!("{}", errors.join("\n"));
            std::process::exit(1);
        }
    };
    cpu::build(&out, &sources);
    let images = gpu::build(&out, &sources);
    launchers::write(&out, &sources, &images);
}
