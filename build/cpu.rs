//! The CPU build: the host C++ compiler compiles every kernel file four times (f32 and bf16, fast
//! and strict), and some a fifth time for AVX-512.
//!
//! Invariant: one source, one result: the flags are the same on every machine of an architecture
//! and in every cargo profile. An object is compiled again only if its own text, or the text that
//! all units include, has changed.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::files::{KernelFile, REALS, Real, Sources, listed, text, write_if_changed};
use crate::kept;
use crate::signature::{Kernel, Kind, Role};

/// How a unit is compiled.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Fast,
    /// For AVX-512: the same bits, chosen at run time if the machine supports it.
    Wide,
    Strict,
}

impl Form {
    fn suffix(self) -> &'static str {
        match self {
            Form::Fast => "",
            Form::Wide => "_wide",
            Form::Strict => "_strict",
        }
    }
}

/// The files whose loops gain from AVX-512. Most of the others are limited by memory, and each one
/// costs compile time.
const WIDE: [&str; 3] = ["activation", "attention", "rmsnorm"];

/// Whether a kernel has a wide form beside its fast one. Fiber kernels have none: the threads of a
/// block take turns.
pub fn has_wide(file: &KernelFile, kernel: &Kernel, real: &Real) -> bool {
    env::var("CARGO_CFG_TARGET_ARCH").unwrap() == "x86_64"
        && real.name == "f32"
        && WIDE.contains(&file.stem.as_str())
        && kernel.kind != Kind::Fiber
}

/// A translation unit, and the text that its object depends on besides the common includes.
struct Unit {
    path: PathBuf,
    from: String,
    form: Form,
}

impl Unit {
    fn stem(&self) -> &str {
        self.path.file_stem().unwrap().to_str().unwrap()
    }
}

pub fn build(out: &Path, sources: &Sources) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(3).warnings(false).include("kernels").debug(false);
    // Never -march=native, never contracted.
    for flag in [
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-Wno-unknown-pragmas",
        "-Wno-attributes",
        // A tensor map is passed by value, aligned to 64 bytes. Both sides of the call are compiled
        // here, so the ABI warning is irrelevant.
        "-Wno-psabi",
    ] {
        build.flag_if_supported(flag);
    }
    if env::var("CARGO_CFG_TARGET_ARCH").unwrap() == "x86_64" {
        build.flag("-march=x86-64-v3");
    }
    let mut units =
        vec![Unit { path: "kernels/shim/shim.cpp".into(), from: String::new(), form: Form::Fast }];
    for file in &sources.files {
        for real in &REALS {
            units.push(unit(out, sources, file, real, Form::Fast));
            units.push(unit(out, sources, file, real, Form::Strict));
            if file.kernels.iter().any(|k| has_wide(file, k, real)) {
                units.push(unit(out, sources, file, real, Form::Wide));
            }
        }
    }
    let shared: String = ["kernels/common", "kernels/prim", "kernels/shim"]
        .iter()
        .flat_map(|folder| listed(folder, &["cuh", "h", "cpp"]))
        .map(|p| text(&p))
        .collect();
    // Strict mode looks for bugs, not speed, and the optimisation level changes no bit: at this
    // level its half of the units takes half the time.
    let mut quick = build.clone();
    quick.opt_level(1);
    let mut wide = build.clone();
    wide.flag("-march=x86-64-v4").flag("-mprefer-vector-width=512");
    let compilers = [(Form::Fast, &build), (Form::Wide, &wide), (Form::Strict, &quick)];
    let identities = compilers.map(|(_, build)| identity(&build.get_compiler().to_command()));
    let stamp = |unit: &Unit| {
        let mut hash = DefaultHasher::new();
        (&identities[unit.form as usize], &shared, &unit.from).hash(&mut hash);
        format!("{:x}", hash.finish())
    };
    let object = |unit: &Unit| out.join(format!("{}.o", unit.stem()));
    for (form, base) in compilers {
        let kept = |unit: &Unit| {
            let (name, stamp) = (unit.stem(), stamp(unit));
            kept::is_fresh(out, name, &["o"], "stamp", &stamp)
                || kept::take(out, name, &["o"], "stamp", &stamp)
        };
        let stale: Vec<&Unit> =
            units.iter().filter(|unit| unit.form == form && !kept(unit)).collect();
        if stale.is_empty() {
            continue;
        }
        let mut compile = base.clone();
        compile.files(stale.iter().map(|u| &u.path));
        for (unit, from) in stale.iter().zip(compile.compile_intermediates()) {
            kept::remove_stamp(out, unit.stem(), "stamp");
            fs::rename(from, object(unit)).unwrap();
            kept::write_stamp(out, unit.stem(), "stamp", &stamp(unit));
        }
    }
    for unit in &units {
        build.object(object(unit));
    }
    for object in products(&build, out) {
        build.object(object);
    }
    build.compile("temper_kernels");
}

