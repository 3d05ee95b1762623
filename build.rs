//! Builds the kernels twice from one source: for the CPU with the host C++ compiler (always), for
//! the GPU with nvcc (when found), and generates the typed Rust launchers from the kernels'
//! signatures. Nothing is written outside OUT_DIR.
//!
//! Environment: `NVCC` or `CUDA_HOME` says where nvcc is (`NVCC=none` builds without),
//! `TEMPER_CUDA_ARCHS` the GPU targets (default `sm_80,sm_90a,sm_120` plus compute_80 PTX),
//! `TEMPER_PTXAS_REPORT` a file for ptxas' resource lines.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const REALS: [(&str, &str); 2] = [("f32", "F32"), ("bf16", "BF16")];

fn main() {
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    for path in ["kernels", "build.rs"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for var in ["NVCC", "CUDA_HOME", "TEMPER_CUDA_ARCHS", "TEMPER_PTXAS_REPORT"] {
        println!("cargo:rerun-if-env-changed={var}");
    }
    let mut files: Vec<KernelFile> = Vec::new();
    for (folder, gpu) in [("kernels", true), ("kernels/shim", false)] {
        let mut paths: Vec<PathBuf> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        paths.retain(|p| p.extension().is_some_and(|e| e == "cu"));
        paths.sort();
        files.extend(paths.iter().map(|p| KernelFile::parse(p, gpu)));
    }
    build_cpu(&out, &files);
    let images = build_gpu(&out, &files);
    fs::write(out.join("launchers.rs"), launchers(&files, &images)).unwrap();
}

// --- reading signatures ---

struct KernelFile {
    stem: String,
    path: PathBuf,
    gpu: bool,
    kernels: Vec<Kernel>,
}

struct Kernel {
    name: String,
    kind: Kind,
    d: Vec<u32>, // the values of template parameter D; empty: not templated
    threads: u32,
    blocks: Option<(u32, u32)>, // (D, n): that instance leaves room for n blocks a multiprocessor
    hot: bool,
    params: Vec<Param>,
    doc: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Fiber,
    Flat,
    Warp,
}

struct Param {
    name: String,
    role: Role,
    ty: String, // element type for pointers, scalar type otherwise
}

#[derive(Clone, Copy, PartialEq)]
enum Role {
    In,
    Out,
    MaybeIn,
    MaybeOut,
    Scalar,
}

impl KernelFile {
    fn parse(path: &Path, gpu: bool) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
        let mut kernels = Vec::new();
        let mut at = 0;
        while let Some(found) = text[at..].find("KERNEL") {
            let start = at + found;
            at = start + 6;
            if start > 0 && text.as_bytes()[start - 1] != b'\n' {
                continue; // a mention in a comment or a macro, not a definition
            }
            let place =
                || format!("{}:{}", path.display(), text[..start].matches('\n').count() + 1);
            let rest = &text[start..];
            let (kind, rest) = if let Some(r) = rest.strip_prefix("KERNEL_FLAT(") {
                (Kind::Flat, r)
            } else if let Some(r) = rest.strip_prefix("KERNEL_WARP(") {
                (Kind::Warp, r)
            } else if let Some(r) = rest.strip_prefix("KERNEL(") {
                (Kind::Fiber, r)
            } else {
                panic!("{}: not KERNEL(..), KERNEL_FLAT(..) or KERNEL_WARP(..)", place());
            };
            let close =
                rest.find(')').unwrap_or_else(|| panic!("{}: unclosed attributes", place()));
            let (name, d, threads, blocks, hot) = attributes(&rest[..close], &place());
            let after = rest[close + 1..].trim_start();
            let params = after
                .strip_prefix('(')
                .unwrap_or_else(|| panic!("{}: parameters expected", place()));
            let end = matching_paren(params)
                .unwrap_or_else(|| panic!("{}: unclosed parameters", place()));
            let params =
                split_params(&params[..end]).iter().map(|p| parse_param(p, &place())).collect();
            let doc = doc_above(&text[..start]);
            kernels.push(Kernel { name, kind, d, threads, blocks, hot, params, doc });
        }
        KernelFile { stem, path: fs::canonicalize(path).unwrap(), gpu, kernels }
    }
}

