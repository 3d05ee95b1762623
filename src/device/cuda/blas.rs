//! cuBLASLt, the only library that computes: plain matrix products with one fixed algorithm per
//! shape. Layer 1.
//!
//! Invariant: the bits of a product are a function of its operands, its [`Key`] and, for
//! [`Algorithm::Trusted`], the chosen candidate. The heuristic is asked once per key. Split-K is
//! allowed only with reductions in a fixed order, and never among candidates. f32 never becomes
//! TF32. The fastest algorithm does depend on m: the caller (`ops::library`) decides whether it may
//! run.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::result as driver;
use cudarc::driver::sys::CUstream;

use super::find_blas;
use crate::device::{Algorithm, DType, Gemm, Layout, LibraryProduct};
use crate::error::{Error, Result};

const WORKSPACE: usize = 32 << 20;
/// Number of algorithms without split-K to ask for; the first few are the fast ones.
const CANDIDATES: usize = 8;

pub struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    version: usize,
    /// The file of the loaded library.
    path: String,
    /// None: the library has no usable algorithm for the key.
    plans: Mutex<HashMap<Key, Option<Plan>>>,
}

/// Everything on which the choice of an algorithm may depend.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// For candidates, which do not use split-K.
    exact: bool,
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    strides: [usize; 3],
    input: DType,
    output: DType,
    bias: Option<DType>,
    accumulate: bool,
    /// Of A, B and C: the largest power of two, up to 256, that divides the address.
    aligned: [u32; 3],
    bias_aligned: u32,
}

/// An operand as the column-major library sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Matrix {
    rows: usize,
    cols: usize,
    ld: usize,
    transpose: bool,
}

/// A row-major matrix is the transpose of a column-major one. So the library computes C^T = op(B)^T
/// op(A)^T: B is its first operand, A its second, and D is C^T, n x m.
fn columns(
    layout: Layout,
    (m, n, k): (usize, usize, usize),
    [lda, ldb, ldc]: [usize; 3],
) -> [Matrix; 3] {
    let matrix = |rows, cols, ld, transpose| Matrix { rows, cols, ld, transpose };
    // Stored [rows, cols] row-major = cols x rows column-major.
    let first = match layout {
        Layout::NT => matrix(k, n, ldb, true),
        Layout::NN | Layout::TN => matrix(n, k, ldb, false),
    };
    let second = match layout {
        Layout::NT | Layout::NN => matrix(k, m, lda, false),
        Layout::TN => matrix(m, k, lda, true),
    };
    [first, second, matrix(n, m, ldc, false)]
}

fn aligned(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    if dtype == DType::BF16 {
        sys::cudaDataType_t::CUDA_R_16BF
    } else {
        sys::cudaDataType_t::CUDA_R_32F
    }
}

fn failed(what: &'static str) -> impl Fn(CublasError) -> Error {
    move |e| {
        Error::Device(format!(
            "cuBLASLt, {what}: {e:?}. TEMPER_CUBLASLT=none runs without the library."
        ))
    }
}

/// The descriptors and algorithms of one key.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    /// Fastest first; not empty.
    algorithms: Vec<sys::cublasLtMatmulAlgo_t>,
    /// Index of the trusted algorithm.
    trusted: Option<usize>,
}
// SAFETY: heap objects of the library, used only under the lock.
unsafe impl Send for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created in `Plan::new` and destroyed once; null if creation failed halfway.
        unsafe {
            for layout in self.layouts.into_iter().filter(|l| !l.is_null()) {
                let _ = lt::destroy_matrix_layout(layout);
            }
            if !self.product.is_null() {
                let _ = lt::destroy_matmul_desc(self.product);
            }
        }
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}

impl Preference {
    fn set<T: Copy>(
        &self,
        what: sys::cublasLtMatmulPreferenceAttributes_t,
        value: T,
    ) -> Result<(), CublasError> {
        // SAFETY: the library copies `size_of::<T>()` bytes; each call below passes the documented
        // type.
        unsafe {
            lt::set_matmul_pref_attribute(self.0, what, (&raw const value).cast(), size_of::<T>())
        }
    }
}

