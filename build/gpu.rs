//! The GPU build: nvcc compiles every kernel file twice (f32 and bf16), into one fatbin with all
//! targets.
//!
//! Invariant: a kernel marked HOT whose bf16 instance spills registers fails the build, even if its
//! fatbin is kept from an earlier build. A fatbin is made again only if its own text, the text that
//! all files include, or the compiler's command has changed.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::files::{KernelFile, REALS, Real, Sources, listed, text, write_if_changed};
use crate::kept;

/// The option that makes fatbins a third of the size, for drivers of CUDA 12.4 and later; compilers
/// before 12.8 do not have it.
fn smaller(nvcc: &Path) -> Option<&'static str> {
    let help = Command::new(nvcc).arg("--help").output().ok()?;
    String::from_utf8_lossy(&help.stdout)
        .contains("--compress-mode")
        .then_some("--compress-mode=size")
}

/// The path of the fatbin, per file and dtype; None if there is no GPU build of it.
pub type Images = Vec<[Option<PathBuf>; 2]>;

pub fn build(out: &Path, sources: &Sources) -> Images {
    let files = &sources.files;
    let none = || files.iter().map(|_| [None, None]).collect();
    let Some(nvcc) = find_nvcc() else {
        println!(
            "cargo:warning=no nvcc found: building for the CPU device only. For the GPU build see README.md, \"The GPU build\"."
        );
        println!("cargo:rustc-env=TEMPER_NVCC=");
        println!("cargo:rustc-env=TEMPER_ARCHS=");
        return none();
    };
    let archs = env::var("TEMPER_CUDA_ARCHS").unwrap_or_else(|_| "sm_80,sm_90a,sm_120".into());
    let mut flags: Vec<String> = vec!["-gencode=arch=compute_80,code=compute_80".into()];
    for arch in archs.split(',').map(str::trim).filter(|a| !a.is_empty()) {
        flags.push(format!("-gencode=arch={},code={arch}", arch.replace("sm_", "compute_")));
    }
    flags.extend(smaller(&nvcc).map(String::from));
    let included: String = ["kernels/common", "kernels/prim"]
        .iter()
        .flat_map(|folder| listed(folder, &["cuh"]))
        .map(|path| text(&path))
        .collect();
    let compiler = Compiler { nvcc, flags, included };
    let jobs: Vec<(usize, usize)> =
        (0..files.len()).filter(|i| files[*i].gpu).flat_map(|i| [(i, 0), (i, 1)]).collect();
    let images: Mutex<Images> = Mutex::new(none());
    let report = Mutex::new(hot_kernels(sources));
    let defects = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2usize);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(&(i, r)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (image, log, spills) =
                        compile_fatbin(out, &compiler, sources, &files[i], &REALS[r]);
                    images.lock().unwrap()[i][r] = Some(image);
                    report.lock().unwrap().push_str(&log);
                    defects.lock().unwrap().extend(spills);
                }
            });
        }
    });
    if let Ok(path) = env::var("TEMPER_PTXAS_REPORT") {
        fs::write(path, report.into_inner().unwrap()).unwrap();
    }
    let defects = defects.into_inner().unwrap();
    assert!(defects.is_empty(), "kernels marked HOT spill registers:\n  {}", defects.join("\n  "));
    println!("cargo:rustc-env=TEMPER_NVCC={}", compiler.nvcc.display());
    println!("cargo:rustc-env=TEMPER_ARCHS={archs}");
    images.into_inner().unwrap()
}

/// For .ci/kernel-table: threads and dynamic shared memory of the HOT bf16 instances.
fn hot_kernels(sources: &Sources) -> String {
    let mut lines = String::new();
    let hot = sources.files.iter().flat_map(|f| &f.kernels).filter(|k| k.hot);
    for instance in hot.flat_map(|k| sources.instances(k, &REALS[1]).unwrap()) {
        let (symbol, shared) = (instance.symbol, instance.shared);
        writeln!(lines, "hot kernel {symbol} {} {shared}", instance.kernel.threads).unwrap();
    }
    lines
}

/// nvcc, its targets, and the text that every kernel includes.
struct Compiler {
    nvcc: PathBuf,
    flags: Vec<String>,
    included: String,
}

