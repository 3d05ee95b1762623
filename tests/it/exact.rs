//! `matmul=exact`: which of a library's algorithms are used. The library is a stand-in on the CPU;
//! the test chooses the summation order and the time of each of its algorithms.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use half::bf16;
use temper::autograd::{Beside, Cx};
use temper::config::MatmulChoice;
use temper::device::cpu::Cpu;
use temper::device::{
    Algorithm, Capabilities, DType, Device, Download, Gemm, Graph, Kernel, KernelArgs, Launch,
    Layout, LibraryProduct, Mark, MemoryInfo,
};
use temper::error::Result;
use temper::observer::Observer;
use temper::ops::activation::Act;
use temper::ops::case::Rng;
use temper::ops::matmul::product;
use temper::ops::mlp::DenseLayer;
use temper::ops::norm_linear::norm_linear;
use temper::ops::rmsnorm::{Norm, NormInput};
use temper::tensor::Tensor;

/// In which order a stand-in adds up.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    /// From left to right, as the engine's own kernel; of bfloat16 the sums of each 16.
    Chain,
    /// Two halves of k, then their sum.
    Split,
    /// From left to right, but from this number of rows on in halves.
    SplitFrom(usize),
}

/// m, n, k, and whether it is added.
type ProductKey = (usize, usize, usize, bool);

/// A CPU whose library has these algorithms, and a clock that knows products alone.
struct Library {
    cpu: Cpu,
    /// Each with its microseconds.
    algorithms: Vec<(Order, f32)>,
    /// Microseconds of the engine's own kernel.
    own: f32,
    hopper: bool,
    /// Whether the library was not found.
    absent: bool,
    clock: Mutex<f32>,
    marks: Mutex<Vec<f32>>,
    trusted: Mutex<HashMap<ProductKey, Option<usize>>>,
    ran: Mutex<Vec<(Algorithm, Order)>>,
}

impl Library {
    /// Algorithms that are all faster than the own kernel, the first the fastest.
    fn new(algorithms: &[Order]) -> Arc<Library> {
        let timed = algorithms.iter().enumerate().map(|(i, order)| (*order, 1.0 + i as f32));
        Library::timed(&timed.collect::<Vec<_>>(), 100.0)
    }

    fn timed(algorithms: &[(Order, f32)], own: f32) -> Arc<Library> {
        Library::beside(algorithms, own, false)
    }

    /// Beside the kernels of Hopper, too.
    fn beside(algorithms: &[(Order, f32)], own: f32, hopper: bool) -> Arc<Library> {
        Arc::new(Library {
            hopper,
            absent: algorithms.is_empty(),
            cpu: Cpu::new(),
            algorithms: algorithms.to_vec(),
            own,
            clock: Mutex::default(),
            marks: Mutex::default(),
            trusted: Mutex::default(),
            ran: Mutex::default(),
        })
    }

    fn take_ran(&self) -> Vec<(Algorithm, Order)> {
        std::mem::take(&mut self.ran.lock().unwrap())
    }

    fn key(g: &Gemm) -> ProductKey {
        (g.m, g.n, g.k, g.accumulate)
    }

    /// `c = a b^T`, or `c += ...`, c in f32.
    unsafe fn multiply(g: &Gemm, order: Order) {
        assert!(g.layout == Layout::NT && g.c.dtype == DType::F32);
        // SAFETY: the operands lie in the CPU's memory, as the caller promises.
        let at = |o: &temper::device::Operand, row: usize, col: usize| unsafe {
            let index = row * o.stride + col;
            match o.dtype {
                DType::BF16 => (*(o.address as *const bf16).add(index)).to_f32(),
                _ => *(o.address as *const f32).add(index),
            }
        };
        let plain = |row, col, from: usize, to: usize| {
            (from..to).fold(0f32, |s, i| at(&g.a, row, i).mul_add(at(&g.b, col, i), s))
        };
        let chain = |row, col, from: usize, to: usize| match g.a.dtype {
            DType::BF16 => {
                let of_16 = |i: usize| plain(row, col, i, (i + 16).min(to));
                (from..to).step_by(16).fold(0f32, |s, i| s + of_16(i))
            }
            _ => plain(row, col, from, to),
        };
        for row in 0..g.m {
            for col in 0..g.n {
                let split = match order {
                    Order::Chain => false,
                    Order::Split => true,
                    Order::SplitFrom(rows) => g.m >= rows,
                };
                let mut sum = match split {
                    true => chain(row, col, 0, g.k / 2) + chain(row, col, g.k / 2, g.k),
                    false => chain(row, col, 0, g.k),
                };
                sum += g.bias.map_or(0.0, |b| at(&b, 0, col));
                if g.accumulate {
                    sum += at(&g.c, row, col);
                }
                // SAFETY: as above.
                unsafe { *(g.c.address as *mut f32).add(row * g.c.stride + col) = sum };
            }
        }
    }
}