fn attributes(text: &str, place: &str) -> (String, Vec<u32>, u32, Option<(u32, u32)>, bool) {
    let (mut name, mut d, mut threads, mut blocks, mut hot) =
        (String::new(), Vec::new(), 256, None, false);
    let mut in_d = false;
    for (i, part) in text.split(',').map(str::trim).enumerate() {
        if i == 0 {
            name = part.to_string();
        } else if let Some(v) = part.strip_prefix("D=") {
            d.push(v.parse().unwrap_or_else(|_| panic!("{place}: D={v}")));
            in_d = true;
        } else if let Some(v) = part.strip_prefix("THREADS=") {
            threads = v.parse().unwrap_or_else(|_| panic!("{place}: THREADS={v}"));
            in_d = false;
        } else if let Some(v) = part.strip_prefix("BLOCKS=") {
            let pair =
                v.split_once(':').and_then(|(d, n)| Some((d.parse().ok()?, n.parse().ok()?)));
            blocks = Some(pair.unwrap_or_else(|| panic!("{place}: BLOCKS={v}, not BLOCKS=D:n")));
            in_d = false;
        } else if part == "HOT" {
            hot = true;
            in_d = false;
        } else if in_d {
            d.push(part.parse().unwrap_or_else(|_| panic!("{place}: {part} after D=")));
        } else {
            panic!("{place}: unknown attribute {part}");
        }
    }
    (name, d, threads, blocks, hot)
}

fn matching_paren(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(i);
        }
    }
    None
}

fn split_params(text: &str) -> Vec<String> {
    let text: String =
        text.lines().map(|l| l.split("//").next().unwrap_or("")).collect::<Vec<_>>().join(" ");
    text.split(',')
        .map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|p| !p.is_empty())
        .collect()
}

fn parse_param(text: &str, place: &str) -> Param {
    let (ty, name) =
        text.rsplit_once([' ', '*']).unwrap_or_else(|| panic!("{place}: parameter {text}"));
    let pointer = text.contains('*');
    let ty = ty.trim().trim_end_matches('*').trim();
    let marked = |m: &str| {
        ty.strip_prefix(m).and_then(|r| r.strip_prefix('(')).and_then(|r| r.strip_suffix(')'))
    };
    let (role, ty) = if let Some(inner) = marked("MAYBE") {
        match inner.strip_prefix("const ") {
            Some(t) => (Role::MaybeIn, t),
            None => (Role::MaybeOut, inner),
        }
    } else if let Some(inner) = marked("INOUT").or(marked("SCRATCH")) {
        (Role::Out, inner)
    } else if pointer {
        match ty.strip_prefix("const ") {
            Some(t) => (Role::In, t),
            None => (Role::Out, ty),
        }
    } else {
        (Role::Scalar, ty)
    };
    Param { name: name.trim().to_string(), role, ty: ty.trim().to_string() }
}

fn doc_above(text: &str) -> String {
    let lines: Vec<&str> = text.lines().rev().take_while(|l| l.starts_with("// ")).collect();
    lines.iter().rev().map(|l| l.trim_start_matches("// ")).collect::<Vec<_>>().join("\n")
}

impl Kernel {
    /// (template argument, symbol without the dtype) of each instance.
    fn instances(&self) -> Vec<(u32, String)> {
        if self.d.is_empty() {
            vec![(0, self.name.clone())]
        } else {
            self.d.iter().map(|d| (*d, format!("{}_{d}", self.name))).collect()
        }
    }