impl Plan {
    fn set<T: Copy>(
        &self,
        what: sys::cublasLtMatmulDescAttributes_t,
        value: T,
    ) -> Result<(), CublasError> {
        // SAFETY: as in `Preference::set`.
        unsafe {
            lt::set_matmul_desc_attribute(
                self.product,
                what,
                (&raw const value).cast(),
                size_of::<T>(),
            )
        }
    }

    fn new(handle: sys::cublasLtHandle_t, key: &Key, bias: u64) -> Result<Plan, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t::*;
        use sys::cublasLtMatmulPreferenceAttributes_t::*;
        use sys::cublasLtReductionScheme_t::*;
        let operands = columns(key.layout, (key.m, key.n, key.k), key.strides);
        // COMPUTE_32F: float products and float sums. TF32 is a separate compute type, which is
        // never requested.
        let product = lt::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )?;
        let layouts = [std::ptr::null_mut(); 3];
        let mut plan = Plan { product, layouts, algorithms: Vec::new(), trusted: None };
        // cublasOperation_t, which the bindings lack: CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
        let op = |m: &Matrix| i32::from(m.transpose);
        plan.set(CUBLASLT_MATMUL_DESC_TRANSA, op(&operands[0]))?;
        plan.set(CUBLASLT_MATMUL_DESC_TRANSB, op(&operands[1]))?;
        if let Some(dtype) = key.bias {
            plan.set(
                CUBLASLT_MATMUL_DESC_EPILOGUE,
                sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            )?;
            plan.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(dtype))?;
            plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        for (i, (m, dtype)) in operands.iter().zip([key.input, key.input, key.output]).enumerate() {
            plan.layouts[i] = lt::create_matrix_layout(
                data_type(dtype),
                m.rows as u64,
                m.cols as u64,
                m.ld as i64,
            )?;
        }
        let preference = Preference(lt::create_matmul_pref()?);
        preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE)?;
        // Split-K: COMPUTE_TYPE sums float parts from the workspace in a separate step. INPLACE
        // adds them one after the other in C's type, which loses nothing only if C is float.
        // Neither uses atomics. NONE is always allowed.
        let schemes = match key.output {
            _ if key.exact => CUBLASLT_REDUCTION_SCHEME_NONE as u32,
            DType::F32 => {
                CUBLASLT_REDUCTION_SCHEME_INPLACE as u32
                    | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32
            }
            _ => CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32,
        };
        preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes)?;
        // The library's A is our B.
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.aligned[1])?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.aligned[0])?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.aligned[2])?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.aligned[2])?;
        let [a, b, c] = plan.layouts;
        let count = if key.exact { CANDIDATES } else { 1 };
        // SAFETY: the structs are plain numbers, which the library overwrites.
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> =
            vec![unsafe { std::mem::zeroed() }; count];
        let mut n = 0;
        // SAFETY: the descriptors are live, and `found` has room for `count` results.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                plan.product,
                a,
                b,
                c,
                c,
                preference.0,
                count as i32,
                found.as_mut_ptr(),
                &mut n,
            )
        }
        .result()?;
        let usable = |f: &&sys::cublasLtMatmulHeuristicResult_t| f.state.result().is_ok();
        let split = |a: &sys::cublasLtMatmulAlgo_t| key.exact && splits_k(a);
        let algorithms = found.iter().take(n.max(0) as usize).filter(usable).map(|f| f.algo);
        plan.algorithms = algorithms.filter(|a| !split(a)).collect();
        match plan.algorithms.is_empty() {
            true => Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
            false => Ok(plan),
        }
    }
}

/// Whether an algorithm computes parts of k separately and adds them.
fn splits_k(algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
    let (mut parts, mut written) = (0i32, 0usize);
    // SAFETY: the attribute is an int32.
    let status = unsafe {
        sys::cublasLtMatmulAlgoConfigGetAttribute(
            algorithm,
            sys::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
            (&raw mut parts).cast(),
            size_of::<i32>(),
            &mut written,
        )
    };
    status.result().is_ok() && parts > 1
}