impl Device for Library {
    fn name(&self) -> String {
        "a library of the test".into()
    }
    fn capabilities(&self) -> Capabilities {
        match self.hopper {
            true => Capabilities {
                wgmma: true,
                asynchronous: false,
                library_gemm: !self.absent,
                ..Capabilities::GPU
            },
            false => Capabilities { gemm_depends_on_rows: true, ..Capabilities::CPU },
        }
    }
    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.cpu.alloc(bytes)
    }
    unsafe fn free(&self, address: u64, bytes: usize) {
        unsafe { self.cpu.free(address, bytes) }
    }
    unsafe fn upload(&self, dst: u64, src: &[u8]) -> Result<()> {
        unsafe { self.cpu.upload(dst, src) }
    }
    unsafe fn download(&self, dst: &mut [u8], src: u64) -> Result<()> {
        unsafe { self.cpu.download(dst, src) }
    }
    unsafe fn begin_download(&self, src: u64, bytes: usize) -> Result<Download> {
        unsafe { self.cpu.begin_download(src, bytes) }
    }
    fn end_download(&self, download: Download, dst: &mut [u8]) -> Result<()> {
        self.cpu.end_download(download, dst)
    }
    unsafe fn copy(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        unsafe { self.cpu.copy(dst, src, bytes) }
    }
    unsafe fn fill(&self, dst: u64, byte: u8, bytes: usize) -> Result<()> {
        unsafe { self.cpu.fill(dst, byte, bytes) }
    }
    unsafe fn launch(&self, kernel: Kernel, at: Launch, args: KernelArgs) -> Result<()> {
        if ["matmul", "few", "hopper"].iter().any(|start| kernel.name.starts_with(start)) {
            *self.clock.lock().unwrap() += self.own;
        }
        unsafe { self.cpu.launch(kernel, at, args) }
    }
    unsafe fn gemm(&self, g: &Gemm, algorithm: Algorithm) -> Result<LibraryProduct> {
        if self.absent {
            return Ok(LibraryProduct::Unavailable);
        }
        let chosen = match algorithm {
            Algorithm::Fastest => Some(0),
            Algorithm::Candidate(i) => Some(i),
            Algorithm::Trusted => match self.trusted.lock().unwrap().get(&Library::key(g)) {
                Some(trusted) => *trusted,
                None => return Ok(LibraryProduct::Untried),
            },
        };
        let Some((order, time)) = chosen.and_then(|i| self.algorithms.get(i)) else {
            return Ok(LibraryProduct::Unavailable);
        };
        unsafe { Library::multiply(g, *order) };
        self.ran.lock().unwrap().push((algorithm, *order));
        *self.clock.lock().unwrap() += time;
        Ok(LibraryProduct::Queued)
    }
    fn trust_gemm(&self, g: &Gemm, candidate: Option<usize>) {
        self.trusted.lock().unwrap().insert(Library::key(g), candidate);
    }
    fn sync(&self) -> Result<()> {
        self.cpu.sync()
    }
    fn memory(&self) -> Result<MemoryInfo> {
        self.cpu.memory()
    }
    fn mark(&self) -> Result<Mark> {
        let mut marks = self.marks.lock().unwrap();
        marks.push(*self.clock.lock().unwrap());
        Ok(Mark(marks.len() - 1))
    }
    fn elapsed_ms(&self, from: Mark, to: Mark) -> Result<f32> {
        let marks = self.marks.lock().unwrap();
        Ok((marks[to.0] - marks[from.0]) / 1000.0)
    }
    fn begin_capture(&self) -> Result<()> {
        self.cpu.begin_capture()
    }
    fn end_capture(&self) -> Result<Graph> {
        self.cpu.end_capture()
    }
    unsafe fn replay(&self, graph: Graph) -> Result<()> {
        unsafe { self.cpu.replay(graph) }
    }
    fn forget(&self, graph: Graph) {
        self.cpu.forget(graph)
    }
}

#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Observer for Notes {
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
}