    fn c_params(&self, restrict: bool) -> String {
        let one = |p: &Param| match p.role {
            Role::Scalar => format!("{} {}", p.ty, p.name),
            Role::In | Role::MaybeIn => {
                format!("const {}*{} {}", p.ty, if restrict { " __restrict__" } else { "" }, p.name)
            }
            // Outputs are not restrict: an in-place call (y == x) is allowed where the op says so.
            Role::Out | Role::MaybeOut => format!("{}* {}", p.ty, p.name),
        };
        self.params.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// Bytes of each argument.
    fn arg_sizes(&self) -> Vec<u8> {
        self.params
            .iter()
            .map(|p| if p.role == Role::Scalar && p.ty != "long long" { 4 } else { 8 })
            .collect()
    }

    fn c_args(&self) -> String {
        self.params.iter().map(|p| p.name.clone()).collect::<Vec<_>>().join(", ")
    }
}

// --- the CPU build ---

fn build_cpu(out: &Path, files: &[KernelFile]) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(3).warnings(false).include("kernels").debug(false);
    // Never native, never contracted: one source, one result, on every machine and in every cargo
    // profile.
    for flag in [
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-Wno-unknown-pragmas",
        "-Wno-attributes",
    ] {
        build.flag_if_supported(flag);
    }
    if env::var("CARGO_CFG_TARGET_ARCH").unwrap() == "x86_64" {
        build.flag("-march=x86-64-v3");
    }
    // What every unit includes: if it changes, all are compiled again; else only those whose own
    // text changed.
    let shared: String = ["kernels/prim", "kernels/shim"]
        .iter()
        .flat_map(|dir| sorted(dir))
        .map(|p| text(&p))
        .collect();
    let mut units: Vec<(PathBuf, String)> = vec![("kernels/shim/shim.cpp".into(), String::new())];
    for file in files {
        for (real, _) in REALS {
            for strict in [false, true] {
                let name = format!("{}_{real}{}", file.stem, if strict { "_strict" } else { "" });
                let path = out.join(format!("{name}.cpp"));
                let source = cpu_source(file, real, strict, &name);
                write_if_changed(&path, &source);
                units.push((path, source + &text(&file.path)));
            }
        }
    }
    let compiler = format!("{:?}", build.get_compiler().to_command());
    let stamp = |unit: &(PathBuf, String)| {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hash = DefaultHasher::new();
        (&compiler, &shared, &unit.1).hash(&mut hash);
        format!("{:x}", hash.finish())
    };
    let stem = |unit: &(PathBuf, String)| unit.0.file_stem().unwrap().to_str().unwrap().to_string();
    // OUT/NAME.o and the stamp of what it was made from, OUT/NAME.stamp.
    let object = |name: &str| out.join(format!("{name}.o"));
    let fresh = |unit: &&(PathBuf, String)| {
        let old = fs::read_to_string(out.join(format!("{}.stamp", stem(unit))));
        old.is_ok_and(|old| old == stamp(unit)) && object(&stem(unit)).exists()
    };
    let stale: Vec<&(PathBuf, String)> = units.iter().filter(|u| !fresh(u)).collect();
    let mut compile = build.clone();
    compile.files(stale.iter().map(|u| &u.0));
    let made = if stale.is_empty() { Vec::new() } else { compile.compile_intermediates() };
    for (unit, from) in stale.iter().zip(made) {
        fs::rename(from, object(&stem(unit))).unwrap();
        fs::write(out.join(format!("{}.stamp", stem(unit))), stamp(unit)).unwrap();
    }
    for unit in &units {
        build.object(object(&stem(unit)));
    }
    build.compile("temper_kernels");
}

