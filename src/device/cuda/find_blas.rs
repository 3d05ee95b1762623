//! Finds cuBLASLt: in the place that the user names, in the system's folders, then in the wheels of
//! the installed Python. Layer 1.
//!
//! Invariant: the search runs no program, and a missing library is not an error.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::path::{Path, PathBuf};

use cudarc::cublaslt::sys;

/// Where to look for the library, from the environment.
struct Places {
    /// `TEMPER_CUBLASLT`: the file, its folder, or `none` to use no library.
    wish: Option<OsString>,
    path: Option<OsString>,
    /// The values of `VIRTUAL_ENV` and `CONDA_PREFIX`.
    environments: Vec<PathBuf>,
}

impl Places {
    fn of_process() -> Places {
        let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os);
        Places {
            wish: std::env::var_os("TEMPER_CUBLASLT"),
            path: std::env::var_os("PATH"),
            environments: environments.map(PathBuf::from).collect(),
        }
    }

    /// Prefixes of Python installations: the active environments, the first `python3` in PATH, and
    /// the installation that this `python3` links to.
    fn prefixes(&self) -> Vec<PathBuf> {
        let mut all = self.environments.clone();
        let path = self.path.as_deref().unwrap_or(OsStr::new(""));
        let python = std::env::split_paths(path).map(|p| p.join("python3")).find(|p| p.is_file());
        // The python3 of a virtual environment links to that of the base; the packages may be in
        // either.
        for python in python.iter().flat_map(|p| [Some(p.clone()), p.canonicalize().ok()]).flatten()
        {
            all.extend(python.parent().and_then(Path::parent).map(Path::to_path_buf));
        }
        all
    }

    /// `nvidia/cu13/lib` (wheels of CUDA 13) and `nvidia/cublas/lib` (CUDA 12) in each
    /// `site-packages` and Debian `dist-packages`; then the toolkit.
    fn folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<PathBuf> = Vec::new();
        for prefix in self.prefixes() {
            let lib = std::fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten();
            let mut pythons: Vec<PathBuf> = lib.map(|entry| entry.path()).collect();
            pythons.retain(|p| {
                p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python"))
            });
            pythons.sort();
            for packages in pythons
                .iter()
                .rev()
                .flat_map(|p| ["site-packages", "dist-packages"].map(|name| p.join(name)))
            {
                let nvidia = packages.join("nvidia");
                folders.extend([nvidia.join("cu13/lib"), nvidia.join("cublas/lib")]);
            }
        }
        folders.push("/usr/local/cuda/lib64".into());
        folders
    }
}

/// Opens the library. False: it was not found, or it is not wanted. cudarc opens the library by
/// name only. That name also finds a library that is already open under its soname
/// (libcublasLt.so.13), wherever its file is; so a library in a known folder is opened here first.
pub fn load() -> bool {
    let places = Places::of_process();
    if places.wish.as_ref().is_some_and(|w| w == "none") {
        return false;
    }
    // SAFETY: only tries to open the library.
    let present = || unsafe { sys::is_culib_present() };
    let folders: Vec<PathBuf> = match &places.wish {
        Some(path) => vec![PathBuf::from(path)],
        None if present() => return true,
        None => places.folders(),
    };
    let opened = folders.iter().flat_map(|f| candidates(f)).any(|path| open(&path));
    (opened || places.wish.is_none()) && present()
}

/// The path of the file that [`load`] opened.
pub fn opened() -> String {
    let unknown = || "a file of unknown name".to_string();
    // SAFETY: zeros are a valid Dl_info. The address is that of a function of the library, and the
    // name lives as long as the library, which is never closed.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        let Some(name) = names().into_iter().find_map(|name| {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD);
            (!handle.is_null()).then_some(handle)
        }) else {
            return unknown();
        };
        let symbol = libc::dlsym(name, c"cublasLtGetVersion".as_ptr());
        if symbol.is_null() || libc::dladdr(symbol, &mut info) == 0 || info.dli_fname.is_null() {
            return unknown();
        }
        CStr::from_ptr(info.dli_fname).to_string_lossy().into_owned()
    }
}

/// The names under which the library may be open.
fn names() -> [&'static CStr; 3] {
    [c"libcublasLt.so.13", c"libcublasLt.so.12", c"libcublasLt.so"]
}

fn candidates(place: &Path) -> Vec<PathBuf> {
    if place.is_dir() {
        ["libcublasLt.so.13", "libcublasLt.so.12"].iter().map(|n| place.join(n)).collect()
    } else {
        vec![place.to_path_buf()]
    }
}

fn open(path: &Path) -> bool {
    let Some(name) =
        path.is_file().then(|| CString::new(path.as_os_str().as_encoded_bytes()).ok()).flatten()
    else {
        return false;
    };
    // SAFETY: a NUL-terminated path of an existing file. The handle is kept until the process ends.
    !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn no_library_is_not_an_error() {
        assert_eq!(candidates(Path::new("/nowhere/libcublasLt.so.13")).len(), 1);
        assert!(!open(Path::new("/nowhere/libcublasLt.so.13")));
    }

    /// A virtual environment whose python3 links to a base installation.
    #[test]
    fn wheels_beside_the_python_on_the_path_and_beside_its_base_are_found() {
        let dir = std::env::temp_dir().join(format!("temper-blas-{}", std::process::id()));
        let (venv, base) = (dir.join("venv"), dir.join("base"));
        let cu13 = venv.join("lib/python3.12/site-packages/nvidia/cu13/lib");
        let cu12 = base.join("lib/python3.11/dist-packages/nvidia/cublas/lib");
        for folder in [&cu13, &cu12, &venv.join("bin"), &base.join("bin")] {
            fs::create_dir_all(folder).unwrap();
        }
        let file = cu13.join("libcublasLt.so.13");
        fs::write(&file, "").unwrap();
        fs::write(base.join("bin/python3.11"), "").unwrap();
        std::os::unix::fs::symlink(base.join("bin/python3.11"), venv.join("bin/python3")).unwrap();
        let path = std::env::join_paths([dir.join("nothing"), venv.join("bin")]).unwrap();
        let places = Places { wish: None, path: Some(path), environments: Vec::new() };
        let folders = places.folders();
        let canonical = dir.canonicalize().unwrap();
        let cu12 = canonical.join(cu12.strip_prefix(&dir).unwrap());
        let first = folders.iter().flat_map(|f| candidates(f)).find(|c| c.is_file());
        assert_eq!(first, Some(file));
        assert!(folders.contains(&cu12), "{folders:?}");
        let active = Places { wish: None, path: None, environments: vec![venv] };
        assert!(active.folders().contains(&cu13));
        fs::remove_dir_all(dir).unwrap();
    }
}