fn context(device: &Arc<Library>, matmul: MatmulChoice) -> (Cx, Arc<Notes>) {
    let (mut cx, notes) =
        (Cx::new(device.clone(), DType::F32).unwrap(), Arc::new(Notes::default()));
    (cx.matmul, cx.observer) = (matmul, notes.clone());
    (cx, notes)
}

/// The bits of `x w^T`, or of what that adds to `before`.
fn multiply(cx: &Cx, m: usize, x: &[f32], w: &[f32], accumulate: bool) -> Vec<u32> {
    let (k, n) = (x.len() / m, w.len() * m / x.len());
    let tensor = |shape: &[usize], v: &[f32]| {
        Tensor::from_host(&cx.pool, "x", DType::F32, shape, v).unwrap()
    };
    let c = tensor(&[m, n], &vec![0.5; m * n]);
    product(cx, Layout::NT, &c, &tensor(&[m, k], x), &tensor(&[n, k], w), None, accumulate)
        .unwrap();
    c.to_vec::<u32>().unwrap()
}

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng(seed);
    (0..n).map(|_| rng.normal() as f32).collect()
}

#[test]
fn the_fastest_algorithm_with_the_own_kernels_bits_is_used() {
    let algorithms = [(Order::Split, 1.0), (Order::Chain, 9.0), (Order::Chain, 5.0)];
    let device = Library::timed(&algorithms, 6.0);
    let (exact, notes) = context(&device, MatmulChoice::Exact);
    let (own, _) = context(&device, MatmulChoice::Own);
    for m in [1, 37] {
        let (x, w) = (random(m * 50, 1), random(19 * 50, 2));
        let got = multiply(&exact, m, &x, &w, false);
        device.take_ran();
        assert_eq!(got, multiply(&own, m, &x, &w, false));
        // The next product of the shape is the library's at once.
        multiply(&exact, m, &x, &w, false);
        assert_eq!(device.take_ran(), [(Algorithm::Trusted, Order::Chain)]);
        let trusted = device.trusted.lock().unwrap()[&(m, 19, 50, false)];
        assert_eq!(trusted, Some(2), "5 us, where the first has other bits and the second 9 us");
    }
    assert!(notes.0.lock().unwrap().is_empty());
}

#[test]
fn the_own_kernel_runs_where_it_is_fastest_and_for_rows_like_these() {
    let device = Library::timed(&[(Order::Chain, 5.0), (Order::Chain, 5.1)], 5.1);
    let (exact, notes) = context(&device, MatmulChoice::Exact);
    let w = random(19 * 50, 2);
    multiply(&exact, 25, &random(25 * 50, 1), &w, false);
    let tried = device.take_ran();
    assert!(tried.len() > 2 && tried.iter().all(|r| matches!(r.0, Algorithm::Candidate(_))));
    for m in [25, 26, 31] {
        multiply(&exact, m, &random(m * 50, 1), &w, false);
        assert_eq!(device.take_ran(), [], "{m} rows: hardly slower, and there is nothing to check");
    }
    for m in [32, 33] {
        multiply(&exact, m, &random(m * 50, 1), &w, false);
        assert!(
            !device.take_ran().is_empty(),
            "{m} rows: a step's own number, and others, are timed"
        );
    }
    multiply(&exact, 32, &random(32 * 50, 1), &w, false);
    assert_eq!(device.take_ran(), [], "32 rows have their verdict");
    assert!(notes.0.lock().unwrap().is_empty(), "nothing was refused");
}

#[test]
fn many_rows_are_timed_once_and_then_only_checked() {
    let device = Library::timed(&[(Order::Split, 1.0), (Order::Chain, 5.0)], 50.0);
    let (exact, _) = context(&device, MatmulChoice::Exact);
    let (own, _) = context(&device, MatmulChoice::Own);
    let w = random(4 * 6, 2);
    let runs = |m: usize| {
        let x = random(m * 6, 1);
        let got = multiply(&exact, m, &x, &w, false);
        let ran = device.take_ran().len();
        assert_eq!(got, multiply(&own, m, &x, &w, false), "{m} rows");
        ran
    };
    let timed = runs(300);
    let checked = runs(301);
    assert_eq!(checked, 3, "two candidates, then the product");
    assert!(timed > checked);
}