/// The files of a folder, in order of their names.
fn sorted(dir: &str) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "cuh" || e == "h" || e == "cpp"));
    paths.sort();
    paths
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn cpu_source(file: &KernelFile, real: &str, strict: bool, namespace: &str) -> String {
    let mut s = String::from("// Generated by build.rs.\n#include \"shim/shim.h\"\n");
    if real == "bf16" {
        s += "#define REAL_BF16 1\n";
    }
    if strict {
        s += "#define TEMPER_STRICT 1\n";
    }
    // A namespace a translation unit: the same names mean other code where `real` or LANES differ.
    writeln!(s, "namespace k_{namespace} {{\n#include \"prim/real.cuh\"").unwrap();
    for k in &file.kernels {
        if !strict && k.kind != Kind::Fiber {
            let (name, params) = (&k.name, k.c_params(false));
            writeln!(s, "template <int D> struct {name}_t : shim::FlatThread {{ inline void body({params}); }};")
                .unwrap();
        }
    }
    writeln!(s, "#include \"{}\"\n}}", file.path.display()).unwrap();
    for k in &file.kernels {
        for (d, symbol) in k.instances() {
            let symbol = format!("{symbol}_{real}{}", if strict { "_strict" } else { "" });
            writeln!(s, "extern \"C\" void {symbol}(const shim::Launch* l) {{\n  using namespace k_{namespace};")
                .unwrap();
            for (i, p) in k.params.iter().enumerate() {
                let ty = match p.role {
                    Role::Scalar => p.ty.clone(),
                    Role::In | Role::MaybeIn => format!("const {}*", p.ty),
                    Role::Out | Role::MaybeOut => format!("{}*", p.ty),
                };
                writeln!(s, "  {ty} {} = *({ty}*)l->args[{i}];", p.name).unwrap();
            }
            let (name, args) = (&k.name, k.c_args());
            match (k.kind, strict) {
                (Kind::Fiber, _) | (Kind::Warp, true) => {
                    writeln!(s, "  shim::fibers(*l, [=] {{ {name}<{d}>({args}); }});").unwrap()
                }
                (Kind::Flat, true) => {
                    writeln!(s, "  shim::permuted(*l, [=] {{ {name}<{d}>({args}); }});").unwrap()
                }
                (Kind::Flat | Kind::Warp, false) => {
                    let lanes = if k.kind == Kind::Warp { 32 } else { 1 };
                    writeln!(
                        s,
                        "  const unsigned threads_ = l->block[0] / {lanes};\n  \
                         for (uint64_t block_ = l->block_begin; block_ < l->block_end; ++block_) {{\n    \
                         {name}_t<{d}> self_;\n    shim::set_block(self_, *l, block_);\n    self_.blockDim = {{threads_, 1, 1}};\n\
#pragma GCC ivdep\n    \
                         for (unsigned thread_ = 0; thread_ < threads_; ++thread_) {{\n      \
                         self_.threadIdx = {{thread_, 0, 0}};\n      self_.body({args});\n    }}\n  }}"
                    )
                    .unwrap();
                }
            }
            s += "}\n";
        }
    }
    s
}

// --- the GPU build ---

/// A third of the size, for drivers of CUDA 12.4 and later; compilers before 12.8 do not know the
/// option.
fn smaller(nvcc: &Path) -> Option<&'static str> {
    let help = Command::new(nvcc).arg("--help").output().ok()?;
    String::from_utf8_lossy(&help.stdout)
        .contains("--compress-mode")
        .then_some("--compress-mode=size")
}

/// Per file and dtype, the fatbin's path; None where there is no GPU build of it.
type Images = Vec<[Option<PathBuf>; 2]>;

fn build_gpu(out: &Path, files: &[KernelFile]) -> Images {
    let none = || files.iter().map(|_| [None, None]).collect();
    let Some(nvcc) = find_nvcc() else {
        println!(
            "cargo:warning=no nvcc found: building for the CPU device only. For the GPU build see README.md, \"The GPU build\"."
        );
        println!("cargo:rustc-env=TEMPER_NVCC=");
        return none();
    };
    let archs = env::var("TEMPER_CUDA_ARCHS").unwrap_or_else(|_| "sm_80,sm_90a,sm_120".into());
    let mut flags: Vec<String> = vec!["-gencode=arch=compute_80,code=compute_80".into()];
    for arch in archs.split(',').map(str::trim).filter(|a| !a.is_empty()) {
        flags.push(format!("-gencode=arch={},code={arch}", arch.replace("sm_", "compute_")));
    }
    let jobs: Vec<(usize, usize)> =
        (0..files.len()).filter(|i| files[*i].gpu).flat_map(|i| [(i, 0), (i, 1)]).collect();
    let images: Mutex<Images> = Mutex::new(none());
    let report = Mutex::new(String::new());
    let defects = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2usize);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(&(i, r)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (image, log, spills) =
                        compile_fatbin(out, &nvcc, &flags, &files[i], REALS[r].0);
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
    println!("cargo:rustc-env=TEMPER_NVCC={}", nvcc.display());
    images.into_inner().unwrap()
}

