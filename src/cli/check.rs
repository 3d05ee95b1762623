//! `temper check`: the self-check on the user's own device. Layer 9.
//!
//! Invariant: any failed case makes the exit code 1.

use std::sync::Arc;

use crate::check::early::check_early;
use crate::check::gated::check_gated;
use crate::check::low_rank::check_low_rank;
use crate::check::model::check_model;
use crate::check::norm::check_norm;
use crate::check::products::check_products;
use crate::check::{CheckOutcome, check_ops};
use crate::cli::args::choice;
use crate::config::DeviceChoice;
use crate::error::{Error, Result};
use crate::observer::output::print_line;
use crate::{device, device::cpu::Cpu};

/// Check every kernel on this device against its f64 oracle
///
/// Runs every op case, then the exactness contracts and a short training run, and prints a table.
#[derive(clap::Args)]
pub struct CheckArgs {
    /// auto, cuda or cpu
    #[arg(long, default_value = "auto", value_parser = choice::<DeviceChoice>)]
    device: DeviceChoice,
    /// only ops whose name contains this; "early launches", "exact products", "gated unit", "low
    /// rank" and "norm in front" are five more
    #[arg(long, default_value = "")]
    op: String,
    /// CPU only: run 32 real lanes for each warp, in an order permuted by this seed, over poisoned
    /// memory with red zones
    #[arg(long)]
    strict: Option<u64>,
}

pub fn run(args: CheckArgs) -> Result<()> {
    let device = match args.strict {
        Some(seed) => Arc::new(Cpu::strict(seed)),
        None => device::open(args.device)?,
    };
    print_line(format_args!("device: {}", device.name()))?;
    if let Some(library) = device.library() {
        print_line(format_args!("library: {library}"))?;
    }
    print_line(format_args!(
        "{:<18} {:<12} {:<9} {:>6} {:>7}  error / tolerance",
        "op", "variant", "dtype", "cases", "failed"
    ))?;
    // Prints the row of an op, variant and dtype after its last case: if a kernel hangs, the last
    // row shows what ran before it.
    let mut row = Row { key: ("", "", ""), cases: 0, failed: 0, ratio: 0.0, printed: Ok(()) };
    let mut each = |outcome: &CheckOutcome| row.add(outcome);
    let mut outcomes = check_ops(&device, &args.op, &mut each)?;
    if args.op.is_empty() {
        outcomes.extend(check_model(&device, &mut each)?);
    }
    if "early launches".contains(&args.op) {
        outcomes.extend(check_early(&device, &mut each)?);
    }
    // The names of these cases say which kernels are fastest, or what they take.
    let mut told = Vec::new();
    if "exact products".contains(&args.op) {
        told.extend(check_products(&device, &mut each)?);
    }
    if "gated unit".contains(&args.op) {
        told.extend(check_gated(&device, &mut each)?);
    }
    if "low rank".contains(&args.op) {
        told.extend(check_low_rank(&device, &mut each)?);
    }
    if "norm in front".contains(&args.op) {
        told.extend(check_norm(&device, &mut each)?);
    }
    row.finish()?;
    for o in &told {
        print_line(format_args!("{} {}: {}", o.op, o.dtype.name(), o.case))?;
    }
    outcomes.extend(told);
    let failures: Vec<_> = outcomes.iter().filter(|o| o.failure.is_some()).collect();
    for o in &failures {
        print_line(format_args!(
            "FAILED {} {} {} {}: {}",
            o.op,
            o.variant,
            o.dtype.name(),
            o.case,
            o.failure.as_deref().unwrap_or("")
        ))?;
    }
    print_line(format_args!(
        "{} passed, {} failed",
        outcomes.len() - failures.len(),
        failures.len()
    ))?;
    if outcomes.is_empty() {
        return Err(Error::Config(format!("no op's name contains \"{}\"", args.op)));
    }
    if failures.is_empty() {
        Ok(())
    } else {
        Err(Error::Run(format!("{} cases fail on this device", failures.len())))
    }
}

/// The consecutive cases of one op, variant and dtype.
struct Row {
    key: (&'static str, &'static str, &'static str),
    cases: usize,
    failed: usize,
    ratio: f64,
    /// The first error of printing.
    printed: Result<()>,
}

impl Row {
    fn add(&mut self, outcome: &CheckOutcome) {
        let key = (outcome.op, outcome.variant, outcome.dtype.name());
        if key != self.key {
            self.show();
            (self.key, self.cases, self.failed, self.ratio) = (key, 0, 0, 0.0);
        }
        self.cases += 1;
        self.failed += usize::from(outcome.failure.is_some());
        self.ratio = self.ratio.max(outcome.ratio);
    }

    fn show(&mut self) {
        let ((op, variant, dtype), cases, failed) = (self.key, self.cases, self.failed);
        if cases > 0 && self.printed.is_ok() {
            self.printed = print_line(format_args!(
                "{op:<18} {variant:<12} {dtype:<9} {cases:>6} {failed:>7}  {:.3}",
                self.ratio
            ));
        }
        self.cases = 0;
    }

    /// Prints the last row. Error: printing of any row failed.
    fn finish(mut self) -> Result<()> {
        self.show();
        self.printed
    }
}
