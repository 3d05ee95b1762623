//! `temper check`: the self-check on the user's own device. Layer 9.
//!
//! Invariant: any failed case makes the exit code 1.

use std::sync::Arc;

use crate::check::early::check_early;
use crate::check::gated::check_gated;
use crate::check::head::check_head;
use crate::check::low_rank::check_low_rank;
use crate::check::model::check_model;
use crate::check::norm::check_norm;
use crate::check::products::check_products;
use crate::check::{CheckOutcome, check_ops};
use crate::cli::args::choice;
use crate::config::DeviceChoice;
use crate::error::{Error, Result};
use crate::observer::output::print_line;
use crate::ops::registry::registry;
use crate::{device, device::cpu::Cpu};

/// Check every kernel on this device against its f64 oracle
///
/// Runs every op case, then the exactness contracts and a short training run, and prints a table.
#[derive(clap::Args)]
pub struct CheckArgs {
    /// auto, cuda or cpu
    #[arg(long, default_value = "auto", value_parser = choice::<DeviceChoice>)]
    device: DeviceChoice,
    /// only ops whose name contains this; "early launches", "exact products", "gated unit", "head
    /// rows", "low rank" and "norm in front" are six more
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
    // Failures and measured cases are printed at once, the row of an op, variant and dtype after its
    // last case: if a kernel hangs, what ran before it is shown.
    let mut table = Table::default();
    let mut each = |outcome: &CheckOutcome| table.add(outcome);
    let mut outcomes = check_ops(&device, &args.op, &mut each);
    // Before anything else records a step, which may turn early launches off.
    if "early launches".contains(&args.op) {
        outcomes.extend(check_early(&device, &mut each));
    }
    if args.op.is_empty() {
        outcomes.extend(check_model(&device, &mut each));
    }
    if "exact products".contains(&args.op) {
        outcomes.extend(check_products(&device, &mut each));
    }
    if "gated unit".contains(&args.op) {
        outcomes.extend(check_gated(&device, &mut each));
    }
    if "head rows".contains(&args.op) {
        outcomes.extend(check_head(&device, &mut each));
    }
    if "low rank".contains(&args.op) {
        outcomes.extend(check_low_rank(&device, &mut each));
    }
    if "norm in front".contains(&args.op) {
        outcomes.extend(check_norm(&device, &mut each));
    }
    table.finish()?;
    if outcomes.is_empty() {
        let names: Vec<&str> = registry().iter().map(|entry| entry.name).collect();
        return Err(Error::Config(format!(
            "no op's name contains \"{}\"; the ops are {}",
            args.op,
            names.join(", ")
        )));
    }
    let failed = outcomes.iter().filter(|o| o.failure.is_some()).count();
    print_line(format_args!("{} passed, {failed} failed", outcomes.len() - failed))?;
    match failed {
        0 => Ok(()),
        _ => Err(Error::Run(format!("{failed} cases fail on this device"))),
    }
}

/// The printed table. A row: the consecutive cases of one op, variant and dtype.
struct Table {
    key: (&'static str, &'static str, &'static str),
    cases: usize,
    failed: usize,
    ratio: f64,
    /// The first error of printing.
    printed: Result<()>,
}

impl Default for Table {
    fn default() -> Table {
        Table { key: ("", "", ""), cases: 0, failed: 0, ratio: 0.0, printed: Ok(()) }
    }
}

impl Table {
    fn add(&mut self, o: &CheckOutcome) {
        let key = (o.op, o.variant, o.dtype.name());
        if key != self.key {
            self.end_row();
            (self.key, self.cases, self.failed, self.ratio) = (key, 0, 0, 0.0);
        }
        self.cases += 1;
        self.failed += usize::from(o.failure.is_some());
        self.ratio = self.ratio.max(o.ratio);
        if o.measured {
            self.print(format_args!("{} {}: {}", o.op, o.dtype.name(), o.case));
        }
        if let Some(failure) = &o.failure {
            let what = [o.op, o.variant, o.dtype.name(), &o.case].join(" ");
            self.print(format_args!("FAILED {what}: {failure}"));
        }
    }

    fn print(&mut self, line: std::fmt::Arguments) {
        if self.printed.is_ok() {
            self.printed = print_line(line);
        }
    }

    fn end_row(&mut self) {
        let ((op, variant, dtype), cases, failed, ratio) =
            (self.key, self.cases, self.failed, self.ratio);
        if cases > 0 {
            self.print(format_args!(
                "{op:<18} {variant:<12} {dtype:<9} {cases:>6} {failed:>7}  {ratio:.3}"
            ));
        }
        self.cases = 0;
    }

    /// Prints the last row. Error: printing of any line failed.
    fn finish(mut self) -> Result<()> {
        self.end_row();
        self.printed
    }
}