fn compile_fatbin(
    out: &Path,
    nvcc: &Path,
    flags: &[String],
    file: &KernelFile,
    real: &str,
) -> (PathBuf, String, Vec<String>) {
    let source = out.join(format!("{}_{real}.cu", file.stem));
    let image = out.join(format!("{}_{real}.fatbin", file.stem));
    write_if_changed(&source, &gpu_source(file, real));
    let output = Command::new(nvcc)
        .args(["-fatbin", "-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "-I", "kernels"])
        .args(smaller(nvcc))
        .args(flags)
        .arg("-o")
        .arg(&image)
        .arg(&source)
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", nvcc.display()));
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "nvcc failed on {}:\n{log}", file.path.display());
    let defects = hot_spills(&log, file, real);
    (image, log, defects)
}

/// The spills of HOT kernels: ptxas names a kernel and its target, then says what it spills. The
/// f32 twins of the tensor-core kernels are for checks and are not hot.
fn hot_spills(log: &str, file: &KernelFile, real: &str) -> Vec<String> {
    let hot = |symbol: &str| {
        real == "bf16"
            && file.kernels.iter().any(|k| {
                k.hot && k.instances().iter().any(|(_, s)| symbol == format!("{s}_{real}"))
            })
    };
    let mut defects = Vec::new();
    let (mut symbol, mut target) = ("", "");
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut quoted = rest.split('\'');
            symbol = quoted.next().unwrap_or("");
            target = quoted.nth(1).unwrap_or("");
        }
        let spills = line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores");
        if spills && hot(symbol) {
            defects.push(format!("{symbol} for {target}: {}", line.trim()));
        }
    }
    defects
}

fn gpu_source(file: &KernelFile, real: &str) -> String {
    let mut s = String::from("// Generated by build.rs.\n");
    if real == "bf16" {
        s += "#define REAL_BF16 1\n";
    }
    writeln!(s, "#include \"{}\"", file.path.display()).unwrap();
    for k in &file.kernels {
        for (d, symbol) in k.instances() {
            let (params, name, args) = (k.c_params(true), &k.name, k.c_args());
            let bounds = match k.blocks {
                Some((of, n)) if of == d => format!("{}, {n}", k.threads),
                _ => k.threads.to_string(),
            };
            writeln!(
                s,
                "extern \"C\" __global__ void __launch_bounds__({bounds}) {symbol}_{real}({params}) {{ {name}<{d}>({args}); }}"
            )
            .unwrap();
        }
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

fn write_if_changed(path: &Path, text: &str) {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).unwrap();
    }
}

// --- the Rust launchers ---

fn launchers(files: &[KernelFile], images: &Images) -> String {
    let mut s = String::from("// Generated by build.rs from the signatures in kernels/*.cu.\n");
    let mut all = Vec::new();
    for (file, image) in files.iter().zip(images) {
        for (r, (real, _)) in REALS.iter().enumerate() {
            let bytes = match &image[r] {
                Some(path) => format!("include_bytes!({:?})", path.display().to_string()),
                None => "&[]".into(),
            };
            let name = format!("{}_{real}", file.stem).to_uppercase();
            writeln!(
                s,
                "static IMAGE_{name}: Image = Image {{ name: \"{}_{real}\", bytes: {bytes} }};",
                file.stem
            )
            .unwrap();
        }
        for k in &file.kernels {
            launcher(&mut s, file, k, &mut all);
        }
    }
    writeln!(
        s,
        "/// Every kernel instance of this build.\npub static ALL: &[&KernelDef] = &[{}];",
        all.join(", ")
    )
    .unwrap();
    s
}

