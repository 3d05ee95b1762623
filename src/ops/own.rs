//! The engine's own matrix products: the kernels that exist for a product, and their launches.
//! Layer 4.
//!
//! Invariant: all kernels of a forward product (NT) have the same bits, so any of them may run.
//! Math and numerics: `kernels/matmul.cu`, `kernels/matmul_few.cu`,
//! `kernels/matmul_few_hopper.cu`, `kernels/matmul_hopper.cu`.

use crate::autograd::Cx;
use crate::config::MatmulChoice;
use crate::device::{Launch, Layout};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::operands::Operands;
use crate::ops::{few_hopper, matmul_few, matmul_hopper};

/// One of the engine's own kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnKernel {
    /// `matmul.cu`: any product.
    Tile,
    /// `matmul_few.cu`: a bf16 forward product of at most [`kernels::FEW_ROWS`] rows.
    FewRows,
    /// `matmul_few_hopper.cu`: a bf16 forward product on Hopper, with wgmma; made for few rows.
    FewHopper,
    /// `matmul_hopper.cu`, with tiles of this many columns.
    Hopper(u32),
}

impl OwnKernel {
    /// The number that `ProductChoice` stores.
    pub(super) fn number(self) -> u32 {
        match self {
            OwnKernel::Tile => 0,
            OwnKernel::FewRows => 1,
            OwnKernel::FewHopper => 2,
            OwnKernel::Hopper(width) => width,
        }
    }

    pub(crate) fn of_number(number: u32) -> OwnKernel {
        match number {
            0 => OwnKernel::Tile,
            1 => OwnKernel::FewRows,
            2 => OwnKernel::FewHopper,
            width => OwnKernel::Hopper(width),
        }
    }

    /// The name in reports.
    pub fn name(self) -> String {
        match self {
            OwnKernel::Tile => "tile".into(),
            OwnKernel::FewRows => "few rows".into(),
            OwnKernel::FewHopper => "few rows, wgmma".into(),
            OwnKernel::Hopper(width) => format!("wgmma {width}"),
        }
    }

    /// The kernel that is assumed to be fastest.
    pub(super) fn preferred(cx: &Cx, p: &Operands) -> OwnKernel {
        if matmul_few::fits(p) {
            return OwnKernel::FewRows;
        }
        match matmul_hopper::width(cx, p) {
            Some(width) => OwnKernel::Hopper(width as u32),
            None => OwnKernel::Tile,
        }
    }

    /// Whether this kernel can compute the product on this device.
    pub(super) fn can(self, cx: &Cx, p: &Operands) -> bool {
        match self {
            OwnKernel::Tile => true,
            OwnKernel::FewRows => matmul_few::fits(p),
            OwnKernel::FewHopper => few_hopper::fits(cx, p),
            OwnKernel::Hopper(_) => matmul_hopper::width(cx, p).is_some(),
        }
    }

    /// All kernels worth timing for a forward product, the one assumed fastest first.
    pub(super) fn contenders(cx: &Cx, p: &Operands) -> Vec<OwnKernel> {
        let mut all = vec![OwnKernel::preferred(cx, p)];
        if few_hopper::competes(cx, p) {
            all.push(OwnKernel::FewHopper);
        }
        let others = match p.layout == Layout::NT && matmul_hopper::width(cx, p).is_some() {
            true => matmul_hopper::WIDTHS.map(OwnKernel::Hopper).to_vec(),
            false => vec![OwnKernel::Tile],
        };
        all.extend(others.into_iter().filter(|kernel| *kernel != all[0]).collect::<Vec<_>>());
        all
    }

    /// Computes the product. Error if this kernel cannot.
    pub(super) fn run(self, cx: &Cx, p: &Operands) -> Result<()> {
        match self {
            OwnKernel::Tile => tile(cx, p),
            kernel if !kernel.can(cx, p) => {
                let message = format!("{} for {:?} and {:?}", kernel.name(), p.a, p.b);
                Err(Error::op("matmul", message))
            }
            OwnKernel::FewRows => matmul_few::product(cx, p),
            OwnKernel::FewHopper => few_hopper::product(cx, p),
            OwnKernel::Hopper(width) => matmul_hopper::product(cx, p, width as usize),
        }
    }
}

/// Whether a kernel of the engine may compute a product with more around it. Where a library's bits
/// do not depend on the number of rows, the library computes products of any number, and fused
/// kernels are not mixed with it.
pub(super) fn own_products(cx: &Cx) -> bool {
    let device = cx.device.capabilities();
    match cx.matmul {
        MatmulChoice::Own => true,
        MatmulChoice::Library => false,
        _ => device.tensor_cores && device.gemm_depends_on_rows,
    }
}

fn tile(cx: &Cx, p: &Operands) -> Result<()> {
    let (m, n, k) = p.sizes();
    let Operands { layout, c, a, b, bias, accumulate } = *p;
    let tile = kernels::tile_side(a.dtype().size());
    let at = Launch::grid([n.div_ceil(tile), m.div_ceil(tile), 1]);
    let kernel = match layout {
        Layout::NT => kernels::matmul_nt,
        Layout::NN => kernels::matmul_nn,
        Layout::TN => kernels::matmul_tn,
    };
    // The instance D = 0 writes a real C, D = 1 the float C of a bf16 product; in f32 both are the
    // same type.
    let float_out = c.dtype() != a.dtype();
    let args = kernels::MatmulNtArgs {
        c: (!float_out).then(|| c.out()),
        cf: float_out.then(|| c.out()),
        a,
        b,
        bias,
        m: m as i32,
        n: n as i32,
        k: k as i32,
        lda: a.stride() as i32,
        ldb: b.stride() as i32,
        ldc: c.stride() as i32,
        accumulate: i32::from(accumulate),
    };
    kernel(&*cx.device, at, usize::from(float_out), args)
}