/// The fatbin of a file, ptxas' output, and the spills of its HOT kernels. Beside OUT/NAME.fatbin
/// there are OUT/NAME.ptxas and, as the fatbin's stamp, OUT/NAME.gpu-stamp.
fn compile_fatbin(
    out: &Path,
    compiler: &Compiler,
    sources: &Sources,
    file: &KernelFile,
    real: &Real,
) -> (PathBuf, String, Vec<String>) {
    let path = |ending: &str| out.join(format!("{}_{}.{ending}", file.stem, real.name));
    let (source, image) = (path("cu"), path("fatbin"));
    let generated = gpu_source(sources, file, real);
    let mut hash = DefaultHasher::new();
    let command = (&compiler.nvcc, &compiler.flags, &compiler.included);
    (command, &generated, text(&file.path)).hash(&mut hash);
    let stamp = format!("{:x}", hash.finish());
    let name = format!("{}_{}", file.stem, real.name);
    let endings = ["fatbin", "ptxas"];
    let kept = kept::is_fresh(out, &name, &endings, "gpu-stamp", &stamp)
        || kept::take(out, &name, &endings, "gpu-stamp", &stamp);
    let log = match fs::read_to_string(path("ptxas")) {
        Ok(log) if kept => log,
        _ => {
            kept::remove_stamp(out, &name, "gpu-stamp");
            write_if_changed(&source, &generated);
            let output = Command::new(&compiler.nvcc)
                .args([
                    "-fatbin",
                    "-std=c++17",
                    "-O3",
                    "-fmad=false",
                    "-Xptxas=-v",
                    "-I",
                    "kernels",
                ])
                .args(&compiler.flags)
                .arg("-o")
                .arg(&image)
                .arg(&source)
                .output()
                .unwrap_or_else(|e| panic!("{}: {e}", compiler.nvcc.display()));
            let log = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "nvcc failed on {}:\n{log}", file.path.display());
            fs::write(path("ptxas"), &log).unwrap();
            kept::write_stamp(out, &name, "gpu-stamp", &stamp);
            log
        }
    };
    let defects = hot_spills(&log, sources, file, real);
    (image, log, defects)
}

/// The spills of HOT kernels: ptxas names a kernel and its target, then reports its spills. The f32
/// instances of the tensor-core kernels exist for checks and do not count.
fn hot_spills(log: &str, sources: &Sources, file: &KernelFile, real: &Real) -> Vec<String> {
    let kernels = file.kernels.iter().filter(|k| k.hot && real.name == "bf16");
    let hot: Vec<String> = kernels
        .flat_map(|k| sources.instances(k, real).unwrap())
        .map(|instance| instance.symbol)
        .collect();
    let mut defects = Vec::new();
    let (mut symbol, mut target) = ("", "");
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut quoted = rest.split('\'');
            symbol = quoted.next().unwrap_or("");
            target = quoted.nth(1).unwrap_or("");
        }
        let spills = line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores");
        if spills && hot.iter().any(|h| h == symbol) {
            defects.push(format!("{symbol} for {target}: {}", line.trim()));
        }
    }
    defects
}

fn gpu_source(sources: &Sources, file: &KernelFile, real: &Real) -> String {
    let mut s = String::from("// Generated by build.rs.\n");
    if real.name == "bf16" {
        s += "#define REAL_BF16 1\n";
    }
    writeln!(s, "#include \"{}\"", file.include).unwrap();
    for instance in file.kernels.iter().flat_map(|k| sources.instances(k, real).unwrap()) {
        let (k, d, symbol) = (instance.kernel, instance.d, instance.symbol);
        let (params, name, args) = (k.entry_params(), &k.name, k.c_args());
        let asked = k.blocks.iter().find(|(of, _)| of.is_none_or(|of| of == d));
        let bounds = match asked {
            Some((_, n)) => format!("{}, {n}", k.threads),
            None => k.threads.to_string(),
        };
        let wait = if k.waits { "" } else { "wait_for_previous(); " };
        writeln!(
            s,
            "extern \"C\" __global__ void __launch_bounds__({bounds}) {symbol}({params}) {{ {wait}{name}<{d}>({args}); }}"
        )
        .unwrap();
    }
    s
}

fn find_nvcc() -> Option<PathBuf> {
    if let Ok(path) = env::var("NVCC") {
        return if path == "none" { None } else { Some(PathBuf::from(path)) };
    }
    let mut places: Vec<PathBuf> = Vec::new();
    if let Ok(home) = env::var("CUDA_HOME") {
        places.push(PathBuf::from(home).join("bin/nvcc"));
    }
    places
        .extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|p| p.join("nvcc")));
    places.push("/usr/local/cuda/bin/nvcc".into());
    // `pip install --target target/cuda-wheels nvidia-cuda-nvcc ...` (see .ci/run)
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    places.push(root.join("target/cuda-wheels/nvidia/cu13/bin/nvcc"));
    places.into_iter().find(|p| p.is_file())
}