fn launcher(s: &mut String, file: &KernelFile, k: &Kernel, all: &mut Vec<String>) {
    let mut table = Vec::new();
    for (real, dtype) in REALS {
        for (d, symbol) in k.instances() {
            let (symbol, image) =
                (format!("{symbol}_{real}"), format!("{}_{real}", file.stem).to_uppercase());
            let upper = symbol.to_uppercase();
            writeln!(
                s,
                "unsafe extern \"C\" {{ fn {symbol}(l: *const CpuLaunch); fn {symbol}_strict(l: *const CpuLaunch); }}\n\
                 static {upper}: KernelDef = KernelDef {{ name: \"{symbol}\", image: &IMAGE_{image}, threads: {}, hot: {}, args: &{:?}, cpu: {symbol}, strict: {symbol}_strict }};",
                k.threads, k.hot, k.arg_sizes()
            )
            .unwrap();
            table.push(format!("(DType::{dtype}, {d}, &{upper})"));
            all.push(format!("&{upper}"));
        }
    }
    let arg_type = |p: &Param| -> String {
        match p.role {
            Role::In => "&Tensor".into(),
            Role::Out => "Out<'_>".into(),
            Role::MaybeIn => "Option<&Tensor>".into(),
            Role::MaybeOut => "Option<Out<'_>>".into(),
            Role::Scalar => rust_scalar(&p.ty).into(),
        }
    };
    for line in k.doc.lines() {
        writeln!(s, "/// {line}").unwrap();
    }
    writeln!(s, "#[allow(clippy::too_many_arguments, clippy::unnecessary_literal_unwrap)]")
        .unwrap();
    let mut sig = format!("pub fn {}(dev: &dyn Device, at: Launch", k.name);
    if !k.d.is_empty() {
        sig += ", D: usize";
    }
    for p in &k.params {
        write!(sig, ", {}: {}", p.name, arg_type(p)).unwrap();
    }
    writeln!(s, "#[allow(non_snake_case)]\n{sig}) -> Result<()> {{").unwrap();
    // The dtype of the instance is that of the first `real` argument that is there.
    let mut real = String::from("None");
    for p in k.params.iter().rev().filter(|p| p.ty == "real" && p.role != Role::Scalar) {
        real = match p.role {
            Role::In => format!("Some({}.dtype())", p.name),
            Role::Out => format!("Some({}.0.dtype())", p.name),
            Role::MaybeIn => format!("{}.map(|t| t.dtype()).or({real})", p.name),
            _ => format!("{}.as_ref().map(|t| t.0.dtype()).or({real})", p.name),
        };
    }
    let d = if k.d.is_empty() { "0" } else { "D" };
    writeln!(s, "    let real = {real}.unwrap_or(DType::F32);").unwrap();
    writeln!(s, "    let def = select(\"{}\", real, {d}, &[{}])?;", k.name, table.join(", "))
        .unwrap();
    for p in &k.params {
        let dtype = rust_dtype(&p.ty);
        let n = &p.name;
        match p.role {
            Role::In => writeln!(s, "    let mut {n} = argument(def, \"{n}\", {n}, {dtype})?;").unwrap(),
            Role::Out => writeln!(s, "    let mut {n} = argument(def, \"{n}\", {n}.0, {dtype})?;").unwrap(),
            Role::MaybeIn => writeln!(
                s,
                "    let mut {n} = match {n} {{ Some(t) => argument(def, \"{n}\", t, {dtype})?, None => 0 }};"
            )
            .unwrap(),
            Role::MaybeOut => writeln!(
                s,
                "    let mut {n} = match {n} {{ Some(t) => argument(def, \"{n}\", t.0, {dtype})?, None => 0 }};"
            )
            .unwrap(),
            Role::Scalar => writeln!(s, "    let mut {n} = {n};").unwrap(),
        }
    }
    let args: Vec<String> =
        k.params.iter().map(|p| format!("(&raw mut {}).cast()", p.name)).collect();
    writeln!(
        s,
        "    // SAFETY: the argument list was generated from the kernel's own signature, and each dtype was checked above.\n    \
         unsafe {{ dev.launch(def, at, &mut [{}]) }}\n}}",
        args.join(", ")
    )
    .unwrap();
}

fn rust_scalar(ty: &str) -> &'static str {
    match ty {
        "int" => "i32",
        "unsigned" => "u32",
        "float" => "f32",
        "long long" => "i64",
        _ => panic!("kernel scalar of type {ty}: use int, unsigned, float or long long"),
    }
}

fn rust_dtype(ty: &str) -> &'static str {
    match ty {
        "real" => "real",
        "float" => "DType::F32",
        "bf16" => "DType::BF16",
        "int" => "DType::I32",
        "unsigned" => "DType::U32",
        "unsigned char" => "DType::U8",
        _ => "real", // scalars never ask; any other pointer type fails in the generated code's dtype check
    }
}
