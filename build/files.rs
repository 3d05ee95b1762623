//! The files of `kernels/` as the build sees them: their declarations, and the instances of each
//! kernel.
//!
//! Invariant: an exported name means the same in all files.

use std::fs;
use std::path::{Path, PathBuf};

use crate::signature::{Export, Kernel, Param, Role, Source, parse};

/// The dtypes of `real`, and their names in Rust.
pub const REALS: [Real; 2] =
    [Real { name: "f32", dtype: "F32", bytes: 4 }, Real { name: "bf16", dtype: "BF16", bytes: 2 }];

pub struct Real {
    pub name: &'static str,
    pub dtype: &'static str,
    pub bytes: i64,
}

/// A `.cu` file.
pub struct KernelFile {
    pub stem: String,
    pub path: PathBuf,
    /// Its path in an include, below `kernels/`: no unit names the folder of the checkout, so that
    /// objects can be kept when that moves.
    pub include: String,
    /// False for files that are built for the CPU only (tests of the shim).
    pub gpu: bool,
    pub kernels: Vec<Kernel>,
}

pub struct Sources {
    pub files: Vec<KernelFile>,
    /// Each with its file, relative to the crate.
    pub exports: Vec<(PathBuf, Export)>,
}

/// One kernel for one D and one dtype.
pub struct Instance<'a> {
    pub kernel: &'a Kernel,
    /// 0 if the kernel is not templated.
    pub d: u32,
    pub symbol: String,
    /// Bytes of dynamic shared memory; 0 if the caller sets it.
    pub shared: i64,
}

impl Sources {
    pub fn read() -> Result<Sources, Vec<String>> {
        let (mut sources, mut errors) =
            (Sources { files: Vec::new(), exports: Vec::new() }, Vec::new());
        for (folder, gpu) in [
            ("kernels/common", true),
            ("kernels/prim", true),
            ("kernels", true),
            ("kernels/levels", true),
            ("kernels/shim", false),
        ] {
            for path in listed(folder, &["cu", "cuh"]) {
                match parse(&path.display().to_string(), &text(&path)) {
                    Ok(found) => sources.add(&path, gpu, found),
                    Err(wrong) => errors.extend(wrong),
                }
            }
        }
        for (i, (path, export)) in sources.exports.iter().enumerate() {
            if let Some((first, _)) = sources.exports[..i].iter().find(|e| e.1.name == export.name)
            {
                errors.push(format!(
                    "{}: {} is exported by {} too; give it another name",
                    path.display(),
                    export.name,
                    first.display()
                ));
            }
        }
        for file in &sources.files {
            for kernel in &file.kernels {
                for real in &REALS {
                    if let Err(what) = sources.instances(kernel, real) {
                        errors.push(format!("{}: {}: {what}", file.path.display(), kernel.name));
                    }
                }
            }
        }
        if errors.is_empty() { Ok(sources) } else { Err(errors) }
    }

    fn add(&mut self, path: &Path, gpu: bool, found: Source) {
        self.exports.extend(found.exports.into_iter().map(|e| (path.to_path_buf(), e)));
        if path.extension().is_some_and(|e| e == "cu") {
            self.files.push(KernelFile {
                stem: path.file_stem().unwrap().to_str().unwrap().to_string(),
                path: path.to_path_buf(),
                include: path.strip_prefix("kernels").unwrap().display().to_string(),
                gpu,
                kernels: found.kernels,
            });
        }
    }

    /// All instances of a kernel for one dtype. Error if SHARED names something that is not
    /// exported.
    pub fn instances<'a>(
        &self,
        kernel: &'a Kernel,
        real: &Real,
    ) -> Result<Vec<Instance<'a>>, String> {
        let exports: Vec<&Export> = self.exports.iter().map(|e| &e.1).collect();
        let templated = !kernel.d.is_empty();
        let values = if templated { &kernel.d[..] } else { &[0] };
        let one = |&d: &u32| {
            let name = &kernel.name;
            let symbol = if templated {
                format!("{name}_{d}_{}", real.name)
            } else {
                format!("{name}_{}", real.name)
            };
            let variables = [("D", i64::from(d)), ("sizeof(real)", real.bytes)];
            let shared = match &kernel.shared {
                Some(shared) => shared.value(&variables, &exports)?,
                None => 0,
            };
            Ok(Instance { kernel, d, symbol, shared })
        };
        values.iter().map(one).collect()
    }
}

impl Param {
    /// The C++ type of the argument.
    pub fn c_type(&self, restrict: &str) -> String {
        match self.role {
            Role::Scalar => self.ty.c().into(),
            Role::Map => "const tensor_map&".into(),
            Role::In | Role::MaybeIn => format!("const {}*{restrict}", self.ty.c()),
            // Outputs are not restrict: an in-place call (y == x) is allowed if the op says so.
            Role::Out | Role::MaybeOut => format!("{}*", self.ty.c()),
        }
    }
}

impl Kernel {
    pub fn c_params(&self, restrict: &str) -> String {
        let one = |p: &Param| format!("{} {}", p.c_type(restrict), p.name);
        self.params.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// The parameters of the entry point of a GPU launch.
    pub fn entry_params(&self) -> String {
        let one = |p: &Param| match p.role {
            Role::Map => format!("const __grid_constant__ tensor_map {}", p.name),
            _ => format!("{} {}", p.c_type(" ENTRY_RESTRICT"), p.name),
        };
        self.params.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    pub fn c_args(&self) -> String {
        self.params.iter().map(|p| p.name.clone()).collect::<Vec<_>>().join(", ")
    }
}

/// The files of a folder with one of these extensions, sorted by name.
pub fn listed(folder: &str, endings: &[&str]) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().and_then(|e| e.to_str()).is_some_and(|e| endings.contains(&e)));
    paths.sort();
    paths
}

pub fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

pub fn write_if_changed(path: &Path, text: &str) {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).unwrap();
    }
}