/// Compiles the matrix product once for each vector width, with the same bits
/// (src/device/cpu/gemm.rs), so the machine may choose at run time.
fn products(build: &cc::Build, out: &Path) -> Vec<PathBuf> {
    let wide = env::var("CARGO_CFG_TARGET_ARCH").unwrap() == "x86_64";
    let mut widths = vec![("temper_product", None)];
    widths.extend(wide.then_some(("temper_product_512", Some("-march=x86-64-v4"))));
    let compile = |(name, flag): (&str, Option<&str>)| {
        let mut one = build.clone();
        one.define("PRODUCT_NAME", name).out_dir(out.join(name)).file("kernels/cpu/product.cpp");
        flag.into_iter().for_each(|flag| {
            one.flag(flag);
        });
        one.compile_intermediates()
    };
    widths.into_iter().flat_map(compile).collect()
}

/// What determines an object besides its text: compiler, version and arguments. The environment is
/// excluded: `Command` would show every variable of it.
fn identity(compiler: &Command) -> String {
    let version = Command::new(compiler.get_program()).arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let arguments: Vec<_> = compiler.get_args().collect();
    format!("{:?} {arguments:?} {}", compiler.get_program(), version.unwrap_or_default())
}

fn unit(out: &Path, sources: &Sources, file: &KernelFile, real: &Real, form: Form) -> Unit {
    let name = format!("{}_{}{}", file.stem, real.name, form.suffix());
    let path = out.join(format!("{name}.cpp"));
    let source = source(sources, file, real, form, &name);
    write_if_changed(&path, &source);
    Unit { path, from: source + &text(&file.path), form }
}

fn source(
    sources: &Sources,
    file: &KernelFile,
    real: &Real,
    form: Form,
    namespace: &str,
) -> String {
    let strict = form == Form::Strict;
    let mut s = String::from("// Generated by build.rs.\n#include \"shim/shim.h\"\n");
    if real.name == "bf16" {
        s += "#define REAL_BF16 1\n";
    }
    if strict {
        s += "#define TEMPER_STRICT 1\n";
    }
    if form == Form::Wide {
        s += "#include <immintrin.h>\n";
    }
    // One namespace per translation unit: the same names are other code where `real` or LANES
    // differ.
    writeln!(s, "namespace k_{namespace} {{\n#include \"prim/real.cuh\"").unwrap();
    for k in &file.kernels {
        if !strict && k.kind != Kind::Fiber {
            let (name, params) = (&k.name, k.c_params(""));
            writeln!(
                s,
                "template <int D> struct {name}_t : shim::FlatThread {{ inline void body({params}); }};"
            )
            .unwrap();
        }
    }
    writeln!(s, "#include \"{}\"\n}}", file.include).unwrap();
    for instance in file.kernels.iter().flat_map(|k| sources.instances(k, real).unwrap()) {
        let (k, d, symbol) = (instance.kernel, instance.d, instance.symbol);
        if form == Form::Wide && !has_wide(file, k, real) {
            continue;
        }
        let suffix = form.suffix();
        writeln!(
            s,
            "extern \"C\" void {symbol}{suffix}(const shim::Launch* l) {{\n  using namespace k_{namespace};"
        )
        .unwrap();
        for (i, p) in k.params.iter().enumerate() {
            let ty = match p.role {
                Role::Map => "tensor_map".into(),
                _ => p.c_type(""),
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
    s
}