/// Whether the library reports that it has nothing for a shape. The engine's own kernel runs then.
fn unsupported(e: &CublasError) -> bool {
    use sys::cublasStatus_t::*;
    matches!(
        e.0,
        CUBLAS_STATUS_NOT_SUPPORTED | CUBLAS_STATUS_INVALID_VALUE | CUBLAS_STATUS_ARCH_MISMATCH
    )
}

impl Blas {
    /// None if the library is not found. The caller has bound the context.
    pub fn new() -> Result<Option<Blas>> {
        if !find_blas::load() {
            return Ok(None);
        }
        // SAFETY: the library is loaded; the function takes no arguments.
        let version = unsafe { sys::cublasLtGetVersion() };
        // Versions 12 and 13 have the same calls and struct sizes; others are unknown.
        if !(120_000..140_000).contains(&version) {
            return Ok(None);
        }
        let handle = lt::create_handle().map_err(failed("start"))?;
        let path = find_blas::opened();
        let mut blas = Blas { handle, workspace: 0, version, path, plans: Mutex::default() };
        // SAFETY: new memory, freed in `Drop`.
        blas.workspace = unsafe { driver::malloc_sync(WORKSPACE) }
            .map_err(|e| Error::OutOfMemory(format!("cuBLASLt's workspace of 32 MiB: {e:?}")))?;
        Ok(Some(blas))
    }