#[test]
fn without_such_an_algorithm_the_own_kernel_runs_and_one_note_says_so() {
    let device = Library::new(&[Order::Split]);
    let (exact, notes) = context(&device, MatmulChoice::Exact);
    let (own, _) = context(&device, MatmulChoice::Own);
    let w = random(19 * 50, 2);
    for m in [1, 20, 40] {
        let x = random(m * 50, 1);
        for _ in 0..2 {
            assert_eq!(multiply(&exact, m, &x, &w, false), multiply(&own, m, &x, &w, false));
        }
    }
    let ran = device.take_ran();
    assert!(!ran.is_empty() && ran.iter().all(|r| r.0 == Algorithm::Candidate(0)), "{ran:?}");
    let notes = notes.0.lock().unwrap();
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("m 1, n 19, k 50"), "{}", notes[0]);
}

/// The library's runs for a product of m rows of bfloat16.
fn runs_in_bf16(
    device: &Arc<Library>,
    cx: &Cx,
    m: usize,
    accumulate: bool,
) -> Vec<(Algorithm, Order)> {
    // Sums of products of bfloat16 are exact for a small k, in any order.
    const K: usize = 1024;
    let tensor = |rows: usize, seed: u64| {
        let values = random(rows * K, seed);
        Tensor::from_f32(&cx.pool, "x", DType::BF16, &[rows, K], &values).unwrap()
    };
    let c = Tensor::from_f32(&cx.pool, "c", DType::F32, &[m, 24], &vec![0.5; m * 24]).unwrap();
    device.take_ran();
    product(cx, Layout::NT, &c, &tensor(m, 1), &tensor(24, 2), None, accumulate).unwrap();
    device.take_ran()
}

#[test]
fn auto_is_exact_for_the_sizes_of_decoding_steps() {
    // The fastest has other bits; the own kernel loses to one that has its own.
    let device = Library::timed(&[(Order::Split, 1.0), (Order::Chain, 5.0)], 9.0);
    let (auto, notes) = context(&device, MatmulChoice::Auto);
    for m in [1, 4, 48] {
        runs_in_bf16(&device, &auto, m, false);
        let chain = [(Algorithm::Trusted, Order::Chain)];
        assert_eq!(runs_in_bf16(&device, &auto, m, false), chain, "{m} rows");
    }
    let fastest = [(Algorithm::Fastest, Order::Split)];
    for (m, accumulate) in [(5, false), (4, true), (96, false)] {
        assert_eq!(runs_in_bf16(&device, &auto, m, accumulate), fastest, "{m} rows");
    }
    // Where the own kernel is the fastest, the library is not asked again.
    let device = Library::timed(&[(Order::Split, 1.0), (Order::Chain, 5.0)], 3.0);
    let (auto, _) = context(&device, MatmulChoice::Auto);
    runs_in_bf16(&device, &auto, 4, false);
    assert_eq!(runs_in_bf16(&device, &auto, 4, false), []);
    assert!(notes.0.lock().unwrap().is_empty(), "an algorithm with these bits was found");
}

#[test]
fn on_hopper_auto_is_exact_for_more_rows_where_a_result_has_few_tiles() {
    let device = Library::beside(&[(Order::Split, 1.0), (Order::Chain, 5.0)], 20.0, true);
    let (auto, _) = context(&device, MatmulChoice::Auto);
    for m in [96, 1024] {
        runs_in_bf16(&device, &auto, m, false);
        let chain = [(Algorithm::Trusted, Order::Chain)];
        assert_eq!(runs_in_bf16(&device, &auto, m, false), chain, "{m} rows");
    }
    let fastest = [(Algorithm::Fastest, Order::Split)];
    for m in [100, 1536] {
        assert_eq!(runs_in_bf16(&device, &auto, m, false), fastest, "{m} rows");
    }
    // An own kernel of Hopper may win.
    let device = Library::beside(&[(Order::Split, 1.0), (Order::Chain, 5.0)], 3.0, true);
    let (auto, _) = context(&device, MatmulChoice::Auto);
    runs_in_bf16(&device, &auto, 96, false);
    assert_eq!(runs_in_bf16(&device, &auto, 96, false), []);
}

#[test]
fn without_a_library_the_own_kernels_compete() {
    let device = Library::beside(&[], 2.0, true);
    let (exact, notes) = context(&device, MatmulChoice::Exact);
    let own = |cx: &Cx, m: usize| {
        assert_eq!(runs_in_bf16(&device, cx, m, false), []);
        let choices = cx.product_check.choices.lock().unwrap();
        let of_m = choices.iter().find(|(shape, _)| shape.rows == m);
        of_m.map(|(_, choice)| choice.own.is_some())
    };
    assert_eq!([1, 96].map(|m| own(&exact, m)), [Some(true); 2]);
    let (auto, _) = context(&device, MatmulChoice::Auto);
    assert_eq!([1, 96].map(|m| own(&auto, m)), [Some(true); 2]);
    assert_eq!(own(&auto, 1536), None, "the kernel that is assumed to be fastest");
    assert!(notes.0.lock().unwrap().is_empty(), "no algorithm was refused");
}