    pub fn version(&self) -> String {
        format!("{}.{}.{}", self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    /// The path of the library.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// See [`Device::trust_gemm`](crate::device::Device::trust_gemm).
    pub fn trust(&self, g: &Gemm, candidate: Option<usize>) {
        let Some(key) = key(g, true) else { return };
        let mut plans = self.plans();
        match (plans.get_mut(&key), candidate) {
            (Some(Some(plan)), Some(i)) if i < plan.algorithms.len() => plan.trusted = Some(i),
            _ => drop(plans.insert(key, None)),
        }
    }

    fn plans(&self) -> MutexGuard<'_, HashMap<Key, Option<Plan>>> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Safety
    ///
    /// The operands are in live device memory, and `stream` belongs to the bound context.
    pub unsafe fn run(
        &self,
        g: &Gemm,
        algorithm: Algorithm,
        stream: CUstream,
    ) -> Result<LibraryProduct> {
        let Some(key) = key(g, algorithm != Algorithm::Fastest) else {
            return Ok(LibraryProduct::Unavailable);
        };
        let bias = g.bias.map_or(0, |b| b.address);
        let mut plans = self.plans();
        let plan = match plans.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => match Plan::new(self.handle, &key, bias) {
                Ok(plan) => new.insert(Some(plan)),
                Err(e) if unsupported(&e) => new.insert(None),
                Err(e) => return Err(failed("choosing an algorithm")(e)),
            },
        };
        let Some(plan) = plan else { return Ok(LibraryProduct::Unavailable) };
        let chosen = match algorithm {
            Algorithm::Fastest => 0,
            Algorithm::Candidate(i) => i,
            Algorithm::Trusted => match plan.trusted {
                Some(i) => i,
                None => return Ok(LibraryProduct::Untried),
            },
        };
        let Some(chosen) = plan.algorithms.get(chosen) else {
            return Ok(LibraryProduct::Unavailable);
        };
        if key.bias.is_some() {
            let what = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            plan.set(what, bias).map_err(failed("bias"))?;
        }
        let (one, beta) = (1f32, if g.accumulate { 1f32 } else { 0f32 });
        let [first, second, d] = plan.layouts;
        // SAFETY: the caller's promise; B is the library's first operand (see `columns`), and D
        // overwrites C.
        let ran = unsafe {
            lt::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                g.b.address as *const c_void,
                first,
                g.a.address as *const c_void,
                second,
                g.c.address as *const c_void,
                d,
                g.c.address as *mut c_void,
                d,
                chosen,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        };
        match ran {
            Ok(()) => Ok(LibraryProduct::Queued),
            // The library reports this before anything runs: the key has no algorithm after all.
            Err(e) if unsupported(&e) => {
                plans.insert(key, None);
                Ok(LibraryProduct::Unavailable)
            }
            Err(e) => Err(failed("matrix product")(e)),
        }
    }
}

/// None for dtypes that only the engine's own kernel computes, and for empty products.
fn key(g: &Gemm, exact: bool) -> Option<Key> {
    let (input, output) = (g.a.dtype, g.c.dtype);
    let float = |d: DType| d == DType::F32 || d == DType::BF16;
    let pair = input == g.b.dtype
        && float(input)
        && float(output)
        && (output == input || output == DType::F32);
    let some = g.m > 0 && g.n > 0 && g.k > 0;
    (pair && some).then(|| Key {
        exact,
        layout: g.layout,
        m: g.m,
        n: g.n,
        k: g.k,
        strides: [g.a.stride, g.b.stride, g.c.stride],
        input,
        output,
        bias: g.bias.map(|b| b.dtype),
        accumulate: g.accumulate,
        aligned: [g.a, g.b, g.c].map(|m| aligned(m.address)),
        bias_aligned: aligned(g.bias.map_or(0, |b| b.address)),
    })
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: the stream was synchronized; nothing uses the workspace or the handle any more.
        unsafe {
            if self.workspace != 0 {
                let _ = driver::free_sync(self.workspace);
            }
            let _ = lt::destroy_handle(self.handle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Element (r, c) that the library sees after the operation.
    fn seen(m: &Matrix, data: &[f64], r: usize, c: usize) -> f64 {
        let (r, c) = if m.transpose { (c, r) } else { (r, c) };
        assert!(r < m.rows && c < m.cols && m.ld >= m.rows);
        data[c * m.ld + r]
    }

    #[test]
    fn the_column_major_view_of_each_layout_is_the_row_major_product() {
        for layout in [Layout::NT, Layout::NN, Layout::TN] {
            for (m, n, k) in [(3, 5, 4), (1, 7, 2), (6, 1, 5)] {
                let (a_rows, a_cols) = if layout == Layout::TN { (k, m) } else { (m, k) };
                let (b_rows, b_cols) = if layout == Layout::NT { (n, k) } else { (k, n) };
                let strides = [a_cols + 3, b_cols + 1, n + 2];
                let a: Vec<f64> = (0..a_rows * strides[0]).map(|i| (i * 7 % 13) as f64).collect();
                let b: Vec<f64> = (0..b_rows * strides[1]).map(|i| (i * 5 % 11) as f64).collect();
                let [first, second, d] = columns(layout, (m, n, k), strides);
                assert_eq!((d.rows, d.cols, d.transpose), (n, m, false));
                for row in 0..m {
                    for col in 0..n {
                        let at = |i: usize| {
                            let p = if layout == Layout::TN {
                                a[i * strides[0] + row]
                            } else {
                                a[row * strides[0] + i]
                            };
                            let q = if layout == Layout::NT {
                                b[col * strides[1] + i]
                            } else {
                                b[i * strides[1] + col]
                            };
                            p * q
                        };
                        let want: f64 = (0..k).map(at).sum();
                        let got: f64 = (0..k)
                            .map(|i| seen(&first, &b, col, i) * seen(&second, &a, i, row))
                            .sum();
                        assert_eq!(got, want, "{layout:?} {m} {n} {k}");
                        assert_eq!(
                            row * strides[2] + col,
                            row * d.ld + col,
                            "C is written where it belongs"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn alignment_is_capped_at_256() {
        assert_eq!(
            [aligned(0x1000), aligned(0x1010), aligned(2), aligned(1), aligned(0)],
            [256, 16, 2, 1, 256]
        );
    }
}