#[test]
fn a_norm_moves_in_front_of_a_product_where_that_is_faster() {
    // The bytes of the result and of the sum.
    let run = |device: Arc<dyn Device>, act: Option<Act>| {
        let mut cx = Cx::new(device, DType::BF16).unwrap();
        cx.matmul = MatmulChoice::Exact;
        let tensor = |shape: &[usize], seed| {
            let values = random(shape.iter().product(), seed);
            Tensor::from_f32(&cx.pool, "t", DType::BF16, shape, &values).unwrap()
        };
        let (x, residual) = (tensor(&[2, 72], 1), tensor(&[2, 72], 2));
        let (weight, w, bias) = (tensor(&[72], 3), tensor(&[24, 72], 4), tensor(&[24], 5));
        let norm = Norm::new(1e-6);
        let input = NormInput { x: &x, residual: Some(&residual), weight: &weight, norm };
        let layer = DenseLayer { weight: &w, bias: Some(&bias) };
        let (y, sum) = norm_linear(&mut cx, input, layer, act).unwrap();
        let choices = cx.product_check.choices.lock().unwrap();
        let norms = [Beside::Norm, Beside::NormAndGate];
        let in_front: Vec<bool> = choices
            .iter()
            .filter(|(shape, _)| norms.contains(&shape.beside))
            .map(|(_, choice)| choice.own.is_some())
            .collect();
        (y.to_bytes().unwrap(), sum.to_bytes().unwrap(), in_front)
    };
    for act in [None, Some(Act::Silu)] {
        let plain = run(Arc::new(Cpu::new()), act);
        assert!(plain.2.is_empty(), "a CPU times nothing");
        // The norm's own launch takes no time here, and a kernel in front is given a microsecond.
        let fused = run(Library::beside(&[], 2.0, true), act);
        assert!(fused == (plain.0, plain.1, vec![true]), "{act:?} {:?}", fused.2);
    }
}

#[test]
fn zeros_of_the_user_cannot_hide_a_difference() {
    // A new adapter's B: all results are zero, in any order.
    let device = Library::new(&[Order::Split]);
    let (exact, _) = context(&device, MatmulChoice::Exact);
    multiply(&exact, 3, &random(3 * 50, 1), &[0.0; 19 * 50], false);
    assert!(device.take_ran().iter().all(|r| r.0 != Algorithm::Trusted));
}

#[test]
fn a_product_that_is_added_is_the_engines_own_where_exact() {
    let device = Library::new(&[Order::Chain]);
    let (exact, _) = context(&device, MatmulChoice::Exact);
    multiply(&exact, 5, &random(5 * 50, 1), &random(19 * 50, 2), true);
    assert_eq!(device.take_ran(), []);
    let (library, _) = context(&device, MatmulChoice::Library);
    multiply(&library, 5, &random(5 * 50, 1), &random(19 * 50, 2), true);
    assert_eq!(device.take_ran().len(), 1);
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let device = Library::new(&[Order::SplitFrom(20), Order::Chain]);
    let rows = |choice| {
        let (cx, _) = context(&device, choice);
        let (x, w) = (random(64 * 96, 3), random(33 * 96, 4));
        let whole = multiply(&cx, 64, &x, &w, false);
        let one = multiply(&cx, 1, &x[..96], &w, false);
        whole[..33] == one[..]
    };
    assert!(rows(MatmulChoice::Exact));
    assert!(!rows(MatmulChoice::Library), "the test sees a dependence on the rows");
}

#[test]
fn backward_products_need_no_exact_algorithm() {
    let device = Library::new(&[]);
    let (cx, notes) = context(&device, MatmulChoice::Exact);
    let tensor = |shape: &[usize]| {
        let values = random(shape.iter().product(), 5);
        Tensor::from_host(&cx.pool, "x", DType::F32, shape, &values).unwrap()
    };
    let (dy, w, dx) = (tensor(&[4, 6]), tensor(&[6, 8]), tensor(&[4, 8]));
    product(&cx, Layout::NN, &dx, &dy, &w, None, false).unwrap();
    assert!(notes.0.lock().unwrap().is_empty(), "the library has nothing, which is no refusal");
}
